//! Start and end: what is there when the daemon says it is ready, and what is left when it ends,
//! whichever process ends it, and however.
#![allow(clippy::unwrap_used)]

use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fs, io, thread};

use nix::sys::signal::{SigSet, Signal, kill, raise};
use nix::unistd::{Pid, getsid};
use wgsep_tests::daemon::{Daemon, remove_files, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::Family;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{Process, stop};
use wgsep_tests::procfs::{is_running, with_argument};
use wgsep_tests::skip::skip;
use wgsep_tests::traffic::{Load, Pinging, iperf, ping, until_ping};
use wgsep_tests::tunnel::{PORT, Plan, Tunnel};
use wgsep_tests::wait::{self, Ends};
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{procfs, require, uapi};

/// Within this time of the cause, processes, interface and socket are gone.
const END_LIMIT: Duration = Duration::from_secs(1);
/// Where the cause is all that is to be shown, and not how soon, a busy machine has more.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running daemon, and who it consists of, noted before it ends.
struct Ending {
    daemon: Daemon,
    dataplane: Pid,
}

impl Ending {
    fn new() -> Self {
        let daemon = Daemon::start(Wgsep, &Netns::new());
        let dataplane = daemon.dataplane();
        assert!(daemon.has_interface() && daemon.has_socket());
        Self { daemon, dataplane }
    }

    /// Asserts that all of it goes within the limit and gives the helper's exit status.
    #[track_caller]
    fn complete(mut self) -> ExitStatus {
        self.complete_within(END_LIMIT)
    }

    #[track_caller]
    fn complete_within(&mut self, limit: Duration) -> ExitStatus {
        let status = self.daemon.process.exit_within(limit);
        wait::until("the dataplane is gone", limit, || !is_running(self.dataplane));
        wait::until("the interface is gone", limit, || !self.daemon.has_interface());
        wait::until("the socket is gone", limit, || !self.daemon.has_socket());
        status
    }
}

#[test]
fn sigterm_ends_it_in_order() {
    require!(Wgsep);
    let ending = Ending::new();
    ending.daemon.process.signal(Signal::SIGTERM);
    assert_eq!(ending.complete().code(), Some(0));
}

#[test]
fn sigint_ends_it_in_order() {
    require!(Wgsep);
    let ending = Ending::new();
    ending.daemon.process.signal(Signal::SIGINT);
    assert_eq!(ending.complete().code(), Some(0));
}

/// The signal is pending before the first instruction, and so at each step of the start.
#[test]
fn sigterm_and_sigint_during_the_start_end_it_in_order() {
    require!(Wgsep);
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let (netns, interface) = (Netns::new(), unique_interface());
        let mut command = Wgsep.command(&netns, &interface);
        // SAFETY: both calls are async-signal-safe, as required between fork and exec.
        unsafe {
            command.pre_exec(move || {
                SigSet::from(signal).thread_block()?;
                raise(signal).map_err(Into::into)
            });
        }
        let mut process = Process::spawn(command, format!("{signal} during the start"));
        let status = process.exit_within(PATIENCE);
        let log = process.log();
        assert_eq!(status.code(), Some(0), "{log}");
        let expected = format!("ended: {signal}, before the dataplane was ready");
        assert!(log.contains(&expected) && !log.contains("again"), "{log}");
        assert!(!socket_path(&interface).exists(), "{log}");
        assert!(!netns.run("ip -o link").contains(&interface), "{log}");
    }
}

/// Until the program has blocked the signals, which is its first step that matters, they end it by themselves.
#[test]
fn sigterm_at_any_moment_of_the_start_is_no_failure() {
    require!(Wgsep);
    let netns = Netns::new();
    for delay in (0..60).map(|step| step * Duration::from_micros(500)) {
        let interface = unique_interface();
        let command = Wgsep.command(&netns, &interface);
        let mut process = Process::spawn(command, format!("SIGTERM after {delay:?}"));
        std::thread::sleep(delay);
        process.signal(Signal::SIGTERM);
        let status = process.exit_within(PATIENCE);
        let is_orderly = status.success() || status.signal() == Some(Signal::SIGTERM as i32);
        assert!(is_orderly, "{delay:?}: {status}, {}", process.log());
        assert!(!socket_path(&interface).exists(), "{delay:?}");
        wait::until("the interface is gone", PATIENCE, || {
            !netns.run("ip -o link").contains(&interface)
        });
    }
}

#[test]
fn deleting_the_interface_ends_it_in_order() {
    require!(Wgsep);
    let ending = Ending::new();
    ending.daemon.netns.run(format!("ip link del {}", ending.daemon.interface));
    assert_eq!(ending.complete().code(), Some(0));
}

/// By a program that deletes what it does not know. The start is held up at one call after the other.
#[test]
fn deleting_the_interface_at_any_moment_of_the_start_ends_it_in_order() {
    require!(Wgsep);
    if Command::new("strace").arg("-V").output().is_err() {
        return skip("strace is missing: install it to hold up the start of a daemon");
    }
    let (netns, elsewhere) = (Netns::new(), Netns::new());
    let ioctls = (1..10).map(|number| ("ioctl", number, None));
    let requests = (1..4).map(|number| ("sendto", number, None));
    let moved = [1, 2, 3].map(|number| ("sendto", number, Some(&elsewhere)));
    for (call, number, to) in ioctls.chain(requests).chain(moved) {
        let interface = unique_interface();
        let mut command = netns.command("strace");
        command.args(["-f", "-qq", "-o", "/dev/null", "-e"]);
        command.arg(format!("inject={call}:delay_enter=300000:when={number}"));
        command.arg(wgsep_program("wgsep")).args(["-f", &interface]);
        let mut names = vec![interface.clone()];
        if let Some(to) = to {
            command.args(["--tun-netns", to.name()]);
            names.push("wgsep0".to_owned());
        }
        let what = format!("{call} {number} {to:?}");
        let mut process = Process::spawn(command, what.clone());
        wait::until(&what, PATIENCE, || {
            let places = [Some(&netns), to].into_iter().flatten();
            places
                .flat_map(|place| names.iter().map(move |name| (place, name)))
                .any(|(place, name)| place.output(format!("ip link del {name}")).status.success())
        });
        let status = process.exit_within(PATIENCE);
        let log = process.log();
        assert_eq!(status.code(), Some(0), "{what}: {log}");
        assert!(log.contains("ended: the interface was deleted"), "{what}: {log}");
        assert!(!socket_path(&interface).exists(), "{what}: {log}");
    }
}

/// The old daemon is held up in its end, as it may be on a busy machine: a script that deletes an
/// interface and makes it anew does not wait for that.
#[test]
fn the_name_of_a_deleted_interface_can_be_had_again_at_once() {
    require!(Wgsep);
    let old = Ending::new();
    let (netns, interface) = (Arc::clone(&old.daemon.netns), old.daemon.interface.clone());
    let old_dataplane = old.dataplane;
    stop(old_dataplane);
    netns.run(format!("ip link del {interface}"));

    let mut command = netns.command(wgsep_program("wgsep"));
    command.args([&interface, "--foreground"]);
    let process = Process::spawn(command, "wgsep again");
    let mut new = Daemon { process, interface, netns };
    wait::until("the new interface is there", END_LIMIT, || new.has_interface());
    kill(old_dataplane, Signal::SIGCONT).unwrap();
    let Ending { daemon: mut old, .. } = old;
    assert_eq!(old.process.exit_within(END_LIMIT).code(), Some(0));
    wait::until("the new daemon answers", END_LIMIT, || {
        assert_eq!(new.process.try_exit(), None, "{}", new.process.log());
        uapi::is_answering(&new.interface)
    });
    // What the old one left behind as it went is not what the new one had made.
    assert!(socket_path(&new.interface).with_extension("sandbox").exists());
    new.process.signal(Signal::SIGTERM);
    assert_eq!(new.process.exit_within(END_LIMIT).code(), Some(0));
}

#[test]
fn removing_the_socket_ends_it_in_order() {
    require!(Wgsep);
    let ending = Ending::new();
    std::fs::remove_file(socket_path(&ending.daemon.interface)).unwrap();
    assert_eq!(ending.complete().code(), Some(0));
}

/// wg(8) finds a daemon by its socket's name, so an operator who renames the interface renames that, too.
#[test]
fn an_interface_and_its_socket_are_renamed_while_it_runs() {
    require!(Wgsep);
    let Ending { mut daemon, dataplane } = Ending::new();
    let new = unique_interface();
    daemon.netns.run(format!("ip link set {} name {new}", daemon.interface));
    std::fs::rename(socket_path(&daemon.interface), socket_path(&new)).unwrap();
    daemon.interface = new;
    daemon.wg_set(format!("listen-port {PORT}"));
    daemon.netns.run(format!("ip link set {} up", daemon.interface));
    assert_eq!(daemon.listen_port(), PORT);
    assert!(daemon.netns.run("ss -H -u -l -n").contains(&format!(":{PORT}")));
    daemon.process.signal(Signal::SIGTERM);
    assert_eq!(Ending { daemon, dataplane }.complete().code(), Some(0));
}

#[test]
fn removing_a_renamed_socket_ends_it_in_order() {
    require!(Wgsep);
    let Ending { mut daemon, dataplane } = Ending::new();
    let new = unique_interface();
    std::fs::rename(socket_path(&daemon.interface), socket_path(&new)).unwrap();
    daemon.netns.run(format!("ip link set {} name {new}", daemon.interface));
    daemon.interface = new;
    std::fs::remove_file(socket_path(&daemon.interface)).unwrap();
    assert_eq!(Ending { daemon, dataplane }.complete().code(), Some(0));
}

#[test]
fn moving_the_socket_elsewhere_ends_it_in_order() {
    require!(Wgsep);
    let mut ending = Ending::new();
    let socket = socket_path(&ending.daemon.interface);
    // A directory of the same file system, or it would be a copy.
    let elsewhere = socket.with_file_name("..").join(ending.daemon.interface.clone());
    std::fs::rename(&socket, &elsewhere).unwrap();
    std::fs::remove_file(&elsewhere).unwrap();
    assert_eq!(ending.complete_within(PATIENCE).code(), Some(0));
    let log = ending.daemon.process.log();
    assert!(log.contains("ended: the UAPI socket was removed"), "{log}");
}

#[test]
fn attack_09_the_dataplanes_death_ends_the_helper_with_an_error_that_names_the_signal() {
    require!(Wgsep);
    let ending = Ending::new();
    kill(ending.dataplane, Signal::SIGKILL).unwrap();
    wait::until("the helper tells why", END_LIMIT, || {
        let log = ending.daemon.process.log();
        log.contains("SIGKILL") || log.contains("signal 9")
    });
    assert_eq!(ending.complete().code(), Some(1));
}

/// As by a filter; a supervisor is to start nothing again for an attacker's next try.
/// For which nix and libc have no name.
#[test]
fn attack_09_a_death_by_a_real_time_signal_names_its_number() {
    require!(Wgsep);
    let mut ending = Ending::new();
    // SAFETY: plain integers.
    let sent = unsafe { nix::libc::kill(ending.dataplane.as_raw(), 37) };
    assert_eq!(sent, 0);
    let status = ending.complete_within(END_LIMIT);
    let log = ending.daemon.process.log();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("the dataplane was killed by real-time signal 37"), "{log}");
}

#[test]
fn attack_09_a_death_by_sigsys_has_an_exit_status_of_its_own() {
    require!(Wgsep);
    let ending = Ending::new();
    kill(ending.dataplane, Signal::SIGSYS).unwrap();
    assert_eq!(ending.complete().code(), Some(76));
}

/// Nobody is left to unlink the socket; the next daemon replaces it.
#[test]
fn attack_09_the_helpers_death_ends_the_dataplane_and_the_interface() {
    require!(Wgsep);
    let Ending { mut daemon, dataplane } = Ending::new();
    daemon.process.signal(Signal::SIGKILL);
    let status = daemon.process.exit_within(END_LIMIT);
    assert_eq!(status.signal(), Some(Signal::SIGKILL as i32));
    wait::until("the dataplane is gone", END_LIMIT, || !is_running(dataplane));
    wait::until("the interface is gone", END_LIMIT, || !daemon.has_interface());
}

#[test]
fn attack_09_a_death_under_load_ends_all_within_a_second() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = tunnel;
    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    let _load = left.daemon.netns.spawn(format!("ping -f {}", right.side.inner(Family::V4)));
    let dataplane = right.daemon.dataplane();
    kill(dataplane, Signal::SIGKILL).unwrap();
    assert_eq!(Ending { daemon: right.daemon, dataplane }.complete().code(), Some(1));
}

/// What was started without `-f`, found by its interface's name; ended when dropped.
struct Background {
    netns: Arc<Netns>,
    interface: String,
}

impl Background {
    fn start() -> Self {
        let (netns, interface) = (Netns::new(), unique_interface());
        let program = wgsep_program("wgsep");
        let output = netns.output(format!("{} {interface}", program.display()));
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{}: {stderr}", output.status);
        Self { netns, interface }
    }

    fn helper(&self) -> Pid {
        let found = with_argument(&self.interface);
        let helpers: Vec<_> = found
            .into_iter()
            .filter(|pid| !wgsep_tests::procfs::children(*pid).is_empty())
            .collect();
        assert_eq!(helpers.len(), 1, "processes with a child: {helpers:?}");
        helpers[0]
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // The helper dies with the namespace.
        remove_files(&self.interface);
    }
}

/// wg-quick calls `wg setconf` the moment the command returns.
#[test]
fn in_the_background_it_returns_when_wg_works() {
    require!(Wgsep);
    let background = Background::start();
    let (netns, interface) = (&background.netns, &background.interface);
    netns.run(format!("wg set {interface} listen-port 51820 fwmark 0"));
    netns.run(format!("ip link set {interface} up"));
    assert_eq!(netns.run(format!("wg show {interface} listen-port")).trim(), "51820");
}

#[test]
fn in_the_background_it_leaves_the_session_directory_and_terminal() {
    require!(Wgsep);
    let background = Background::start();
    let helper = background.helper();
    assert_eq!(std::fs::read_link(format!("/proc/{helper}/cwd")).unwrap().to_str(), Some("/"));
    assert_ne!(getsid(Some(helper)).unwrap(), getsid(None).unwrap());
    let descriptors = wgsep_tests::procfs::descriptors(helper);
    for number in 0..=2 {
        let target = descriptors.get(&number).map(String::as_str);
        // The caller's pipes must be let go, or the caller waits for their end for ever. That
        // `output` returned at all shows it for 1 and 2.
        assert!(target != Some("/dev/tty"), "descriptor {number} is {target:?}");
    }
    kill(helper, Signal::SIGTERM).unwrap();
    wait::until("the helper is gone", END_LIMIT, || !is_running(helper));
    let socket = socket_path(&background.interface);
    wait::until("the socket is gone", END_LIMIT, || !socket.exists());
}

#[test]
fn in_the_background_a_failure_is_one_line_and_a_status() {
    require!(Wgsep);
    let first = Background::start();
    let program = wgsep_program("wgsep");
    let output = first.netns.output(format!("{} {}", program.display(), first.interface));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code().is_some_and(|code| code != 0), "{}", output.status);
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
    assert!(stderr.contains(&first.interface), "{stderr}");
    // And the first is none the worse.
    first.netns.run(format!("wg show {}", first.interface));
}

#[test]
fn the_link_goes_down_and_up_again() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    let (netns, interface) = (&left.daemon.netns, &left.daemon.interface);
    for _ in 0..3 {
        until_ping(netns, right.side.inner(Family::V4));
        netns.run(format!("ip link set {interface} down"));
        // Down means no socket: a port that is held is a surprise to a program that needs it.
        wait::until("the port is let go", END_LIMIT, || {
            !netns.run("ss -H -u -l -n").contains(":51820")
        });
        netns.run(format!("ip link set {interface} up"));
        // Taking a link down takes its IPv6 addresses, not its IPv4 ones.
    }
    until_ping(netns, right.side.inner(Family::V4));
    until_ping(&right.daemon.netns, left.side.inner(Family::V4));
    assert_eq!(left.daemon.listen_port(), 51820);
}

/// Opening the sockets takes the helper; a client that asks meanwhile sees the link as it is going to be.
#[test]
fn what_link_up_and_down_cause_is_there_when_wg_asks_next() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let (netns, interface) = (&daemon.netns, &daemon.interface);
    let key = KeyPair::generate();
    daemon.wg_conf("setconf", &format!("[Interface]\nPrivateKey = {}\n", key.private));
    let peer = KeyPair::generate().public;
    daemon.wg_set(format!("peer {peer} endpoint 127.0.0.1:9 persistent-keepalive 25"));
    for ups in 1..=20 {
        netns.run(format!("ip link set {interface} up"));
        assert_eq!(daemon.peer().sent, 148 * ups, "one initiation a time");
        assert_ne!(daemon.listen_port(), 0);
        netns.run(format!("ip link set {interface} down"));
    }
}

#[test]
fn the_mtu_is_1420_and_follows_the_operator() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    let address = right.side.inner(Family::V4);
    until_ping(&left.daemon.netns, address);
    let shown = left.daemon.netns.run(format!("ip link show {}", left.daemon.interface));
    assert!(shown.contains("mtu 1420"), "{shown}");
    for mtu in [1280, 1420, 9000] {
        for end in [&left.daemon, &right.daemon] {
            end.netns.run(format!("ip link set {} mtu {mtu}", end.interface));
        }
        // 28 bytes are the headers of IPv4 and ICMP.
        let size = mtu - 28;
        wait::until(&format!("a packet of {mtu} bytes passes"), Duration::from_secs(10), || {
            let line = format!("ping -n -q -c 1 -W 1 -M do -s {size} {address}");
            left.daemon.netns.output(line).status.success()
        });
        let tcp = iperf(&left.daemon.netns, &right.daemon.netns, address, Load::Tcp);
        assert!(tcp.bytes > 0, "MTU {mtu}: {tcp:?}");
    }
}

/// The sockets stay where they were opened, so a namespace can have nothing but the tunnel.
#[test]
fn an_interface_moved_to_another_namespace_works_there() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    let elsewhere = Netns::new();
    let interface = &left.daemon.interface;
    left.daemon.netns.run(format!("ip link set {interface} netns {}", elsewhere.name()));
    elsewhere.run(format!("ip addr add {}/24 dev {interface}", left.side.inner(Family::V4)));
    elsewhere.run(format!("ip link set {interface} up"));
    until_ping(&elsewhere, right.side.inner(Family::V4));
    let pings = ping(&elsewhere, right.side.inner(Family::V4), 5);
    assert_eq!(pings.received, 5, "{pings:?}");
}

/// The helper serves requests only: without it the tunnel keeps working.
#[test]
fn attack_09_a_stopped_helper_does_not_stop_the_traffic() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    stop(left.daemon.process.pid());
    let pinging = Pinging::start(&left.daemon.netns, right.side.inner(Family::V4));
    pinging.until_more(5);
    assert_eq!(left.daemon.listen_port(), 51820, "and wg(8) can look");
    left.daemon.process.signal(Signal::SIGCONT);
    left.daemon.wg_set("fwmark 7");
    pinging.until_more(5);

    // What needs it waits for it.
    stop(left.daemon.process.pid());
    left.daemon.netns.run(format!("ip link set {} down", left.daemon.interface));
    left.daemon.netns.run(format!("ip link set {} up", left.daemon.interface));
    left.daemon.process.signal(Signal::SIGCONT);
    pinging.until_more(5);
}

#[test]
fn ten_starts_and_ends_in_a_row_leave_nothing() {
    require!(Wgsep);
    for _ in 0..10 {
        let ending = Ending::new();
        ending.daemon.process.signal(Signal::SIGTERM);
        assert_eq!(ending.complete().code(), Some(0));
    }
}

/// As wg(8) does when it lists the interfaces, which monitoring may do at any time, but as often as possible.
#[test]
fn programs_that_remove_dead_daemons_sockets_do_not_keep_it_from_starting() {
    require!(Wgsep);
    let netns = Netns::new();
    for _ in 0..20 {
        let interface = unique_interface();
        let path = socket_path(&interface);
        let ended = AtomicBool::new(false);
        thread::scope(|threads| {
            threads.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    let refused =
                        |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
                    if UnixStream::connect(&path).is_err_and(refused) {
                        let _gone = fs::remove_file(&path);
                    }
                }
            });
            let _ends = Ends(&ended);
            let daemon = Daemon::start_on(&interface, Wgsep, &netns, |_| {});
            assert_eq!(daemon.listen_port(), 0);
        });
    }
}

/// No timer runs and no packet comes, so no thread wakes up; a poll, four times a second say, would show.
#[test]
fn an_idle_daemon_sleeps() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let daemon = &tunnel.left.daemon;
    let switches = || -> u64 {
        let helper = daemon.process.pid();
        let threads = [helper, daemon.dataplane()].into_iter().flat_map(procfs::threads);
        let count = |status: procfs::Status| -> u64 {
            status.text("voluntary_ctxt_switches").parse().unwrap()
        };
        threads.map(count).sum()
    };
    // A second, which a ping takes: what the start caused is over some time, and the sockets of other
    // tests, whose removal the helper is notified of, are not removed all the time.
    let quiet = || {
        let before = switches();
        let _clock = ping(&Netns::new(), Ipv4Addr::LOCALHOST.into(), 20);
        switches() - before
    };
    let woken = wait::poll(Duration::from_secs(60), || Some(quiet()).filter(|woken| *woken <= 1));
    assert!(woken.is_some(), "it wakes up {} times a second", quiet());
}
