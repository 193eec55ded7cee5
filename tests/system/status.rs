//! The status socket: what it tells and to whom, `wgsep stats` and `wgsep watch` without root, and its file.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::net::UdpSocket;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use wgsep_tests::daemon::{Daemon, SOCKETS, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::{DEVICE, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{Process, output, run};
use wgsep_tests::traffic::{Load, iperf, until_ping};
use wgsep_tests::tunnel::{End, Plan, Tunnel};
use wgsep_tests::uapi::Uapi;
use wgsep_tests::wg::{KeyPair, hex, preshared_key};
use wgsep_tests::{require, wait};

const LIMIT: Duration = Duration::from_secs(20);
/// A group that no account has.
const GROUP: u32 = 4242;

fn status_path(interface: &str) -> PathBuf {
    socket_path(interface).with_extension("status")
}

fn stats(daemon: &Daemon) -> Value {
    let program = wgsep_program("wgsep");
    let printed =
        daemon.netns.run(format!("{} stats --json {}", program.display(), daemon.interface));
    serde_json::from_str(&printed).unwrap()
}

/// As a user of the group that has this number, and of no other.
fn as_member(netns: &Netns, group: u32, arguments: &[&str]) -> Command {
    let mut command = netns.command("setpriv");
    command.args(["--reuid=61000", &format!("--regid={group}"), "--clear-groups"]);
    command.arg(wgsep_program("wgsep")).args(arguments);
    command
}

/// A tunnel with a preshared key that has carried something.
fn tunnel() -> Tunnel {
    let tunnel = Plan { preshared: true, ..Plan::new(Wgsep, Wgsep) }.build();
    until_ping(&tunnel.left.daemon.netns, tunnel.right.side.inner(Family::V4));
    tunnel
}

#[test]
fn the_answer_has_every_value_and_no_key_but_public_ones() {
    require!(Wgsep);
    let tunnel = tunnel();
    let Tunnel { left, right } = &tunnel;
    left.set_peer(right, "persistent-keepalive 25");
    // One that never answers, and has a preshared key of its own.
    let (stranger, psk) = (KeyPair::generate(), preshared_key());
    left.set_peer_key(&stranger.public, &psk, "10.99.0.0/16,fd99::/64");
    let answer =
        Uapi::connect_status(&left.daemon.interface).unwrap().transact("get=1\n\n").unwrap();

    let configured = left.daemon.wg("showconf", "");
    let secrets = configured.lines().filter_map(|line| {
        let (name, value) = line.split_once(" = ")?;
        ["PrivateKey", "PresharedKey"].contains(&name).then(|| value.to_owned())
    });
    let secrets: Vec<_> = secrets.collect();
    assert_eq!(secrets.len(), 3, "{configured}");
    for secret in &secrets {
        assert!(!answer.contains(secret.as_str()) && !answer.contains(&hex(secret)), "{answer}");
    }
    // Nothing else that could be a key: what is as long as one is a peer's public key.
    let public =
        [&right.key.public, &stranger.public].map(|key| format!("public_key={}", hex(key)));
    for line in answer.lines() {
        let value = line.split_once('=').unwrap().1;
        assert!(value.len() < 43 || public.iter().any(|key| key == line), "{line}");
    }
    assert_eq!(answer.matches("public_key=").count(), 2);

    let statistics = stats(&left.daemon);
    let peers = statistics["peers"].as_array().unwrap();
    let shown = left.daemon.peers();
    assert_eq!(peers.len(), 2);
    // Sorted: the one that is connected first.
    let peer = &peers[0];
    let known = shown.iter().find(|peer| peer.public_key == right.key.public).unwrap();
    assert_eq!(peer["public_key"], *right.key.public);
    assert_eq!(peer["state"], "established");
    assert_eq!(peer["endpoint"], right.endpoint(Family::V4).to_string());
    assert_eq!(peer["persistent_keepalive"], 25);
    assert_eq!(peer["latest_handshake"].to_string(), known.latest_handshake.to_string());
    assert!(peer["rx_bytes"].as_u64().unwrap() >= 148 && peer["tx_bytes"].as_u64().unwrap() >= 148);
    assert!(peer["rx_packets"].as_u64().unwrap() >= 2 && peer["tx_packets"].as_u64().unwrap() >= 2);
    assert!(peer["handshakes"]["completed"].as_u64().unwrap() >= 1, "{peer}");
    let round_trip = peer["round_trip_seconds"].as_f64().unwrap();
    assert!(round_trip > 0.0 && round_trip < 5.0, "{peer}");
    let allowed_ips = peer["allowed_ips"].as_array().unwrap();
    assert_eq!(allowed_ips.len(), known.allowed_ips.split(',').count());
    let other = &peers[1];
    assert_eq!(other["public_key"], *stranger.public);
    assert_eq!((&other["state"], &other["endpoint"]), (&"idle".into(), &Value::Null));
    assert_eq!(other["allowed_ips"], serde_json::json!(["10.99.0.0/16", "fd99::/64"]));
    assert!(statistics["drops"].as_object().unwrap().len() > 30);
}

/// Both ends count the same, in each way that packets are sent.
#[test]
fn packets_are_counted_as_they_are_on_the_other_side() {
    require!(Wgsep);
    let tunnel = tunnel();
    let Tunnel { left, right } = &tunnel;
    let passes = |load| {
        let address = right.side.inner(Family::V4);
        let _received = iperf(&left.daemon.netns, &right.daemon.netns, address, load);
    };
    passes(Load::Udp);
    let count = |end: &End, what: &str| stats(&end.daemon)["peers"][0][what].as_u64().unwrap();
    for (from, to) in [(left, right), (right, left)] {
        wait::until("all has arrived", LIMIT, || {
            count(from, "tx_packets") == count(to, "rx_packets")
                && count(from, "tx_bytes") == count(to, "rx_bytes")
        });
    }
    assert!(count(left, "tx_packets") > 400);
    // Many segments in one send are many packets. Some may be lost on the way.
    passes(Load::Tcp);
    let (sent, packets) = (count(left, "tx_bytes"), count(left, "tx_packets"));
    let mean = sent / packets;
    assert!((1000..=1500).contains(&mean), "{sent} bytes in {packets} packets");
    assert!(count(right, "rx_packets") > packets / 2);
}

#[test]
fn members_of_the_group_read_the_status_without_root_and_nothing_else() {
    require!(Wgsep);
    let netns = Netns::new();
    let daemon = Daemon::start_with(Wgsep, &netns, |command| {
        command.args(["--status-group", &GROUP.to_string()]);
    });
    let found = fs::metadata(status_path(&daemon.interface)).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (0, GROUP, 0o660));
    let said = run(&mut as_member(&netns, GROUP, &["stats", &daemon.interface]));
    assert!(said.contains("0 packets dropped"), "{said}");
    let exposition =
        run(&mut as_member(&netns, GROUP, &["stats", "--prometheus", &daemon.interface]));
    assert!(exposition.contains("wgsep_up{") && exposition.contains("} 1\n"), "{exposition}");

    let refused = output(&mut as_member(&netns, GROUP + 1, &["stats", &daemon.interface]));
    let line = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(
        line.contains("become a member of the group that has it") && line.lines().count() == 1,
        "{line}"
    );
    // The UAPI is still root's.
    assert_eq!(fs::metadata(socket_path(&daemon.interface)).unwrap().mode() & 0o7777, 0o600);
    let mut wg = netns.command("setpriv");
    wg.args(["--reuid=61000", &format!("--regid={GROUP}"), "--clear-groups", "wg", "show"]);
    let shown = output(wg.arg(&daemon.interface));
    assert!(!shown.status.success(), "{shown:?}");
    // wg(8) takes it for no interface.
    let interfaces = netns.run("wg show interfaces");
    assert!(!interfaces.contains("status"), "{interfaces}");
}

/// The capabilities of the shipped unit, without the right to change the owner of files.
#[test]
fn the_group_gets_the_socket_without_cap_chown_and_the_mode_is_the_operators() {
    require!(Wgsep);
    let netns = Netns::new();
    let interface = unique_interface();
    let mut command = netns.command("setpriv");
    command.args(["--bounding-set=-chown,-fowner,-fsetid,-dac_override"]);
    command.arg(wgsep_program("wgsep")).args(["-f", &interface]);
    command.args(["--status-group", &GROUP.to_string(), "--status-mode", "0640"]);
    let mut daemon = Process::spawn(command, "wgsep without CAP_CHOWN");
    wait::until("it has started", LIMIT, || {
        assert_eq!(daemon.try_exit(), None, "{}", daemon.log());
        daemon.log().contains("started: ")
    });
    let found = fs::metadata(status_path(&interface)).unwrap();
    assert_eq!((found.gid(), found.mode() & 0o7777), (GROUP, 0o640));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.exit_within(LIMIT).code(), Some(0), "{}", daemon.log());
    assert!(!status_path(&interface).exists());
}

/// In a machine of its own, whose groups are these.
fn with_groups(netns: &Netns, interface: &str, groups: &str, mode: &str) -> Process {
    let script = format!(
        "mount -t tmpfs -o mode=0755 none /run; mkdir -m {mode} /run/wireguard
        cp /etc/group /run/group; printf '{groups}' >>/run/group; mount --bind /run/group /etc/group
        exec \"$@\""
    );
    let mut command = netns.command("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-ec", &script, "sh"]);
    command.arg(wgsep_program("wgsep")).args(["-f", interface]);
    let mut daemon = Process::spawn(command, "wgsep with groups of its own");
    wait::until("it has started", LIMIT, || {
        assert_eq!(daemon.try_exit(), None, "{}", daemon.log());
        daemon.log().contains("started: ")
    });
    daemon
}

#[test]
fn it_is_the_group_wgseps_by_default_where_there_is_one_and_roots_elsewhere() {
    require!(Wgsep);
    let netns = Netns::new();
    for (groups, mode, expected, warns) in [
        ("", "0755", (0, 0o600), false),
        ("wgsep:x:4242:\\n", "0755", (GROUP, 0o660), false),
        ("wgsep:x:4242:\\n", "0700", (GROUP, 0o660), true),
    ] {
        let interface = unique_interface();
        let mut daemon = with_groups(&netns, &interface, groups, mode);
        let path = format!("/proc/{}/root/run/wireguard/{interface}.status", daemon.pid());
        let found = fs::metadata(path).unwrap();
        assert_eq!((found.gid(), found.mode() & 0o7777), expected, "{groups:?}");
        let log = daemon.log();
        assert_eq!(log.contains("cannot be searched by group 4242"), warns, "{log}");
        assert!(!warns || log.contains("chmod a+x /var/run/wireguard"), "{log}");
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.exit_within(LIMIT).code(), Some(0), "{}", daemon.log());
    }
}

#[test]
fn a_group_or_a_mode_that_makes_no_sense_is_refused_before_anything_is_made() {
    require!(Wgsep);
    let netns = Netns::new();
    for (options, status, reason) in [
        (
            &["--status-group", "no-such-group"][..],
            1,
            "no group \"no-such-group\"; create it: groupadd --system no-such-group",
        ),
        (&["--status-mode", "0777"], 2, "is not an octal mode up to 0666"),
        (&["--status-mode", "rw"], 2, "is not an octal mode up to 0666"),
        (&["--status-mode=-1"], 2, "is not an octal mode up to 0666"),
    ] {
        let interface = unique_interface();
        let mut command = netns.command(wgsep_program("wgsep"));
        let done = output(command.args(["-f", &interface]).args(options));
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(status), "{options:?}: {said}");
        assert!(said.contains(reason) && said.lines().count() == 1, "{options:?}: {said}");
        assert!(!socket_path(&interface).exists() && !status_path(&interface).exists());
    }
}

#[test]
fn a_stale_socket_is_replaced_and_anything_else_is_left_alone() {
    require!(Wgsep);
    let netns = Netns::new();
    fs::create_dir_all(SOCKETS).unwrap();
    // Of a daemon that was killed.
    let interface = unique_interface();
    drop(UnixListener::bind(status_path(&interface)).unwrap());
    let mut daemon = Daemon::start_on(&interface, Wgsep, &netns, |_| {});
    assert!(stats(&daemon)["peers"].is_array());
    // It may be removed, and the daemon goes on: `wgsep stats` has the counters all the same.
    fs::remove_file(status_path(&interface)).unwrap();
    assert_eq!(stats(&daemon)["peers"], serde_json::json!([]));
    assert!(daemon.has_socket());
    daemon.process.signal(Signal::SIGTERM);
    assert_eq!(daemon.process.exit_within(LIMIT).code(), Some(0), "{}", daemon.process.log());

    for wanted in [false, true] {
        let interface = unique_interface();
        let path = status_path(&interface);
        fs::write(&path, "mine").unwrap();
        let reason = format!("{} exists and is not a socket; move it away", path.display());
        if wanted {
            let mut command = netns.command(wgsep_program("wgsep"));
            command.args(["-f", &interface, "--status-group", "0"]);
            let done = output(&mut command);
            let said = String::from_utf8_lossy(&done.stderr);
            assert_eq!(done.status.code(), Some(1), "{said}");
            assert!(said.contains(&reason), "{said}");
        } else {
            let mut daemon = Daemon::start_on(&interface, Wgsep, &netns, |_| {});
            let log = daemon.process.log();
            assert!(log.contains(&reason) && log.contains("there is no status socket"), "{log}");
            daemon.process.signal(Signal::SIGTERM);
            assert_eq!(daemon.process.exit_within(LIMIT).code(), Some(0));
            assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
            // Which removes what a killed one may have left.
            drop(daemon);
            fs::write(&path, "mine").unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
        fs::remove_file(path).unwrap();
    }
}

/// With the file, its owner and mode, the counters, and those who watch.
#[test]
fn an_upgrade_hands_over_the_socket_and_every_counter() {
    require!(Wgsep);
    let (left, right) = wgsep_tests::link::joined();
    let start = |netns: &Arc<Netns>| {
        Daemon::start_with(Wgsep, netns, |command| {
            command.args(["--status-group", &GROUP.to_string()]);
        })
    };
    let tunnel = Tunnel {
        left: End::new(Side::Left, start(&left)),
        right: End::new(Side::Right, start(&right)),
    };
    for (end, other) in tunnel.directions() {
        end.configure(&other.key.public, Some(other.endpoint(Family::V4)), None);
    }
    let Tunnel { left, right } = &tunnel;
    let daemon = &left.daemon;
    until_ping(&daemon.netns, right.side.inner(Family::V4));
    let watching = Watching::start(daemon);
    let before = stats(daemon);
    let file = fs::metadata(status_path(&daemon.interface)).unwrap();
    daemon.netns.run(format!("{} upgrade {}", wgsep_program("wgsep").display(), daemon.interface));
    let after = stats(daemon);
    let peer = |statistics: &Value| {
        let mut peer = statistics["peers"][0].clone();
        // A keepalive may be sent at any time.
        for name in ["rx_bytes", "tx_bytes", "rx_packets", "tx_packets"] {
            let count = peer.as_object_mut().unwrap().remove(name).unwrap();
            assert!(count.as_u64().unwrap() >= 2, "{name} of {statistics}");
        }
        peer
    };
    assert_eq!(peer(&before), peer(&after));
    let same = fs::metadata(status_path(&daemon.interface)).unwrap();
    assert_eq!((file.ino(), file.gid(), file.mode()), (same.ino(), same.gid(), same.mode()));
    // Whoever watches goes on with the new pair, once it has connected to that.
    wait::until("it watches the new pair", LIMIT, || {
        watching.events().iter().filter(|event| event["event"] == "watching").count() == 2
    });
    daemon.wg_set("listen-port 51999");
    watching.until(|event| event["event"] == "configuration");
    // A second time, and then the end: the file is the new pair's to remove.
    daemon.netns.run(format!("{} upgrade {}", wgsep_program("wgsep").display(), daemon.interface));
    assert!(stats(daemon)["peers"][0]["handshakes"]["completed"].as_u64().unwrap() >= 1);
    daemon.netns.run(format!("ip link del {}", daemon.interface));
    let removed = wait::poll(LIMIT, || (!status_path(&daemon.interface).exists()).then_some(()));
    assert!(removed.is_some(), "the socket is left: {}", daemon.process.log());
}

/// `wgsep watch --json` of a daemon.
struct Watching(Process);

impl Watching {
    /// Starts it, and waits until it watches.
    fn start(daemon: &Daemon) -> Self {
        let mut command = daemon.netns.command(wgsep_program("wgsep"));
        command.args(["watch", "--json", &daemon.interface]);
        let watching = Self(Process::spawn(command, "wgsep watch"));
        watching.until(|event| event["event"] == "watching");
        watching
    }

    fn events(&self) -> Vec<Value> {
        let log = self.0.log();
        let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Waits for an event, and returns it.
    #[track_caller]
    fn until(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        self.within(LIMIT, wanted)
    }

    #[track_caller]
    fn within(&self, limit: Duration, wanted: impl Fn(&Value) -> bool) -> Value {
        let found = wait::poll(limit, || self.events().into_iter().find(|event| wanted(event)));
        found.unwrap_or_else(|| panic!("no such event in {}", self.0.log()))
    }
}

#[test]
fn a_first_handshake_a_changed_configuration_and_a_moved_endpoint_are_events() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    let watching = Watching::start(&left.daemon);
    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    let of_peer = |name: &'static str| {
        let key = right.key.public.clone();
        move |event: &Value| event["event"] == name && event["public_key"] == *key
    };
    let connected = watching.until(of_peer("connect"));
    assert_eq!(connected["endpoint"], right.endpoint(Family::V4).to_string());
    assert_eq!(connected["interface"], *left.daemon.interface);
    // It moves with a data packet: its port changes, and no handshake follows.
    right.daemon.wg_set("listen-port 51999");
    until_ping(&right.daemon.netns, left.side.inner(Family::V4));
    let moved = watching.until(of_peer("endpoint"));
    assert!(moved["endpoint"].as_str().unwrap().ends_with(":51999"), "{moved}");
    left.daemon.wg_set("fwmark 7");
    let configured = watching.until(|event| event["event"] == "configuration");
    assert_eq!(configured["peers"], 1);
}

#[test]
fn a_handshake_that_fails_is_an_event_with_its_cause() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    let watching = [left, right].map(|end| Watching::start(&end.daemon));
    left.set_peer_key(&right.key.public, &preshared_key(), "10.99.0.0/16");
    left.set_peer(right, "allowed-ips 0.0.0.0/0 persistent-keepalive 1");
    let failed = |watching: &Watching, cause: &str| {
        watching.until(|event| event["event"] == "handshake_failed" && event["cause"] == *cause)
    };
    assert_eq!(failed(&watching[0], "bad_response")["public_key"], *right.key.public);
    assert_eq!(failed(&watching[1], "unconfirmed")["public_key"], *left.key.public);
    // What is not WireGuard of anybody here.
    let to = left.endpoint(Family::V4);
    right.daemon.netns.inside(|| {
        let socket = UdpSocket::bind((Side::Right.outer(Family::V4), 0)).unwrap();
        let mut initiation = [0; 148];
        initiation[0] = 1;
        socket.send_to(&initiation, to).unwrap();
    });
    let event = failed(&watching[0], "bad_mac1");
    assert!(event["public_key"].is_null() && event["endpoint"].is_string(), "{event}");
}

#[test]
fn an_offload_that_the_path_refuses_is_lost() {
    require!(Wgsep);
    let tunnel = tunnel();
    let Tunnel { left, right } = &tunnel;
    let watching = Watching::start(&left.daemon);
    // Segments no longer fit, and the kernel refuses to make and to fragment them.
    for end in [left, right] {
        end.daemon.netns.run(format!("ip link set {DEVICE} mtu 1300"));
    }
    let passes = || {
        let address = right.side.inner(Family::V4);
        iperf(&left.daemon.netns, &right.daemon.netns, address, Load::Tcp)
    };
    let _received = passes();
    let lost = watching.until(|event| event["event"] == "offload_lost");
    assert_eq!(lost["offload"], "udp_gso");
    // An endpoint that is set anew may have another path, which is tried again.
    for end in [left, right] {
        end.daemon.netns.run(format!("ip link set {DEVICE} mtu 1500"));
    }
    let regained = wait::poll(LIMIT, || {
        let _received = passes();
        watching.events().into_iter().find(|event| event["event"] == "offload_regained")
    });
    assert_eq!(regained.unwrap()["offload"], "udp_gso");
}

/// In real time: three minutes and some seconds.
#[test]
fn a_peer_rekeys_after_two_minutes_and_disconnects_after_three_silent_ones() {
    require!(Wgsep);
    let [busy, silent] = [tunnel(), tunnel()];
    let watching = [&busy, &silent].map(|tunnel| Watching::start(&tunnel.left.daemon));
    busy.left.set_peer(&busy.right, "persistent-keepalive 1");
    silent.right.daemon.netns.run(format!("ip link set {} down", silent.right.daemon.interface));
    let of = |name: &'static str, tunnel: &Tunnel| {
        let key = tunnel.right.key.public.clone();
        move |event: &Value| event["event"] == name && event["public_key"] == *key
    };
    watching[0].within(Duration::from_secs(150), of("rekey", &busy));
    watching[1].within(Duration::from_secs(100), of("disconnect", &silent));
    assert!(!watching[0].events().iter().any(|event| event["event"] == "disconnect"));
    // And it connects again.
    silent.right.daemon.netns.run(format!("ip link set {} up", silent.right.daemon.interface));
    until_ping(&silent.right.daemon.netns, silent.left.side.inner(Family::V4));
    watching[1].until(of("connect", &silent));
}

#[test]
fn stats_can_be_repeated_and_watch_ends_with_the_daemon() {
    require!(Wgsep);
    let mut daemon = Daemon::start(Wgsep, &Netns::new());
    let mut command = daemon.netns.command(wgsep_program("wgsep"));
    command.args(["stats", "--json", "--watch=1", &daemon.interface]);
    let repeated = Process::spawn(command, "wgsep stats --watch");
    wait::until("two answers", LIMIT, || repeated.log().lines().count() >= 2);
    for line in repeated.log().lines().take(2) {
        assert!(serde_json::from_str::<Value>(line).is_ok(), "{line}");
    }
    let mut watching = Watching::start(&daemon);
    daemon.process.signal(Signal::SIGTERM);
    assert_eq!(daemon.process.exit_within(LIMIT).code(), Some(0));
    assert_eq!(watching.0.exit_within(LIMIT).code(), Some(2));
    let said = watching.0.log();
    assert!(said.contains(&format!("the daemon of {} has ended; ", daemon.interface)), "{said}");
    let none = output(Command::new(wgsep_program("wgsep")).args(["watch", &daemon.interface]));
    let line = String::from_utf8_lossy(&none.stderr);
    assert_eq!(none.status.code(), Some(2), "{none:?}");
    assert!(line.contains("no daemon serves") && line.lines().count() == 1, "{line}");
}

/// Serves the status socket of an interface until it is dropped, for each connection as `serve` does, and counts them.
struct OtherProgram {
    path: PathBuf,
    connections: Arc<AtomicUsize>,
}

impl OtherProgram {
    fn serve(interface: &str, serve: fn(UnixStream)) -> Self {
        fs::create_dir_all(SOCKETS).unwrap();
        let path = status_path(interface);
        let listener = UnixListener::bind(&path).unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        // It ends with the test's process.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                count.fetch_add(1, Ordering::Relaxed);
                serve(client);
            }
        });
        Self { path, connections }
    }
}

impl Drop for OtherProgram {
    fn drop(&mut self) {
        let _gone = fs::remove_file(&self.path);
    }
}

#[test]
fn watch_gives_up_what_is_no_daemon_and_connects_seldom() {
    const MOST: usize = 100;
    let drips = |mut client: UnixStream| {
        while client.write_all(b"=").is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    };
    let floods = |mut client: UnixStream| while client.write_all(&[b'='; 4096]).is_ok() {};
    // What the line says does not depend on what the connection of the moment has come to when the time is over.
    let drops_late = |client| {
        thread::sleep(Duration::from_secs(3));
        drop(client);
    };
    let watched: [(fn(UnixStream), _); 4] = [
        (drop, "is served by another program, or by another version of wgsep"),
        (drops_late, "is served by another program, or by another version of wgsep"),
        (drips, "does not answer within 5 s"),
        (floods, "does not answer"),
    ];
    let watched = watched.map(|(serve, why)| {
        let interface = unique_interface();
        let other = OtherProgram::serve(&interface, serve);
        let mut command = Command::new(wgsep_program("wgsep"));
        command.args(["watch", &interface]);
        (Process::spawn(command, "wgsep watch"), other, why)
    });
    for (mut watching, other, why) in watched {
        assert_eq!(watching.exit_within(LIMIT).code(), Some(2));
        let said = watching.log();
        assert!(said.contains(why) && said.lines().count() == 1, "{said}");
        let connections = other.connections.load(Ordering::Relaxed);
        assert!((1..MOST).contains(&connections), "{connections}");
    }

    // One that begins as a daemon does.
    let begins = |mut client: UnixStream| {
        let _gone = client.write_all(b"event=watching\ntime_sec=1\ntime_nsec=0\npeers=0\n\n");
    };
    let interface = unique_interface();
    let other = OtherProgram::serve(&interface, begins);
    let mut command = Command::new(wgsep_program("wgsep"));
    command.args(["watch", &interface]);
    let start = Instant::now();
    let watching = Process::spawn(command, "wgsep watch");
    wait::until("it connects again", LIMIT, || other.connections.load(Ordering::Relaxed) > 5);
    let (lines, tenths) = (watching.log().lines().count(), start.elapsed().as_millis() / 100);
    assert!(lines as u128 <= tenths + 2, "{lines} lines in {tenths} tenths of a second");
}
