//! What a service manager receives from the daemon (sd_notify(3)), and when.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use wgsep_tests::daemon::{Daemon, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::stop;
use wgsep_tests::scratch::Scratch;
use wgsep_tests::{require, wait};

const LIMIT: Duration = Duration::from_secs(10);

fn next(manager: &UnixDatagram) -> String {
    let mut message = [0; 512];
    let length = manager.recv(&mut message).expect("the manager receives nothing more");
    String::from_utf8_lossy(&message[..length]).into_owned()
}

/// The next message other than those for the watchdog.
fn next_news(manager: &UnixDatagram) -> String {
    std::iter::repeat_with(|| next(manager)).find(|message| message != "WATCHDOG=1").unwrap()
}

/// A daemon with a watchdog of 200 ms, and the socket of its manager.
fn watched() -> (Daemon, UnixDatagram) {
    let scratch = Scratch::new();
    let path = scratch.join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let daemon = Daemon::start_with(Wgsep, &Netns::new(), |command| {
        command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "200000");
    });
    // The daemon is connected, so that the path is needed no more.
    (daemon, manager)
}

#[test]
fn the_manager_is_notified_of_readiness_life_and_the_end() {
    require!(Wgsep);
    let (mut daemon, manager) = watched();
    assert_eq!(next_news(&manager), format!("READY=1\nSTATUS=serving {}", daemon.interface));
    for _ in 0..3 {
        assert_eq!(next(&manager), "WATCHDOG=1");
    }
    daemon.process.signal(Signal::SIGTERM);
    assert_eq!(next_news(&manager), "FDSTOREREMOVE=1\nFDNAME=wgsep-tun");
    assert_eq!(next_news(&manager), "STOPPING=1\nSTATUS=SIGTERM");
    assert_eq!(daemon.process.exit_within(LIMIT).code(), Some(0));
}

/// The helper is as well as ever, so what it says must not be taken for the daemon's life.
#[test]
fn a_stopped_dataplane_ends_the_signs_of_life_until_it_continues_and_is_not_killed() {
    require!(Wgsep);
    /// Five times the interval of the signs.
    const SILENCE: Duration = Duration::from_millis(500);
    let (mut daemon, manager) = watched();
    let is_alive = || next(&manager) == "WATCHDOG=1";
    wait::until("it is alive", LIMIT, is_alive);
    stop(daemon.dataplane());
    // Those that were under way.
    manager.set_nonblocking(true).unwrap();
    while manager.recv(&mut [0; 512]).is_ok() {}
    manager.set_nonblocking(false).unwrap();
    manager.set_read_timeout(Some(SILENCE)).unwrap();
    // One answer may have crossed with the stop.
    let said = (0..2).filter(|_| manager.recv(&mut [0; 512]).is_ok()).count();
    assert!(said < 2, "WATCHDOG=1 is sent for a stopped dataplane");
    assert_eq!(daemon.process.try_exit(), None, "{}", daemon.process.log());
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    kill(daemon.dataplane(), Signal::SIGCONT).unwrap();
    for _ in 0..3 {
        assert!(is_alive());
    }
    daemon.wg("show", "listen-port");
}

/// systemd of a user, and container managers, give names of the abstract namespace, which is that of
/// the network namespace.
#[test]
fn a_manager_with_an_abstract_name_is_notified_and_without_an_interval_no_watchdog_is_fed() {
    require!(Wgsep);
    let netns = Netns::new();
    let name = unique_interface();
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let manager = netns.inside(|| UnixDatagram::bind_addr(&address).unwrap());
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let daemon = Daemon::start_with(Wgsep, &netns, |command| {
        command.env("NOTIFY_SOCKET", format!("@{name}"));
    });
    assert!(next(&manager).starts_with("READY=1\n"));
    kill(daemon.dataplane(), Signal::SIGKILL).unwrap();
    let end = next(&manager);
    assert!(end.starts_with("STOPPING=1\nSTATUS=") && end.contains("SIGKILL"), "{end}");
}

/// sd_notify(3) returns an error then, which programs may ignore.
#[test]
fn a_manager_that_cannot_be_reached_is_a_warning_and_the_daemon_serves() {
    require!(Wgsep);
    let (netns, scratch) = (Netns::new(), Scratch::new());
    let closed = scratch.join("closed");
    drop(UnixDatagram::bind(&closed).unwrap());
    let unsupported = "not a Unix socket; other forms, such as vsock:, are not supported";
    for (socket, reason) in [
        ("/run/without/a/listener", "No such file or directory (ENOENT)"),
        (closed.to_str().unwrap(), "Connection refused (ECONNREFUSED)"),
        ("@without-a-listener", "Connection refused (ECONNREFUSED)"),
        ("vsock:2:1234", unsupported),
        ("vsock-stream:2:1234", unsupported),
        ("relative/path", unsupported),
        (&*format!("/{}", "x".repeat(200)), "path must be shorter than SUN_LEN"),
        (&*format!("@{}", "x".repeat(200)), ""),
    ] {
        let daemon = Daemon::start_with(Wgsep, &netns, |command| {
            command.env("NOTIFY_SOCKET", socket).env("WATCHDOG_USEC", "200000");
        });
        let log = daemon.process.log();
        let warnings: Vec<_> = log.lines().filter(|line| line.contains(" WARN ")).collect();
        let expected =
            format!("cannot notify the service manager: NOTIFY_SOCKET is {socket}: {reason}");
        assert!(warnings.len() == 1 && warnings[0].contains(&expected), "{log}");
        let in_line = format!("wgsep[{}]", daemon.interface);
        assert!(warnings[0].contains(&in_line), "{log}");
        daemon.wg("show", "");
    }
}
