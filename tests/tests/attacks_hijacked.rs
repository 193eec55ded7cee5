//! Attacks 2 and 4: what a dataplane that was taken over could try on the kernel. Each is tried by a
//! thread of the real one, sealed and serving, on the descriptors that it really holds.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used)]

use std::fs;
use std::time::Duration;

use nix::libc;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use wgsep_tests::daemon::Daemon;
use wgsep_tests::hijack::{Entry, Hijacked, Outcome};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::stop;
use wgsep_tests::{descriptors, procfs, require, wait};

/// How long the end of it all may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(10);
const WORKERS: usize = 2;
const PAGE: u64 = 4096;
const READ_WRITE: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
const PRIVATE: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
const NO_DESCRIPTOR: u64 = u64::MAX;

/// What linux/if_tun.h has to set.
const TUN_SET: [(&str, u64); 8] = [
    ("TUNSETPERSIST", 0x4004_54cb),
    ("TUNSETOWNER", 0x4004_54cc),
    ("TUNSETGROUP", 0x4004_54ce),
    ("TUNSETQUEUE", 0x4004_54d9),
    ("TUNSETCARRIER", 0x4004_54e2),
    ("TUNSETOFFLOAD", 0x4004_54d0),
    ("TUNSETIFF", 0x4004_54ca),
    ("TUNATTACHFILTER", 0x4010_54d5),
];

/// A daemon that serves: its interface is up, so that the dataplane holds all it ever does.
fn serving() -> Daemon {
    let daemon = Daemon::start_with(Wgsep, &Netns::new(), |command| {
        command.args(["--workers", &WORKERS.to_string()]);
    });
    daemon.netns.run(format!("ip link set {} up", daemon.interface));
    daemon.wg("show", "listen-port");
    daemon
}

fn threads(process: Pid) -> Vec<Pid> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let names = tasks.map(|task| task.unwrap().file_name().into_string().unwrap());
    let mut threads: Vec<_> = names.map(|name| Pid::from_raw(name.parse().unwrap())).collect();
    threads.sort_unstable();
    threads
}

/// Takes over the last thread, which is a worker.
fn hijack(daemon: &Daemon) -> Hijacked {
    let process = daemon.dataplane();
    Hijacked::seize(process, *threads(process).last().unwrap())
}

/// The dataplane's descriptor of a kind.
#[track_caller]
fn descriptor(daemon: &Daemon, kind: &str) -> u64 {
    let held = descriptors::kinds(daemon.dataplane(), daemon.process.pid());
    let found = held.iter().find(|(_, held)| *held == kind);
    u64::try_from(*found.unwrap_or_else(|| panic!("no {kind} in {held:?}")).0).unwrap()
}

/// The call ended the whole process, and with it the interface, the socket and the helper.
#[track_caller]
fn assert_ended_by(what: &str, outcome: Outcome, mut daemon: Daemon, dataplane: Pid) {
    assert_eq!(outcome, Outcome::Died(Signal::SIGSYS), "{what}");
    let status = daemon.process.exit_within(LIMIT);
    assert_eq!(status.code(), Some(1), "{what}: {}", daemon.process.log());
    let log = daemon.process.log();
    assert!(log.contains("the dataplane was killed by SIGSYS"), "{what}: {log}");
    assert!(!procfs::is_running(dataplane), "{what}: the dataplane lives");
    wait::until("the interface is gone", LIMIT, || !daemon.has_interface());
    assert!(!daemon.has_socket(), "{what}: the socket is left");
}

/// Makes a call on a worker of a daemon of its own, that ends the daemon.
#[track_caller]
fn assert_fatal(
    what: &str,
    number: i64,
    arguments: impl FnOnce(&Daemon, &mut Hijacked) -> Vec<u64>,
) {
    let daemon = serving();
    let (dataplane, mut worker) = (daemon.dataplane(), hijack(&daemon));
    let arguments = arguments(&daemon, &mut worker);
    let outcome = worker.call(number, &arguments);
    assert_ended_by(what, outcome, daemon, dataplane);
}

/// The other tests show something only if a hijacked thread does what it is told.
#[test]
fn what_the_filter_leaves_a_hijacked_thread_can_do_and_the_daemon_goes_on() {
    require!(Wgsep);
    let daemon = serving();
    let mut worker = hijack(&daemon);
    let own = i64::from(daemon.dataplane().as_raw());
    assert_eq!(worker.call(libc::SYS_getpid, &[]), Outcome::Returned(own));
    let Outcome::Returned(memory) =
        worker.call(libc::SYS_mmap, &[0, PAGE, READ_WRITE, PRIVATE, NO_DESCRIPTOR, 0])
    else {
        panic!("it died of memory for data");
    };
    assert!(memory > 0, "{memory}");
    drop(worker);
    daemon.wg("show", "listen-port");
}

#[test]
fn attack_02_calls_of_x32_and_of_32_bit_programs_kill() {
    require!(Wgsep);
    const X32: i64 = 0x4000_0000;
    const I386_GETPID: i64 = 20;
    for (entry, number) in [(Entry::Syscall, libc::SYS_getpid | X32), (Entry::Int80, I386_GETPID)] {
        let daemon = serving();
        let dataplane = daemon.dataplane();
        let outcome = hijack(&daemon).call_by(entry, number, &[]);
        assert_ended_by(&format!("{entry:?} {number:#x}"), outcome, daemon, dataplane);
    }
}

#[test]
fn attack_02_executable_memory_kills() {
    require!(Wgsep);
    let execute = libc::PROT_EXEC as u64;
    for protection in [execute, READ_WRITE | execute] {
        assert_fatal("mmap", libc::SYS_mmap, |_, _| {
            vec![0, PAGE, protection, PRIVATE, NO_DESCRIPTOR, 0]
        });
    }
    assert_fatal("mprotect", libc::SYS_mprotect, |_, worker| {
        let mapped = worker.call(libc::SYS_mmap, &[0, PAGE, READ_WRITE, PRIVATE, NO_DESCRIPTOR, 0]);
        let Outcome::Returned(memory) = mapped else { panic!("{mapped:?}") };
        vec![memory.cast_unsigned(), PAGE, execute]
    });
    assert_fatal("mmap of a descriptor", libc::SYS_mmap, |daemon, _| {
        let tun = descriptor(daemon, "tun");
        vec![0, PAGE, READ_WRITE, libc::MAP_SHARED as u64, tun, 0]
    });
}

#[test]
fn attack_02_a_violation_on_any_thread_ends_the_whole_process_and_the_interface() {
    require!(Wgsep);
    let mut names = Vec::new();
    // The first waits for the second, the control thread; the others are the workers.
    for number in 0..2 + WORKERS {
        let daemon = serving();
        let dataplane = daemon.dataplane();
        let threads = threads(dataplane);
        assert_eq!(threads.len(), 2 + WORKERS);
        let name = fs::read_to_string(format!("/proc/{}/comm", threads[number])).unwrap();
        let mut thread = Hijacked::seize(dataplane, threads[number]);
        // The first thread's end is the process's, which its tracer is told of before the helper.
        stop(daemon.process.pid());
        let outcome = thread.call(libc::SYS_socket, &[libc::AF_INET as u64, 2, 0]);
        daemon.process.signal(Signal::SIGCONT);
        assert_ended_by(&name, outcome, daemon, dataplane);
        names.push(name.trim().to_owned());
    }
    assert_eq!(names, ["wgsep-dataplane", "control", "worker", "worker"]);
}

#[test]
fn attack_04_the_tun_device_cannot_be_kept_given_away_or_changed() {
    require!(Wgsep);
    for (what, request) in TUN_SET {
        assert_fatal(what, libc::SYS_ioctl, |daemon, _| {
            vec![descriptor(daemon, "tun"), request, 1]
        });
    }
}

#[test]
fn attack_04_the_udp_sockets_cannot_be_moved_marked_or_made_to_lie() {
    require!(Wgsep);
    for (what, level, name) in [
        ("SO_BINDTODEVICE", libc::SOL_SOCKET, libc::SO_BINDTODEVICE),
        ("IP_FREEBIND", libc::IPPROTO_IP, libc::IP_FREEBIND),
        ("SO_MARK", libc::SOL_SOCKET, libc::SO_MARK),
    ] {
        assert_fatal(what, libc::SYS_setsockopt, |daemon, _| {
            vec![descriptor(daemon, "udp"), level as u64, name as u64, PAGE, 4]
        });
    }
    for (what, number) in [("connect", libc::SYS_connect), ("bind", libc::SYS_bind)] {
        assert_fatal(what, number, |daemon, _| vec![descriptor(daemon, "udp"), PAGE, 16]);
    }
}

/// sendmsg has to be allowed, and no filter sees what its pointers lead to: here the kernel's own
/// check of capabilities refuses.
#[test]
fn attack_04_a_mark_in_a_control_message_is_refused() {
    require!(Wgsep);
    let daemon = serving();
    let socket = descriptor(&daemon, "udp");
    let mut worker = hijack(&daemon);
    let mapped = worker.call(libc::SYS_mmap, &[0, PAGE, READ_WRITE, PRIVATE, NO_DESCRIPTOR, 0]);
    let Outcome::Returned(memory) = mapped else { panic!("{mapped:?}") };
    let memory = memory.cast_unsigned();
    let [message, name, payload, control] = [0, 128, 192, 256].map(|offset| memory + offset);
    // msghdr: name, its length, iovec and how many, control and its length, flags.
    let header = |control_len| [name, 16, message + 56, 1, control, control_len, 0];
    // sockaddr_in: family, port 9, 127.0.0.1.
    worker.write(name, &[0x0100_007f_0900_0002, 0]);
    worker.write(message + 56, &[payload, 8]);
    // cmsghdr: length, level and type; then the mark.
    let kind = u64::from(libc::SO_MARK.cast_unsigned()) << 32 | libc::SOL_SOCKET as u64;
    worker.write(control, &[20, kind, 51820]);
    let mut send = |control_len| {
        worker.write(message, &header(control_len));
        worker.call(libc::SYS_sendmsg, &[socket, message, libc::MSG_DONTWAIT as u64])
    };
    assert_eq!(send(0), Outcome::Returned(8), "without a mark");
    assert_eq!(send(24), Outcome::Returned(-i64::from(libc::EPERM)));
    drop(worker);
    daemon.wg("show", "listen-port");
}
