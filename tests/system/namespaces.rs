//! The interface in one network namespace and its sockets in another: from the start, or because it was
//! moved. Its state is followed wherever it is, and whichever namespace goes first.
#![allow(clippy::unwrap_used)]

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use wgsep_tests::daemon::{Daemon, socket_path, unique_interface};
use wgsep_tests::implementation::{Implementation::Wgsep, wgsep_program};
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{Process, run};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::{End, PORT};
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{descriptors, require, uapi, wait};

const LIMIT: Duration = Duration::from_secs(5);

/// A daemon whose interface is elsewhere than its sockets, and its peer.
struct Apart {
    sockets: Arc<Netns>,
    daemon: Daemon,
    peer: End,
}

impl Apart {
    /// Configures a daemon whose sockets are in the left of two joined namespaces, and a peer in the
    /// right one.
    fn new(daemon: impl FnOnce(&Arc<Netns>) -> Daemon) -> Self {
        let (sockets, right) = link::joined();
        let daemon = daemon(&sockets);
        let peer = End::new(Side::Right, Daemon::start(Wgsep, &right));
        let key = KeyPair::generate();
        peer.configure(&key.public, None, None);
        daemon.wg_conf(
            "setconf",
            &format!(
                "[Interface]\nPrivateKey = {}\nListenPort = {PORT}\n\
                 [Peer]\nPublicKey = {}\nAllowedIPs = 192.168.77.2/32\nEndpoint = {}\n",
                key.private,
                peer.key.public,
                peer.endpoint(Family::V4),
            ),
        );
        Self { sockets, daemon, peer }
    }

    fn has_port(&self) -> bool {
        self.sockets.run("ss -H -u -l -n").contains(&format!(":{PORT}"))
    }

    /// Takes the interface up in the namespace where it is, and down again.
    #[track_caller]
    fn works_in(&self, netns: &Netns) {
        let interface = &self.daemon.interface;
        netns.run(format!("ip addr add {}/24 dev {interface}", Side::Left.inner(Family::V4)));
        netns.run(format!("ip link set {interface} up"));
        until_ping(netns, self.peer.side.inner(Family::V4));
        netns.run(format!("ip link set {interface} down"));
        wait::until("the port is let go", LIMIT, || !self.has_port());
        netns.run(format!("ip addr flush dev {interface}"));
    }

    fn move_interface(&self, from: &Netns, to: &Netns) {
        from.run(format!("ip link set {} netns {}", self.daemon.interface, to.name()));
    }
}

#[test]
fn the_interface_and_the_sockets_are_each_made_where_the_options_say() {
    require!(Wgsep);
    let (start, tun) = (Netns::new(), Netns::new());
    let apart = Apart::new(|sockets| {
        Daemon::start_with(Wgsep, &start, |command| {
            command.args(["--socket-netns", sockets.name(), "--tun-netns", tun.name()]);
        })
    });
    assert!(!apart.daemon.has_interface(), "the interface is where it was started");
    apart.works_in(&tun);
    apart.works_in(&tun);
    let elsewhere = Netns::new();
    apart.move_interface(&tun, &elsewhere);
    apart.works_in(&elsewhere);
}

#[test]
fn with_its_sockets_elsewhere_the_interface_is_where_the_daemon_was_started() {
    require!(Wgsep);
    let start = Netns::new();
    let apart = Apart::new(|sockets| {
        Daemon::start_with(Wgsep, &start, |command| {
            command.args(["--socket-netns", sockets.name()]);
        })
    });
    assert!(apart.daemon.has_interface(), "the interface is not where it was started");
    apart.works_in(&start);
    let elsewhere = Netns::new();
    apart.move_interface(&start, &elsewhere);
    apart.works_in(&elsewhere);
}

#[test]
fn both_options_may_name_the_same_namespace() {
    require!(Wgsep);
    let start = Netns::new();
    let apart = Apart::new(|sockets| {
        Daemon::start_with(Wgsep, &start, |command| {
            command.args(["--socket-netns", sockets.name(), "--tun-netns", sockets.name()]);
        })
    });
    apart.works_in(&apart.sockets);
}

#[test]
fn an_interface_that_is_moved_again_and_again_is_followed() {
    require!(Wgsep);
    let apart = Apart::new(|sockets| Daemon::start(Wgsep, sockets));
    let elsewhere = [Netns::new(), Netns::new(), Netns::new()];
    let mut at = &apart.sockets;
    for next in [&elsewhere[0], &elsewhere[1], &apart.sockets, &elsewhere[2], &elsewhere[0]] {
        apart.move_interface(at, next);
        apart.works_in(next);
        at = next;
    }
}

/// Without CAP_NET_BROADCAST the kernel does not tell what happens in other namespaces.
#[test]
fn without_the_capability_to_be_notified_a_moved_interface_is_looked_at() {
    require!(Wgsep);
    let apart = Apart::new(|sockets| {
        let interface = unique_interface();
        let mut command = sockets.command("setpriv");
        command.args(["--bounding-set", "-net_broadcast"]);
        command.arg(wgsep_program("wgsep")).args([&interface, "--foreground"]);
        let mut process = Process::spawn(command, "wgsep without CAP_NET_BROADCAST");
        wait::until("the daemon answers", Duration::from_secs(10), || {
            assert_eq!(process.try_exit(), None);
            uapi::is_answering(&interface)
        });
        Daemon { process, interface, netns: Arc::clone(sockets) }
    });
    let elsewhere = Netns::new();
    apart.works_in(&apart.sockets);
    apart.move_interface(&apart.sockets, &elsewhere);
    apart.works_in(&elsewhere);
    apart.works_in(&elsewhere);
}

#[test]
fn the_mtu_is_followed_in_another_namespace() {
    require!(Wgsep);
    let tun = Netns::new();
    let apart = Apart::new(|sockets| {
        Daemon::start_with(Wgsep, sockets, |command| {
            command.args(["--tun-netns", tun.name(), "--log-level", "debug"]);
        })
    });
    for mtu in [1300, 9000] {
        tun.run(format!("ip link set {} mtu {mtu}", apart.daemon.interface));
        wait::until("the MTU is reported", LIMIT, || {
            apart.daemon.process.log().contains(&format!("MTU is {mtu}"))
        });
    }
}

#[test]
fn namespaces_may_go_in_any_order() {
    require!(Wgsep);
    for sockets_first in [true, false] {
        let tun = Netns::new();
        let apart = Apart::new(|sockets| {
            Daemon::start_with(Wgsep, sockets, |command| {
                command.args(["--tun-netns", tun.name()]);
            })
        });
        let interface = apart.daemon.interface.clone();
        tun.run(format!("ip addr add {}/24 dev {interface}", Side::Left.inner(Family::V4)));
        tun.run(format!("ip link set {interface} up"));
        until_ping(&tun, apart.peer.side.inner(Family::V4));
        let Apart { sockets, mut daemon, peer } = apart;
        let ip_netns = |verb: &str| run(Command::new("ip").args(["netns", verb, sockets.name()]));
        if sockets_first {
            // Only the name is removed: the processes inside continue.
            ip_netns("del");
            assert!(uapi::is_answering(&interface));
            until_ping(&tun, peer.side.inner(Family::V4));
        }
        drop(tun);
        // With its namespace the interface goes, and with it the daemon, in order.
        assert_eq!(daemon.process.exit_within(LIMIT).code(), Some(0));
        assert!(!daemon.has_socket());
        if sockets_first {
            // For the harness, which deletes it at the end.
            ip_netns("add");
        }
    }
}

#[test]
fn a_name_is_taken_only_where_the_interface_is_to_be() {
    require!(Wgsep);
    let (start, tun) = (Netns::new(), Netns::new());
    let name = unique_interface();
    let program = wgsep_program("wgsep");
    let in_background =
        || start.output(format!("{} {name} --tun-netns {}", program.display(), tun.name()));
    tun.run(format!("ip link add {name} type bridge"));
    let refused = in_background();
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert!(stderr.contains(&format!("interface {name} already exists")), "{stderr}");
    assert_eq!(start.run("ip -o link").lines().count(), 1, "only the loopback is left here");
    tun.run(format!("ip link del {name}"));
    start.run(format!("ip link add {name} type bridge"));
    assert!(in_background().status.success());
    tun.run(format!("ip link del {name}"));
    wait::until("the daemon has ended", LIMIT, || !socket_path(&name).exists());
}

#[test]
fn a_namespace_that_is_not_there_or_may_not_be_entered_is_one_clear_line() {
    require!(Wgsep);
    let netns = Netns::new();
    let other = Netns::new();
    let program = wgsep_program("wgsep");
    let program = program.display();
    let interface = unique_interface();
    for option in ["--socket-netns", "--tun-netns"] {
        for (launcher, name, expected) in [
            (
                "",
                "wgsep-none",
                "there is no network namespace wgsep-none; make it: ip netns add wgsep-none",
            ),
            ("", "../etc", "bad network namespace name \"../etc\""),
            (
                "setpriv --bounding-set -sys_admin",
                other.name(),
                "CAP_SYS_ADMIN is missing; run as root",
            ),
        ] {
            let line = format!("{launcher} {program} {interface} --foreground {option} {name}");
            let output = netns.output(line.trim());
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{stderr}");
            assert!(stderr.contains(expected), "{stderr}");
            assert_eq!(stderr.lines().count(), 1, "{stderr}");
        }
    }
}

/// The file behind a name, which goes with this.
struct InTheWay(PathBuf);

impl InTheWay {
    /// Beside the namespaces, made by `make`.
    fn new(make: impl FnOnce(&Path)) -> Self {
        let path = Path::new("/run/netns").join(unique_interface());
        make(&path);
        Self(path)
    }
}

impl Drop for InTheWay {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0).or_else(|_| std::fs::remove_file(&self.0));
    }
}

/// Opening a FIFO waits for a writer, unless it is asked not to.
#[test]
fn what_has_the_name_of_a_namespace_and_is_none_is_refused_at_once() {
    require!(Wgsep);
    let netns = Netns::new();
    let fifo = InTheWay::new(|path| nix::unistd::mkfifo(path, Mode::S_IRUSR).unwrap());
    let socket = InTheWay::new(|path| drop(UnixListener::bind(path).unwrap()));
    let file = InTheWay::new(|path| std::fs::write(path, "").unwrap());
    let directory = InTheWay::new(|path| std::fs::create_dir(path).unwrap());
    for InTheWay(path) in [&fifo, &socket, &file, &directory] {
        let name = path.file_name().unwrap();
        for option in ["--socket-netns", "--tun-netns"] {
            let mut command = netns.command(wgsep_program("wgsep"));
            command.args(["--foreground", option]).arg(name).arg(unique_interface());
            let mut process = Process::spawn(command, "wgsep");
            assert_eq!(process.exit_within(LIMIT).code(), Some(1), "{option} {path:?}");
            let log = process.log();
            let why = format!("wgsep: {} is no network namespace; remove it", path.display());
            assert!(log.lines().count() == 1 && log.starts_with(&why), "{log}");
        }
    }
}

/// Starts a daemon in the foreground on a socket that is bound at `path`, and waits until it serves.
fn on_a_socket(netns: &Netns, interface: &str, path: &Path) -> Process {
    let listener = UnixListener::bind(path).unwrap();
    let mut command = netns.command(wgsep_program("wgsep"));
    let number = descriptors::give(&mut command, &listener);
    command.args(["--foreground", interface]).env("WG_UAPI_FD", number.to_string());
    let process = Process::spawn(command, "wgsep on a socket that it was given");
    wait::until("it has started", LIMIT, || process.log().contains("started: "));
    process
}

#[test]
fn a_daemon_of_the_same_name_in_another_namespace_takes_nothing_from_the_first() {
    require!(Wgsep);
    let first = Daemon::start(Wgsep, &Netns::new());
    let (elsewhere, scratch) = (Netns::new(), Scratch::new());
    let files =
        [socket_path(&first.interface), socket_path(&first.interface).with_extension("sandbox")];
    // It finds the socket in use,
    let program = wgsep_program("wgsep");
    let refused = elsewhere.output(format!("{} -f {}", program.display(), first.interface));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("in use by a running daemon"), "{said}");
    // or has one of its own in another place.
    let mut second = on_a_socket(&elsewhere, &first.interface, &scratch.join("sock"));
    assert!(files.iter().all(|file| file.exists()), "taken by the second's start");
    second.signal(Signal::SIGTERM);
    assert_eq!(second.exit_within(LIMIT).code(), Some(0), "{}", second.log());
    assert!(files.iter().all(|file| file.exists()), "taken by the second's end");
    assert!(uapi::is_answering(&first.interface));
    // The end of the first is not the second's.
    let second = on_a_socket(&elsewhere, &first.interface, &scratch.join("sock-2"));
    let interface = first.interface.clone();
    drop(first);
    wait::until("the first has ended", LIMIT, || !socket_path(&interface).exists());
    let asked = wgsep_tests::process::output(Command::new("ip").args([
        "-n",
        elsewhere.name(),
        "link",
        "show",
        &interface,
    ]));
    assert!(asked.status.success(), "the second has ended: {}", second.log());
    let _killed_with_its_report = std::fs::remove_file(&files[1]);
}

#[test]
fn a_socket_that_was_handed_over_ends_the_daemon_when_it_is_removed_and_stays_otherwise() {
    require!(Wgsep);
    for is_removed in [false, true] {
        let (netns, interface) = (Netns::new(), unique_interface());
        let socket = socket_path(&interface);
        let mut daemon = on_a_socket(&netns, &interface, &socket);
        assert!(uapi::is_answering(&interface));
        let report = socket.with_extension("sandbox");
        assert!(report.exists());
        if is_removed {
            std::fs::remove_file(&socket).unwrap();
        } else {
            daemon.signal(Signal::SIGTERM);
        }
        assert_eq!(daemon.exit_within(LIMIT).code(), Some(0), "{}", daemon.log());
        assert!(!report.exists());
        assert!(
            is_removed || std::fs::remove_file(&socket).is_ok(),
            "removed what it did not make"
        );
    }
}
