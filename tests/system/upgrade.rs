//! `wgsep upgrade`: the tunnel goes on while another pair takes its place, or nothing changes; and no nonce is used
//! twice, whichever process is killed when.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io::{IoSlice, Read as _, Write as _};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, ControlMessage, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, UnixAddr,
    recvfrom, sendmsg, setsockopt, socket, sockopt,
};
use nix::unistd::Pid;
use wgsep_tests::daemon::{Daemon, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{Process, output, stop};
use wgsep_tests::procfs::{
    children, describe_threads, is_reading, is_running, threads, with_argument,
};
use wgsep_tests::require;
use wgsep_tests::scratch::Scratch;
use wgsep_tests::skip::skip;
use wgsep_tests::traffic::{answers_at_once, ping, until_ping};
use wgsep_tests::tun_device;
use wgsep_tests::tunnel::{End, Plan, Tunnel};
use wgsep_tests::uapi::{Uapi, errno};
use wgsep_tests::wait::{self, Ends};
use wgsep_tests::wg::KeyPair;

/// Upgrades in a row.
const MANY: usize = 100;
const LIMIT: Duration = Duration::from_secs(10);
/// Longer than a pair waits for another one.
const PATIENCE: Duration = Duration::from_secs(20);

fn tunnel_with(options: &[&str]) -> Tunnel {
    let (left, right) = link::joined();
    let start = |netns| {
        Daemon::start_with(Wgsep, netns, |command| {
            command.args(options);
        })
    };
    let tunnel = Tunnel {
        left: End::new(Side::Left, start(&left)),
        right: End::new(Side::Right, start(&right)),
    };
    for (end, other) in tunnel.directions() {
        end.configure(&other.key.public, Some(other.endpoint(Family::V4)), None);
    }
    until_ping(&tunnel.left.daemon.netns, inner(&tunnel.right));
    tunnel
}

fn inner(end: &End) -> IpAddr {
    end.side.inner(Family::V4)
}

fn command(daemon: &Daemon) -> Command {
    let mut command = daemon.netns.command(wgsep_program("wgsep"));
    command.args(["upgrade", &daemon.interface]);
    command
}

#[track_caller]
fn upgrade(daemon: &Daemon) {
    let done = output(&mut command(daemon));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// An upgrade that must fail; its error line.
#[track_caller]
fn refused(done: &Output) -> String {
    let line = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!((done.status.code(), line.lines().count()), (Some(1), 1), "{line}");
    line
}

/// Every process of a daemon: those whose command line names the interface.
fn processes(daemon: &Daemon) -> Vec<Pid> {
    with_argument(&daemon.interface)
}

/// Each helper that runs, with its dataplane.
fn pairs(daemon: &Daemon) -> Vec<[Pid; 2]> {
    let pairs = processes(daemon).into_iter().filter_map(|helper| match children(helper)[..] {
        [dataplane] if is_dataplane(dataplane) => Some([helper, dataplane]),
        _ => None,
    });
    pairs.collect()
}

/// The helper and the dataplane that serve, once those before them have ended.
#[track_caller]
fn pair(daemon: &Daemon) -> [Pid; 2] {
    let only = wait::poll(PATIENCE, || match pairs(daemon)[..] {
        [pair] => Some(pair),
        _ => None,
    });
    let Some(pair) = only else {
        let all: Vec<_> = processes(daemon).into_iter().map(describe_threads).collect();
        panic!("{:?} of {all:#?}", pairs(daemon))
    };
    pair
}

/// No process and no interface is left. A process that ends closes its descriptors after it has lost its arguments.
fn has_ended(daemon: &Daemon) -> bool {
    processes(daemon).is_empty() && !daemon.has_interface()
}

fn is_dataplane(pid: Pid) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("wgsep-data"))
}

fn index(daemon: &Daemon) -> String {
    let line = daemon.netns.run(format!("ip -o link show {}", daemon.interface));
    line.split(':').next().unwrap().to_owned()
}

#[test]
fn a_hundred_upgrades_under_traffic_break_no_connection_and_cause_no_handshake() {
    require!(Wgsep);
    let tunnel = tunnel_with(&[]);
    let Tunnel { left, right } = &tunnel;
    let (near, far) = (&left.daemon.netns, &right.daemon.netns);
    let before = [left, right].map(|end| (end.daemon.peer(), index(&end.daemon)));
    let mut server = far.spawn("iperf3 -s -1 --forceflush");
    wait::until("iperf3 listens", LIMIT, || server.log().contains("Server listening"));
    // Both directions at once.
    let client = near.spawn(format!("iperf3 -c {} -t 60 --bidir -J", inner(right)));
    wait::until("traffic flows", LIMIT, || left.daemon.peer().sent > 1 << 20);
    let pings = near.spawn(format!("ping -n -i 0.01 -W 2 {}", inner(right)));
    for number in 0..MANY {
        upgrade(&[left, right][number % 2].daemon);
    }
    pings.signal(Signal::SIGINT);
    let mut pings = pings;
    pings.exit_within(LIMIT);
    let summary = pings.log();
    let numbers: Vec<u32> = summary
        .lines()
        .filter(|line| line.contains("packets transmitted"))
        .flat_map(|line| line.split(", "))
        .filter_map(|part| part.split(' ').next()?.parse().ok())
        .collect();
    let lost = numbers[0] - numbers[1];
    assert!(numbers[0] > 100 && lost as usize <= MANY, "{lost} of {} pings", numbers[0]);
    assert_eq!(server.try_exit(), None, "the connection broke");
    for (end, (peer, index_before)) in [left, right].into_iter().zip(before) {
        let now = end.daemon.peer();
        assert_eq!(now.latest_handshake, peer.latest_handshake, "a handshake took place");
        assert!(now.received > peer.received && now.sent > peer.sent);
        assert_eq!(index(&end.daemon), index_before);
        assert_eq!(end.daemon.drops("replay"), 0);
    }
    let sent = left.daemon.peer().sent;
    wait::until("the streams go on", LIMIT, || left.daemon.peer().sent > sent + (1 << 20));
    drop(client);
}

#[test]
fn everything_that_wg_shows_and_each_counter_is_carried_over() {
    require!(Wgsep);
    let tunnel = tunnel_with(&["--workers", "3"]);
    let Tunnel { left, right } = &tunnel;
    let daemon = &left.daemon;
    daemon.wg_set("fwmark 77");
    left.set_peer(right, "persistent-keepalive 25");
    let others: String = (0..50)
        .map(|number| {
            let key = KeyPair::generate().public;
            format!(
                "[Peer]\nPublicKey = {key}\nAllowedIPs = 10.60.{number}.0/24, fd60:{number}::/64\n"
            )
        })
        .collect();
    daemon.wg_conf("addconf", &others);
    // Packets that no peer has the destination of, or the source.
    daemon.netns.run(format!("ip route add 10.99.0.0/16 dev {}", daemon.interface));
    let _unanswered = ping(&daemon.netns, "10.99.0.1".parse().unwrap(), 3);
    let (shown, dropped) = (daemon.wg("show", "dump"), daemon.drops("no_peer"));
    assert_eq!(dropped, 3);
    let routes = daemon.netns.run("ip route");
    upgrade(daemon);
    assert_eq!(daemon.wg("show", "dump"), shown);
    assert_eq!(daemon.drops("no_peer"), dropped);
    assert_eq!(daemon.netns.run("ip route"), routes);
    assert!(answers_at_once(&daemon.netns, inner(right)));
    let audited = daemon.netns.run(format!(
        "{} audit --json {}",
        wgsep_program("wgsep").display(),
        daemon.interface
    ));
    let [helper, dataplane] = pair(daemon);
    for pid in [helper, dataplane] {
        assert!(audited.contains(&pid.to_string()), "{pid}: {audited}");
    }
    // What is set afterwards takes effect: the new helper serves the sockets of the old one.
    daemon.wg_set("listen-port 51999 fwmark 78");
    right.set_peer(left, format!("endpoint {}:51999", left.side.outer(Family::V4)));
    assert!(answers_at_once(&right.daemon.netns, inner(left)));
    daemon.wg_set("fwmark 0");
}

#[test]
fn the_first_process_in_the_foreground_passes_signals_on_and_ends_with_the_daemon() {
    require!(Wgsep);
    for upgrades in [1, 3] {
        let mut tunnel = tunnel_with(&[]);
        for _ in 0..upgrades {
            upgrade(&tunnel.left.daemon);
        }
        assert!(answers_at_once(&tunnel.left.daemon.netns, inner(&tunnel.right)));
        let daemon = &mut tunnel.left.daemon;
        // The first helper, the last one, and its dataplane.
        wait::until("the pairs between are gone", LIMIT, || processes(daemon).len() == 3);
        daemon.process.signal(Signal::SIGHUP);
        wait::until("SIGHUP is passed on", LIMIT, || daemon.process.log().contains("SIGHUP"));
        daemon.process.signal(Signal::SIGTERM);
        let status = daemon.process.exit_within(LIMIT);
        assert_eq!(status.code(), Some(0), "{}", daemon.process.log());
        wait::until("all of it ends", LIMIT, || has_ended(daemon));
        assert!(!daemon.has_socket());
        for file in ["sandbox", "upgrade"] {
            assert!(!socket_path(&daemon.interface).with_extension(file).exists(), "{file}");
        }
    }
}

#[test]
fn each_process_of_an_upgraded_daemon_takes_the_others_with_it() {
    require!(Wgsep);
    for victim in ["first helper", "helper", "dataplane"] {
        let mut tunnel = tunnel_with(&[]);
        let daemon = &mut tunnel.left.daemon;
        upgrade(daemon);
        let [helper, dataplane] = pair(daemon);
        let pid = match victim {
            "helper" => helper,
            "dataplane" => dataplane,
            _first => daemon.process.pid(),
        };
        kill(pid, Signal::SIGKILL).unwrap();
        let status = daemon.process.exit_within(LIMIT);
        assert_ne!(status.code(), Some(0), "the {victim} was killed");
        wait::until("all of it ends", LIMIT, || has_ended(daemon));
    }
}

/// It reaches the old pair, the new one, or the process that only waits.
#[test]
fn sigterm_at_any_moment_of_an_upgrade_ends_the_daemon() {
    require!(Wgsep);
    let (left, _right) = link::joined();
    for round in 0..30 {
        let mut daemon = Daemon::start(Wgsep, &left);
        if round % 2 == 1 {
            upgrade(&daemon);
            wait::until("the earlier upgrade is over", LIMIT, || processes(&daemon).len() == 3);
        }
        let upgrading = Process::spawn(command(&daemon), "wgsep upgrade");
        thread::sleep(Duration::from_millis(2) * round);
        daemon.process.signal(Signal::SIGTERM);
        let status = daemon.process.exit_within(LIMIT);
        wait::until("all of it ends", LIMIT, || has_ended(&daemon));
        assert!(!daemon.has_socket(), "round {round}: {}", upgrading.log());
        assert_eq!(status.code(), Some(0), "round {round}: {}", daemon.process.log());
    }
}

#[test]
fn a_daemon_in_the_background_is_replaced_in_the_background() {
    require!(Wgsep);
    let scratch = Scratch::new();
    let netns = Netns::new();
    let interface = wgsep_tests::daemon::unique_interface();
    let log = scratch.join("log");
    let program = wgsep_program("wgsep");
    netns.run(format!("{} --log-file {} {interface}", program.display(), log.display()));
    let before = with_argument(&interface);
    assert_eq!(before.len(), 2);
    netns.run(format!("{} upgrade {interface}", program.display()));
    wait::until("the old pair ends", LIMIT, || !before.iter().any(|pid| is_running(*pid)));
    assert_eq!(with_argument(&interface).len(), 2);
    let logged = fs::read_to_string(&log).unwrap();
    assert_eq!(logged.matches(": started:").count(), 2, "{logged}");
    assert!(logged.contains("has taken over"), "{logged}");
    fs::remove_file(socket_path(&interface)).unwrap();
    wait::until("it ends", LIMIT, || with_argument(&interface).is_empty());
    assert!(!netns.output(format!("ip link show {interface}")).status.success());
}

#[test]
fn ten_thousand_peers_are_handed_over_with_their_sessions() {
    require!(Wgsep);
    let tunnel = tunnel_with(&[]);
    let Tunnel { left, right } = &tunnel;
    let peers: String = (1..=10_000_u32)
        .map(|number| {
            let [_, high, middle, low] = number.to_be_bytes();
            format!("public_key={number:064x}\nallowed_ip=10.{}.{middle}.{low}/32\n", 128 + high)
        })
        .collect();
    let mut uapi = Uapi::connect(&left.daemon.interface).unwrap();
    assert_eq!(errno(&uapi.transact(&format!("set=1\n{peers}\n")).unwrap()), Some(0));
    drop(uapi);
    let shown = left.daemon.wg("show", "dump");
    let handshake = right.daemon.peer().latest_handshake;
    for _ in 0..5 {
        let began = Instant::now();
        let pings = left.daemon.netns.spawn(format!("ping -n -i 0.01 -W 5 {}", inner(right)));
        wait::until("pings are answered", LIMIT, || pings.log().contains("bytes from"));
        upgrade(&left.daemon);
        let replies = pings.log().matches("bytes from").count();
        wait::until("pings are answered after it", LIMIT, || {
            pings.log().matches("bytes from").count() > replies
        });
        assert!(began.elapsed() < LIMIT);
    }
    assert_eq!(left.daemon.wg("show", "dump").lines().count(), shown.lines().count());
    assert_eq!(right.daemon.peer().latest_handshake, handshake, "a handshake took place");
}

#[test]
fn an_upgrade_with_the_link_down_or_without_its_port_changes_neither() {
    require!(Wgsep);
    let tunnel = tunnel_with(&[]);
    let Tunnel { left, right } = &tunnel;
    let daemon = &left.daemon;
    daemon.netns.run(format!("ip link set {} down", daemon.interface));
    wait::until("the port is closed", LIMIT, || {
        daemon.netns.inside(|| std::net::UdpSocket::bind(("0.0.0.0", left.port)).is_ok())
    });
    upgrade(daemon);
    // It is not open in the new pair, either, until the link is up; and then it is refused while another process has it.
    let other = daemon.netns.inside(|| std::net::UdpSocket::bind(("0.0.0.0", left.port))).unwrap();
    daemon.netns.run(format!("ip link set {} up", daemon.interface));
    wait::until("the refusal is logged", LIMIT, || daemon.process.log().contains("trying again"));
    upgrade(daemon);
    drop(other);
    // The other end still has a session, which this one has dropped.
    until_ping(&daemon.netns, inner(right));
}

#[test]
fn an_initiation_under_way_is_answered_to_the_new_pair() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    // The other side does not answer yet.
    let [far_helper, far_dataplane] = pair(&right.daemon);
    stop(far_dataplane);
    let mut pinged = left.daemon.netns.spawn(format!("ping -n -c 1 -W 8 {}", inner(right)));
    wait::until("an initiation is sent", LIMIT, || left.daemon.peer().sent >= 148);
    upgrade(&left.daemon);
    kill(far_dataplane, Signal::SIGCONT).unwrap();
    assert!(pinged.exit_within(LIMIT).success(), "the packet that waited was lost");
    // No second initiation was needed.
    assert!(left.daemon.peer().sent < 2 * 148 + 200, "{:?}", left.daemon.peer());
    assert!(is_running(far_helper));
}

/// The side that answered: it has a keypair that it does not send with yet.
#[test]
fn a_handshake_that_was_answered_is_completed_with_the_new_pair() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    let ([_, near], [_, far]) = (pair(&left.daemon), pair(&right.daemon));
    stop(far);
    let mut pinged = left.daemon.netns.spawn(format!("ping -n -c 1 -W 8 {}", inner(right)));
    wait::until("an initiation is sent", LIMIT, || left.daemon.peer().sent >= 148);
    stop(near);
    kill(far, Signal::SIGCONT).unwrap();
    wait::until("it is answered", LIMIT, || right.daemon.peer().sent >= 92);
    upgrade(&right.daemon);
    kill(near, Signal::SIGCONT).unwrap();
    assert!(pinged.exit_within(LIMIT).success(), "the keypair was lost");
    assert!(left.daemon.peer().sent < 2 * 148 + 200, "{:?}", left.daemon.peer());
}

/// How many threads of a dataplane carry packets.
fn workers(dataplane: Pid) -> usize {
    let tasks = fs::read_dir(format!("/proc/{dataplane}/task")).unwrap().flatten();
    let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.starts_with("worker")).count()
}

/// The number is that of the running pair, whatever the machine or the caller has.
#[test]
fn sixty_four_workers_are_replaced_by_as_many_or_not_at_all_and_one_by_one() {
    require!(Wgsep);
    for number in [64, 1] {
        let tunnel = tunnel_with(&["--workers", &number.to_string()]);
        let Tunnel { left, right } = &tunnel;
        let before = pair(&left.daemon);
        assert_eq!(workers(before[1]), number);
        let mut limited = left.daemon.netns.command("prlimit");
        limited.arg("--nofile=40:40").arg(wgsep_program("wgsep"));
        let line = refused(&output(limited.args(["upgrade", &left.daemon.interface])));
        assert!(line.contains("limit on open files is 40"), "{line}");
        assert_eq!(pair(&left.daemon), before);
        assert!(answers_at_once(&left.daemon.netns, inner(right)));
        for end in [left, right] {
            upgrade(&end.daemon);
            assert_eq!(workers(pair(&end.daemon)[1]), number);
        }
        assert!(answers_at_once(&left.daemon.netns, inner(right)));
        assert!(answers_at_once(&right.daemon.netns, inner(left)));
    }
}

#[test]
fn a_daemon_whose_socket_was_renamed_is_not_upgraded_and_one_whose_interface_was_is() {
    require!(Wgsep);
    let mut tunnel = tunnel_with(&[]);
    let name = wgsep_tests::daemon::unique_interface();
    let Tunnel { left, right } = &mut tunnel;
    left.daemon.netns.run(format!("ip link set {} name {name}", left.daemon.interface));
    let before = pair(&left.daemon);
    upgrade(&left.daemon);
    let between = pair(&left.daemon);
    assert_ne!(between, before);
    assert!(answers_at_once(&left.daemon.netns, inner(right)));

    let was = socket_path(&left.daemon.interface);
    fs::rename(&was, socket_path(&name)).unwrap();
    let gone = was.with_extension("upgrade");
    wait::until("the helper knows", LIMIT, || !gone.exists());
    for interface in [&left.daemon.interface, &name] {
        let mut command = left.daemon.netns.command(wgsep_program("wgsep"));
        let line = refused(&output(command.args(["upgrade", interface])));
        assert!(line.contains("nor has one whose socket was renamed"), "{line}");
    }
    assert_eq!(pair(&left.daemon), between);
    assert!(answers_at_once(&left.daemon.netns, inner(right)));
    fs::remove_file(socket_path(&name)).unwrap();
    left.daemon.process.exit_within(LIMIT);
}

#[test]
fn an_upgrade_that_cannot_start_says_why_and_changes_nothing() {
    require!(Wgsep);
    let tunnel = tunnel_with(&[]);
    let Tunnel { left, right } = &tunnel;
    let daemon = &left.daemon;
    let before = pair(daemon);
    let scratch = Scratch::new();
    scratch.install("wgsep", "wgsep");
    let alone = |name: &str| {
        let mut command = daemon.netns.command(scratch.join(name));
        output(command.args(["upgrade", &daemon.interface]))
    };
    let line = refused(&alone("wgsep"));
    assert!(line.contains("wgsep-dataplane not found"), "{line}");
    // A dataplane that is none.
    scratch.write_script("wgsep-dataplane", "#!/bin/sh\nexit 1\n");
    let line = refused(&alone("wgsep"));
    assert!(line.starts_with("wgsep: "), "{line}");
    fs::remove_file(scratch.join("wgsep-dataplane")).unwrap();
    for word in ["no-such-interface", "with/slash"] {
        let mut command = daemon.netns.command(wgsep_program("wgsep"));
        let line = refused(&output(command.args(["upgrade", word])));
        assert!(line.contains(word), "{line}");
    }
    let mut command = daemon.netns.command("setpriv");
    let user = ["--reuid=61001", "--regid=61001", "--clear-groups"];
    let program = wgsep_program("wgsep");
    scratch.install("wgsep", "public");
    run_public(&scratch);
    let denied =
        output(command.args(user).arg(scratch.join("public")).args(["upgrade", &daemon.interface]));
    let line = refused(&denied);
    assert!(line.contains("permission") || line.contains("run as root"), "{line}");
    assert!(program.is_file());
    assert_eq!(pair(daemon), before, "the pair is the same");
    assert!(answers_at_once(&daemon.netns, inner(right)));
    upgrade(daemon);
    assert!(answers_at_once(&daemon.netns, inner(right)));
}

/// A layer that the running pair has is not given up for want of a privilege or a limit.
#[test]
fn an_upgrade_that_would_lose_a_layer_of_the_sandbox_is_refused_with_its_name() {
    require!(Wgsep);
    let tunnel = tunnel_with(&["--user", "games"]);
    let daemon = &tunnel.left.daemon;
    let before = pair(daemon);
    let claims =
        fs::read_to_string(format!("/run/wireguard/{}.sandbox", daemon.interface)).unwrap();
    let cases = [
        ("setpriv", &["--bounding-set=-all,+net_admin", "--inh-caps=-all"][..], "user"),
        ("prlimit", &["--memlock=0:0"], "secret-memory"),
    ];
    for (program, arguments, layer) in cases {
        if !claims.contains(&format!(" {layer}=applied")) {
            skip(&format!("{layer} is not in force here"));
            continue;
        }
        let mut weaker = daemon.netns.command(program);
        let wgsep = wgsep_program("wgsep");
        let line = refused(&output(
            weaker.args(arguments).arg(wgsep).args(["upgrade", &daemon.interface]),
        ));
        assert!(
            line.contains("would lose") && line.contains(&format!("{layer} degraded")),
            "{arguments:?}: {line}"
        );
        assert_eq!(pair(daemon), before, "the pair is the same");
    }
    assert!(answers_at_once(&daemon.netns, inner(&tunnel.right)));
    upgrade(daemon);
    assert!(answers_at_once(&daemon.netns, inner(&tunnel.right)));
}

/// Lets every user execute what is in a directory.
fn run_public(scratch: &Scratch) {
    wgsep_tests::process::run(Command::new("chmod").arg("755").arg(&**scratch));
}

#[test]
fn two_upgrades_at_once_leave_one_pair() {
    require!(Wgsep);
    let tunnel = tunnel_with(&[]);
    let Tunnel { left, right } = &tunnel;
    for _ in 0..10 {
        let spawn = || Process::spawn(command(&left.daemon), "an upgrade");
        let mut both = [spawn(), spawn()];
        let statuses = both.each_mut().map(|one| one.exit_within(LIMIT).success());
        assert!(statuses.contains(&true), "{}{}", both[0].log(), both[1].log());
        wait::until("one pair is left", LIMIT, || processes(&left.daemon).len() == 3);
        assert!(answers_at_once(&left.daemon.netns, inner(right)));
    }
}

#[test]
fn a_daemon_that_does_not_answer_is_not_waited_for_and_goes_on() {
    require!(Wgsep);
    let tunnel = tunnel_with(&[]);
    let Tunnel { left, right } = &tunnel;
    for at in 0..2 {
        let victim = pair(&left.daemon)[at];
        stop(victim);
        let done = output(&mut command(&left.daemon));
        kill(victim, Signal::SIGCONT).unwrap();
        refused(&done);
        wait::until("the old pair alone is left", Duration::from_secs(30), || {
            processes(&left.daemon).len() == 2
        });
        until_ping(&left.daemon.netns, inner(right));
    }
}

/// Stops both dataplanes in each step of a hand-over, as a debugger or a freezer may, and the new one for longer than
/// anything may take once it is the only one. False if a step took longer than a dataplane waits for the other.
fn stop_at_each_step(daemon: &Daemon) -> bool {
    let [_, old] = pair(daemon);
    let go_on = |pid| kill(pid, Signal::SIGCONT).unwrap();
    let waits = |pid| wait::until("it waits for the other", LIMIT, || is_reading(pid));

    stop(old);
    let mut upgrading = Process::spawn(command(daemon), "wgsep upgrade");
    let is_new = |pid: &Pid| *pid != old && is_dataplane(*pid);
    let new = wait::poll(LIMIT, || processes(daemon).into_iter().find(is_new)).unwrap();
    waits(new);
    stop(new);
    go_on(new);
    waits(new);
    stop(new);
    go_on(old);
    waits(old);
    stop(old);
    go_on(old);
    waits(old);
    stop(old);
    go_on(new);
    waits(new);
    stop(new);
    go_on(old);
    let handed_over = wait::poll(LIMIT, || (!is_running(old)).then_some(())).is_some();
    let given_up = wait::poll(Duration::from_secs(17), || {
        (!handed_over || !is_running(upgrading.pid())).then_some(())
    });
    go_on(new);
    let status = upgrading.exit_within(LIMIT);
    let [_, serving] = pair(daemon);
    assert_eq!(status.success(), handed_over, "{}", upgrading.log());
    assert_eq!(serving, if handed_over { new } else { old });
    assert!(!handed_over || given_up.is_none(), "{}", upgrading.log());
    handed_over
}

#[test]
fn dataplanes_that_are_stopped_at_any_step_of_a_hand_over_go_on_with_it() {
    require!(Wgsep);
    let tunnel = tunnel_with(&[]);
    let Tunnel { left, right } = &tunnel;
    assert!((0..5).any(|_| stop_at_each_step(&left.daemon)), "{}", left.daemon.process.log());
    until_ping(&left.daemon.netns, inner(right));
}

/// Begins an upgrade, and stops the new dataplane before it is locked down, and so before the old one hands over. `None`
/// if that came too late.
///
/// Looks without a pause: a dataplane is locked down within milliseconds.
fn begin_upgrade(daemon: &Daemon) -> Option<(Pid, Process)> {
    let [_, old] = pair(daemon);
    let mut upgrading = Process::spawn(command(daemon), "wgsep upgrade");
    let is_new = |pid: &Pid| *pid != old && is_dataplane(*pid);
    let deadline = Instant::now() + LIMIT;
    let new = loop {
        if let Some(new) = processes(daemon).into_iter().find(is_new) {
            break new;
        }
        assert!(Instant::now() < deadline, "no dataplane: {}", upgrading.log());
    };
    stop(new);
    if threads(new).iter().all(|thread| thread.text("Seccomp") == "0") {
        return Some((new, upgrading));
    }
    kill(new, Signal::SIGCONT).unwrap();
    upgrading.exit_within(PATIENCE);
    None
}

/// The running helper has already sent what the new one needs to start.
#[test]
fn sockets_that_change_during_an_upgrade_are_handed_over_as_they_are_in_the_end() {
    require!(Wgsep);
    let tunnel = tunnel_with(&[]);
    let Tunnel { left, right } = &tunnel;
    let (netns, interface) = (&left.daemon.netns, &left.daemon.interface);
    let listening = || {
        let sockets = netns.run("ss -H -u -l -n");
        let port = left.daemon.listen_port().to_string();
        sockets.lines().filter(|line| line.contains(&format!(":{port} "))).count()
    };
    let set_link = |state: &str| {
        netns.run(format!("ip link set {interface} {state}"));
        let expected = if state == "up" { 2 } else { 0 };
        wait::until("the port follows", LIMIT, || listening() == expected);
    };
    let set_port = |port: &str| left.daemon.wg_set(format!("listen-port {port} fwmark {port}"));
    type Change<'a> = &'a dyn Fn();
    let changes: [(Change<'_>, usize); 4] = [
        (&|| set_link("down"), 0),
        (&|| set_link("up"), 2),
        (&|| ["down", "up", "down", "up"].map(set_link).into_iter().collect(), 2),
        (&|| ["20821", "20822"].map(set_port).into_iter().collect(), 2),
    ];
    for (number, (change, expected)) in changes.into_iter().enumerate() {
        let (new, mut upgrading) = wait::poll(PATIENCE, || begin_upgrade(&left.daemon)).unwrap();
        change();
        kill(new, Signal::SIGCONT).unwrap();
        assert!(upgrading.exit_within(PATIENCE).success(), "{number}: {}", upgrading.log());
        assert_eq!(pair(&left.daemon)[1], new);
        wait::until("the sockets are as the link is", LIMIT, || listening() == expected);
        if expected > 0 {
            until_ping(netns, inner(right));
        }
    }
    let log = left.daemon.process.log();
    assert!(!log.contains(" ERROR "), "{log}");
}

/// Another user cannot reach the socket. Where it could, it would not be served either.
#[test]
fn what_another_user_or_nonsense_asks_of_the_upgrade_socket_changes_nothing() {
    require!(Wgsep);
    let tunnel = tunnel_with(&[]);
    let Tunnel { left, right } = &tunnel;
    let before = pair(&left.daemon);
    let path = socket_path(&left.daemon.interface).with_extension("upgrade");
    let as_another = || {
        let mut command = left.daemon.netns.command("setpriv");
        command.args(["--reuid=65500", "--regid=65500", "--clear-groups"]);
        command.arg(wgsep_program("wgsep")).args(["upgrade", &left.daemon.interface]);
        refused(&output(&mut command))
    };
    assert!(as_another().contains("no permission to reach"));
    fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
    assert!(
        as_another().contains("cannot be replaced by this one: it is of another version or user")
    );

    let socket = UnixDatagram::unbound().unwrap();
    socket.connect(&path).unwrap();
    let null = fs::File::open("/dev/null").unwrap();
    let hello = &wgsep_ipc::upgrade::HELLO;
    let send = |bytes: &[u8], descriptors: usize| {
        let descriptors = vec![null.as_raw_fd(); descriptors];
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let bytes = [IoSlice::new(bytes)];
        let flags = MsgFlags::MSG_DONTWAIT;
        let _full = sendmsg::<UnixAddr>(socket.as_raw_fd(), &bytes, &rights, flags, None);
    };
    for bytes in [&b""[..], b"x", &hello[..7], hello, &[0xff; 300]] {
        for descriptors in [0, 1, 2, 3, 40] {
            send(bytes, descriptors);
        }
    }
    // A helper of another version is not left to wait: its end of the channel is closed.
    let mut later = *hello;
    later[7] += 1;
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(LIMIT)).unwrap();
    let both = [theirs.as_raw_fd(), null.as_raw_fd()];
    let (bytes, rights) = ([IoSlice::new(&later)], [ControlMessage::ScmRights(&both)]);
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &bytes, &rights, MsgFlags::empty(), None).unwrap();
    drop(theirs);
    assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0);

    assert_eq!(pair(&left.daemon), before);
    assert!(answers_at_once(&left.daemon.netns, inner(right)));
    upgrade(&left.daemon);
    assert!(answers_at_once(&left.daemon.netns, inner(right)));
}

/// Whatever the moment of the question: of the old pair, of the new one, or none while they change.
#[test]
fn no_answer_of_the_status_socket_during_an_upgrade_has_a_port_that_is_closed() {
    require!(Wgsep);
    let tunnel = tunnel_with(&[]);
    let daemon = &tunnel.left.daemon;
    let path = socket_path(&daemon.interface).with_extension("status");
    let (is_over, answers) = (AtomicBool::new(false), AtomicUsize::new(0));
    let ask = || -> std::io::Result<String> {
        let mut client = UnixStream::connect(&path)?;
        client.set_read_timeout(Some(LIMIT))?;
        client.write_all(b"get=1\n\n")?;
        let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
        while !answer.ends_with(b"errno=0\n\n") {
            match client.read(&mut buffer)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                len => answer.extend_from_slice(&buffer[..len]),
            }
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    thread::scope(|scope| {
        let asker = scope.spawn(|| {
            let mut closed = Vec::new();
            while !is_over.load(Ordering::Relaxed) {
                // The old dataplane ends with a client or two.
                let Ok(answer) = ask() else { continue };
                answers.fetch_add(1, Ordering::Relaxed);
                if !answer.contains("udp_ipv4=1") {
                    closed.push(answer);
                }
            }
            closed
        });
        let ends = Ends(&is_over);
        for _ in 0..20 {
            upgrade(daemon);
            let before = answers.load(Ordering::Relaxed);
            wait::until("another answer", LIMIT, || answers.load(Ordering::Relaxed) > before + 1);
        }
        drop(ends);
        let closed = asker.join().unwrap();
        assert!(closed.is_empty(), "{} answers, such as {}", closed.len(), closed[0]);
    });
}

/// Or a user without other rights would command a daemon of root's.
#[test]
fn root_does_not_take_over_the_daemon_of_a_user_and_is_told_as_whom_to_run_it() {
    require!(Wgsep);
    if Command::new("setcap").arg("-h").output().is_err() {
        return skip("setcap is missing: run `make deps`");
    }
    const USER: &str = "61001";
    let (scratch, netns, interface) = (Scratch::new(), Netns::new(), unique_interface());
    for program in ["wgsep", "wgsep-dataplane"] {
        scratch.install(program, program);
    }
    run_public(&scratch);
    let program = scratch.join("wgsep").display().to_string();
    let script = format!(
        "mkdir -p /run/wireguard; mount -t tmpfs none /run/wireguard; {}
         setcap cap_net_admin+ep {program}
         chgrp {USER} /run/wireguard; chmod 1770 /run/wireguard
         as_user='setpriv --reuid={USER} --regid={USER} --clear-groups'
         $as_user {program} {interface}
         trap 'ip link del {interface}' EXIT
         ! {program} upgrade {interface} 2>&1
         $as_user {program} upgrade {interface}
         stat -c 'owner %u' /run/wireguard/{interface}.upgrade",
        tun_device::OPEN_TO_EVERY_USER
    );
    let mut shell = netns.command("unshare");
    shell.args(["--mount", "sh", "-ec", &script]);
    let done = output(shell.env("WG_LOG_FILE", "/run/wireguard/log"));
    let (said, complaints) =
        (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{said}{complaints}");
    let advice = format!("run it as that user: sudo -u '#{USER}' wgsep upgrade {interface}");
    let [refusal, owner] = said.lines().collect::<Vec<_>>()[..] else { panic!("{said}") };
    assert!(refusal.ends_with(&advice), "{refusal}");
    assert_eq!(owner, format!("owner {USER}"));
}

/// The receiver index and counter of each data message that leaves a namespace.
struct Nonces {
    ending: AtomicBool,
}

impl Nonces {
    fn capture(netns: &Netns) -> OwnedFd {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let open = || socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll);
        let socket = netns.inside(open).unwrap();
        setsockopt(&socket, sockopt::RcvBufForce, &(32 << 20)).unwrap();
        socket
    }

    /// Until the end, all that were sent; panics for one that was sent twice.
    fn watch(&self, socket: &OwnedFd) -> BTreeSet<(u32, u64)> {
        /// As in linux/if_packet.h.
        const PACKET_OUTGOING: u8 = 4;
        const HEADERS: usize = 14 + 20 + 8;
        let mut seen = BTreeSet::new();
        let mut buffer = [0; 128];
        loop {
            let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::from(50_u8)).unwrap() == 0 {
                if self.ending.load(Ordering::Relaxed) {
                    return seen;
                }
                continue;
            }
            let Ok((len, address)) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) else {
                continue;
            };
            let outgoing = address.is_some_and(|address| address.pkttype() == PACKET_OUTGOING);
            let frame = &buffer[..len.min(buffer.len())];
            // IPv4, UDP, type 4.
            if !outgoing || frame.len() < HEADERS + 16 || frame[12..14] != [8, 0] || frame[23] != 17
            {
                continue;
            }
            let message = &frame[HEADERS..];
            if message[..4] != [4, 0, 0, 0] {
                continue;
            }
            let index = u32::from_le_bytes(*message[4..].first_chunk().unwrap());
            let counter = u64::from_le_bytes(*message[8..].first_chunk().unwrap());
            assert!(seen.insert((index, counter)), "nonce {counter} of {index:#x} was used twice");
        }
    }
}

/// Kills one of the processes at a time that differs from round to round: before, during and after the hand-over.
#[test]
fn no_nonce_is_used_twice_and_no_tunnel_is_left_half_whichever_process_is_killed_when() {
    const ROUNDS: u64 = 80;
    require!(Wgsep);
    let (mut survived, mut ended) = (0, 0);
    let mut tunnel = None;
    for round in 0..ROUNDS {
        // One datagram a frame, so that each is seen.
        let present = tunnel.take().unwrap_or_else(|| tunnel_with(&["--without", "udp-gso"]));
        let Tunnel { left, right } = &present;
        let nonces = Nonces { ending: AtomicBool::new(false) };
        let socket = Nonces::capture(&left.daemon.netns);
        let is_alive = thread::scope(|scope| {
            let watching = scope.spawn(|| nonces.watch(&socket));
            let ends = Ends(&nonces.ending);
            let flood =
                left.daemon.netns.spawn(format!("ping -n -q -i 0.002 -s 64 {}", inner(right)));
            let sent = left.daemon.peer().sent;
            wait::until("pings are sent", LIMIT, || left.daemon.peer().sent > sent);
            let old = pair(&left.daemon);
            let mut upgrade = Process::spawn(command(&left.daemon), "an upgrade");
            thread::sleep(Duration::from_micros(1300 * (round / 4)));
            let new = || pair_other_than(&left.daemon, old);
            let victim = match round % 4 {
                0 => Some(old[0]),
                1 => Some(old[1]),
                2 => new().map(|pair| pair[0]),
                _ => new().map(|pair| pair[1]),
            };
            if let Some(victim) = victim {
                let _has_ended = kill(victim, Signal::SIGKILL);
                wait::until("it is dead", LIMIT, || !is_running(victim));
            }
            upgrade.exit_within(Duration::from_secs(30));
            let to = inner(right);
            // Either there is a whole pair, with a tunnel that works; or nothing is left of it.
            let mut is_alive = false;
            wait::until("there is a whole tunnel, or none", Duration::from_secs(20), || {
                let pinged = left.daemon.netns.output(format!("ping -n -q -c 1 -W 1 {to}"));
                // What has lost one of its processes ends, if it has not yet.
                is_alive = pinged.status.success()
                    && is_running(left.daemon.process.pid())
                    && pairs(&left.daemon).len() == 1;
                is_alive || processes(&left.daemon).is_empty()
            });
            drop(flood);
            drop(ends);
            let seen = watching.join().unwrap();
            assert!(!seen.is_empty(), "round {round}: nothing was seen");
            is_alive
        });
        if is_alive {
            survived += 1;
            tunnel = Some(present);
        } else {
            ended += 1;
            wait::until("all of it ends", LIMIT, || has_ended(&left.daemon));
        }
    }
    // Both happen, or this shows nothing.
    assert!(survived > 0 && ended > 0, "{survived} survived, {ended} ended");
}

/// A helper with its dataplane that are not these.
fn pair_other_than(daemon: &Daemon, old: [Pid; 2]) -> Option<[Pid; 2]> {
    let helpers = processes(daemon).into_iter().filter(|pid| *pid != old[0]);
    helpers.into_iter().find_map(|helper| Some([helper, *children(helper).first()?]))
}

/// systemd makes no process that has ended the main one: each that a notification names must be alive when a busy manager receives it.
#[test]
fn a_replaced_helper_stays_until_the_service_manager_has_received_who_replaced_it() {
    require!(Wgsep);
    let (scratch, netns) = (Scratch::new(), Netns::new());
    let path = scratch.join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let daemon = Daemon::start_with(Wgsep, &netns, |command| {
        command.env("NOTIFY_SOCKET", &path);
    });
    let received = || {
        let mut message = [0; 256];
        let len = socket.recv(&mut message).unwrap();
        String::from_utf8_lossy(&message[..len]).into_owned()
    };
    let next_main_process = || loop {
        if let Some(pid) = received().strip_prefix("MAINPID=") {
            return Pid::from_raw(pid.parse().unwrap());
        }
    };
    let mut helpers = vec![daemon.process.pid()];
    for _ in 0..3 {
        upgrade(&daemon);
        let newest = wait::poll(LIMIT, || {
            let newest = pairs(&daemon).into_iter().map(|[helper, _]| helper);
            newest.into_iter().find(|helper| !helpers.contains(helper))
        });
        helpers.push(newest.unwrap());
    }
    for (before, helper) in helpers.iter().zip(&helpers[1..]) {
        assert!(is_running(*before) && is_running(*helper));
        assert_eq!(next_main_process(), *helper);
    }
    wait::until("those that were replaced end", LIMIT, || {
        while socket.set_nonblocking(true).is_ok() && socket.recv(&mut [0; 256]).is_ok() {}
        processes(&daemon).len() == 2
    });
    assert!(is_running(helpers[3]));
}
