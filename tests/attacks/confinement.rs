//! The confinement of both processes as the kernel tells it, thread by thread; attacks 3 and 5. What is
//! asserted here was read from /proc; nothing is taken from the processes' own word.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use wgsep_tests::daemon::{Daemon, SOCKETS, remove_files, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::launched_as::LaunchedAs;
use wgsep_tests::link::Family;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{Process, output};
use wgsep_tests::procfs::{self, Status, namespace, threads};
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::Plan;
use wgsep_tests::{descriptors, require, uapi, wait};

/// The five sets of capabilities(7).
const SETS: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];

const CAP_KILL: u64 = 1 << 5;
const CAP_NET_ADMIN: u64 = 1 << 12;

/// The uid the kernel shows for ids it cannot map, and NFS for anonymous users.
const NOBODY: u32 = 65_534;

/// A tunnel end that has carried traffic: all threads started, all descriptors passed.
fn after_traffic(check: impl FnOnce(&Daemon)) {
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    until_ping(&tunnel.left.daemon.netns, tunnel.right.side.inner(Family::V4));
    check(&tunnel.left.daemon);
}

fn assert_locked_down(status: &Status) {
    assert_eq!(status.text("NoNewPrivs"), "1", "no_new_privs");
    assert_eq!(status.text("Seccomp"), "2", "seccomp filter mode");
}

#[test]
fn attack_03_every_thread_of_the_dataplane_is_without_capability_and_locked_down() {
    require!(Wgsep);
    after_traffic(|daemon| {
        for thread in threads(daemon.dataplane()) {
            for set in SETS {
                assert_eq!(thread.capabilities(set), 0, "{set} of {}", thread.text("Name"));
            }
            assert_locked_down(&thread);
        }
    });
}

#[test]
fn attack_03_every_thread_of_the_dataplane_has_a_uid_of_its_own_and_no_groups() {
    require!(Wgsep);
    after_traffic(|daemon| {
        let helper = threads(daemon.process.pid())[0].ids("Uid")[0];
        for thread in threads(daemon.dataplane()) {
            for field in ["Uid", "Gid"] {
                let ids: BTreeSet<_> = thread.ids(field).into_iter().collect();
                assert_eq!(
                    ids.len(),
                    1,
                    "{field}: real, effective, saved and file system: {ids:?}"
                );
                // Otherwise it has the launcher's, and the report says so.
                for id in ids.into_iter().filter(|_| LaunchedAs::this_run().has_own_uid()) {
                    assert!(id != 0 && id != NOBODY && id != helper, "{field} {id}");
                }
            }
            assert_eq!(thread.text("Groups"), "", "supplementary groups");
        }
    });
}

#[test]
fn two_daemons_dataplanes_cannot_reach_each_other() {
    require!(Wgsep);
    let first = Daemon::start(Wgsep, &Netns::new());
    let second = Daemon::start(Wgsep, &Netns::new());
    let (first, second) = (first.dataplane(), second.dataplane());
    for kind in ["net", "mnt", "ipc", "uts"] {
        assert_ne!(namespace(first, kind), namespace(second, kind), "{kind}");
    }
}

#[test]
fn the_dataplane_sees_an_empty_root() {
    require!(Wgsep);
    after_traffic(|daemon| {
        let root = format!("/proc/{}/root/", daemon.dataplane());
        let entries: Vec<_> = fs::read_dir(&root).unwrap().flatten().collect();
        assert!(entries.is_empty(), "{entries:?}");
        let made = fs::create_dir(format!("{root}made"));
        assert!(made.is_err(), "the root can be written");
        let cwd = fs::read_dir(format!("/proc/{}/cwd/", daemon.dataplane())).unwrap();
        assert_eq!(cwd.count(), 0, "the working directory is outside the root");
    });
}

#[test]
fn the_dataplane_is_in_namespaces_of_its_own() {
    require!(Wgsep);
    after_traffic(|daemon| {
        let (helper, dataplane) = (daemon.process.pid(), daemon.dataplane());
        for kind in ["net", "mnt", "ipc", "uts"] {
            assert_ne!(namespace(helper, kind), namespace(dataplane, kind), "{kind}");
        }
        let interfaces = fs::read_to_string(format!("/proc/{dataplane}/net/dev")).unwrap();
        let names: Vec<_> = interfaces.lines().skip(2).map(str::trim).collect();
        assert!(names.iter().all(|line| line.starts_with("lo:")), "{names:?}");
    });
}

#[test]
fn no_process_dumps_core() {
    require!(Wgsep);
    after_traffic(|daemon| {
        for pid in [daemon.process.pid(), daemon.dataplane()] {
            let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
            let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
            let values: Vec<_> = core.split_whitespace().skip(4).take(2).collect();
            assert_eq!(values, ["0", "0"], "{core}");
        }
    });
}

/// A non-dumpable process's /proc entries belong to root, under any uid: its own uid may not
/// read its memory, descriptors or environment.
#[test]
fn the_dataplane_is_not_dumpable() {
    require!(Wgsep);
    after_traffic(|daemon| {
        let dataplane = daemon.dataplane();
        let uid = threads(dataplane)[0].ids("Uid")[0];
        for (file, reader) in [("environ", "cat"), ("maps", "cat"), ("mem", "cat"), ("fd", "ls")] {
            let path = format!("/proc/{dataplane}/{file}");
            let mut command = Command::new("setpriv");
            command.args([&format!("--reuid={uid}"), &format!("--regid={uid}"), "--clear-groups"]);
            let output = output(command.args([reader, &path]));
            let message = String::from_utf8_lossy(&output.stderr);
            assert!(message.contains("Permission denied"), "{path} as uid {uid}: {message}");
        }
    });
}

#[test]
fn the_helper_holds_two_capabilities_and_is_locked_down() {
    require!(Wgsep);
    after_traffic(|daemon| {
        let threads = threads(daemon.process.pid());
        assert_eq!(threads.len(), 1, "the helper has one thread");
        let helper = &threads[0];
        for (set, expected) in
            SETS.into_iter().zip([0, CAP_NET_ADMIN | CAP_KILL, CAP_NET_ADMIN | CAP_KILL, 0, 0])
        {
            assert_eq!(helper.capabilities(set), expected, "{set}");
        }
        assert_eq!(helper.text("Groups"), "", "supplementary groups");
        assert_locked_down(helper);
    });
}

/// Descriptors of a process from 3 on, as `descriptors::count` has them.
fn assert_holds(daemon: &Daemon, process: Pid, expected: &[(&str, usize)]) {
    let held = descriptors::count(process, daemon.process.pid());
    let expected = expected.iter().map(|(kind, number)| ((*kind).to_owned(), *number)).collect();
    assert_eq!(held, expected);
}

#[test]
fn attack_05_the_dataplane_holds_exactly_what_it_works_with() {
    require!(Wgsep);
    after_traffic(|daemon| {
        let dataplane = daemon.dataplane();
        // The others are the control thread and the first, which waits for its end.
        let workers = threads(dataplane).len() - 2;
        assert_holds(
            daemon,
            dataplane,
            &[
                ("UAPI socket", 1),
                ("status socket", 1),
                // The leading worker's, and two of the control thread: one asks whether the interface is up.
                ("epoll", workers + 3),
                ("event", workers + 1),
                ("helper's socket", 1),
                ("netlink", 1),
                ("timer", 1),
                // One that is written to, and those that flows wait in.
                ("tun", 1 + 16),
                ("udp", 1),
                ("udp6", 1),
            ],
        );
        for number in 0..=2 {
            let target = procfs::descriptors(dataplane).remove(&number).unwrap_or_default();
            let harmless = target == "/dev/null" || target.starts_with("pipe:");
            assert!(harmless, "descriptor {number} is {target}");
        }
    });
}

#[test]
fn attack_05_the_helper_holds_exactly_what_it_needs_and_what_a_successor_gets() {
    require!(Wgsep);
    after_traffic(|daemon| {
        let log = procfs::descriptors(daemon.process.pid()).remove(&2).unwrap();
        let directory = fs::canonicalize(SOCKETS).unwrap().display().to_string();
        let [socket, report, upgrade, status] = ["sock", "sandbox", "upgrade", "status"]
            .map(|kind| format!("{directory}/{}.{kind}", daemon.interface));
        // A container may have none, and it takes CAP_SYSLOG.
        let has_log = LaunchedAs::this_run() == LaunchedAs::Root;
        let has_log = has_log && fs::File::open("/dev/kmsg").is_ok();
        let kernel_log = has_log.then_some(("/dev/kmsg", 1));
        let mut expected: Vec<(&str, usize)> = vec![
            // The socket's directory, to remove it from, and the files, to know them by.
            (&directory, 1),
            (&socket, 1),
            (&report, 1),
            (&upgrade, 1),
            (&status, 1),
            // The kernel's uevents.
            ("netlink", 1),
            // Where it logs to, which here is a file of the test's.
            (&log, 1),
            // The channel, what is never read, and the place of the channel to a helper that replaces it.
            ("helper's socket", 3),
            // What such a helper gets, and where it announces itself.
            ("tun", 17),
            ("UAPI socket", 1),
            ("status socket", 1),
            ("unix datagram socket", 1),
            ("inotify", 1),
            ("pidfd", 1),
            ("pipe", 1),
            ("signalfd", 1),
            ("udp", 1),
            ("udp6", 1),
        ];
        expected.extend(kernel_log);
        assert_holds(daemon, daemon.process.pid(), &expected);
    });
}

/// A launcher that forgot O_CLOEXEC must not hand its files to the dataplane, nor the helper.
#[test]
fn attack_05_a_descriptor_leaked_by_the_launcher_reaches_neither_process() {
    require!(Wgsep);
    let (netns, name) = (Netns::new(), unique_interface());
    let mut command = netns.command("sh");
    command.args(["-c", "exec 8</etc/passwd 9>/dev/full; exec \"$@\"", "sh"]);
    command.arg(wgsep_program("wgsep")).args(["-f", &name]);
    let process = Process::spawn(command, "wgsep with leaked descriptors");
    wait::until("it answers", Duration::from_secs(10), || uapi::is_answering(&name));
    let children = procfs::children(process.pid());
    assert_eq!(children.len(), 1);
    for pid in [process.pid(), children[0]] {
        let open = procfs::descriptors(pid);
        let leaked =
            open.values().find(|target| ["/etc/passwd", "/dev/full"].contains(&&***target));
        assert_eq!(leaked, None, "{pid} has {open:?}");
    }
    remove_files(&name);
}

/// A start takes a few milliseconds between exec and lock-down, so the child is stopped for each look,
/// and runs on only between two looks.
#[test]
fn nothing_of_the_network_is_held_before_the_lockdown() {
    require!(Wgsep);
    let (mut starts, mut looks) = (0, 0);
    // On a busy machine most looks come too early or too late.
    while starts < 10 || looks == 0 {
        assert!(starts < 200, "no start was caught before its lock-down, so this shows nothing");
        starts += 1;
        let (netns, name) = (Netns::new(), unique_interface());
        let process = Process::spawn(Wgsep.command(&netns, &name), "wgsep while it starts");
        let deadline = Instant::now() + Duration::from_secs(10);
        let child = loop {
            assert!(Instant::now() < deadline, "the helper starts no child");
            if let Some(child) = procfs::children(process.pid()).first() {
                break *child;
            }
        };
        while !is_locked_down(child) {
            assert!(Instant::now() < deadline, "the dataplane is never locked down");
            kill(child, Signal::SIGSTOP).unwrap();
            looks += usize::from(holds_nothing_if_not_locked_down(process.pid(), child));
            kill(child, Signal::SIGCONT).unwrap();
        }
        wait::until("it answers", Duration::from_secs(10), || uapi::is_answering(&name));
        remove_files(&name);
    }
}

fn is_locked_down(child: Pid) -> bool {
    let status = fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
    status.contains("\nSeccomp:\t2\n")
}

/// Whether the dataplane was seen before its lockdown.
///
/// Descriptors are listed first and the lockdown is read after: where it is not there yet, it was not
/// when they were listed.
fn holds_nothing_if_not_locked_down(helper: Pid, child: Pid) -> bool {
    let held = descriptors::kinds(child, helper);
    // Until exec the child is a copy of the helper, with the helper's descriptors.
    let program = fs::read_link(format!("/proc/{child}/exe")).unwrap_or_default();
    if is_locked_down(child) || !program.ends_with("wgsep-dataplane") {
        return false;
    }
    for kind in held.values() {
        let network =
            ["tun", "udp", "udp6", "UAPI socket", "status socket", "netlink"].contains(&&**kind);
        assert!(!network, "{kind} is held before the lockdown: {held:?}");
    }
    true
}
