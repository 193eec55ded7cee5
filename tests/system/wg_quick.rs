//! wg-quick(8) with wgsep as its userspace implementation: up, traffic, down, and nothing left
//! behind; twice, because what was left would show.
#![allow(clippy::unwrap_used)]

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use wgsep_tests::daemon::{Daemon, remove_files, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::{self, Wgsep, WireguardGo};
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{output, run};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::traffic::{Pinging, until_ping};
use wgsep_tests::tunnel::End;
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{procfs, require, wait};

const EVERYTHING: &str = "0.0.0.0/0, ::/0";

#[test]
fn a_full_tunnel_over_v4_goes_up_and_down_twice() {
    require!(Wgsep);
    up_and_down_twice(Wgsep, Family::V4, EVERYTHING);
}

#[test]
fn a_full_tunnel_over_v6_goes_up_and_down_twice() {
    require!(Wgsep);
    up_and_down_twice(Wgsep, Family::V6, EVERYTHING);
}

#[test]
fn control_wireguard_go_goes_up_and_down_twice() {
    require!(WireguardGo);
    up_and_down_twice(WireguardGo, Family::V4, EVERYTHING);
}

#[test]
fn a_split_tunnel_goes_up_and_down_twice() {
    require!(Wgsep);
    let (v4, v6) = (Side::Right.inner(Family::V4), Side::Right.inner(Family::V6));
    up_and_down_twice(Wgsep, Family::V4, &format!("{v4}/32, {v6}/128, 198.51.100.0/24"));
}

fn up_and_down_twice(implementation: Implementation, outer: Family, allowed_ips: &str) {
    let site = Site::new(implementation);
    let quick = Quick::new(&site.interface_section(""), &site.peer(outer, allowed_ips));
    let before = state(&site.client);
    for _ in 0..2 {
        quick.must(&site, "up");
        until_ping(&site.client, Side::Right.inner(Family::V4));
        until_ping(&site.client, Side::Right.inner(Family::V6));
        // Everything but the tunnel's own datagrams goes through a full tunnel, and what was not
        // asked for around a split one.
        let routed = site.client.output("ip route get 203.0.113.1");
        let through = String::from_utf8_lossy(&routed.stdout).contains(&quick.interface);
        assert_eq!(through, allowed_ips == EVERYTHING, "{routed:?}");
        assert!(site.client.run("ip route get 198.51.100.1").contains(&quick.interface));
        quick.must(&site, "down");
        quick.assert_gone();
        assert_eq!(state(&site.client), before);
    }
}

#[test]
fn saveconfig_writes_what_wg_set_and_the_next_up_has_it() {
    require!(Wgsep);
    let site = Site::new(Wgsep);
    let other = KeyPair::generate().public;
    let peer = site.peer(Family::V4, "0.0.0.0/0");
    let quick = Quick::new(&site.interface_section("SaveConfig = true\n"), &peer);
    quick.must(&site, "up");
    until_ping(&site.client, Side::Right.inner(Family::V4));
    let set = format!("wg set {} peer {other} allowed-ips 192.0.2.7/32", quick.interface);
    site.client.run(format!("{set} persistent-keepalive 21 endpoint 192.0.2.9:7"));
    quick.must(&site, "save");
    let saved = fs::read_to_string(quick.path()).unwrap();
    for line in [
        "SaveConfig = true",
        &format!("PublicKey = {other}"),
        "AllowedIPs = 192.0.2.7/32",
        "Endpoint = 192.0.2.9:7",
        "PersistentKeepalive = 21",
        &format!("Endpoint = {}", site.server.endpoint(Family::V4)),
    ] {
        assert!(saved.lines().any(|saved| saved == line), "no {line:?} in\n{saved}");
    }
    let keepalive = format!("wg set {} peer {other} persistent-keepalive 22", quick.interface);
    site.client.run(keepalive);
    let shown = site.client.run(format!("wg showconf {}", quick.interface));
    quick.must(&site, "down");
    quick.assert_gone();
    quick.must(&site, "up");
    until_ping(&site.client, Side::Right.inner(Family::V4));
    assert_eq!(site.client.run(format!("wg showconf {}", quick.interface)), shown);
    quick.must(&site, "down");
    quick.assert_gone();
}

#[test]
fn syncconf_of_a_stripped_file_keeps_the_session() {
    require!(Wgsep);
    let site = Site::new(Wgsep);
    let (interface, peer) = (site.interface_section(""), site.peer(Family::V4, EVERYTHING));
    let quick = Quick::new(&interface, &peer);
    quick.must(&site, "up");
    let pinging = Pinging::start(&site.client, Side::Right.inner(Family::V4));
    pinging.until_more(3);
    let handshakes = format!("wg show {} latest-handshakes", quick.interface);
    let before = site.client.run(&handshakes);

    quick.write(&interface, &format!("{peer}PersistentKeepalive = 25\n"));
    let stripped = quick.must(&site, "strip");
    assert!(!stripped.contains("Address"), "{stripped}");
    let file = quick.directory.join("stripped");
    fs::write(&file, stripped).unwrap();
    site.client.run(format!("wg syncconf {} {}", quick.interface, file.display()));

    pinging.until_more(3);
    let pings = pinging.stop();
    assert!(pings.received + 1 >= pings.sent, "{pings:?} across a syncconf");
    assert_eq!(site.client.run(&handshakes), before, "the session went on");
    let keepalive = site.client.run(format!("wg show {} persistent-keepalive", quick.interface));
    assert!(keepalive.trim().ends_with("25"), "{keepalive}");
    quick.must(&site, "down");
    quick.assert_gone();
}

#[test]
fn hooks_run_in_their_order_and_find_the_interface() {
    require!(Wgsep);
    let site = Site::new(Wgsep);
    let notes = site.scratch.join("notes");
    let note = |hook: &str| {
        // What `wg show` and `ip link` find tells how far the interface has come.
        let (show, link) = ("wg show %i >/dev/null 2>&1", "ip link show %i >/dev/null 2>&1");
        format!(
            "{hook} = {link} && l=1 || l=0; {show} && s=1 || s=0; echo {hook} %i $l $s >> {}\n",
            notes.display()
        )
    };
    let hooks = ["PreUp", "PostUp", "PreDown", "PostDown"].map(note).concat();
    let quick = Quick::new(&site.interface_section(&hooks), &site.peer(Family::V4, EVERYTHING));
    quick.must(&site, "up");
    until_ping(&site.client, Side::Right.inner(Family::V4));
    quick.must(&site, "down");
    quick.assert_gone();
    let noted = fs::read_to_string(&notes).unwrap();
    let name = &quick.interface;
    let expected = ["PreUp {} 0 0", "PostUp {} 1 1", "PreDown {} 1 1", "PostDown {} 0 0"];
    let expected = expected.map(|line| line.replace("{}", name));
    assert_eq!(noted.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn a_hook_that_fails_takes_everything_back() {
    require!(Wgsep);
    let site = Site::new(Wgsep);
    let interface = site.interface_section("PostUp = exit 7\n");
    let quick = Quick::new(&interface, &site.peer(Family::V4, EVERYTHING));
    let before = state(&site.client);
    let failed = quick.run(&site, "up");
    assert!(!failed.status.success(), "{failed:?}");
    quick.assert_gone();
    assert_eq!(state(&site.client), before);
}

#[test]
fn the_dns_line_reaches_resolvconf_and_is_taken_back() {
    require!(Wgsep);
    let site = Site::new(Wgsep);
    let interface = site.interface_section("DNS = 10.9.0.53, fd00:9::53, corp.example\n");
    let quick = Quick::new(&interface, &site.peer(Family::V4, EVERYTHING));
    let recorded = site.stub_resolvconf();
    quick.must(&site, "up");
    let text = fs::read_to_string(&recorded).unwrap();
    let first = text.lines().next().unwrap();
    assert!(first.starts_with("-a ") && first.contains(&quick.interface), "{text}");
    for line in ["nameserver 10.9.0.53", "nameserver fd00:9::53", "search corp.example"] {
        assert!(text.lines().any(|recorded| recorded == line), "no {line:?} in\n{text}");
    }
    until_ping(&site.client, Side::Right.inner(Family::V4));
    quick.must(&site, "down");
    quick.assert_gone();
    let text = fs::read_to_string(&recorded).unwrap();
    let last = text.lines().last().unwrap();
    assert!(last.starts_with("-d ") && last.contains(&quick.interface), "{text}");
}

#[test]
fn mtu_port_and_mark_of_the_file_are_the_interfaces() {
    require!(Wgsep);
    let site = Site::new(Wgsep);
    let lines = "MTU = 1337\nListenPort = 20830\nFwMark = 0x2a\nTable = off\n";
    let peer = site.peer(Family::V4, EVERYTHING);
    let quick = Quick::new(&site.interface_section(lines), &peer);
    quick.must(&site, "up");
    let link = site.client.run(format!("ip link show {}", quick.interface));
    assert!(link.contains("mtu 1337"), "{link}");
    let show = site.client.run(format!("wg show {} dump", quick.interface));
    assert!(show.lines().next().unwrap().ends_with("\t20830\t0x2a"), "{show}");
    // `Table = off` leaves the routes to somebody else: only the address's own is there.
    let added = site.client.run("ip route show table all type unicast");
    assert!(!added.contains("default dev"), "{added}");
    until_ping(&site.client, Side::Right.inner(Family::V4));
    quick.must(&site, "down");
    quick.assert_gone();
}

/// What wg-quick changes in a namespace.
fn state(netns: &Netns) -> String {
    ["ip -o addr", "ip rule", "ip -6 rule", "ip route show table all", "nft list ruleset"]
        .map(|line| netns.run(line))
        .join("\n")
}

/// A server that runs, and the namespace of a client of wg-quick's.
struct Site {
    client: Arc<Netns>,
    key: KeyPair,
    server: End,
    program: PathBuf,
    scratch: Scratch,
}

impl Site {
    fn new(implementation: Implementation) -> Self {
        let (client, right) = link::joined();
        let server = End::new(Side::Right, Daemon::start(implementation, &right));
        let key = KeyPair::generate();
        server.configure(&key.public, None, None);
        let program = implementation.program().unwrap();
        Self { client, key, server, program, scratch: Scratch::new() }
    }

    /// The `[Interface]` of the client, with these lines more.
    fn interface_section(&self, lines: &str) -> String {
        let (v4, v6) = (Side::Left.inner(Family::V4), Side::Left.inner(Family::V6));
        let key = &self.key.private;
        format!("[Interface]\nPrivateKey = {key}\nAddress = {v4}/24, {v6}/64\n{lines}")
    }

    /// The `[Peer]` that the server is to the client.
    fn peer(&self, outer: Family, allowed_ips: &str) -> String {
        let (key, endpoint) = (&self.server.key.public, self.server.endpoint(outer));
        format!("[Peer]\nPublicKey = {key}\nAllowedIPs = {allowed_ips}\nEndpoint = {endpoint}\n")
    }

    /// Puts a resolvconf(8) on the client's path that writes down its arguments and input, in the
    /// file returned.
    fn stub_resolvconf(&self) -> PathBuf {
        let recorded = self.scratch.join("recorded");
        fs::create_dir(self.bin()).unwrap();
        let script = format!(
            "#!/bin/sh\necho \"$*\" >> {recorded}\nif [ \"$1\" = -a ]; then cat >> {recorded}; fi\n",
            recorded = recorded.display()
        );
        self.scratch.write_script("bin/resolvconf", &script);
        recorded
    }

    /// What the client's path begins with.
    fn bin(&self) -> PathBuf {
        self.scratch.join("bin")
    }
}

/// A configuration of wg-quick in a directory of its own.
struct Quick {
    interface: String,
    directory: Scratch,
}

impl Quick {
    /// Writes the file; the interface is not up yet.
    fn new(interface: &str, peer: &str) -> Self {
        let quick = Self { interface: unique_interface(), directory: Scratch::new() };
        quick.write(interface, peer);
        quick
    }

    fn write(&self, interface: &str, peer: &str) {
        let mut options = OpenOptions::new();
        let mut file =
            options.write(true).create(true).truncate(true).mode(0o600).open(self.path()).unwrap();
        write!(file, "{interface}{peer}").unwrap();
    }

    fn path(&self) -> PathBuf {
        self.directory.join(format!("{}.conf", self.interface))
    }

    /// Runs `wg-quick VERB`, which must succeed; returns its stdout.
    #[track_caller]
    fn must(&self, site: &Site, verb: &str) -> String {
        run(&mut self.command(site, verb))
    }

    fn run(&self, site: &Site, verb: &str) -> Output {
        output(&mut self.command(site, verb))
    }

    fn command(&self, site: &Site, verb: &str) -> Command {
        let mut command = site.client.command("wg-quick");
        let path = std::env::var("PATH").unwrap();
        command.env("PATH", format!("{}:{path}", site.bin().display()));
        command.env("WG_QUICK_USERSPACE_IMPLEMENTATION", &site.program);
        command.arg(verb).arg(self.path());
        command
    }

    /// Neither process nor socket is left.
    #[track_caller]
    fn assert_gone(&self) {
        wait::until("the daemon is gone", Duration::from_secs(1), || {
            procfs::with_argument(&self.interface).is_empty()
        });
        wait::until("its socket is gone", Duration::from_secs(1), || {
            !socket_path(&self.interface).exists()
        });
    }
}

impl Drop for Quick {
    fn drop(&mut self) {
        // Ends a daemon that a failed test has left.
        remove_files(&self.interface);
    }
}
