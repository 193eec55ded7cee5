//! What a service manager's descriptor store keeps of a daemon that ends in a failure: the interface, as it is.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use wgsep_tests::daemon::{Daemon, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::nft::Counter;
use wgsep_tests::process::output;
use wgsep_tests::service_manager::{QUEUE, ServiceManager, listen};
use wgsep_tests::traffic::{Pinging, until_ping};
use wgsep_tests::tunnel::End;
use wgsep_tests::{descriptors, procfs, require, wait};

use crate::tun_fd::open_queue;

const LIMIT: Duration = Duration::from_secs(10);
/// More than an interface has queues.
const CAPACITY: usize = 32;
/// One for writing, and those that are read.
const QUEUES: usize = 17;

/// Kills one of the two, and waits for the end of both.
fn crash(daemon: &mut Daemon, victim: Pid) {
    let dataplane = daemon.dataplane();
    kill(victim, Signal::SIGKILL).unwrap();
    daemon.process.exit_within(LIMIT);
    wait::until("both have ended", LIMIT, || !procfs::is_running(dataplane));
}

/// Starts a daemon with what the manager has stored.
fn start_again(
    manager: &ServiceManager,
    netns: &Arc<Netns>,
    interface: &str,
    adjust: impl FnOnce(&mut Command),
) -> Daemon {
    Daemon::start_on(interface, Wgsep, netns, |command| {
        manager.supervise(command, CAPACITY);
        // Duplicates of them live no longer than the command.
        let stored = manager.stored();
        listen(command, netns, &stored, &vec![QUEUE; stored.len()]);
        adjust(command);
    })
}

/// Puts the next daemon of an interface in the place of one that has ended, which must not remove the socket.
fn succeed(ended: &mut Daemon, next: Daemon) {
    ended.interface = unique_interface();
    *ended = next;
}

/// The queues of an interface whose daemon was killed.
fn crashed(manager: &ServiceManager, netns: &Arc<Netns>, interface: &str) -> Vec<OwnedFd> {
    let supervise = |command: &mut Command| manager.supervise(command, CAPACITY);
    let mut daemon = Daemon::start_on(interface, Wgsep, netns, supervise);
    manager.until_message("READY=1");
    let helper = daemon.process.pid();
    crash(&mut daemon, helper);
    manager.stored()
}

/// All that belongs to an interface and an operator has set, with its index.
fn state(netns: &Netns, interface: &str) -> String {
    let shown = ["-o link", "-o addr", "-4 route", "-6 route"].map(|what| {
        let (options, object) = what.split_once(' ').unwrap();
        netns.run(format!("ip {options} {object} show dev {interface}"))
    });
    shown.concat()
}

#[test]
fn after_a_crash_the_interface_is_the_same_and_no_packet_leaves_by_another_route() {
    require!(Wgsep);
    for (of_dataplane, options, queues) in
        [(false, None, QUEUES), (true, None, QUEUES), (false, Some("flow-queues"), 1)]
    {
        let (manager, (left, right)) = (ServiceManager::default(), link::joined());
        let daemon = Daemon::start_with(Wgsep, &left, |command| {
            manager.supervise(command, CAPACITY);
            options.map(|without| command.args(["--without", without]));
        });
        let mut end = End::new(Side::Left, daemon);
        let other = End::new(Side::Right, Daemon::start(Wgsep, &right));
        end.configure(&other.key.public, Some(other.endpoint(Family::V4)), None);
        other.configure(&end.key.public, None, None);
        let interface = end.daemon.interface.clone();
        left.run(format!("ip link set {interface} mtu 1390"));
        left.run(format!("ip route add 198.51.100.0/24 dev {interface}"));
        left.run(format!("ip route add default via {}", Side::Right.outer(Family::V4)));
        let inner = Side::Right.inner(Family::V4);
        let leaked = Counter::new(
            &left,
            "leaked",
            "output",
            &format!("ip daddr {inner} oifname != {interface}"),
        );
        manager.until_message("FDSTORE=1");
        assert_eq!(manager.stored().len(), queues);
        let pinging = Pinging::start(&left, inner);
        pinging.until_more(3);

        let before = state(&left, &interface);
        let helper = end.daemon.process.pid();
        let victim = if of_dataplane { end.daemon.dataplane() } else { helper };
        crash(&mut end.daemon, victim);
        assert_eq!(state(&left, &interface), before);
        let stale = socket_path(&interface).exists();
        assert_eq!(stale, !of_dataplane, "a killed helper leaves its socket");
        let again = start_again(&manager, &left, &interface, |command| {
            options.map(|without| command.args(["--without", without]));
        });
        succeed(&mut end.daemon, again);
        assert_eq!(state(&left, &interface), before);
        end.set_keys(&other.key.public, Some(other.endpoint(Family::V4)), None);
        pinging.until_more(10);
        assert_eq!(state(&left, &interface), before);
        assert!(pinging.stop().received > 10);
        assert_eq!(leaked.packets(), 0);

        // Once more, with what was stored by the first.
        let helper = end.daemon.process.pid();
        crash(&mut end.daemon, helper);
        let again = start_again(&manager, &left, &interface, |_| {});
        succeed(&mut end.daemon, again);
        end.set_keys(&other.key.public, Some(other.endpoint(Family::V4)), None);
        until_ping(&left, inner);
        assert_eq!(state(&left, &interface), before);

        end.daemon.process.signal(Signal::SIGINT);
        assert_eq!(end.daemon.process.exit_within(LIMIT).code(), Some(0));
        wait::until("the interface is gone", LIMIT, || !end.daemon.has_interface());
        assert!(!end.daemon.has_socket());
    }
}

/// What is in place of the queues of a daemon that was killed: these, or none if it is to be the interface as it was.
type Change = fn(&ServiceManager, &Arc<Netns>, &str, Vec<OwnedFd>) -> Vec<OwnedFd>;

/// Queues that are not those of one interface of wgsep, and what the log says of them.
const WRONG: [(&str, Change, &str); 11] = [
    (
        "of an interface that was deleted",
        |_, netns, interface, queues| {
            netns.run(format!("ip link del {interface}"));
            queues
        },
        "a stored queue is a queue of no interface",
    ),
    (
        "of another daemon's interface",
        |manager, netns, _, queues| {
            drop(queues);
            manager.store(Vec::new());
            crashed(manager, netns, &unique_interface())
        },
        "which was renamed or moved",
    ),
    (
        "of two interfaces",
        |_, netns, _, mut queues| {
            let keep = ServiceManager::default();
            queues.truncate(5);
            queues.extend(crashed(&keep, netns, &unique_interface()));
            queues
        },
        "which was renamed or moved",
    ),
    (
        "of an interface that was renamed",
        |_, netns, interface, queues| {
            netns.run(format!("ip link set {interface} name {}", unique_interface()));
            queues
        },
        "which was renamed or moved",
    ),
    (
        "of an interface that was moved",
        |_, netns, interface, queues| {
            // To that of the tests, where nothing else has the name.
            netns.run(format!("ip link set {interface} netns {}", std::process::id()));
            queues
        },
        "which was renamed or moved",
    ),
    (
        "without the one for writing",
        |_, _, _, mut queues| {
            queues.remove(0);
            queues
        },
        "0 stored queues are detached and 16 are not",
    ),
    (
        "without those that are read",
        |_, _, _, mut queues| {
            queues.truncate(1);
            queues
        },
        "1 stored queues are detached and 0 are not",
    ),
    (
        "one too many",
        |_, _, _, mut queues| {
            queues.push(queues[1].try_clone().unwrap());
            queues
        },
        "1 stored queues are detached and 17 are not",
    ),
    (
        "and one that is no queue",
        |_, _, _, mut queues| {
            queues.push(File::open("/dev/null").unwrap().into());
            queues
        },
        "a stored queue is not a TUN device",
    ),
    (
        "and one that is attached to nothing",
        |_, _, _, mut queues| {
            let unattached = File::options().read(true).write(true).open("/dev/net/tun");
            queues.push(unattached.unwrap().into());
            queues
        },
        "a stored queue is a queue of no interface",
    ),
    (
        "of another program's interface",
        |manager, netns, interface, queues| {
            drop(queues);
            manager.store(Vec::new());
            wait_for_removal(netns, interface);
            vec![open_queue(netns, interface, OFlag::O_RDWR, libc::IFF_TUN)]
        },
        "a stored queue is opened with other flags",
    ),
];

#[track_caller]
fn wait_for_removal(netns: &Netns, interface: &str) {
    let link = format!("ip link show {interface}");
    wait::until("the interface is gone", LIMIT, || !netns.output(&link).status.success());
}

#[test]
fn queues_that_are_not_those_of_the_interface_are_given_up_for_a_new_one() {
    require!(Wgsep);
    for (what, change, reason) in WRONG {
        let (manager, netns, interface) =
            (ServiceManager::default(), Netns::new(), unique_interface());
        let queues = crashed(&manager, &netns, &interface);
        let queues = change(&manager, &netns, &interface, queues);
        manager.store(queues);
        let mut daemon = start_again(&manager, &netns, &interface, |_| {});
        let log = daemon.process.log();
        let warnings: Vec<_> = log.lines().filter(|line| line.contains(" WARN ")).collect();
        let given_up = "the interface that the service manager stored is given up: ";
        assert!(
            warnings.len() == 1 && warnings[0].contains(given_up) && warnings[0].contains(reason),
            "{what}: {log}"
        );
        manager.until_message("READY=1");
        let messages = manager.messages();
        let order = ["FDSTOREREMOVE=1\n", "FDSTORE=1\n", "READY=1\n"];
        assert!(
            messages.iter().map(|message| message.split_inclusive('\n').next().unwrap()).eq(order),
            "{what}: {messages:?}"
        );
        assert_eq!(manager.stored().len(), QUEUES, "{what}");
        // Loopback and the new one: of that of before, nothing is left.
        wait::until(what, LIMIT, || netns.run("ip -o link").lines().count() == 2);
        daemon.wg("show", "listen-port");
        let (helper, dataplane) = (daemon.process.pid(), daemon.dataplane());
        let held = |pid| descriptors::count(pid, helper).get("tun").copied().unwrap_or(0);
        // The helper keeps duplicates for one that replaces it.
        assert_eq!((held(helper), held(dataplane)), (QUEUES, QUEUES), "{what}");

        daemon.process.signal(Signal::SIGINT);
        daemon.process.exit_within(LIMIT);
        wait_for_removal(&netns, &interface);
    }
}

/// As where the manager stores fewer than it was sent: the kernel has removed the others.
#[test]
fn fewer_queues_to_read_are_taken_over() {
    require!(Wgsep);
    let (manager, netns, interface) = (ServiceManager::default(), Netns::new(), unique_interface());
    let mut queues = crashed(&manager, &netns, &interface);
    let before = state(&netns, &interface);
    queues.truncate(4);
    manager.store(queues);
    let daemon = start_again(&manager, &netns, &interface, |_| {});
    assert_eq!(state(&netns, &interface), before);
    let log = daemon.process.log();
    assert!(log.contains("with 4 queues that the service manager stored"), "{log}");
}

/// The interface that exists decides, not --without: its queues and its header are what it was made with.
#[test]
fn an_interface_keeps_its_queues_whatever_the_options_of_the_next_start_are() {
    require!(Wgsep);
    let (manager, netns, interface) = (ServiceManager::default(), Netns::new(), unique_interface());
    drop(crashed(&manager, &netns, &interface));
    let before = state(&netns, &interface);
    let daemon = start_again(&manager, &netns, &interface, |command| {
        command.args(["--without", "flow-queues,vnet-hdr"]);
    });
    assert_eq!(state(&netns, &interface), before);
    let held = descriptors::count(daemon.dataplane(), daemon.process.pid());
    assert_eq!(held["tun"], QUEUES);
}

#[test]
fn an_interface_in_a_namespace_of_its_own_is_taken_over_there() {
    require!(Wgsep);
    let (manager, netns, inner) = (ServiceManager::default(), Netns::new(), Netns::new());
    let interface = unique_interface();
    let inside = |command: &mut Command| {
        manager.supervise(command, CAPACITY);
        command.args(["--tun-netns", inner.name()]);
    };
    let mut daemon = Daemon::start_on(&interface, Wgsep, &netns, inside);
    let before = state(&inner, &interface);
    let helper = daemon.process.pid();
    crash(&mut daemon, helper);
    let again = start_again(&manager, &netns, &interface, |command| {
        command.args(["--tun-netns", inner.name()]);
    });
    succeed(&mut daemon, again);
    assert_eq!(state(&inner, &interface), before);
    inner.run(format!("ip link set {interface} up"));
    daemon.wg_set("listen-port 4711");
    wait::until("it listens", LIMIT, || daemon.wg("show", "listen-port").trim() == "4711");
}

/// An environment that is not a service manager's: nothing is guessed.
#[test]
fn descriptors_by_numbers_that_cannot_be_right_are_an_error() {
    require!(Wgsep);
    let netns = Netns::new();
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    let refusal = |given: &[OwnedFd], names: &[&str], variables: &[(&str, &str)]| {
        let interface = unique_interface();
        let command = Wgsep.command(&netns, &interface);
        let mut limited = netns.command("timeout");
        limited.args(["--foreground", "10"]);
        limited.arg("sh").args(["-c", "export LISTEN_PID=$$; exec \"$@\"", "sh"]);
        limited.arg(command.get_program()).args(command.get_args());
        listen(&mut limited, &netns, given, names);
        limited.envs(variables.iter().copied());
        let refused = output(&mut limited);
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!((refused.status.code(), error.lines().count()), (Some(1), 1), "{error}");
        assert_eq!(netns.run("ip -o link").lines().count(), 1, "an interface was left behind");
        error
    };
    for count in ["", "0", "1", "3", "-2", "999999999", "18446744073709551617", "x"] {
        let error = refusal(&[null(), null()], &[QUEUE; 2], &[("LISTEN_FDS", count)]);
        let expected = format!("LISTEN_FDS is {count:?}, and LISTEN_FDNAMES has 2 names; ");
        assert!(error.contains(&expected), "{error}");
    }
    let error = refusal(&[null(), null()], &[QUEUE; 3], &[]);
    assert!(error.contains("5 of LISTEN_FDS must be the number of an open descriptor"), "{error}");
    let error = refusal(&[null()], &[QUEUE; 9000], &[]);
    assert!(error.contains("4 of LISTEN_FDS must be the number of an open descriptor"), "{error}");
    for variable in ["WG_TUN_FD", "WG_UAPI_FD"] {
        let error = refusal(&[null(), null()], &["other", QUEUE], &[(variable, "4")]);
        assert!(error.contains("named wgsep-tun by LISTEN_FDNAMES"), "{error}");
    }
}

/// sd_listen_fds(3): those of another process, and of another purpose.
#[test]
fn descriptors_that_are_meant_for_others_are_closed_and_not_looked_at() {
    require!(Wgsep);
    let netns = Netns::new();
    for (names, variables) in [
        ([QUEUE, QUEUE], &[("LISTEN_PID", "1")][..]),
        ([QUEUE, QUEUE], &[("LISTEN_PID", "x"), ("LISTEN_FDS", "999999999")]),
        (["connection", "wgsep@wg0.socket"], &[]),
        (["unknown", "wgsep-tun2"], &[("LISTEN_FDS", "-1")]),
    ] {
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        let daemon = Daemon::start_with(Wgsep, &netns, |command| {
            listen(command, &netns, &[null(), null()], &names);
            command.envs(variables.iter().copied());
        });
        let log = daemon.process.log();
        assert!(!log.contains("stored") && !log.contains(" WARN "), "{log}");
        daemon.wg("show", "listen-port");
    }
}

/// SIGTERM is how systemd ends a daemon whose configuration failed, and starts it again then: after a crash the
/// interface stays until that succeeds.
#[test]
fn the_interface_stays_after_a_failure_and_after_sigterm_until_a_crash_is_overcome() {
    require!(Wgsep);
    for (is_after_crash, signal, status, stays) in [
        (false, Signal::SIGSYS, 76, false),
        (false, Signal::SIGSEGV, 1, true),
        (false, Signal::SIGTERM, 0, false),
        (false, Signal::SIGINT, 0, false),
        (true, Signal::SIGSYS, 76, false),
        (true, Signal::SIGSEGV, 1, true),
        (true, Signal::SIGTERM, 0, true),
        (true, Signal::SIGINT, 0, false),
    ] {
        let (manager, netns, interface) =
            (ServiceManager::default(), Netns::new(), unique_interface());
        if is_after_crash {
            drop(crashed(&manager, &netns, &interface));
        }
        let mut daemon = start_again(&manager, &netns, &interface, |_| {});
        manager.until_message("READY=1");
        let victim = if status == 0 { daemon.process.pid() } else { daemon.dataplane() };
        kill(victim, signal).unwrap();
        assert_eq!(daemon.process.exit_within(LIMIT).code(), Some(status));
        manager.catch_up();
        let removed = "FDSTOREREMOVE=1\nFDNAME=wgsep-tun".to_owned();
        let what = format!("{signal}, after a crash: {is_after_crash}");
        assert_eq!(manager.messages().contains(&removed), !stays, "{what}");
        assert_eq!(manager.stored().len(), if stays { QUEUES } else { 0 }, "{what}");
        assert_eq!(daemon.has_interface(), stays, "{what}");
        // As a unit that is stopped has it.
        manager.store(Vec::new());
        wait_for_removal(&netns, &daemon.interface);
    }
}

#[test]
fn a_manager_without_room_for_all_queues_gets_none_and_the_log_says_so() {
    require!(Wgsep);
    for (capacity, warnings) in [(0, 0), (QUEUES - 1, 1), (QUEUES, 0)] {
        let (manager, netns) = (ServiceManager::default(), Netns::new());
        let daemon =
            Daemon::start_with(Wgsep, &netns, |command| manager.supervise(command, capacity));
        manager.until_message("READY=1");
        let expected = if capacity == QUEUES { QUEUES } else { 0 };
        assert_eq!(manager.stored().len(), expected);
        let log = daemon.process.log();
        assert_eq!(log.matches("raise FileDescriptorStoreMax=").count(), warnings, "{log}");
    }
}

#[test]
fn another_queue_of_the_launcher_takes_the_place_of_what_is_stored() {
    require!(Wgsep);
    let (manager, netns, interface) = (ServiceManager::default(), Netns::new(), unique_interface());
    drop(crashed(&manager, &netns, &interface));
    let other = unique_interface();
    let flags = libc::IFF_TUN | libc::IFF_NO_PI;
    let queue = open_queue(&netns, &other, OFlag::O_RDWR, flags);
    let daemon = start_again(&manager, &netns, &other, |command| {
        let number = descriptors::give(command, &queue);
        command.env("WG_TUN_FD", number.to_string());
    });
    let log = daemon.process.log();
    assert!(log.contains("is given up: WG_TUN_FD is set"), "{log}");
    wait_for_removal(&netns, &interface);
    assert!(manager.stored().is_empty(), "the queue of another program was stored");
}
