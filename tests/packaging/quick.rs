//! wgsep-quick(8) with files as people have them: up, traffic, reload, a crash, and down with nothing left; by hand, and
//! as the unit runs it.

use std::fs::{self, Permissions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use wgsep_tests::daemon::{Daemon, remove_files, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::{self, DEVICE, Family, Side};
use wgsep_tests::machine::{Debian, Machine, package};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{Process, output, run};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::traffic::{Pinging, until_ping};
use wgsep_tests::tunnel::End;
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{descriptors, procfs, repository, require, uapi, wait};

const LIMIT: Duration = Duration::from_secs(10);
const PORT: u16 = 51820;

/// A host with a file, and the other end of its tunnel in another namespace.
struct Host {
    netns: Arc<Netns>,
    other: End,
    key: KeyPair,
    interface: String,
    /// What is seen as /etc/wireguard.
    files: Scratch,
    /// Programs that this host has in place of the machine's, and what they and hooks write down.
    bin: Scratch,
}

/// Writes down rules, one a line, as iptables(8) has them, and removes them.
const IPTABLES: &str = r#"#!/bin/sh
rules=${0%/*}/rules
rule="${0##*/} $(echo "$*" | sed 's/ -D / -A /; s/^-D /-A /')"
case " $* " in
*" -D "*) grep -qxF -e "$rule" $rules && grep -vxF -e "$rule" $rules >$rules.new; status=$?
	[ -e $rules.new ] && mv $rules.new $rules; [ $status -le 1 ] && exit 0; exit 1 ;;
*) echo "$rule" >>$rules ;;
esac
"#;

/// A resolv.conf for each interface.
const RESOLVCONF: &str = r#"#!/bin/sh
case $1 in
-a) cat >${0%/*}/resolv.$2 ;;
-d) rm -f ${0%/*}/resolv.$2 ;;
-l) cat ${0%/*}/resolv.$2 ;;
esac
"#;

impl Host {
    fn new() -> Self {
        let (netns, right) = link::joined();
        let other = End::new(Side::Right, Daemon::start(Wgsep, &right));
        let key = KeyPair::generate();
        let endpoint = format!("{}:{PORT}", Side::Left.outer(Family::V4)).parse().unwrap();
        other.configure(&key.public, Some(endpoint), None);
        let host = Self {
            netns,
            other,
            key,
            interface: unique_interface(),
            files: Scratch::new(),
            bin: Scratch::new(),
        };
        host.bin.write_script("iptables", IPTABLES);
        host.bin.write_script("ip6tables", IPTABLES);
        host.bin.write_script("resolvconf", RESOLVCONF);
        fs::write(host.bin.join("rules"), "").unwrap();
        host
    }

    fn write(&self, text: &str) {
        let path = self.files.join(format!("{}.conf", self.interface));
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    }

    fn text(&self) -> String {
        fs::read_to_string(self.files.join(format!("{}.conf", self.interface))).unwrap()
    }

    /// A server as most people begin.
    fn plain_server(&self) -> String {
        let (address, theirs) = (Side::Left.inner(Family::V4), Side::Right.inner(Family::V4));
        format!(
            "[Interface]\nPrivateKey = {}\nListenPort = {PORT}\nAddress = {address}/24\n\n[Peer]\n# A phone\n\
             PublicKey = {}\nAllowedIPs = {theirs}/32\n",
            self.key.private, self.other.key.public
        )
    }

    /// A server of both families that masquerades.
    fn masquerading_server(&self) -> String {
        let [v4, v6] = [Family::V4, Family::V6].map(|family| Side::Left.inner(family));
        let [their4, their6] = [Family::V4, Family::V6].map(|family| Side::Right.inner(family));
        let nat = format!(
            "iptables -A FORWARD -i %i -j ACCEPT; iptables -t nat -A POSTROUTING -o {DEVICE} -j MASQUERADE"
        );
        format!(
            "[Interface]\nAddress = {v4}/24\nAddress = {v6}/64\nListenPort = {PORT}\nPrivateKey = {}\n\
             MTU = 1380\nPreUp = echo preup >>{note}\nPostUp = sysctl -q -w net.ipv4.ip_forward=1\nPostUp = {nat}\n\
             PostUp = ip6tables -t nat -A POSTROUTING -o {DEVICE} -j MASQUERADE # IPv6\nPostUp = echo postup >>{note}\n\
             PreDown = echo predown >>{note}\nPostDown = {unnat}\n\
             PostDown = ip6tables -t nat -D POSTROUTING -o {DEVICE} -j MASQUERADE\nPostDown = echo postdown >>{note}\n\
             [Peer]\nPublicKey = {}\nAllowedIPs = {their4}/32, {their6}/128, 198.51.100.0/24\n",
            self.key.private,
            self.other.key.public,
            unnat = nat.replace("-A ", "-D "),
            note = self.bin.join("notes").display(),
        )
    }

    /// A client all of whose traffic goes through the tunnel.
    fn client(&self) -> String {
        let [v4, v6] = [Family::V4, Family::V6].map(|family| Side::Left.inner(family));
        format!(
            "[Interface]\nPrivateKey = {}\nListenPort = {PORT}\nAddress = {v4}/24, {v6}/64\nDNS = 10.9.0.53, corp.example\n\
             PostUp = echo postup >>{note}\nPreDown = echo predown >>{note}\n\n[Peer]\nPublicKey = {}\n\
             Endpoint = {}\nAllowedIPs = 0.0.0.0/0, ::/0\nPersistentKeepalive = 25\n",
            self.key.private,
            self.other.key.public,
            self.other.endpoint(Family::V4),
            note = self.bin.join("notes").display(),
        )
    }

    /// Another interface in the same network namespace.
    fn second(&self) -> Self {
        let bin = Scratch::new();
        fs::write(bin.join("rules"), "").unwrap();
        let other = End::new(Side::Right, Daemon::start(Wgsep, &self.other.daemon.netns));
        let (key, interface, files) = (KeyPair::generate(), unique_interface(), Scratch::new());
        Self { netns: Arc::clone(&self.netns), other, key, interface, files, bin }
    }

    fn command(&self, verb: &str, more: &[&str]) -> Command {
        self.command_with("", verb, more)
    }

    /// wgsep-quick, after a line of shell in private mounts. It cannot trap a signal that is ignored when it starts, as SIGINT is
    /// where these tests run in the background of a shell.
    fn command_with(&self, before: &str, verb: &str, more: &[&str]) -> Command {
        self.command_in(&self.netns, before, verb, more)
    }

    fn command_in(&self, netns: &Netns, before: &str, verb: &str, more: &[&str]) -> Command {
        let line = format!(
            "mkdir -p /etc/wireguard && mount --bind {} /etc/wireguard && {{ {before} true; }} && \
             exec env --default-signal=INT \"$@\"",
            self.files.display()
        );
        let mut command = netns.command("unshare");
        command.args(["--mount", "sh", "-c", &line, "sh"]).arg(script());
        command.args([verb, &self.interface]).args(more);
        let programs = wgsep_program("wgsep").parent().unwrap().display().to_string();
        let path = std::env::var("PATH").unwrap();
        command.env("PATH", format!("{}:{programs}:{path}", self.bin.display()));
        command
    }

    fn quick(&self, verb: &str) -> Output {
        output(&mut self.command(verb, &[]))
    }

    #[track_caller]
    fn must(&self, verb: &str) -> String {
        let done = self.quick(verb);
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "{verb}: {said}");
        said
    }

    /// The lines that the script itself says when it fails.
    #[track_caller]
    fn refused(&self, verb: &str) -> Vec<String> {
        self.refusal(&mut self.command(verb, &[]))
    }

    #[track_caller]
    fn refusal(&self, command: &mut Command) -> Vec<String> {
        let refused = output(command);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success(), "{said}");
        lines_of_ours(&said)
    }

    /// The daemon of the unit, with the queue of an interface that remains, if there is one.
    fn serve(&self, queue: Option<&OwnedFd>) -> Process {
        let program = wgsep_program("wgsep").display().to_string();
        let mut command = self.command("serve", &[&program, "--foreground"]);
        if let Some(queue) = queue {
            let number = descriptors::give(&mut command, queue);
            command.env("WG_TUN_FD", number.to_string());
        }
        let mut daemon = Process::spawn(command, "serve");
        wait::until("the daemon answers", LIMIT, || {
            let ended = daemon.try_exit();
            assert!(ended.is_none(), "it ended: {ended:?} {}", daemon.log());
            uapi::is_answering(&self.interface)
        });
        daemon
    }

    /// Kills both processes of the daemon, and waits until nothing of them runs.
    fn crash(&self) {
        for pid in self.daemons() {
            let _ = kill(pid, Signal::SIGKILL);
        }
        wait::until("the daemon is dead", LIMIT, || self.daemons().is_empty());
    }

    /// Not the pings and the like that name it.
    fn daemons(&self) -> Vec<nix::unistd::Pid> {
        let named = procfs::with_argument(&self.interface);
        let is_daemon = |pid: &nix::unistd::Pid| {
            fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.starts_with("wgsep"))
        };
        named.into_iter().filter(is_daemon).collect()
    }

    fn has_interface(&self) -> bool {
        self.netns.output(format!("ip link show {}", self.interface)).status.success()
    }

    fn index(&self) -> String {
        let shown = self.netns.run(format!("ip -o link show {}", self.interface));
        shown.split(':').next().unwrap().to_owned()
    }

    #[track_caller]
    fn carries_traffic(&self) {
        if !self.text().contains("Endpoint") {
            // The other end begins, and with a handshake, as a client that has tried for 15 s does.
            let other = &self.other.daemon;
            other.wg_set(format!("peer {} remove", self.key.public));
            let [v4, v6] = [Family::V4, Family::V6].map(|family| Side::Left.inner(family));
            let endpoint = format!("endpoint {}:{PORT}", Side::Left.outer(Family::V4));
            let allowed_ips = format!("allowed-ips {v4}/32,{v6}/128");
            other.wg_set(format!("peer {} {allowed_ips} {endpoint}", self.key.public));
            until_ping(&other.netns, Side::Left.inner(Family::V4));
        }
        until_ping(&self.netns, Side::Right.inner(Family::V4));
    }

    /// Hooks that were run, in their order.
    fn notes(&self) -> Vec<String> {
        let notes = fs::read_to_string(self.bin.join("notes")).unwrap_or_default();
        notes.lines().map(str::to_owned).collect()
    }

    fn state_file(&self) -> String {
        format!("/run/wgsep-quick/{}.conf", self.interface)
    }

    /// All that a file may change, but for the interface's own statistics.
    fn state(&self) -> String {
        let lines = [
            "ip -o -br address",
            "ip rule",
            "ip -6 rule",
            "ip route show table all",
            "nft list ruleset",
        ];
        let mut state = lines.map(|line| self.netns.run(line)).join("\n");
        state += &fs::read_to_string(self.bin.join("rules")).unwrap();
        let resolved = fs::read_to_string(self.bin.join(format!("resolv.{}", self.interface)));
        state += &resolved.unwrap_or_default();
        // The kernel has the host's own IPv6 routes in an order of its own.
        let mut sorted: Vec<_> = state.lines().map(str::trim_end).collect();
        sorted.sort_unstable();
        sorted.join("\n")
    }

    #[track_caller]
    fn is_as(&self, before: &str) {
        assert_eq!(self.state(), before);
        let files = fs::read_dir("/run/wgsep-quick").into_iter().flatten().flatten();
        let of_this = files.map(|file| file.file_name().into_string().unwrap());
        let left: Vec<_> = of_this.filter(|name| name.contains(&self.interface)).collect();
        assert!(left.is_empty(), "{left:?}");
        wait::until("the daemon has ended", LIMIT, || self.daemons().is_empty());
        wait::until("its socket is gone", LIMIT, || !socket_path(&self.interface).exists());
    }

    /// A reload with another peer, under traffic.
    #[track_caller]
    fn reload_keeps_the_session(&self) {
        let handshakes = || {
            let shown = self.netns.run(format!("wg show {} latest-handshakes", self.interface));
            shown.lines().find(|line| line.contains(&self.other.key.public)).map(str::to_owned)
        };
        let (before, mark) =
            (handshakes(), self.netns.run(format!("wg show {} fwmark", self.interface)));
        let pinging = Pinging::start(&self.netns, Side::Right.inner(Family::V4));
        pinging.until_more(2);
        let added = KeyPair::generate().public;
        let text = self.text();
        self.write(&format!("{text}[Peer]\nPublicKey = {added}\nAllowedIPs = 192.0.2.7/32\n"));
        let said = self.must("reload");
        assert_eq!(said, "");
        pinging.until_more(3);
        let pings = pinging.stop();
        assert!(pings.received + 1 >= pings.sent, "{pings:?} across a reload");
        assert_eq!(handshakes(), before, "the session went on");
        assert_eq!(self.netns.run(format!("wg show {} fwmark", self.interface)), mark);
        assert!(self.netns.run("ip route get 192.0.2.7").contains(&self.interface));
        self.write(&text);
        self.must("reload");
    }
}

impl Host {
    /// Another pair takes over, under traffic.
    #[track_caller]
    fn upgrade_keeps_the_session(&self) {
        let handshakes = || self.netns.run(format!("wg show {} latest-handshakes", self.interface));
        let (before, set_up, notes) = (handshakes(), self.state(), self.notes());
        let pinging = Pinging::start(&self.netns, Side::Right.inner(Family::V4));
        pinging.until_more(2);
        self.netns.run(format!("{} upgrade {}", wgsep_program("wgsep").display(), self.interface));
        pinging.until_more(3);
        assert!(pinging.stop().were_answered(), "a ping was lost");
        assert_eq!((handshakes(), self.state(), self.notes()), (before, set_up, notes));
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.interface == "wg0" {
            // A machine's.
            return;
        }
        // What a failed test has left.
        remove_files(&self.interface);
        for left in ["conf", "conf.lock", "endpoints", "reached"] {
            let _ = fs::remove_file(format!("/run/wgsep-quick/{}.{left}", self.interface));
        }
    }
}

/// What the script itself says.
fn lines_of_ours(said: &str) -> Vec<String> {
    let of_ours = said.lines().filter_map(|line| line.strip_prefix("wgsep-quick: "));
    of_ours.map(str::to_owned).collect()
}

fn script() -> PathBuf {
    repository().join("bin/dist/wgsep-quick")
}

/// A queue of a new interface, as a service manager holds it.
fn open_queue(netns: &Netns, name: &str) -> OwnedFd {
    netns.inside(|| {
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let queue = open("/dev/net/tun", flags, Mode::empty()).unwrap();
        // SAFETY: plain integers and bytes, for which zero is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: the request is live and as TUNSETIFF reads it.
        let outcome =
            unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
        nix::Error::result(outcome).unwrap();
        queue
    })
}

/// The hooks of the file with some, in the order in which they are run.
const UP: [&str; 2] = ["preup", "postup"];
const DOWN: [&str; 2] = ["predown", "postdown"];

/// Each of the files, and the hooks of it that are noted at up and at down.
type File = (fn(&Host) -> String, &'static [&'static str], &'static [&'static str]);
const FILES: [File; 3] = [
    (Host::plain_server, &[], &[]),
    (Host::masquerading_server, &UP, &DOWN),
    (Host::client, &["postup"], &["predown"]),
];

#[test]
fn each_file_goes_up_survives_a_crash_and_comes_down_by_hand_with_nothing_left() {
    require!(Wgsep);
    for (file, up, down) in FILES {
        let host = Host::new();
        host.write(&file(&host));
        let before = host.state();
        host.must("up");
        host.carries_traffic();
        assert_eq!(host.notes(), up);
        let set_up = host.state();
        assert_ne!(set_up, before);
        let is_full = host.text().contains("0.0.0.0/0");
        let routed = host.netns.output("ip route get 203.0.113.1");
        let routed = String::from_utf8_lossy(&routed.stdout).contains(&host.interface);
        assert_eq!(routed, is_full, "{}", host.text());
        host.reload_keeps_the_session();
        host.upgrade_keeps_the_session();

        let said = host.refused("up");
        assert!(said.len() == 1 && said[0].contains("is up already"), "{said:?}");
        host.carries_traffic();
        assert_eq!(host.notes(), up);

        // The interface ends with the daemon; what is left of the run is taken down before the next one.
        host.crash();
        wait::until("the interface is gone", LIMIT, || !host.has_interface());
        host.must("up");
        host.carries_traffic();
        assert_eq!(host.notes(), [up, down, up].concat());
        host.must("down");
        assert_eq!(host.notes(), [up, down, up, down].concat());
        host.is_as(&before);
        let said = host.refused("down");
        assert!(said.len() == 1 && said[0].contains("is not up"), "{said:?}");

        // Nor does a crash leave what cannot be taken down.
        host.must("up");
        host.crash();
        host.must("down");
        host.is_as(&before);
    }
}

#[test]
fn each_file_keeps_what_it_set_up_where_the_units_interface_survives_a_crash() {
    require!(Wgsep);
    for (file, up, down) in FILES {
        let host = Host::new();
        host.write(&file(&host));
        let before = host.state();
        let queue = open_queue(&host.netns, &host.interface);
        let mut daemon = host.serve(Some(&queue));
        assert_eq!(host.must("apply"), "");
        host.carries_traffic();
        host.reload_keeps_the_session();
        let (set_up, index) = (host.state(), host.index());
        for _ in 0..2 {
            host.crash();
            daemon.exit_within(LIMIT);
            let ended =
                host.command("ended", &[]).env("SERVICE_RESULT", "signal").output().unwrap();
            assert!(ended.status.success() && ended.stderr.is_empty(), "{ended:?}");
            assert_eq!(host.index(), index, "the test does not keep the interface");
            daemon = host.serve(Some(&queue));
            assert_eq!(host.must("apply"), "");
            host.carries_traffic();
            assert_eq!(host.notes(), up, "hooks were run again");
            assert_eq!(host.state(), set_up);
            assert_eq!(host.index(), index);
        }
        // Other hooks in the file are a reason for more.
        host.crash();
        daemon.exit_within(LIMIT);
        let text = host.text();
        host.write(&text.replace("[Peer]", "PostUp = true\n[Peer]"));
        daemon = host.serve(Some(&queue));
        host.must("apply");
        host.carries_traffic();
        assert_eq!(host.notes(), [up, down, up].concat());
        // A reload had left the route of a peer that it took out.
        let set_up: Vec<_> =
            set_up.lines().filter(|line| !line.starts_with("192.0.2.7 ")).collect();
        assert_eq!(host.state(), set_up.join("\n"));
        host.must("stop");
        assert_eq!(host.notes(), [up, down, up, down].concat());
        drop(queue);
        daemon.exit_within(LIMIT);
        host.is_as(&before);
        assert_eq!(host.must("ended"), "");
    }
}

/// As without a descriptor store, or where it was lost.
#[test]
fn a_unit_with_a_new_interface_takes_down_what_a_crash_left_and_sets_all_up() {
    require!(Wgsep);
    for (file, up, down) in FILES {
        let host = Host::new();
        host.write(&file(&host));
        let before = host.state();
        let mut daemon = host.serve(None);
        host.must("apply");
        host.carries_traffic();
        let set_up = host.state();
        host.crash();
        daemon.exit_within(LIMIT);
        let mut ended = host.command("ended", &[]);
        assert!(ended.env("SERVICE_RESULT", "signal").status().unwrap().success());
        assert_eq!(host.notes(), up);
        daemon = host.serve(None);
        host.must("apply");
        host.carries_traffic();
        assert_eq!(host.notes(), [up, down, up].concat());
        assert_eq!(host.state(), set_up);

        // One that has ended in order by itself, as when the interface is deleted.
        host.netns.run(format!("ip link delete {}", host.interface));
        daemon.exit_within(LIMIT);
        let mut ended = host.command("ended", &[]);
        assert!(ended.env("SERVICE_RESULT", "success").status().unwrap().success());
        assert_eq!(host.notes(), [up, down, up, down].concat());
        host.is_as(&before);
    }
}

/// A key that a hook sets is loaded again, too, and so is one whose hook does more.
#[test]
fn a_private_key_that_a_hook_sets_is_there_again_after_a_crash() {
    require!(Wgsep);
    for (more, hooks) in [("", 1), ("; true", 2)] {
        let host = Host::new();
        let key = host.bin.join("key");
        fs::write(&key, &host.key.private).unwrap();
        let note = host.bin.join("notes");
        let hooks_of_file = format!(
            "PostUp = wg set %i private-key {}{more}\nPostUp = echo postup >>{}\n",
            key.display(),
            note.display()
        );
        let file = host.plain_server();
        host.write(&file.replace(&format!("PrivateKey = {}\n", host.key.private), &hooks_of_file));
        let queue = open_queue(&host.netns, &host.interface);
        let mut daemon = host.serve(Some(&queue));
        host.must("apply");
        host.carries_traffic();
        host.crash();
        daemon.exit_within(LIMIT);
        let _daemon = host.serve(Some(&queue));
        host.must("apply");
        host.carries_traffic();
        assert_eq!(host.notes().len(), hooks, "{more}");
        host.must("stop");
    }
}

/// The resolver of the file is in the tunnel: no name can be resolved while that is dead.
#[test]
fn an_endpoint_that_is_a_name_is_found_again_after_a_crash() {
    require!(Wgsep);
    for is_kept in [true, false] {
        let host = Host::new();
        let endpoint = host.other.endpoint(Family::V4);
        host.write(&host.client().replace(
            &format!("Endpoint = {endpoint}"),
            &format!("Endpoint = vpn.example : {} # ours", endpoint.port()),
        ));
        fs::write(host.bin.join("hosts"), format!("{} vpn.example\n", endpoint.ip())).unwrap();
        // Of getent(1), the part that the resolver of the file decides.
        let resolver = host.bin.join(format!("resolv.{}", host.interface));
        let getent = format!(
            "#!/bin/sh\n[ ! -e {} ] || exit 2\nexec /usr/bin/getent \"$@\"\n",
            resolver.display()
        );
        host.bin.write_script("getent", &getent);
        let before = host.state();
        let hosts = format!("mount --bind {} /etc/hosts &&", host.bin.join("hosts").display());
        let queue = is_kept.then(|| open_queue(&host.netns, &host.interface));
        let mut daemon = host.serve(queue.as_ref());
        let apply = |before: &str| {
            let mut command = host.command_with(before, "apply", &[]);
            let done = output(command.env("WGSEP_RESOLVE_SECONDS", "2"));
            assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
        };
        apply(&hosts);
        host.carries_traffic();
        host.crash();
        daemon.exit_within(LIMIT);
        daemon = host.serve(queue.as_ref());
        // With the interface, the address is taken that it had.
        apply(if is_kept { "" } else { &hosts });
        host.carries_traffic();
        host.must("stop");
        daemon.exit_within(LIMIT);
        host.is_as(&before);
    }
}

/// What a crash has left has no daemon: this has one, and everything of it is elsewhere.
#[test]
fn a_tunnel_of_another_namespace_or_name_is_not_taken_for_one_of_a_crash() {
    require!(Wgsep);
    let host = Host::new();
    host.write(&host.plain_server());
    host.must("up");
    let (state, notes) = (host.state(), host.notes());
    for verb in ["down", "up"] {
        let mut elsewhere = Command::new("ip");
        elsewhere.args([
            "netns",
            "exec",
            host.other.daemon.netns.name(),
            "unshare",
            "--mount",
            "sh",
            "-c",
        ]);
        let line = format!("mount --bind {} /etc/wireguard && exec \"$@\"", host.files.display());
        elsewhere.args([&line, "sh"]).arg(script()).args([verb, &host.interface]);
        let said = host.refusal(&mut elsewhere);
        assert!(said.len() == 1 && said[0].contains("network namespace"), "{verb}: {said:?}");
        assert_eq!((host.state(), host.notes()), (state.clone(), notes.clone()));
    }
    host.netns.run(format!("ip link set {} name renamed", host.interface));
    let said = host.refused("down");
    assert!(said.len() == 1 && said[0].contains("rename the interface back"), "{said:?}");
    host.netns.run(format!("ip link set renamed name {}", host.interface));
    host.must("down");
}

#[test]
fn lines_that_cannot_be_written_end_nothing_half_way() {
    require!(Wgsep);
    let host = Host::new();
    host.write(&host.client());
    let before = host.state();
    for verb in ["up", "down"] {
        let mut command = host.command(verb, &[]);
        let full = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let status = command.stdout(full()).stderr(full()).status().unwrap();
        assert!(status.success(), "{verb}: {status}");
        if verb == "up" {
            host.carries_traffic();
        }
    }
    host.is_as(&before);
}

#[test]
fn a_shell_that_is_to_keep_to_posix_and_a_path_of_large_packets_change_nothing() {
    require!(Wgsep);
    let host = Host::new();
    host.write(&host.plain_server().replace("AllowedIPs", "Endpoint = localhost:9\nAllowedIPs"));
    let up = output(host.command("up", &[]).env("POSIXLY_CORRECT", "1"));
    let said = String::from_utf8_lossy(&up.stderr).into_owned();
    assert!(up.status.success(), "{said}");
    let steps = said.lines().filter(|line| line.contains(" mtu ")).collect::<Vec<_>>();
    let [step] = steps[..] else { panic!("{said}") };
    let link = host.netns.run(format!("ip -o link show {}", host.interface));
    let mtu = link.split_whitespace().skip_while(|word| *word != "mtu").nth(1).unwrap();
    assert_eq!(step, format!("[#] ip link set mtu {mtu} up dev {}", host.interface));
    host.must("down");
}

#[test]
fn options_of_the_caller_s_shell_change_nothing() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    host.write(&host.client());
    for (key, value) in [("BASHOPTS", "failglob:nocasematch"), ("SHELLOPTS", "noclobber:nounset")] {
        for verb in ["up", "down"] {
            let done = output(host.command(verb, &[]).env(key, value));
            assert!(done.status.success(), "{key}={value} {verb}: {done:?}");
        }
        host.is_as(&before);
    }
}

/// As with wg-quick(8), which sets no DNS then.
#[test]
fn search_domains_without_an_address_need_no_program() {
    require!(Wgsep);
    let host = Host::new();
    host.write(&host.client().replace("DNS = 10.9.0.53, corp.example", "DNS = corp.example"));
    let no_resolvconf = "mount --bind /dev/null $(command -v resolvconf) &&";
    let up = output(&mut host.command_with(no_resolvconf, "up", &[]));
    assert!(up.status.success(), "{up:?}");
    host.must("down");
    host.write(&host.client().replace("10.9.0.53, corp.example", "corp.example, 10.9.0.53"));
    let said = host.refusal(&mut host.command_with(no_resolvconf, "up", &[]));
    assert!(said[0].ends_with("PostUp = resolvectl dns %i 10.9.0.53"), "{said:?}");
}

/// `vpn.example` in place of the address of the other end.
struct Named(Host);

impl Named {
    /// Up, without any traffic of its own, while the name leads to `addresses`.
    fn up(addresses: &str) -> Self {
        Self::up_with("", addresses)
    }

    /// The same with a line more in the file.
    fn up_with(line: &str, addresses: &str) -> Self {
        let host = Host::new();
        let file = format!("{}Endpoint = vpn.example:{PORT}\n", host.plain_server());
        host.write(&file.replace("[Interface]", &format!("[Interface]\n{line}")));
        // It is not to begin by itself.
        host.other.daemon.wg_set(format!("peer {} remove", host.key.public));
        let named = Self(host);
        named.leads_to(addresses);
        let up = named.run("up");
        assert!(up.status.success(), "{up:?}");
        named
    }

    fn leads_to(&self, addresses: &str) {
        let lines = addresses.split_whitespace().map(|address| format!("{address} vpn.example\n"));
        fs::write(self.0.bin.join("hosts"), lines.collect::<String>()).unwrap();
    }

    fn command(&self, verb: &str) -> Command {
        let hosts = format!("mount --bind {} /etc/hosts &&", self.0.bin.join("hosts").display());
        self.0.command_with(&hosts, verb, &[])
    }

    fn run(&self, verb: &str) -> Output {
        output(&mut self.command(verb))
    }

    /// Resolves the names again; the endpoint afterwards, without its port.
    #[track_caller]
    fn resolve(&self) -> String {
        let done = self.run("resolve");
        assert!(done.status.success(), "{done:?}");
        self.endpoint()
    }

    fn endpoint(&self) -> String {
        let shown = self.0.netns.run(format!("wg show {} endpoints", self.0.interface));
        let (_, endpoint) = shown.trim().split_once('\t').unwrap();
        endpoint.strip_suffix(&format!(":{PORT}")).unwrap().to_owned()
    }

    /// All that wg(8) shows but endpoints.
    fn rest(&self) -> String {
        let shown = self.0.netns.run(format!("wg showconf {}", self.0.interface));
        shown.lines().filter(|line| !line.starts_with("Endpoint")).collect::<Vec<_>>().join("\n")
    }

    /// The other end takes this one as a peer again.
    fn is_expected(&self) {
        let address = Side::Left.inner(Family::V4);
        let key = &self.0.key.public;
        self.0.other.daemon.wg_set(format!("peer {key} allowed-ips {address}/32"));
    }
}

/// An address of the link that no host has.
const NOWHERE: &str = "10.77.0.99";

#[test]
fn a_name_that_leads_elsewhere_by_now_is_followed_where_its_peer_is_not_reached() {
    require!(Wgsep);
    let named = Named::up(NOWHERE);
    let right = Side::Right.outer(Family::V4).to_string();
    let before = named.rest();
    assert_eq!((named.endpoint(), named.resolve()), (NOWHERE.to_owned(), NOWHERE.to_owned()));
    named.leads_to(&right);
    assert_eq!(named.resolve(), right);
    assert_eq!(named.rest(), before, "nothing else is set");
    named.is_expected();
    named.0.carries_traffic();

    named.leads_to(NOWHERE);
    assert_eq!(named.resolve(), right, "the peer is reached");
    named.leads_to(&right);
    named
        .0
        .netns
        .run(format!("wg set {} peer {} remove", named.0.interface, named.0.other.key.public));
    assert!(named.run("resolve").status.success());
    assert_eq!(named.0.netns.run(format!("wg show {} peers", named.0.interface)), "");
    named.0.must("down");
}

/// A here-document that is longer than a pipe is a file there.
#[test]
fn names_among_many_peers_are_resolved_where_tmp_is_full() {
    require!(Wgsep);
    let host = Host::new();
    let name = format!("{}Endpoint = vpn.example:{PORT}\n", host.plain_server());
    let peers = (0..1200).map(|number: u32| {
        let key = KeyPair::generate().public;
        let [high, low] = [number / 250, number % 250];
        format!("[Peer]\nPublicKey = {key}\nAllowedIPs = 10.200.{high}.{low}/32\nEndpoint = 127.0.0.1:9\n")
    });
    host.write(&(name + &peers.collect::<String>()));
    let named = Named(host);
    named.leads_to(NOWHERE);
    assert!(named.run("up").status.success());
    named.leads_to("10.77.0.9");
    let hosts = named.0.bin.join("hosts").display().to_string();
    let full = format!(
        "mount --bind {hosts} /etc/hosts && mount -t tmpfs -o size=4k none /tmp && {{ cp /bin/true /tmp/full 2>/dev/null; true; }} &&"
    );
    let resolved = output(&mut named.0.command_with(&full, "resolve", &[]));
    assert!(resolved.status.success(), "{resolved:?}");
    let shown = named.0.netns.run(format!("wg show {} endpoints", named.0.interface));
    assert!(shown.contains(&format!("10.77.0.9:{PORT}")), "{shown}");
}

#[test]
fn addresses_of_both_families_are_tried_in_turn_while_packets_go_unanswered() {
    require!(Wgsep);
    let right = Side::Right.outer(Family::V6).to_string();
    let named = Named::up(&format!("{NOWHERE} {right}"));
    named.is_expected();
    let interface = &named.0.interface;
    named.0.netns.run(format!(
        "wg set {interface} peer {} endpoint {NOWHERE}:{PORT}",
        named.0.other.key.public
    ));
    assert_eq!([named.resolve(), named.resolve()], [NOWHERE; 2], "nothing was sent");
    let pinging = Pinging::start(&named.0.netns, Side::Right.inner(Family::V4));
    let was_sent = || {
        let shown = named.0.netns.run(format!("wg show {interface} transfer"));
        !shown.trim().ends_with("\t0")
    };
    wait::until("an initiation was sent", LIMIT, was_sent);
    assert_eq!(named.resolve(), format!("[{right}]"));
    pinging.until_more(1);
    assert_eq!(named.resolve(), format!("[{right}]"), "it is reached");
    named.0.must("down");
}

/// What could not be sent does not count as bytes sent.
#[test]
fn an_address_that_nothing_can_be_sent_to_is_left_again() {
    require!(Wgsep);
    let (v4, v6) = (Side::Right.outer(Family::V4).to_string(), Side::Right.outer(Family::V6));
    for refusal in [
        "nft add table ip6 f; nft add chain ip6 f o '{ type filter hook output priority 0; }'; \
         nft add rule ip6 f o udp dport 51820 drop",
        &format!("ip -6 rule add to {v6} unreachable pref 1"),
    ] {
        let named = Named::up(&format!("{v4} {v6}"));
        named.is_expected();
        let Host { netns, other, interface, .. } = &named.0;
        run(netns.command("sh").args(["-c", refusal]));
        let key = &other.key.public;
        netns.run(format!("wg set {interface} peer {key} endpoint [{v6}]:{PORT}"));
        let pinging = Pinging::start(netns, Side::Right.inner(Family::V4));
        let initiations = || {
            let mut stats = netns.command(wgsep_program("wgsep"));
            stats.args(["stats", "--prometheus", interface]);
            let shown = String::from_utf8(output(&mut stats).stdout).unwrap();
            shown
                .lines()
                .any(|line| line.contains("_handshake_initiations_total{") && !line.ends_with(" 0"))
        };
        wait::until("an initiation was tried", LIMIT, initiations);
        assert_eq!(named.resolve(), v4, "{refusal}");
        pinging.until_more(1);
        named.0.must("down");
    }
}

/// As with a kill switch that unmarked datagrams do not pass, and in a tunnel for all traffic.
#[test]
fn the_way_to_a_name_s_address_is_that_of_marked_datagrams() {
    require!(Wgsep);
    let right = Side::Right.outer(Family::V4).to_string();
    let named = Named::up_with("FwMark = 7", NOWHERE);
    let netns = &named.0.netns;
    netns.run("ip rule add not fwmark 7 unreachable pref 1");
    named.leads_to(&right);
    assert_eq!(named.resolve(), right);
    netns.run("ip rule del pref 1");
    named.0.must("down");
}

/// The tunnel's own IPv6 address and route make the resolver put the other family first.
#[test]
fn a_reload_keeps_an_endpoint_that_is_an_address_of_the_name() {
    require!(Wgsep);
    let (v4, v6) = (Side::Right.outer(Family::V4).to_string(), Side::Right.outer(Family::V6));
    let named = Named::up(&format!("{v4} {v6}"));
    named.is_expected();
    let Host { netns, other, interface, .. } = &named.0;
    for endpoint in [v4.clone(), format!("[{v6}]")] {
        let key = &other.key.public;
        netns.run(format!("wg set {interface} peer {key} endpoint {endpoint}:{PORT}"));
        let reloaded = named.run("reload");
        assert!(reloaded.status.success(), "{reloaded:?}");
        assert_eq!(named.endpoint(), endpoint);
        named.0.carries_traffic();
    }
    named.leads_to(&v6.to_string());
    netns.run(format!("wg set {interface} peer {} endpoint {v4}:{PORT}", other.key.public));
    assert!(named.run("reload").status.success());
    assert_eq!(named.endpoint(), format!("[{v6}]"), "the name has moved");
    named.0.must("down");
}

/// A stop, and a start after a crash, would wait for a resolver that does not answer.
#[test]
fn names_are_looked_up_while_others_may_work_on_the_interface() {
    require!(Wgsep);
    let named = Named::up(NOWHERE);
    let looked_up = named.0.bin.join("looked-up");
    let slow = format!(
        "#!/bin/sh\ntouch {}; while [ -e {0} ]; do sleep 0.02; done; PATH=${{PATH#*:}} exec getent \"$@\"\n",
        looked_up.display()
    );
    named.0.bin.write_script("getent", &slow);
    let mut resolving = Process::spawn(named.command("resolve"), "resolve");
    wait::until("it looks the name up", LIMIT, || looked_up.exists());
    named.0.must("down");
    fs::remove_file(looked_up).unwrap();
    assert!(!resolving.exit_within(LIMIT).success());
    assert!(resolving.log().contains("is not up"), "{}", resolving.log());
}

/// Of a clock that was set back.
#[test]
fn a_handshake_of_the_future_is_no_recent_one() {
    require!(Wgsep);
    let right = Side::Right.outer(Family::V4).to_string();
    let named = Named::up(&right);
    named.is_expected();
    named.0.carries_traffic();
    named.leads_to(NOWHERE);
    assert_eq!(named.resolve(), right, "it is reached");
    named.0.bin.write_script(
        "wg",
        "#!/bin/sh\nPATH=${PATH#*:}\ncase $3 in latest-handshakes) wg \"$@\" | awk '{ print $1 \"\\t\" $2 + 3600 }' ;; *) exec wg \"$@\" ;; esac\n",
    );
    assert_eq!(named.resolve(), NOWHERE);
    fs::remove_file(named.0.bin.join("wg")).unwrap();
    named.0.must("down");
}

/// The timer's run may have begun when the unit of the tunnel is stopped.
#[test]
fn a_tunnel_that_is_stopped_while_its_names_are_resolved_is_no_failure_of_the_timer() {
    require!(Wgsep);
    for setting in ["endpoints", "transfer", "fwmark"] {
        let named = Named::up(NOWHERE);
        let interface = &named.0.interface;
        let socket = format!("/run/wireguard/{interface}.sock");
        named.0.write_wrapper(
            "wg",
            &format!(
                "case \"$*\" in *' {setting}') ip link delete dev {interface}; \
                 while [ -e {socket} ]; do sleep 0.02; done ;; esac"
            ),
        );
        let done = output(
            named.command("resolve").env("INVOCATION_ID", "0").env_remove("SYSTEMD_EXEC_PID"),
        );
        assert!(done.status.success() && done.stderr.is_empty(), "{setting}: {done:?}");
        assert!(fs::metadata(socket).is_err(), "{setting} was asked for");
        // By hand, also in a shell of a console that has the variables of the console's unit.
        for (key, value) in [("INVOCATION_ID", ""), ("SYSTEMD_EXEC_PID", "1")] {
            let mut by_hand = named.command("resolve");
            let said = named.0.refusal(by_hand.env("INVOCATION_ID", "0").env(key, value));
            assert_eq!(said.len(), 1, "{said:?}");
        }
    }
}

#[test]
fn a_name_without_an_address_to_send_to_is_said_and_the_endpoint_stays() {
    require!(Wgsep);
    let named = Named::up(NOWHERE);
    let own = Side::Left.outer(Family::V4).to_string();
    for addresses in ["", &own, "2001:db8::1"] {
        named.leads_to(addresses);
        let said = named.0.refusal(&mut named.command("resolve"));
        let [line] = &said[..] else { panic!("{said:?}") };
        assert!(line.contains("vpn.example") && line.contains("getent ahosts"), "{line}");
        assert_eq!(named.endpoint(), NOWHERE);
    }
    // In a unit, which runs every half minute, it is no failure, and a line once.
    let in_unit = || {
        output(named.command("resolve").env("INVOCATION_ID", "0").env_remove("SYSTEMD_EXEC_PID"))
    };
    assert!(in_unit().status.success());
    let again = in_unit();
    assert!(again.status.success() && again.stderr.is_empty(), "{again:?}");
    named.0.must("down");
    let said = named.0.refusal(&mut named.command("resolve"));
    assert!(said[0].contains("is not up"), "{said:?}");
}

/// Its `ip link add type wireguard` would succeed.
#[test]
fn the_kernel_module_is_not_used_where_there_is_one() {
    require!(Wgsep);
    let host = Host::new();
    host.write(&host.client());
    let ip = "#!/bin/sh\ncase \"$*\" in *type?wireguard*) echo \"$*\" >>${0%/*}/module; exit 0 ;; esac\n\
              PATH=${PATH#*:} exec ip \"$@\"\n";
    host.bin.write_script("ip", ip);
    host.must("up");
    host.carries_traffic();
    assert!(!host.bin.join("module").exists(), "the module was asked");
    let shown = host.netns.run(format!("ip -d link show {}", host.interface));
    assert!(shown.contains(" tun "), "{shown}");
    host.must("down");
}

/// What Debian's next release has: it names the device after `dev`, adds to the configuration, and runs PreUp
/// when the interface is there.
#[test]
fn a_newer_wg_quick_is_answered_as_well() {
    require!(Wgsep);
    let host = Host::new();
    let newer = fs::read_to_string("/usr/bin/wg-quick").unwrap();
    let newer = newer
        .replace("cmd ip link add \"$INTERFACE\" type", "cmd ip link add dev \"$INTERFACE\" type")
        .replace("cmd wg setconf", "cmd wg addconf")
        .replace(
            "\texecute_hooks \"${PRE_UP[@]}\"\n\tadd_if\n",
            "\tadd_if\n\texecute_hooks \"${PRE_UP[@]}\"\n",
        );
    assert!(newer.contains("add_if\n\texecute_hooks"), "another wg-quick: {newer}");
    host.bin.write_script("wg-quick", &newer);
    let file = host.client().replace(
        "PostUp = ",
        &format!(
            "PreUp = ip link show %i >/dev/null && echo there >>{}\nPostUp = ",
            host.bin.join("notes").display()
        ),
    );
    host.write(&file);
    let before = host.state();
    host.must("up");
    host.carries_traffic();
    assert_eq!(host.notes(), ["there", "postup"]);
    host.must("down");
    host.is_as(&before);
}

#[test]
fn saveconfig_writes_the_file_at_save_at_down_and_at_the_stop_of_the_unit() {
    require!(Wgsep);
    let host = Host::new();
    // Which bash 5.2 replaces by what it has matched.
    let hook = "PreDown = true && echo 'a&b' | sed 's/./[&]/' >/dev/null";
    host.write(&host.client().replace("DNS", &format!("SaveConfig = true\n{hook}\nDNS")));
    let added = ["192.0.2.11", "192.0.2.12", "192.0.2.13"];
    let add = |address: &str| {
        let key = KeyPair::generate().public;
        host.netns.run(format!("wg set {} peer {key} allowed-ips {address}/32", host.interface));
    };
    host.must("up");
    add(added[0]);
    host.must("save");
    assert!(host.text().contains(added[0]), "{}", host.text());
    add(added[1]);
    host.must("down");
    assert!(host.text().contains(added[1]), "{}", host.text());
    let mut daemon = host.serve(None);
    host.must("apply");
    host.carries_traffic();
    assert!(host.netns.run(format!("ip route get {}", added[1])).contains(&host.interface));
    add(added[2]);
    host.must("stop");
    daemon.exit_within(LIMIT);
    let text = host.text();
    for line in ["SaveConfig = true", "PostUp = echo", hook, "DNS = 10.9.0.53"].iter().chain(&added)
    {
        assert!(text.contains(line), "no {line}: {text}");
    }
    // Two tunnels whose files had the mark that was chosen for each could not be up at the same time.
    assert!(!text.contains("FwMark"), "{text}");
    host.write(&text.replace("SaveConfig", "FwMark = 0xca77\nSaveConfig"));
    host.must("up");
    host.must("down");
    assert!(host.text().contains("FwMark = 0xca77"), "{}", host.text());
    assert_eq!(
        fs::metadata(host.files.join(format!("{}.conf", host.interface)))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o600
    );
}

#[test]
fn what_fails_is_taken_down_and_named_with_its_line() {
    require!(Wgsep);
    let host = Host::new();
    let file = format!("/etc/wireguard/{}.conf", host.interface);
    let before = host.state();
    let (client, server) = (host.client(), host.masquerading_server());
    let no_program = |name: &str| format!("mount --bind /dev/null $(command -v {name}) &&");
    for (text, without, status, expected) in [
        (
            client.replace("PostUp =", "PostUp = exit 7\nPostUp ="),
            String::new(),
            7,
            "line 6: PostUp = exit 7: the hook ended with status 7; correct the command",
        ),
        (
            client.replace("PostUp =", "PreUp = cat /nowhere/%i\nPostUp ="),
            String::new(),
            1,
            "line 6: PreUp = cat /nowhere/%i: the hook ended with status 1",
        ),
        (
            server.replace("PostUp = echo", "PostUp = false; echo"),
            String::new(),
            1,
            "line 11: PostUp = false; echo postup",
        ),
        (
            client.replace("DNS =", "DNS = 10.9.9.9,"),
            "printf '#!/bin/sh\\n[ $1 != -a ] || { echo no space >&2; exit 3; }\\n' >/run/stub && chmod +x /run/stub && \
            mount --bind /run/stub $(command -v resolvconf) &&"
                .to_owned(),
            3,
            "line 5: DNS = 10.9.9.9: cannot run: resolvconf -a IF -m 0 -x: no space; ",
        ),
        (
            client.clone(),
            no_program("resolvconf"),
            1,
            "line 5: DNS = 10.9.0.53 needs resolvconf, which is missing; install openresolv",
        ),
        (
            client.clone(),
            // A machine may also have this one.
            format!(
                "{} {{ iptables=$(command -v iptables-restore) && mount --bind /dev/null $iptables || true; }} &&",
                no_program("nft")
            ),
            1,
            "line 12: AllowedIPs = 0.0.0.0/0 needs nft or iptables-restore, which is missing; install nftables",
        ),
        (
            client.replace("Endpoint = ", "Endpoint = 192.0.2.1:x # "),
            String::new(),
            1,
            "line 11: Endpoint = 192.0.2.1:x",
        ),
        (
            client.replace("PrivateKey", "PrivatKey"),
            String::new(),
            1,
            "line 2: wg setconf refuses it",
        ),
        (
            client.replace("DNS =", "Table = nosuchtable\nDNS ="),
            String::new(),
            1,
            "line 5: Table = nosuchtable is not a routing table",
        ),
        (
            client.replace("DNS =", "MTU = 1200\nDNS ="),
            String::new(),
            1,
            "cannot configure",
        ),
    ] {
        host.write(&text);
        fs::write(host.bin.join("notes"), "").unwrap();
        for unit in [false, true] {
            let mut daemon = unit.then(|| host.serve(None));
            // Whatever the test binds over the stub is in private mounts.
            let verb = if unit { "apply" } else { "up" };
            let mut command = host.command_with(&without, verb, &[]);
            let failed = output(&mut command);
            let said = String::from_utf8_lossy(&failed.stderr).into_owned();
            assert_eq!(failed.status.code(), Some(status), "{expected}: {said}");
            let line =
                said.lines().find(|line| line.starts_with("wgsep-quick: ")).unwrap_or_default();
            let expected =
                format!("wgsep-quick: {file}: {}", expected.replace("IF", &host.interface));
            assert!(line.starts_with(&expected), "no {expected}: {said}");
            let ours = said.lines().filter(|line| line.starts_with("wgsep-quick: "));
            assert_eq!(ours.count(), 1, "{said}");
            assert!(
                !unit || said.lines().filter(|line| line.starts_with("[#]")).count() == 0,
                "{said}"
            );
            if let Some(daemon) = &mut daemon {
                // What the unit does next.
                daemon.signal(Signal::SIGTERM);
                daemon.exit_within(LIMIT);
                host.must("ended");
            }
            host.is_as(&before);
        }
    }
}

/// Those for up would pile up: the unit tries again.
#[test]
fn a_failed_start_also_runs_the_hooks_for_down_once_one_for_up_was_run() {
    require!(Wgsep);
    let host = Host::new();
    host.write(&host.masquerading_server().replace("PostUp = echo", "PostUp = exit 7; echo"));
    let before = host.state();
    for _ in 0..2 {
        let said = host.refused("up");
        assert!(said[0].contains("exit 7; echo postup"), "{said:?}");
        host.is_as(&before);
    }
    assert_eq!(host.notes(), ["preup", "predown", "postdown", "preup", "predown", "postdown"]);
}

#[test]
fn a_hook_that_deletes_the_interface_fails_the_start_and_leaves_nothing() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    host.write(&host.client().replace("PostUp =", "PreUp = ip link del %i\nPostUp ="));
    let mut daemon = host.serve(None);
    let said = host.refused("apply");
    assert!(said.iter().any(|line| line.contains("if a PreUp deletes")), "{said:?}");
    daemon.exit_within(LIMIT);
    host.is_as(&before);
    host.write(&host.client().replace("PostUp =", "PostUp = ip link del %i\nPostUp ="));
    for _ in 0..2 {
        let said = host.refused("up");
        assert!(said.len() == 1 && said[0].contains("correct a PostUp that ends it"), "{said:?}");
        host.is_as(&before);
    }
}

#[test]
fn a_zero_byte_is_refused_and_can_be_removed_as_the_line_says() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    host.write(&host.plain_server().replace("[Peer]", "\0\n[Peer]"));
    let said = host.refused("up");
    assert!(said.len() == 1 && said[0].contains("there is a zero byte"), "{said:?}");
    host.is_as(&before);
    let (_, remedy) = said[0].split_once("remove it: ").unwrap();
    run(host
        .netns
        .command("sh")
        .args(["-c", &remedy.replace("/etc/wireguard", &host.files.display().to_string())]));
    assert!(!host.text().contains('\0'));
    host.must("up");
    host.must("down");
}

#[test]
fn what_a_peer_does_not_get_is_said() {
    require!(Wgsep);
    let host = Host::new();
    let (ours, theirs) = (&host.key.public, Side::Right.inner(Family::V4));
    let third = KeyPair::generate().public;
    let peer =
        |key: &str, prefixes: &str| format!("[Peer]\nAllowedIPs = {prefixes}\nPublicKey = {key}\n");
    let said = |peers: String| {
        host.write(&format!("{}{peers}", host.plain_server()));
        let said = host.must("up");
        host.must("down");
        lines_of_ours(&said)
    };
    let warned = said(peer(ours, "10.1.0.1/32") + &peer(&third, &format!("10.1.0.2, {theirs}")));
    let [own, taken] = &warned[..] else { panic!("{warned:?}") };
    assert!(own.contains("line 12: the PublicKey is that of the interface itself"), "{own}");
    let expected = format!("line 14: AllowedIPs = {theirs}/32 is another peer's too (line 9)");
    assert!(taken.contains(&expected) && taken.ends_with("one of the two"), "{taken}");
    let taken = said(
        peer(&third, &format!("{theirs}/32, 10.1.0.0/24, 10.1.0.0/24"))
            + &peer(ours, "10.1.0.0/24"),
    );
    assert!(taken[1].ends_with("one of the two; and 1 more like it"), "{taken:?}");
    // Of one peer, also in two sections, it is no mistake.
    let none = said(peer(&third, "10.1.0.0/24") + &peer(&third, "10.1.0.0/24, 10.1.0.1/32"));
    assert_eq!(none, <[String; 0]>::default());
}

/// A file in the directory of the states, which keeps other tests from removing it: a mount over it goes with it, in every
/// mount namespace.
struct Kept(PathBuf);

impl Kept {
    fn new() -> Self {
        let directory = Path::new("/run/wgsep-quick");
        let file = directory.join(unique_interface());
        wait::until("the directory is kept", LIMIT, || {
            let _is_there = fs::create_dir(directory);
            fs::write(&file, "").is_ok()
        });
        Self(file)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _gone = fs::remove_file(&self.0);
    }
}

/// One to all processes, as of a terminal or of the unit's stop, ends the hook itself.
#[test]
fn a_signal_to_the_script_alone_while_a_hook_runs_takes_down_what_was_set_up() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    let [go_on, runs] = ["go-on", "runs"].map(|name| host.bin.join(name));
    let waits = format!(
        "touch {}; until [ -e {} ]; do sleep 0.02; done; ",
        runs.display(),
        go_on.display()
    );
    host.write(&host.client().replace("PostUp = ", &format!("PostUp = {waits}")));
    // The second has no place for its state.
    let _kept = Kept::new();
    let read_only = "mount -t tmpfs -o ro none /run/wgsep-quick &&";
    for before_up in ["", read_only] {
        for (signal, status) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
            let before_up = format!("ulimit -c unlimited && {before_up}");
            let mut up = Process::spawn(host.command_with(&before_up, "up", &[]), "up");
            wait::until("the hook runs", LIMIT, || runs.exists());
            // It has the private key in its memory.
            for pid in procfs::tree(up.pid()) {
                let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
                let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size"));
                assert!(core.is_none_or(|core| core.trim().starts_with("0 ")), "{limits}");
            }
            up.signal(signal);
            fs::write(&go_on, "").unwrap();
            assert_eq!(up.exit_within(LIMIT).code(), Some(status), "{}", up.log());
            assert!(up.log().contains("interrupted by a signal"), "{}", up.log());
            assert_eq!(host.notes(), ["postup", "predown"]);
            host.is_as(&before);
            for done in [&go_on, &runs, &host.bin.join("notes")] {
                fs::remove_file(done).unwrap();
            }
        }
    }
}

#[test]
fn a_full_file_system_for_the_state_refuses_and_keeps_nothing() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    let long = format!("{}# {}\n", host.client(), "x".repeat(8 << 10));
    host.write(&long);
    let _kept = Kept::new();
    let full = "mount -t tmpfs -o size=4k none /run/wgsep-quick && \
                { ! \"$@\" && ! ls -A /run/wgsep-quick | grep .; exit; } && ";
    let refused = output(&mut host.command_with(full, "up", &[]));
    assert!(refused.status.success(), "{refused:?}");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("make room (df /run/wgsep-quick)"), "{said}");
    host.is_as(&before);
}

#[test]
fn a_hook_for_down_that_fails_keeps_the_tunnel_by_hand_and_nothing_in_the_unit() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    host.write(&host.client().replace("PreDown = ", "PreDown = exit 5; "));
    host.must("up");
    let said = host.refused("down");
    assert!(
        said.len() == 1 && said[0].contains("line 7: PreDown = exit 5; echo predown"),
        "{said:?}"
    );
    assert!(said[0].contains("stays up"), "{said:?}");
    host.carries_traffic();
    host.crash();
    wait::until("the interface is gone", LIMIT, || !host.has_interface());
    let said = host.must("down");
    assert!(said.contains("the rest is taken down"), "{said}");
    host.is_as(&before);

    host.write(&host.client().replace("PreDown = ", "PreDown = exit 5; "));
    let mut daemon = host.serve(None);
    host.must("apply");
    let said = host.must("stop");
    assert!(
        said.contains("PreDown = exit 5; ") && said.contains("the rest is taken down"),
        "{said}"
    );
    daemon.exit_within(LIMIT);
    host.is_as(&before);
}

/// As when systemd waits no longer for a hook, or the file of SaveConfig cannot be written. No hook is run twice.
#[test]
fn a_stop_that_is_ended_in_its_midst_takes_down_the_rest() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    let [runs, note] = ["runs", "notes"].map(|name| host.bin.join(name));
    let hangs = format!("touch {}; exec sleep 1000", runs.display());
    let after = |hook: &str| {
        let note = note.display();
        format!("PostDown = echo one >>{note}{hook}\nPostDown = echo two >>{note}\nPreDown = ")
    };
    let (in_pre_down, in_post_down) =
        (format!("{}{hangs}; ", after("")), after(&format!("; {hangs}")));
    // As systemd does, to each process of the stop.
    let until_hook_hangs = |stop: &mut Process, signal: Signal| {
        wait::until("the hook runs", LIMIT, || runs.exists());
        for pid in procfs::tree(stop.pid()) {
            let _has_ended = kill(pid, signal);
        }
        fs::remove_file(&runs).unwrap();
        stop.exit_within(LIMIT).code()
    };
    let all = ["postup", "predown", "one", "two"];
    let without_pre_down = ["postup", "one", "two"];
    for (hooks, expected) in [(&in_pre_down, &without_pre_down[..]), (&in_post_down, &all)] {
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            host.write(&host.client().replace("PreDown = ", hooks));
            let mut daemon = host.serve(None);
            host.must("apply");
            let mut stop = Process::spawn(host.command("stop", &[]), "stop");
            let status = until_hook_hangs(&mut stop, signal);
            if signal == Signal::SIGTERM {
                assert_eq!(status, Some(143), "{}", stop.log());
                assert!(stop.log().contains("the rest is taken down"), "{}", stop.log());
            } else {
                let mut ended = host.command("ended", &[]);
                let ended = output(ended.env("SERVICE_RESULT", "timeout"));
                assert!(ended.status.success(), "{ended:?}");
            }
            daemon.exit_within(LIMIT);
            assert_eq!(host.notes(), expected, "{signal}");
            host.is_as(&before);
            fs::remove_file(&note).unwrap();
        }
    }

    host.write(&host.client().replace("ListenPort", "SaveConfig = true\nListenPort"));
    let mut daemon = host.serve(None);
    host.must("apply");
    let read_only = "mount -o remount,bind,ro /etc/wireguard &&";
    let said = host.refusal(&mut host.command_with(read_only, "stop", &[]));
    assert!(said.iter().any(|line| line.contains("the rest is taken down")), "{said:?}");
    daemon.exit_within(LIMIT);
    assert_eq!(host.notes(), ["postup", "predown"]);
    host.is_as(&before);
}

/// After a crash, until the file is applied again, and before it is applied at all.
#[test]
fn saveconfig_does_not_take_keys_out_of_the_file_that_the_daemon_does_not_have() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    let text = host.client().replace("ListenPort", "SaveConfig = true\nListenPort");
    let is_kept = || assert_eq!(host.text(), text);
    host.write(&text);
    let mut daemon = host.serve(None);
    for verb in ["save", "down"] {
        let said = host.refused(verb);
        assert!(
            said.iter().any(|line| line.contains("its keys are not saved")),
            "{verb}: {said:?}"
        );
        is_kept();
    }
    host.must("apply");
    daemon.signal(Signal::SIGKILL);
    daemon.exit_within(LIMIT);
    let mut daemon = host.serve(None);
    let said = host.refused("save");
    assert!(said.iter().any(|line| line.contains("its keys are not saved")), "{said:?}");
    is_kept();
    let said = host.must("down");
    assert!(said.contains("it stays as it is"), "{said}");
    daemon.exit_within(LIMIT);
    is_kept();
    host.is_as(&before);
    // Nor is a daemon asked twice that does not answer.
    let mut daemon = host.serve(None);
    host.must("apply");
    let asked = "case $1 in showconf) exit 1 ;; esac";
    host.write_wrapper("wg", asked);
    let said = host.refused("down");
    assert!(said.len() == 1 && said[0].contains("ip link delete dev"), "{said:?}");
    let said = host.must("stop");
    assert!(said.contains("it stays as it is") && said.contains("does not answer"), "{said}");
    daemon.exit_within(LIMIT);
    is_kept();
    host.is_as(&before);
}

#[test]
fn a_stop_without_a_record_takes_down_what_the_file_says() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    host.write(&host.client());
    let _kept = Kept::new();
    let read_only = "mount -t tmpfs -o ro none /run/wgsep-quick &&";
    for before_stop in ["", read_only] {
        let mut daemon = host.serve(None);
        if before_stop.is_empty() {
            host.must("apply");
            fs::remove_file(host.state_file()).unwrap();
        } else {
            let apply = output(&mut host.command_with(read_only, "apply", &[]));
            let said = String::from_utf8_lossy(&apply.stderr).into_owned();
            assert!(
                apply.status.success() && said.contains("cannot write to /run/wgsep-quick"),
                "{said}"
            );
        }
        let stop = output(&mut host.command_with(before_stop, "stop", &[]));
        assert!(stop.status.success(), "{stop:?}");
        daemon.exit_within(LIMIT);
        host.is_as(&before);
    }
    assert_eq!(host.notes(), ["postup", "predown", "postup", "predown"]);
}

/// A daemon that resolvconf(8) starts would have the lock.
#[test]
fn what_a_step_leaves_running_does_not_keep_the_next_run_waiting() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    host.write(&host.client());
    let own = fs::read_to_string(host.bin.join("resolvconf")).unwrap();
    let leaves = own.replacen(
        '\n',
        "\nsleep 60 </dev/null >/dev/null 2>&1 & echo $! >>\"${0%/*}/left\"\n",
        1,
    );
    fs::write(host.bin.join("resolvconf"), leaves).unwrap();
    host.must("up");
    let started = Instant::now();
    host.must("reload");
    host.must("down");
    assert!(started.elapsed() < LIMIT, "{:?}", started.elapsed());
    for pid in fs::read_to_string(host.bin.join("left")).unwrap().lines() {
        let _has_ended = kill(nix::unistd::Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL);
    }
    host.is_as(&before);
}

/// It would wait for the lock of the run that waits for the hook. What it saves is what wg-quick(8) would.
#[test]
fn a_hook_that_runs_wgsep_quick_on_its_own_interface_is_no_deadlock() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    let of_hook = |verb: &str| {
        let hook = format!("PostUp = {} {verb} %i\nPostUp =", script().display());
        host.write(&host.client().replace("PostUp =", &hook));
    };
    of_hook("down");
    let started = Instant::now();
    let said = host.refused("up");
    assert!(said[0].contains("waits for the hook") && started.elapsed() < LIMIT, "{said:?}");
    host.is_as(&before);
    of_hook("save");
    host.must("up");
    host.must("down");
    host.is_as(&before);
}

/// As by the kernel where memory is short. No hook was run, so none for down is.
#[test]
fn steps_of_an_up_that_are_killed_are_taken_down() {
    require!(Wgsep);
    let host = Host::new();
    host.write(&host.client());
    let before = host.state();
    let runs = host.bin.join("runs");
    let hangs = RESOLVCONF.replacen(
        '\n',
        &format!("\n[ $1 != -a ] || {{ touch {}; exec sleep 1000; }}\n", runs.display()),
        1,
    );
    host.bin.write_script("resolvconf", &hangs);
    let mut up = Process::spawn(host.command("up", &[]), "up");
    wait::until("it runs", LIMIT, || runs.exists());
    // The daemon has another parent by now.
    for pid in procfs::tree(up.pid()).into_iter().skip(1) {
        let _has_ended = kill(pid, Signal::SIGKILL);
    }
    assert_eq!(up.exit_within(LIMIT).code(), Some(137), "{}", up.log());
    assert_eq!(host.notes(), <[String; 0]>::default());
    host.is_as(&before);
}

#[test]
fn a_reload_that_takes_out_the_default_route_says_that_it_stays() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    host.write(&host.client());
    host.must("up");
    assert_eq!(lines_of_ours(&host.must("reload")), <[String; 0]>::default());
    host.write(&host.client().replace("0.0.0.0/0, ::/0", "198.51.100.0/24"));
    let said = lines_of_ours(&host.must("reload"));
    let [line] = &said[..] else { panic!("{said:?}") };
    let stays = format!("no default route any more, and that of {} stays until: ", host.interface);
    assert!(line.contains(&stays), "{line}");
    host.must("down");
    host.is_as(&before);
}

#[test]
fn a_daemon_that_dies_while_it_is_set_up_is_named_as_the_reason() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    let dies = "PreUp = pkill -9 -f -- '--interface %i '; while wg show %i >/dev/null 2>&1; do sleep 0.05; done\nPostUp = ";
    host.write(&host.client().replace("PostUp = ", dies));
    let mut daemon = host.serve(None);
    let said = host.refused("apply");
    assert!(said.iter().any(|line| line.contains("its daemon has ended")), "{said:?}");
    daemon.exit_within(LIMIT);
    host.is_as(&before);
}

/// Rules with the same mark, and a firewall of the same name, are another tunnel's elsewhere.
#[test]
fn what_a_crash_left_in_another_network_namespace_is_taken_down_there_or_is_gone_with_it() {
    require!(Wgsep);
    let host = Host::new();
    host.write(&host.client());
    let before = host.state();
    let elsewhere = Netns::new();
    for family in ["-4", "-6"] {
        elsewhere.run(format!("ip {family} rule add not fwmark 51820 table 51820"));
        elsewhere.run(format!("ip {family} rule add table main suppress_prefixlength 0"));
    }
    elsewhere.run(format!("nft add table ip wg-quick-{}", host.interface));
    let rules = || ["ip rule", "ip -6 rule", "nft list ruleset"].map(|line| elsewhere.run(line));
    let theirs = rules();
    let must = |netns: &Netns, verb: &str| {
        let done = output(&mut host.command_in(netns, "", verb, &[]));
        assert!(done.status.success(), "{verb}: {done:?}");
    };
    for verb in ["down", "stop", "ended"] {
        host.must("up");
        host.crash();
        must(&elsewhere, verb);
        host.is_as(&before);
        assert_eq!(rules(), theirs, "{verb}");
        assert_eq!(host.notes(), ["postup", "predown"]);
        fs::remove_file(host.bin.join("notes")).unwrap();
    }
    host.must("up");
    host.crash();
    host.write(&host.plain_server());
    let third = Netns::new();
    must(&third, "up");
    assert_eq!(host.notes(), ["postup", "predown"]);
    must(&third, "down");
    host.is_as(&before);

    host.write(&host.client());
    let gone = Netns::new();
    must(&gone, "up");
    host.crash();
    drop(gone);
    must(&elsewhere, "down");
    host.is_as(&before);
    assert_eq!(rules(), theirs);

    // The interface of the next one has the same number, and nothing else of the one before.
    let (gone, next) = (Netns::new(), Netns::new());
    must(&gone, "up");
    host.crash();
    drop(gone);
    let program = wgsep_program("wgsep").display().to_string();
    let serve = host.command_in(&next, "", "serve", &[&program, "--foreground"]);
    let mut daemon = Process::spawn(serve, "serve");
    wait::until("the daemon answers", LIMIT, || uapi::is_answering(&host.interface));
    must(&next, "apply");
    assert!(next.run("ip rule").contains("lookup 51820"));
    must(&next, "stop");
    assert!(!next.run("ip rule").contains("lookup 51820"));
    daemon.exit_within(LIMIT);
    host.is_as(&before);
}

/// The line that says so is followed, in each way that it names.
#[test]
fn a_hook_for_down_that_failed_is_run_as_it_was_corrected_in_the_file() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    let note = host.bin.join("notes").display().to_string();
    let with = |hooks: &str| host.client().replace("PreDown = ", &format!("{hooks}PreDown = "));
    for corrected in
        [with(&format!("PreDown = echo corrected >>{note}\n")), with("PreDown = true\n"), with("")]
    {
        fs::write(&note, "").unwrap();
        host.write(&with("PreDown = false\n"));
        host.must("up");
        let said = host.refused("down");
        let [line] = &said[..] else { panic!("{said:?}") };
        assert!(line.contains("line 7: PreDown = false: the hook ended with status 1"), "{line}");
        let way = format!("wgsep-quick down {}", host.interface);
        assert!(line.ends_with(&way), "{line}");
        // What sets up is taken down as it was set up, whatever the file says of it by now.
        host.write(&corrected.replace("DNS = ", "# DNS = "));
        host.must("down");
        let notes = host.notes();
        assert_eq!(notes.last().map(String::as_str), Some("predown"));
        assert_eq!(notes.iter().any(|note| note == "corrected"), corrected.contains("corrected"));
        host.is_as(&before);
    }

    // One that was corrected before it failed: the hooks of the start are run until one fails.
    host.write(&with("PreDown = false\n"));
    host.must("up");
    host.write(&with("\nPreDown = true\n"));
    let said = host.refused("down");
    let named = "line 7 of the file as it was at the start: PreDown = false: the hook ended";
    assert!(said.len() == 1 && said[0].contains(named), "{said:?}");
    // And one that is corrected into another that fails.
    host.write(&with("\nPreDown = exit 4\n"));
    let said = host.refused("down");
    assert!(said.len() == 1 && said[0].contains("line 8: PreDown = exit 4: the hook"), "{said:?}");
    host.carries_traffic();
    // Without a file there is no other hook.
    let path = host.files.join(format!("{}.conf", host.interface));
    fs::remove_file(path).unwrap();
    let said = host.refused("down");
    assert!(said.len() == 1 && said[0].contains("PreDown = exit 4: the hook"), "{said:?}");
    host.write("[Interface]\n");
    host.must("down");
    host.is_as(&before);

    // Of a PostDown, nothing stays up.
    host.write(&host.client().replace("PreDown = ", "PostDown = exit 6\nPreDown = "));
    host.must("up");
    let said = host.refused("down");
    assert!(said.len() == 1 && said[0].contains(" is down; run by hand what"), "{said:?}");
    host.is_as(&before);
}

#[test]
fn names_and_files_that_cannot_be_used_are_refused_with_a_remedy() {
    require!(Wgsep);
    let host = Host::new();
    host.write(&host.plain_server());
    let run = |before: &str, verb: &str, name: &str| {
        let line = format!("{{ {before} true; }} && exec \"$@\"");
        let mut command = host.netns.command("unshare");
        command.args(["--mount", "sh", "-c", &line, "sh"]).arg(script()).args([verb, name]);
        host.refusal(&mut command)
    };
    let path = host.files.join(format!("{}.conf", host.interface)).display().to_string();
    let no_wg_quick = "mount --bind /dev/null /usr/bin/wg-quick &&";
    for (before, verb, name, expected) in [
        ("", "up", "nowhere", "there is no /etc/wireguard"),
        ("", "up", "/nowhere/wg0.conf", "there is no /nowhere"),
        (
            "mount -t tmpfs none /tmp && ln -s /nowhere /tmp/keys &&",
            "up",
            "/tmp/keys/wg0.conf",
            "/tmp/keys is a symbolic link to /nowhere, which does not exist or is hidden",
        ),
        ("", "up", "/etc/passwd", "its name must be that of the interface, followed by .conf"),
        (
            "",
            "up",
            "/tmp/a-name-too-long-for-it.conf",
            "cannot use the interface name a-name-too-long-for-it",
        ),
        ("", "up", "a-name-too-long-for-it", "it must have 1 to 15 letters"),
        ("", "down", &path, "is not up; see what is: wg show interfaces"),
        ("", "save", &path, "is not up; see what is: wg show interfaces"),
        ("", "reload", &path, "is not up; see what is: wg show interfaces"),
        ("", "down", "lo", "lo is not an interface of wgsep"),
        (
            no_wg_quick,
            "up",
            &path,
            "wg-quick(8) is missing; install it: Debian and Fedora have it in wireguard-tools",
        ),
        ("", "start", &path, "usage: wgsep-quick up|down|reload|resolve|save|strip INTERFACE|FILE"),
    ] {
        let said = run(before, verb, name);
        assert!(said.len() == 1 && said[0].contains(expected), "{verb} {name}: {said:?}");
    }
    // Every user may read it: a warning.
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    fs::set_permissions(&*host.files, Permissions::from_mode(0o755)).unwrap();
    let said = host.must("up");
    assert!(said.contains("every user can read or write it; run: chmod 600"), "{said}");
    let stripped = output(&mut host.command("strip", &[]));
    let stripped = String::from_utf8_lossy(&stripped.stdout).into_owned();
    assert!(stripped.contains("PrivateKey") && !stripped.contains("Address"), "{stripped}");
    host.must("down");
}

/// The second waits, and finds what the first has set up.
#[test]
fn of_two_that_begin_at_once_one_sets_it_up() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    host.write(&host.masquerading_server().replace("PreUp = ", "PreUp = sleep 0.5; "));
    let mut first = Process::spawn(host.command("up", &[]), "up");
    wait::until("it has begun", LIMIT, || fs::metadata(host.state_file()).is_ok());
    let said = host.refused("up");
    assert!(said.len() == 1 && said[0].contains("is up already"), "{said:?}");
    assert_eq!(first.exit_within(LIMIT).code(), Some(0), "{}", first.log());
    assert_eq!(host.notes(), UP);
    host.carries_traffic();
    host.must("down");
    host.is_as(&before);
}

/// As in a hand-made root.
#[test]
fn without_dev_fd_it_says_so_at_once() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    host.write(&host.plain_server());
    let without_dev_fd = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 &&";
    for before in ["mount -t tmpfs none /proc &&", without_dev_fd] {
        for verb in ["up", "down"] {
            let mut run = Process::spawn(host.command_with(before, verb, &[]), verb);
            let status = run.exit_within(LIMIT).code();
            assert_eq!(status, Some(1), "{before} {verb}: {}", run.log());
            assert!(run.log().contains("ln -s /proc/self/fd /dev/fd"), "{verb}: {}", run.log());
        }
    }
    host.is_as(&before);
}

impl Host {
    /// A line of shell that gives a command a /run which no other test uses, with the sockets of all: the directory of the
    /// states is in it while something is up, or being worked on.
    fn own_run(&self) -> String {
        let run = self.bin.join("run");
        fs::create_dir_all(run.join("wireguard")).unwrap();
        fs::create_dir_all("/run/wireguard").unwrap();
        let run = run.display();
        format!("mount --bind /run/wireguard {run}/wireguard && mount --rbind {run} /run &&")
    }

    /// A program of this host that writes a line into `name.runs`, runs `before`, and becomes the machine's.
    fn write_wrapper(&self, name: &str, before: &str) {
        let text = format!(
            "#!/bin/sh\necho run >>{}/{name}.runs\n{before}\nPATH=${{PATH#*:}} exec {name} \"$@\"\n",
            self.bin.display()
        );
        self.bin.write_script(name, &text);
    }

    fn runs(&self, name: &str) -> usize {
        let runs = fs::read_to_string(self.bin.join(format!("{name}.runs")));
        runs.unwrap_or_default().lines().count()
    }
}

/// The last one removes the lock that others wait for, and its directory.
#[test]
fn what_waits_for_a_down_has_its_turn_after_it() {
    require!(Wgsep);
    let host = Host::new();
    let own_run = host.own_run();
    let before = host.state();
    let (held, holds) = (host.bin.join("held"), host.bin.join("holds"));
    let hook = format!(
        "PostDown = touch {}; while [ -e {} ]; do sleep 0.02; done\n[Peer]",
        holds.display(),
        held.display()
    );
    host.write(&host.plain_server().replace("[Peer]", &hook));
    host.write_wrapper("flock", "");
    let begin = |verb: &str| Process::spawn(host.command_with(&own_run, verb, &[]), verb);
    // As a reload of the unit, which may not write there.
    let read_only = "mount --bind /run/wgsep-quick /run/wgsep-quick && mount -o remount,bind,ro /run/wgsep-quick &&";
    let begin_read_only = |verb: &str| {
        Process::spawn(host.command_with(&format!("{own_run} {read_only}"), verb, &[]), verb)
    };
    let finish = |mut process: Process| {
        let status = process.exit_within(LIMIT).code();
        (status, process.log())
    };
    let verbs = ["up", "reload", "resolve", "save", "down"].map(|verb| (verb, false));
    for (verb, is_read_only) in verbs.into_iter().chain([("reload", true)]) {
        let (status, log) = finish(begin("up"));
        assert_eq!(status, Some(0), "{log}");
        fs::write(&held, "").unwrap();
        let down = begin("down");
        wait::until("the hook runs", LIMIT, || holds.exists());
        let runs = host.runs("flock");
        let waiting = if is_read_only { begin_read_only(verb) } else { begin(verb) };
        wait::until("it waits", LIMIT, || host.runs("flock") > runs);
        fs::remove_file(&held).unwrap();
        let (status, log) = finish(down);
        assert_eq!(status, Some(0), "{log}");
        let (status, log) = finish(waiting);
        if verb == "up" {
            assert_eq!(status, Some(0), "{log}");
            host.carries_traffic();
            let (status, log) = finish(begin("down"));
            assert_eq!(status, Some(0), "{log}");
        } else {
            assert_eq!(status, Some(1), "{verb}: {log}");
            assert!(log.contains("is not up; see what is"), "{verb}: {log}");
            assert_eq!(log.lines().count(), 1, "{verb}: {log}");
        }
        fs::remove_file(&holds).unwrap();
        host.is_as(&before);
        assert!(!host.bin.join("run/wgsep-quick").exists());
    }
}

/// The last `down` of another interface may remove it between the two.
#[test]
fn a_directory_that_is_removed_while_the_lock_is_opened_is_made_again() {
    require!(Wgsep);
    let host = Host::new();
    let own_run = host.own_run();
    let before = host.state();
    host.write(&host.plain_server());
    let directory = host.bin.join("run/wgsep-quick").display().to_string();
    for verb in ["up", "reload", "down"] {
        if verb != "up" {
            // What keeps the directory otherwise.
            fs::rename(&directory, format!("{directory}.kept")).unwrap();
        }
        let _earlier = fs::remove_file(host.bin.join("mkdir.runs"));
        let restore = format!(
            "case $(wc -l <{bin}/mkdir.runs) in\n[1-7]) /bin/mkdir -p {directory}; /bin/rmdir {directory}; exit ;;\n\
             8) [ ! -e {directory}.kept ] || exec mv {directory}.kept {directory} ;;\nesac",
            bin = host.bin.display()
        );
        host.write_wrapper("mkdir", &restore);
        let done = output(&mut host.command_with(&own_run, verb, &[]));
        assert!(done.status.success(), "{verb}: {done:?}");
        if verb == "up" {
            host.carries_traffic();
        }
    }
    host.is_as(&before);

    // What stays is said, and ends.
    fs::remove_file(host.bin.join("mkdir")).unwrap();
    let blocked = format!("mkdir -p /run/wgsep-quick/{}.conf.lock &&", host.interface);
    let said = host.refusal(&mut host.command_with(&format!("{own_run} {blocked}"), "up", &[]));
    assert!(said.len() == 1 && said[0].contains("cannot write /run/wgsep-quick/"), "{said:?}");
    host.is_as(&before);
}

#[test]
fn a_run_that_goes_on_too_long_is_named_and_another_failure_of_the_lock_is_none() {
    require!(Wgsep);
    let host = Host::new();
    host.write(&host.plain_server());
    let before = host.state();
    // The time passes at once.
    host.bin.write_script("sleep", "#!/bin/sh\n");
    for (flock, expected) in [
        ("exit 1", "another wgsep-quick has been at work on it for 90 s (fuser "),
        ("echo 'No locks available' >&2; exit 1", "No locks available; see: flock -n "),
        ("exit 71", "flock(1) ended with status 71; see: flock -n "),
    ] {
        host.bin.write_script("flock", &format!("#!/bin/sh\n{flock}\n"));
        let said = host.refused("up");
        assert!(said.len() == 1 && said[0].contains(expected), "{said:?}");
        assert!(!said[0].contains("at work") || flock == "exit 1", "{said:?}");
        fs::remove_file(format!("/run/wgsep-quick/{}.conf.lock", host.interface)).unwrap();
        host.is_as(&before);
    }
}

#[test]
fn a_missing_program_is_named_with_its_package_before_anything_else() {
    require!(Wgsep);
    let host = Host::new();
    host.write(&host.plain_server());
    let before = host.state();
    for (programs, expected) in [
        (&["flock"][..], "flock (util-linux)"),
        (&["sed"], "sed (sed)"),
        (&["stat", "sort", "ip"], "ip (iproute2), sort (coreutils), stat (coreutils)"),
        (&["readlink"], "readlink (coreutils)"),
        (&["wg"], "wg (wireguard-tools)"),
    ] {
        // A PATH of this host's programs only: the script adds the directories of the system's, which are empty.
        let bare = Scratch::new();
        let line = format!(
            "for directory in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do \
             for file in $directory/*; do [ -e {bare}/${{file##*/}} ] || ln -s $(readlink -f $file) {bare}/${{file##*/}}; done; done; \
             cd {bare} && rm {programs} && mount -t tmpfs none /usr/local/sbin && ln -s {script} /usr/local/sbin/wgsep-quick && \
             mount -t tmpfs none /usr/sbin && mount -t tmpfs none /sbin && export PATH={bare}:{bin} && bash=$(readlink -f bash) && \
             exec $bash /usr/local/sbin/wgsep-quick up {interface}; ",
            bare = bare.display(),
            programs = programs.join(" "),
            script = script().display(),
            bin = wgsep_program("wgsep").parent().unwrap().display(),
            interface = host.interface,
        );
        let said = host.refusal(&mut host.command_with(&line, "up", &[]));
        let expected = format!("programs are missing: {expected}; install them");
        assert!(said.len() == 1 && said[0].contains(&expected), "{said:?}");
        host.is_as(&before);
    }
}

#[test]
fn a_reload_of_a_file_without_content_is_refused_and_keeps_the_tunnel() {
    require!(Wgsep);
    let host = Host::new();
    let text = host.plain_server();
    host.write(&text);
    host.must("up");
    host.carries_traffic();
    let (before, notes) = (host.state(), host.notes());
    for cut in ["", "\n \n", "# mine\n"] {
        host.write(cut);
        let refused = host.quick("reload");
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(said.contains("has no [Interface]") && said.lines().count() == 1, "{said}");
        host.carries_traffic();
        assert_eq!((host.state(), host.notes()), (before.clone(), notes.clone()));
    }
    host.write(&text);
    host.must("down");
}

/// Peers that are idle send to the port that they know; a mark and a key may be a hook's.
#[test]
fn a_reload_keeps_port_mark_and_key_that_the_file_does_not_mention() {
    require!(Wgsep);
    let host = Host::new();
    let key = host.bin.join("key");
    fs::write(&key, &host.key.private).unwrap();
    let plain = host.plain_server().replace(&format!("ListenPort = {PORT}\n"), "");
    let of_hook = format!("PostUp = wg set %i private-key {}", key.display());
    let keyless = plain.replace(&format!("PrivateKey = {}", host.key.private), &of_hook);
    let interface = &host.interface;
    let shown = |what: &str| host.netns.run(format!("wg show {interface} {what}"));
    for file in [&plain, &keyless, &plain.replace("Address", "ListenPort = 0\nAddress")] {
        host.write(file);
        host.must("up");
        let device = || ["listen-port", "public-key", "fwmark"].map(shown);
        let port = shown("listen-port").trim().to_owned();
        let endpoint = format!("endpoint {}:{port}", Side::Left.outer(Family::V4));
        let key = &host.key.public;
        host.other.daemon.wg_set(format!("peer {key} remove"));
        let address = Side::Left.inner(Family::V4);
        host.other.daemon.wg_set(format!("peer {key} allowed-ips {address}/32 {endpoint}"));
        until_ping(&host.other.daemon.netns, address);
        let (before, handshakes) = (device(), shown("latest-handshakes"));
        assert_ne!(before[0].trim(), "0");
        for _ in 0..5 {
            assert_eq!(host.must("reload"), "");
            assert_eq!(device(), before);
        }
        // Nothing was sent from here in between.
        until_ping(&host.other.daemon.netns, address);
        assert_eq!(shown("latest-handshakes"), handshakes, "the session went on");
        host.must("down");
    }

    // A daemon whose mark is free, as with an ExecStart= of one's own.
    host.write(&plain);
    let program = wgsep_program("wgsep").display().to_string();
    host.netns.run(format!("{program} {interface}"));
    host.must("apply");
    host.netns.run(format!("wg set {interface} fwmark 7"));
    host.must("reload");
    assert_eq!(shown("fwmark").trim(), "0x7");
    host.write(&plain.replace("Address", "FwMark = off\nAddress"));
    host.must("reload");
    assert_eq!(shown("fwmark").trim(), "off");
    host.must("down");

    // Of a peer.
    let (key, address) = (&host.other.key.public, Side::Right.outer(Family::V4));
    host.must("up");
    let more = "persistent-keepalive 25 allowed-ips 192.0.2.7/32";
    host.netns.run(format!("wg set {interface} peer {key} endpoint {address}:9 {more}"));
    let removed = KeyPair::generate().public;
    host.netns.run(format!("wg set {interface} peer {removed}"));
    host.must("reload");
    assert_eq!(shown("persistent-keepalive"), format!("{key}\t25\n"));
    assert_eq!(shown("endpoints"), format!("{key}\t{address}:9\n"));
    assert!(!shown("allowed-ips").contains("192.0.2.7"));
    host.must("down");

    // What is taken out of the file stays until the next start, which is said.
    host.write(&host.plain_server().replace("Address", "FwMark = 9\nAddress"));
    host.must("up");
    host.write(&plain);
    let said = host.must("reload");
    let way = format!("wgsep-quick down {interface} && wgsep-quick up {interface}");
    for (key, value) in [("ListenPort", PORT.to_string()), ("FwMark", "0x9".to_owned())] {
        let expected = format!("the {key} that was taken out stays {value} until: {way}\n");
        assert!(said.contains(&expected), "{said}");
    }
    assert_eq!(shown("listen-port").trim(), PORT.to_string());
    assert_eq!(shown("fwmark").trim(), "0x9");
    host.must("down");
}

/// As `wg syncconf` of older wireguard-tools, whatever version is installed.
#[test]
fn a_preshared_key_that_is_taken_out_of_the_file_stays_and_is_named() {
    require!(Wgsep);
    let host = Host::new();
    let interface = &host.interface;
    let shown = || host.netns.run(format!("wg show {interface} preshared-keys"));
    let (peer, preshared) = (&host.other.key.public, KeyPair::generate().private);
    let expected = format!("{peer}\t{preshared}\n");
    let plain = host.plain_server();
    let file = host.bin.join("preshared");
    fs::write(&file, &preshared).unwrap();
    let hook = format!("PostUp = wg set %i peer {peer} preshared-key {}", file.display());
    let of_hook = plain.replace("Address", &format!("{hook}\nAddress"));
    host.write(&format!("{plain}PresharedKey = {preshared}\n"));
    host.must("up");
    assert_eq!(host.must("reload"), "");
    // The peer once more: the key in one of its sections is that of the file.
    let twice = format!("\n[Peer]\nPublicKey = {peer}\nAllowedIPs = 192.0.2.9/32\n");
    host.write(&format!("{plain}PresharedKey = {preshared}\n{twice}"));
    assert_eq!(host.must("reload"), "");
    assert_eq!(shown(), expected);
    host.write(&plain);
    for _ in 0..2 {
        let said = host.must("reload");
        let way = format!("wg set {interface} peer {peer} preshared-key /dev/null");
        assert!(said.contains(&format!("peer {peer} has no PresharedKey here")), "{said}");
        assert!(said.ends_with(&format!("{way}\n")) && said.lines().count() == 1, "{said}");
        assert!(!said.contains(&preshared), "{said}");
        assert_eq!(shown(), expected);
    }
    host.netns.run(format!("wg set {interface} peer {peer} preshared-key /dev/null"));
    assert_eq!(host.must("reload"), "");
    assert_eq!(shown(), format!("{peer}\t(none)\n"));
    host.must("down");

    host.write(&of_hook);
    host.must("up");
    assert_eq!((host.must("reload"), shown()), (String::new(), expected));
    host.must("down");
}

/// In a unit SIGPIPE is ignored, and wg(8) ends before it has read all.
#[test]
fn a_reload_that_is_refused_is_one_line_where_broken_pipes_are_no_signal() {
    require!(Wgsep);
    let host = Host::new();
    let plain = host.plain_server();
    host.write(&plain);
    host.must("up");
    host.carries_traffic();
    let comments = "# a comment that is longer than a few words, as many are\n".repeat(5000);
    let keyless = plain.replace(&format!("ListenPort = {PORT}\n"), "");
    host.write(&format!("{}{comments}", keyless.replace("PublicKey = ", "PublicKey = x")));
    let mut command = host.command_with("trap '' PIPE;", "reload", &[]);
    let refused = output(&mut command);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("wg syncconf refuses it") && said.lines().count() == 1, "{said}");
    host.carries_traffic();
    host.must("down");
}

/// As at boot. Two with one mark would take down the rules of both.
#[test]
fn two_default_routes_that_are_set_up_at_once_have_a_table_each_and_come_down_at_once() {
    require!(Wgsep);
    let host = Host::new();
    let second = host.second();
    let before = host.state();
    for (one, other) in
        [("0.0.0.0/0", "0.0.0.0/0"), ("0.0.0.0/0", "::/0"), ("::/0", "0.0.0.0/0, ::/0")]
    {
        for (number, (host, prefixes)) in [(&host, one), (&second, other)].into_iter().enumerate() {
            host.write(&format!(
                "[Interface]\nPrivateKey = {}\nAddress = 10.77.{number}.1/24, fd77:{number}::1/64\n\n\
                 [Peer]\nPublicKey = {}\nAllowedIPs = {prefixes}\n",
                host.key.private, host.other.key.public
            ));
        }
        let both = |verb: &str| {
            let run = |host: &Host| Process::spawn(host.command(verb, &[]), verb);
            for mut running in [run(&host), run(&second)] {
                let status = running.exit_within(LIMIT);
                assert!(status.success(), "{verb}: {}", running.log());
            }
        };
        both("up");
        let marks = [&host, &second].map(|host| {
            let shown = host.netns.run(format!("wg show {} fwmark", host.interface));
            u32::from_str_radix(shown.trim().trim_start_matches("0x"), 16).unwrap()
        });
        assert_ne!(marks[0], marks[1]);
        for ((host, mark), prefixes) in [&host, &second].into_iter().zip(marks).zip([one, other]) {
            for prefix in prefixes.split(", ") {
                let family = if prefix == "::/0" { "-6" } else { "-4" };
                let rules = host.netns.run(format!("ip {family} rule"));
                assert!(rules.contains(&format!("lookup {mark}")), "{prefix}: {rules}");
                let routes = host.netns.run(format!("ip {family} route show table {mark}"));
                assert!(routes.contains(&format!("default dev {}", host.interface)), "{routes}");
            }
        }
        both("down");
        host.is_as(&before);
        second.is_as(&before);
    }
}

/// wg-quick(8) takes away the rules of both when the second fails, and the first one's packets leave outside of its tunnel.
#[test]
fn a_default_route_with_the_mark_of_another_is_refused_and_the_other_stays() {
    require!(Wgsep);
    let host = Host::new();
    let second = host.second();
    let file = |host: &Host, number: u8, prefixes: &str, mark: &str| {
        host.write(&format!(
            "[Interface]\nPrivateKey = {}\nAddress = 10.77.{number}.1/24\n{mark}\n[Peer]\nPublicKey = {}\nAllowedIPs = {prefixes}\n",
            host.key.private, host.other.key.public
        ));
    };
    let without = host.state();
    for (one, other) in [("0.0.0.0/0, ::/0", "0.0.0.0/0"), ("::/0", "0.0.0.0/0")] {
        file(&host, 1, one, "FwMark = 0xca6d");
        host.must("up");
        let before = host.state();
        file(&second, 2, other, "FwMark = 51821");
        let said = second.refused("up");
        let named = format!(
            "line 4: FwMark = 51821 is the routing table 51821, in which {} has",
            host.interface
        );
        assert!(said.len() == 1 && said[0].contains(&named), "{said:?}");
        assert_eq!(host.state(), before);
        file(&second, 2, other, "");
        second.must("up");
        second.must("down");
        assert_eq!(host.state(), before);
        second.must("up");
        host.must("down");
        // The rule for the other routes of the main table comes before the one for all that is not the tunnel's own.
        let rules = host.netns.run("ip rule");
        let rules: Vec<_> = rules.lines().filter_map(|line| line.split_once(":\t")).collect();
        let own =
            rules.iter().position(|(_, rule)| rule.starts_with("not from all fwmark")).unwrap();
        assert!(rules[own - 1].1.trim_end().ends_with("suppress_prefixlength 0"), "{rules:?}");
        second.must("down");
        host.is_as(&without);
        second.is_as(&without);
    }
    // Of a program that leaves no record here.
    host.netns.run("ip route add default dev veth0 table 51821");
    let before = host.state();
    file(&host, 1, "0.0.0.0/0", "FwMark = 51821");
    let said = host.refused("up");
    assert!(said.len() == 1 && said[0].contains("in which veth0 has a default route"), "{said:?}");
    host.is_as(&before);
}

/// One is the beginning of the other, for wg-quick(8) the same; and 010 is ten, as for wg(8).
#[test]
fn marks_that_begin_alike_are_taken_down_apart() {
    require!(Wgsep);
    let host = Host::new();
    let second = host.second();
    for (host, mark) in [(&host, "010"), (&second, "1")] {
        let text = host.client().replace("DNS", "# DNS");
        host.write(&text.replace("ListenPort =", &format!("FwMark = {mark}\n#")));
    }
    // A rule of another program that has no rule for the main table beside it.
    host.netns.run("ip rule add not fwmark 5 table 100");
    let before = host.state();
    host.must("up");
    let rules = host.netns.run("ip rule");
    assert!(rules.contains("not from all fwmark 0xa lookup 10"), "{rules}");
    let with_one = host.state();
    second.must("up");
    second.must("down");
    assert_eq!(host.state(), with_one);
    second.must("up");
    host.must("down");
    assert!(host.netns.run("ip -6 rule").contains("not from all fwmark 0x1 lookup 1"));
    second.must("down");
    host.is_as(&before);
    second.is_as(&before);
}

/// Its own datagrams would go into the tunnel.
#[test]
fn a_reload_keeps_the_mark_of_a_default_route_until_a_restart() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    let marked = |mark: u32| {
        let text = host.client().replace("ListenPort", &format!("FwMark = {mark}\nListenPort"));
        host.write(&text);
    };
    host.write(&host.client());
    host.must("up");
    let up = host.state();
    marked(51821);
    let said = host.must("reload");
    assert!(said.contains("FwMark = 51821 takes effect by:"), "{said}");
    assert_eq!(host.netns.run(format!("wg show {} fwmark", host.interface)).trim(), "0xca6c");
    assert_eq!(host.state(), up);
    // Of the file, though the same was chosen at the start.
    marked(51820);
    let said = host.must("reload");
    assert!(!said.contains("takes effect"), "{said}");
    host.must("save");
    assert!(host.text().contains("FwMark = 0xca6c"), "{}", host.text());
    host.must("down");
    host.is_as(&before);
}

/// Of timeout(1), which prints a warning: LimitSIGPENDING= of a service is inherited.
#[test]
fn a_warning_beside_an_answer_is_no_part_of_it() {
    require!(Wgsep);
    let host = Host::new();
    let before = host.state();
    let limit = "prlimit --pid $$ --sigpending=0 &&";
    host.write(&host.client());
    for verb in ["up", "reload", "resolve", "save", "down"] {
        let done = output(&mut host.command_with(limit, verb, &[]));
        assert!(done.status.success(), "{verb}: {done:?}");
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(!["up", "reload"].contains(&verb) || said.contains("timer_create"), "{said}");
        if verb != "down" {
            host.carries_traffic();
        }
    }
    host.is_as(&before);
}

/// Without a service manager that starts it again.
#[test]
fn a_daemon_that_is_dead_is_named_as_the_cause_and_the_remedy_works() {
    require!(Wgsep);
    for is_named in [true, false] {
        let named = Named::up(&Side::Right.outer(Family::V4).to_string());
        let host = &named.0;
        if !is_named {
            host.write(&host.plain_server());
        }
        for verb in ["reload", "resolve", "save"] {
            host.crash();
            wait::until("the interface is gone", LIMIT, || !host.has_interface());
            // The second one finds no socket: wg(8) has removed it.
            for _ in 0..2 {
                let done = named.run(verb);
                let said = String::from_utf8_lossy(&done.stderr).into_owned();
                assert_eq!(done.status.code(), Some(1), "{verb}: {said}");
                assert_eq!(said.lines().count(), 1, "{verb}: {said}");
                let cause = format!("cannot {verb} {}: its daemon does not run", host.interface);
                assert!(said.contains(&cause), "{verb}: {said}");
                let remedy = format!("anew: wgsep-quick up {}\n", host.interface);
                assert!(said.ends_with(&remedy), "{verb}: {said}");
            }
            assert!(named.run("up").status.success());
        }
        host.must("down");
    }
}

#[test]
fn a_daemon_that_does_not_answer_is_named() {
    require!(Wgsep);
    let named = Named::up(NOWHERE);
    let host = &named.0;
    host.bin.write_script("wg", "#!/bin/sh\necho 'Unable to access interface' >&2\nexit 124\n");
    for verb in ["reload", "resolve", "save"] {
        let said = host.refusal(&mut named.command(verb));
        assert!(said.len() == 1 && said[0].contains("has not answered within 10 s"), "{said:?}");
    }
    fs::remove_file(host.bin.join("wg")).unwrap();
    host.must("down");
}

#[test]
fn the_unit_takes_each_file_through_a_crash_a_reload_and_a_restart_and_leaves_nothing() {
    takes_each_file(Debian::Bookworm);
}

/// With another wg-quick(8), too.
#[test]
fn a_newer_debian_takes_each_file_as_well() {
    takes_each_file(Debian::Trixie);
}

/// The unit, with the machine's own wg-quick(8), iptables(8), nft(8) and resolvconf(8).
fn takes_each_file(debian: Debian) {
    let Some(image) = debian.image_or_skips() else { return };
    let scratch = Scratch::new();
    let deb = package(&scratch);
    for (file, up, _down) in FILES {
        let mut host = Host::new();
        host.interface = "wg0".to_owned();
        let free = "PostUp = touch /etc/hook /home/hook; \
                    { umask; grep ^NoNewPrivs /proc/self/status; } >/var/tmp/free; rm /etc/hook /home/hook\n[Peer]";
        let notes = host.bin.join("notes").display().to_string();
        host.write(&file(&host).replace(&notes, "/var/tmp/notes").replace("[Peer]", free));
        let files = [(&*deb, "/mnt/wgsep.deb"), (&*host.files, "/etc/wireguard")];
        let machine = Machine::boot(&image, &host.netns, &files);
        machine.run("dpkg --install /mnt/wgsep.deb");
        let state = || {
            machine.run(
                "{ ip -o -br address; ip rule; ip -6 rule; ip route show table all; nft list ruleset; resolvconf -l; \
                 cat /etc/resolv.conf; ls /run/wireguard /run/wgsep-quick; } 2>/dev/null | sort",
            )
        };
        let notes = || machine.run("cat /var/tmp/notes 2>/dev/null; true");
        // How many hooks for up were run, without those that hooks for down took back.
        let in_force = || {
            let notes = notes();
            let count = |words: &[&str]| notes.lines().filter(|line| words.contains(line)).count();
            (count(&["postup"]) - count(&["predown"]), count(&["preup"]) - count(&["postdown"]))
        };
        let show = |what: &str| {
            machine
                .run(&format!("systemctl show --value --property {what} wgsep@wg0"))
                .trim()
                .to_owned()
        };
        let journal = || machine.run("journalctl --quiet --no-pager --output cat --unit wgsep@wg0");
        // Settings of the network are the machine's, as on a real one.
        machine.run("mkdir -p /run/wireguard; mount -o remount,bind,rw /proc/sys");
        // Chains that iptables(8) makes and leaves.
        machine.run(
            "for rules in 'iptables FORWARD' 'iptables POSTROUTING -t nat' 'ip6tables POSTROUTING -t nat'; do \
             set -- $rules; program=$1 chain=$2; shift 2; \
             $program -A $chain $* -j ACCEPT && $program -D $chain $* -j ACCEPT || exit; done",
        );
        let before = state();
        let one = (usize::from(up.contains(&"postup")), usize::from(up.contains(&"preup")));

        let started = machine.output("systemctl start wgsep@wg0");
        assert!(started.status.success(), "{}", journal());
        host.carries_traffic();
        assert_eq!(in_force(), one);
        assert_eq!(machine.run("cat /var/tmp/free"), "0022\nNoNewPrivs:\t0\n");
        let set_up = state();
        assert!(!journal().contains("wgsep-quick: "), "{}", journal());

        let handshakes = || machine.run("wg show wg0 latest-handshakes");
        let earlier = handshakes();
        let pinging = Pinging::start(&host.netns, Side::Right.inner(Family::V4));
        pinging.until_more(2);
        machine.run("systemctl reload wgsep@wg0");
        pinging.until_more(3);
        let pings = pinging.stop();
        assert!(pings.received + 1 >= pings.sent, "{pings:?} across a reload");
        assert_eq!(handshakes(), earlier, "the session went on");
        assert_eq!(state(), set_up);

        let (index, noted) = (host.index(), notes());
        machine.run("kill -9 $(systemctl show --value --property MainPID wgsep@wg0)");
        wait::until("systemd starts it again", LIMIT, || {
            show("NRestarts") == "1" && show("ActiveState") == "active"
        });
        host.carries_traffic();
        assert_eq!(in_force(), one, "{}", journal());
        assert_eq!(state(), set_up);
        // systemd may have kept the interface.
        assert!(host.index() != index || notes() == noted, "hooks were run again: {}", journal());

        machine.run("systemctl restart wgsep@wg0");
        host.carries_traffic();
        assert_eq!(in_force(), one);
        assert_eq!(state(), set_up);
        machine.run("systemctl stop wgsep@wg0");
        assert_eq!(in_force(), (0, 0));
        assert_eq!(state(), before);
        assert_eq!(show("ActiveState"), "inactive", "{}", journal());
        assert_eq!(show("Result"), "success");

        // In the midst of a reload, and of the start after a crash, systemd asks `wgsep-quick stop` nothing.
        machine.run(
            "printf '%s\\n' '#!/bin/sh' 'case $1 in *conf) while [ -e /run/hold ]; do sleep 0.05; done ;; esac' \
             'exec /usr/bin/wg \"$@\"' >/usr/local/sbin/wg && chmod +x /usr/local/sbin/wg",
        );
        for (begin, begun) in [
            ("systemctl reload --no-block wgsep@wg0", "reload"),
            ("kill -9 $(systemctl show --value --property MainPID wgsep@wg0)", "start-post"),
        ] {
            machine.run("systemctl start wgsep@wg0 && touch /run/hold");
            machine.run(begin);
            wait::until(begun, LIMIT, || show("SubState") == begun);
            machine.run("systemctl stop wgsep@wg0; rm /run/hold");
            assert_eq!(in_force(), (0, 0), "{begun}: {}", journal());
            assert_eq!(state(), before, "{begun}: {}", journal());
            machine.run("systemctl reset-failed wgsep@wg0; true");
        }
        machine.run("rm /usr/local/sbin/wg");

        // A stop that has ended the daemon before the second command of a reload begins, which systemd runs all the same.
        machine.run(
            "mkdir /run/systemd/system/wgsep@wg0.service.d && printf '%s\n' '[Service]' ExecReload= \
             \"ExecReload=+/bin/sh -c 'trap : TERM; systemctl stop --no-block %n; while pgrep -x wgsep; do sleep 0.05; done; true'\" \
             'ExecReload=/usr/sbin/wgsep-quick reload %i' >/run/systemd/system/wgsep@wg0.service.d/stop.conf && \
             systemctl daemon-reload && systemctl start wgsep@wg0; systemctl reload wgsep@wg0; true",
        );
        wait::until("it is stopped", LIMIT, || {
            ["inactive", "failed"].contains(&&*show("ActiveState"))
        });
        assert!(journal().contains("cannot reload wg0: its daemon does not run"), "{}", journal());
        assert_eq!(in_force(), (0, 0), "{}", journal());
        assert_eq!(state(), before, "{}", journal());
        machine.run(
            "rm -r /run/systemd/system/wgsep@wg0.service.d; systemctl daemon-reload; systemctl reset-failed wgsep@wg0; true",
        );

        // The same by hand.
        machine.run("wgsep-quick up wg0");
        host.carries_traffic();
        machine.run("wgsep-quick down wg0");
        assert_eq!(state(), before);
    }
}

#[test]
fn the_timer_follows_a_name_that_leads_elsewhere() {
    let Some(image) = Machine::image_or_skips() else { return };
    let scratch = Scratch::new();
    let deb = package(&scratch);
    let mut host = Host::new();
    host.interface = "wg0".to_owned();
    let right = host.other.endpoint(Family::V4);
    host.write(&format!("{}Endpoint = vpn.example:{PORT}\n", host.plain_server()));
    let files = [(&*deb, "/mnt/wgsep.deb"), (&*host.files, "/etc/wireguard")];
    let machine = Machine::boot(&image, &host.netns, &files);
    machine.run("dpkg --install /mnt/wgsep.deb");
    let leads_to = |address: &str| machine.run(&format!("echo {address} vpn.example >/etc/hosts"));
    leads_to(NOWHERE);
    // Each second, for a test.
    machine.run(
        "mkdir -p /run/systemd/system/wgsep-resolve@.timer.d && printf '[Timer]\\nOnCalendar=\\nOnCalendar=*:*:*\\n\
         AccuracySec=100ms\\n' >/run/systemd/system/wgsep-resolve@.timer.d/often.conf && systemctl daemon-reload && \
         systemctl start wgsep-resolve@wg0.timer",
    );
    let result =
        || machine.run("systemctl show --value --property Result wgsep-resolve@wg0.service");
    machine.run("systemctl start wgsep@wg0");
    assert!(machine.run("wg show wg0 endpoints").contains(NOWHERE));
    leads_to(&right.ip().to_string());
    wait::until("the endpoint follows", LIMIT, || {
        machine.run("wg show wg0 endpoints").contains(&right.to_string())
    });
    host.carries_traffic();
    machine.run("systemctl stop wgsep@wg0");
    let journal = || {
        machine.run("journalctl --quiet --no-pager --output cat --unit wgsep-resolve@wg0.service")
    };
    wait::until("it goes on without a tunnel", LIMIT, || journal().contains("skipped"));
    assert_eq!(result().trim(), "success", "{}", journal());
    assert!(journal().contains("endpoint of vpn.example"), "{}", journal());
}
