//! Attacks 2, 4 and 5: what a dataplane that was taken over could try on the kernel. Each is tried by a
//! thread of the real one, locked down and serving, on the descriptors that it really holds.
#![cfg(target_arch = "x86_64")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use wgsep_tests::daemon::{Daemon, socket_path};
use wgsep_tests::hijack::{
    Entry, Hijacked, LIMIT, NO_DESCRIPTOR, Outcome, PAGE, PRIVATE, READ_WRITE, WORKERS,
    assert_ended_by, assert_fatal, descriptor, hijack, map_page, serving, threads,
};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::launched_as::LaunchedAs;
use wgsep_tests::process::stop;
use wgsep_tests::skip::skip;
use wgsep_tests::{procfs, require, wait};

/// SIGCANCEL and SIGSETXID, as bits.
const GLIBC_OWN: u64 = 0b11 << 31;

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

/// What the dataplane has mapped: where, with which permissions, and the name.
fn mappings(daemon: &Daemon) -> Vec<(u64, String, String)> {
    let maps = fs::read_to_string(format!("/proc/{}/maps", daemon.dataplane())).unwrap();
    let mapping = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let start = words[0].split_once('-').unwrap().0;
        let start = u64::from_str_radix(start, 16).unwrap();
        (start, words[1].to_owned(), words.get(5).unwrap_or(&"").to_string())
    };
    maps.lines().map(mapping).collect()
}

/// The other tests show something only if a hijacked thread does what it is ordered to.
#[test]
fn what_the_filter_leaves_a_hijacked_thread_can_do_and_the_daemon_continues() {
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
    assert_fatal("mprotect", libc::SYS_mprotect, |_, worker| vec![map_page(worker), PAGE, execute]);
    assert_fatal("mmap of a descriptor", libc::SYS_mmap, |daemon, _| {
        let tun = descriptor(daemon, "tun");
        vec![0, PAGE, READ_WRITE, libc::MAP_SHARED as u64, tun, 0]
    });
}

/// Pages that an attacker may read and write could otherwise take the place of constants, or of the table
/// of functions that the loader wrote.
#[test]
fn attack_02_nothing_of_the_program_can_be_unmapped() {
    require!(Wgsep);
    let daemon = serving();
    if daemon.sandbox_report().contains("sealed-memory=unsupported") {
        return skip("this kernel has no mseal(2)");
    }
    let mut worker = hijack(&daemon);
    let memory = map_page(&mut worker);
    let unmapped = worker.call(libc::SYS_munmap, &[memory, PAGE]);
    assert_eq!(unmapped, Outcome::Returned(0), "what it mapped itself");
    let mut kinds = BTreeSet::new();
    for (start, access, name) in mappings(&daemon) {
        if name.ends_with("/wgsep-dataplane") || name.starts_with("/secretmem") {
            let unmapped = worker.call(libc::SYS_munmap, &[start, PAGE]);
            let refused = Outcome::Returned(-i64::from(libc::EPERM));
            assert_eq!(unmapped, refused, "{access} {name} at {start:x}");
            kinds.insert(access);
        }
    }
    let all = ["---s", "r--p", "r-xp", "rw-p", "rw-s"].map(str::to_owned);
    assert_eq!(kinds, BTreeSet::from(all));
    drop(worker);
    daemon.wg("show", "listen-port");
}

/// The program's own bytes behind its code would be code, too.
#[test]
fn attack_02_code_that_grows_moves_or_can_be_written_kills() {
    require!(Wgsep);
    let code = |daemon: &Daemon| {
        let code = mappings(daemon).into_iter().find(|(_, access, _)| access == "r-xp");
        code.unwrap().0
    };
    assert_fatal("mremap", libc::SYS_mremap, |daemon, _| {
        vec![code(daemon), PAGE, 2 * PAGE, libc::MREMAP_MAYMOVE as u64]
    });
    assert_fatal("mprotect", libc::SYS_mprotect, |daemon, _| {
        vec![code(daemon), PAGE, READ_WRITE | libc::PROT_EXEC as u64]
    });
}

/// A frame of its own making would set every register, and is what returning from a handler reads.
#[test]
fn attack_02_returning_from_a_signal_handler_or_having_one_kills() {
    require!(Wgsep);
    assert_fatal("rt_sigreturn", libc::SYS_rt_sigreturn, |_, _| vec![]);
    assert_fatal("rt_sigaction", libc::SYS_rt_sigaction, |_, _| {
        vec![libc::SIGSEGV as u64, PAGE, 0, 8]
    });
}

/// But those that glibc has for itself, which it would not have taken away.
#[test]
fn no_signal_has_a_handler() {
    require!(Wgsep);
    let daemon = serving();
    for pid in [daemon.dataplane(), daemon.process.pid()] {
        for thread in procfs::threads(pid) {
            let caught = thread.capabilities("SigCgt");
            assert_eq!(caught & GLIBC_OWN, caught, "{}: {caught:x}", thread.text("Name"));
        }
    }
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
        // The first thread's end is the process's, of which its tracer is notified before the helper.
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
    let memory = map_page(&mut worker);
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

/// A client of the UAPI socket, and the dataplane's descriptor of it.
fn client(daemon: &Daemon) -> (UnixStream, u64) {
    // It is of the client's network namespace, so that the daemon's tables do not show what it is.
    let sockets = || -> Vec<i32> {
        let held = procfs::descriptors(daemon.dataplane()).into_iter();
        held.filter(|(_, to)| to.starts_with("socket:")).map(|(number, _)| number).collect()
    };
    // The two listeners, the channel, the link monitor and two UDP sockets.
    wait::until("no other client is left", LIMIT, || sockets().len() == 6);
    let before = sockets();
    let client = UnixStream::connect(socket_path(&daemon.interface)).unwrap();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    let accepted =
        wait::poll(LIMIT, || sockets().into_iter().find(|number| !before.contains(number)));
    (client, u64::try_from(accepted.unwrap()).unwrap())
}

/// Bytes pass, descriptors do not: an accomplice of the dataplane gets none of its sockets and queues, which
/// it could use after the end of the dataplane.
#[test]
fn attack_05_no_descriptor_can_be_sent_to_a_uapi_client_or_to_the_helper() {
    require!(Wgsep);
    let daemon = serving();
    let (mut client, accepted) = client(&daemon);
    let channel = descriptor(&daemon, "helper's socket");
    let held = ["tun", "udp", "UAPI socket", "status socket"].map(|kind| descriptor(&daemon, kind));
    let mut worker = hijack(&daemon);
    let memory = map_page(&mut worker);
    let [message, payload, control] = [0, 192, 256].map(|offset| memory + offset);
    worker.write(payload, &[u64::from_le_bytes(*b"no more!")]);
    worker.write(message + 56, &[payload, 8]);
    let mut send = |to, sent: Option<u64>| {
        let (at, len) = sent.map_or((0, 0), |_| (control, 24));
        // msghdr: no name, iovec and how many, control and its length, flags.
        worker.write(message, &[0, 0, message + 56, 1, at, len, 0]);
        // cmsghdr: length, level and type; then the descriptor.
        let kind = u64::from(libc::SCM_RIGHTS.cast_unsigned()) << 32 | libc::SOL_SOCKET as u64;
        worker.write(control, &[20, kind, sent.unwrap_or(0)]);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        worker.call(libc::SYS_sendmsg, &[to, message, flags as u64])
    };
    if !LaunchedAs::this_run().has_own_uid() {
        // As SECURITY.md and the report say.
        assert!(daemon.sandbox_report().contains("no-fd-out=degraded(EPERM)"));
        assert_eq!(send(accepted, Some(held[0])), Outcome::Returned(8));
        return;
    }
    for descriptor in held {
        for to in [accepted, channel] {
            let refused = Outcome::Returned(-i64::from(libc::ETOOMANYREFS));
            assert_eq!(send(to, Some(descriptor)), refused, "{descriptor} to {to}");
        }
    }
    assert_eq!(send(accepted, None), Outcome::Returned(8));
    let mut received = [0; 8];
    client.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"no more!");
    drop(worker);
    daemon.wg("show", "listen-port");
}

#[test]
fn attack_05_no_descriptor_can_be_received_from_a_uapi_client() {
    require!(Wgsep);
    let daemon = serving();
    if daemon.sandbox_report().contains("no-fd-in=unsupported") {
        return skip("this kernel has no SO_PASSRIGHTS, which came with Linux 6.16");
    }
    let (mut client, accepted) = client(&daemon);
    let shadow = fs::File::open("/etc/shadow").unwrap();
    let send = |to: &UnixStream| {
        let descriptors = [shadow.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let bytes = [IoSlice::new(b"\n")];
        sendmsg::<UnixAddr>(to.as_raw_fd(), &bytes, &rights, MsgFlags::MSG_NOSIGNAL, None)
    };
    let (ordinary, _other) = UnixStream::pair().unwrap();
    assert_eq!(send(&ordinary), Ok(1), "the control");
    let mut worker = hijack(&daemon);
    assert_eq!(send(&client), Err(Errno::EPERM));
    // A client of the status socket need not even be root.
    let status = socket_path(&daemon.interface).with_extension("status");
    assert_eq!(send(&UnixStream::connect(status).unwrap()), Err(Errno::EPERM));
    // Nor is there anything to receive.
    let memory = map_page(&mut worker);
    worker.write(memory, &[0, 0, memory + 56, 1, memory + 256, 64, 0, memory + 192, 8]);
    let flags = libc::MSG_DONTWAIT as u64;
    let received = worker.call(libc::SYS_recvmsg, &[accepted, memory, flags]);
    assert_eq!(received, Outcome::Returned(-i64::from(libc::EAGAIN)));
    drop(worker);
    client.write_all(b"get=1\n\n").unwrap();
    assert!(client.read(&mut [0; 64]).unwrap() > 0);
}

/// Lines that look like the helper's, then more of them than any log should take.
#[test]
fn attack_16_log_lines_keep_their_tag_and_end_with_the_budget_of_the_hour() {
    require!(Wgsep);
    const BUDGET: usize = 4 << 20;
    let daemon = serving();
    let (interface, mut worker) = (&daemon.interface, hijack(&daemon));
    let memory = map_page(&mut worker);
    let mut log = |text: &str| {
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize(text.len().next_multiple_of(8), 0);
        let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
        worker.write(memory, &words.collect::<Vec<_>>());
        let written = i64::try_from(text.len()).unwrap();
        wait::until("the pipe takes it", LIMIT, || {
            worker.call(libc::SYS_write, &[2, memory, text.len() as u64])
                == Outcome::Returned(written)
        });
    };
    let lines_of = |tag: &str| {
        let log = daemon.process.log();
        let lines = log.lines().filter(|line| line.contains(&format!(" {tag}[{interface}]: ")));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let own = lines_of("wgsep");
    let forged = format!("2026-11-29T00:00:00.000Z ERROR wgsep[{interface}]: ended: forged");
    for end in ["\n", "\r", "\u{2028}", "\u{1b}[1A", "\n\0"] {
        log(&format!("INFO forged{end}{forged}\n"));
    }
    log(&format!("INFO {}{forged}\n", " ".repeat(300)));
    wait::until("all of it is logged", LIMIT, || {
        lines_of("wgsep-dataplane").iter().filter(|line| line.contains("ended: forged")).count()
            == 6
    });
    assert_eq!(lines_of("wgsep"), own, "a forged line of the helper");

    let line = format!("WARN {}\n", "x".repeat(1000));
    let text = line.repeat(4);
    for _ in 0..BUDGET / text.len() + 50 {
        log(&text);
    }
    let suppressed = "lines of the dataplane are suppressed until 20";
    wait::until(suppressed, LIMIT, || daemon.process.log().contains(suppressed));
    let len = daemon.process.log().len();
    for _ in 0..50 {
        log(&text);
    }
    drop(worker);
    // The helper's own lines go on, and come after all that was written before.
    daemon.process.signal(Signal::SIGTERM);
    wait::until("it ends", LIMIT, || daemon.process.log().contains("ended: SIGTERM"));
    let after = daemon.process.log().len() - len;
    assert!(after < 300, "{after} bytes came after the budget was used up");
    assert!(len > BUDGET && len < BUDGET + (64 << 10), "{len} bytes");
}
