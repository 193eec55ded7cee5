//! Attack 18: what SECURITY.md says that a process of the two cannot do once it was taken over. A thread
//! of the real one, locked down and serving, tries exactly that.
#![cfg(target_arch = "x86_64")]

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use nix::libc;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use wgsep_tests::daemon::{Daemon, socket_path};
use wgsep_tests::hijack::{
    Hijacked, LIMIT, NO_DESCRIPTOR, Outcome, PAGE, PRIVATE, READ_WRITE, assert_ended_by,
    assert_fatal, descriptor, hijack, map_page, serving, threads,
};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::scratch::Scratch;
use wgsep_tests::{procfs, require, wait};

/// AT_FDCWD, as the kernel reads it.
const HERE: u64 = libc::AT_FDCWD as u64;
const PATH: &str = "/etc/shadow";

/// A system call's name, its number, and its arguments, of which some may be the address of [`PATH`] or of the
/// rest of that page.
type Call<'a> = (&'a str, i64, &'a dyn Fn(u64) -> Vec<u64>);

/// Writes a C string into memory of the process.
fn put(thread: &Hijacked, at: u64, text: &str) {
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize((text.len() + 1).next_multiple_of(8), 0);
    let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    thread.write(at, &words.collect::<Vec<_>>());
}

/// Each call ends a dataplane of its own.
#[track_caller]
fn assert_each_is_fatal(calls: &[Call<'_>]) {
    for (name, number, arguments) in calls {
        assert_fatal(name, *number, |_, worker| {
            let page = map_page(worker);
            put(worker, page, PATH);
            arguments(page)
        });
    }
}

fn errno(errno: i32) -> Outcome {
    Outcome::Returned(-i64::from(errno))
}

#[test]
fn attack_18_the_dataplane_can_open_list_change_or_watch_no_file() {
    require!(Wgsep);
    const WRITE: u64 = (libc::O_WRONLY | libc::O_CREAT) as u64;
    assert_each_is_fatal(&[
        ("open", libc::SYS_open, &|path| vec![path, 0]),
        ("openat", libc::SYS_openat, &|path| vec![HERE, path, 0]),
        ("openat to write", libc::SYS_openat, &|path| vec![HERE, path, WRITE, 0o600]),
        ("openat2", libc::SYS_openat2, &|path| vec![HERE, path, path + 64, 24]),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, &|path| vec![HERE, path, 0]),
        ("getdents64", libc::SYS_getdents64, &|path| vec![3, path, 512]),
        ("stat", libc::SYS_newfstatat, &|path| vec![HERE, path, path + 64, 0]),
        ("statx", libc::SYS_statx, &|path| vec![HERE, path, 0, 0xfff, path + 64]),
        ("readlink", libc::SYS_readlinkat, &|path| vec![HERE, path, path + 64, 64]),
        ("unlink", libc::SYS_unlinkat, &|path| vec![HERE, path, 0]),
        ("rename", libc::SYS_renameat2, &|path| vec![HERE, path, HERE, path, 0]),
        ("link", libc::SYS_linkat, &|path| vec![HERE, path, HERE, path, 0]),
        ("mkdir", libc::SYS_mkdirat, &|path| vec![HERE, path, 0o700]),
        ("chmod", libc::SYS_fchmodat, &|path| vec![HERE, path, 0o777]),
        ("chdir", libc::SYS_chdir, &|path| vec![path]),
        ("chroot", libc::SYS_chroot, &|path| vec![path]),
        ("mount", libc::SYS_mount, &|path| vec![path, path, path, 0, 0]),
        ("inotify_init1", libc::SYS_inotify_init1, &|_| vec![0]),
        ("fanotify_init", libc::SYS_fanotify_init, &|_| vec![0, 0]),
        ("memfd_create", libc::SYS_memfd_create, &|path| vec![path, 0]),
        ("sendfile", libc::SYS_sendfile, &|_| vec![3, 4, 0, 512]),
        ("io_uring_setup", libc::SYS_io_uring_setup, &|path| vec![8, path + 64]),
    ]);
}

#[test]
fn attack_18_the_dataplane_can_start_no_process_thread_or_program() {
    require!(Wgsep);
    const THREAD: u64 = (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND) as u64;
    assert_each_is_fatal(&[
        ("fork", libc::SYS_fork, &|_| vec![]),
        ("vfork", libc::SYS_vfork, &|_| vec![]),
        ("clone of a process", libc::SYS_clone, &|_| vec![libc::SIGCHLD as u64, 0, 0, 0, 0]),
        ("clone of a thread", libc::SYS_clone, &|page| vec![THREAD, page + PAGE, 0, 0, 0]),
        ("clone3", libc::SYS_clone3, &|page| vec![page + 64, 88]),
        ("execve", libc::SYS_execve, &|path| vec![path, 0, 0]),
        ("execveat", libc::SYS_execveat, &|path| vec![HERE, path, 0, 0, 0]),
    ]);
}

#[test]
fn attack_18_the_dataplane_can_trace_read_or_signal_no_other_process() {
    require!(Wgsep);
    /// PIDFD_GETFD and the like need a descriptor; none of them gets that far.
    const ANY: u64 = 3;
    let helper = |daemon: &Daemon| u64::from(daemon.process.pid().as_raw().cast_unsigned());
    let calls: [(&str, i64, [u64; 5]); 11] = [
        ("ptrace", libc::SYS_ptrace, [libc::PTRACE_ATTACH as u64, 0, 0, 0, 0]),
        ("process_vm_readv", libc::SYS_process_vm_readv, [0, PAGE, 1, PAGE, 1]),
        ("process_vm_writev", libc::SYS_process_vm_writev, [0, PAGE, 1, PAGE, 1]),
        ("kill", libc::SYS_kill, [0, 9, 0, 0, 0]),
        ("tkill", libc::SYS_tkill, [0, 9, 0, 0, 0]),
        ("tgkill", libc::SYS_tgkill, [0, 0, libc::SIGABRT as u64, 0, 0]),
        ("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, [0, 9, PAGE, 0, 0]),
        ("pidfd_open", libc::SYS_pidfd_open, [0, 0, 0, 0, 0]),
        ("pidfd_getfd", libc::SYS_pidfd_getfd, [ANY, 0, 0, 0, 0]),
        ("pidfd_send_signal", libc::SYS_pidfd_send_signal, [ANY, 9, 0, 0, 0]),
        ("prlimit64", libc::SYS_prlimit64, [0, libc::RLIMIT_NOFILE.into(), PAGE, 0, 0]),
    ];
    for (name, number, arguments) in calls {
        // Where a process is named, by its number, it is the helper.
        assert_fatal(name, number, |daemon, _| {
            let mut arguments = arguments.to_vec();
            let place = usize::from(name == "ptrace");
            if !name.starts_with("pidfd_g") && !name.starts_with("pidfd_s") {
                arguments[place] = helper(daemon);
            }
            if name == "tgkill" {
                arguments[1] = helper(daemon);
            }
            arguments
        });
    }
    // Nor may a signal but SIGABRT reach a thread of its own.
    assert_fatal("tgkill", libc::SYS_tgkill, |daemon, _| {
        let own = u64::from(daemon.dataplane().as_raw().cast_unsigned());
        vec![own, own, libc::SIGKILL as u64]
    });
}

#[test]
fn attack_18_the_dataplane_can_have_no_uid_capability_namespace_or_power_again() {
    require!(Wgsep);
    assert_each_is_fatal(&[
        ("setuid", libc::SYS_setuid, &|_| vec![0]),
        ("setresuid", libc::SYS_setresuid, &|_| vec![0, 0, 0]),
        ("setresgid", libc::SYS_setresgid, &|_| vec![0, 0, 0]),
        ("setgroups", libc::SYS_setgroups, &|_| vec![0, 0]),
        ("capset", libc::SYS_capset, &|page| vec![page + 64, page + 128]),
        ("prctl, to be dumpable", libc::SYS_prctl, &|_| vec![libc::PR_SET_DUMPABLE as u64, 1]),
        ("seccomp", libc::SYS_seccomp, &|page| vec![1, 0, page + 64]),
        ("unshare", libc::SYS_unshare, &|_| vec![libc::CLONE_NEWUSER as u64]),
        ("setns", libc::SYS_setns, &|_| vec![3, 0]),
        ("bpf", libc::SYS_bpf, &|page| vec![0, page + 64, 64]),
        ("userfaultfd", libc::SYS_userfaultfd, &|_| vec![0]),
        ("perf_event_open", libc::SYS_perf_event_open, &|page| vec![page + 64, 0, 0, 0, 0]),
        ("keyctl", libc::SYS_keyctl, &|_| vec![0, 0, 0, 0, 0]),
        ("personality", libc::SYS_personality, &|_| vec![0]),
        ("modify_ldt", libc::SYS_modify_ldt, &|page| vec![1, page + 64, 16]),
    ]);
}

#[test]
fn attack_18_the_dataplane_can_make_no_socket_and_open_none_of_its_own() {
    require!(Wgsep);
    const STREAM: u64 = libc::SOCK_STREAM as u64;
    let kinds = [
        ("IPv4", libc::AF_INET),
        ("IPv6", libc::AF_INET6),
        ("unix", libc::AF_UNIX),
        ("netlink", libc::AF_NETLINK),
        ("packet", libc::AF_PACKET),
        ("vsock", libc::AF_VSOCK),
        ("alg", libc::AF_ALG),
    ];
    for (name, family) in kinds {
        assert_fatal(name, libc::SYS_socket, |_, _| vec![family as u64, STREAM, 0]);
    }
    assert_fatal("socketpair", libc::SYS_socketpair, |_, worker| {
        vec![libc::AF_UNIX as u64, STREAM, 0, map_page(worker)]
    });
    assert_fatal("listen", libc::SYS_listen, |daemon, _| vec![descriptor(daemon, "udp"), 1]);
    // An accepted client may pass no file on, and is accepted in one way only.
    assert_fatal("accept", libc::SYS_accept, |daemon, _| {
        vec![descriptor(daemon, "UAPI socket"), 0, 0]
    });
}

/// An rtnetlink request: type, flags, and what follows the header.
fn request(kind: u16, flags: i32, body: &[u32]) -> Vec<u64> {
    let len = 16 + 4 * u32::try_from(body.len()).unwrap();
    let flags = u32::from(u16::try_from(flags).unwrap());
    let mut halves = vec![len, u32::from(kind) | flags << 16, 1, 0];
    halves.extend(body);
    halves.resize(halves.len().next_multiple_of(2), 0);
    let word = |pair: &[u32]| u64::from(pair[0]) | u64::from(pair[1]) << 32;
    halves.chunks_exact(2).map(word).collect()
}

/// What the link monitor is for is reading. It was opened by a process with CAP_NET_ADMIN, but the kernel
/// asks for the sender's own capability as well.
#[test]
fn attack_18_the_link_monitor_reads_its_network_and_changes_nothing() {
    require!(Wgsep);
    let daemon = serving();
    let netlink = descriptor(&daemon, "netlink");
    daemon.netns.run(format!("ip address add 192.0.2.1/24 dev {}", daemon.interface));
    let link = daemon.netns.run(format!("ip -o link show {}", daemon.interface));
    let index: u32 = link.split(':').next().unwrap().trim().parse().unwrap();
    // The control thread itself, so that it does not read the answers.
    let control = threads(daemon.dataplane())[1];
    let mut worker = Hijacked::seize(daemon.dataplane(), control);
    let memory = map_page(&mut worker);
    let mut ask = |request: &[u64]| {
        // The answer to an earlier one may still wait.
        while let Outcome::Returned(1..) =
            worker.call(libc::SYS_read, &[netlink, memory + 2048, 2048])
        {}
        worker.write(memory, request);
        let len = request[0] & 0xffff_ffff;
        let sent = worker.call(libc::SYS_write, &[netlink, memory, len]);
        if sent != Outcome::Returned(len.cast_signed()) {
            return Err(sent);
        }
        let read = worker.call(libc::SYS_read, &[netlink, memory + 2048, 2048]);
        assert!(matches!(read, Outcome::Returned(16..)), "{read:?}");
        let answer = worker.read(memory + 2048, 3);
        let kind = (answer[0] >> 32) & 0xffff;
        // NLMSG_ERROR: a header of 16 bytes, then the errno.
        Ok((kind, if kind == 2 { i64::from((answer[2] as u32).cast_signed()) } else { 0 }))
    };
    const REQUEST: i32 = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
    const CREATE: i32 = REQUEST | libc::NLM_F_CREATE;
    const DUMP: i32 = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
    let v4 = libc::AF_INET as u32;
    for (what, kind, words, answer) in [
        ("links", libc::RTM_GETLINK, 4, libc::RTM_NEWLINK),
        ("addresses", libc::RTM_GETADDR, 2, libc::RTM_NEWADDR),
        ("routes", libc::RTM_GETROUTE, 3, libc::RTM_NEWROUTE),
        ("rules", libc::RTM_GETRULE, 3, libc::RTM_NEWRULE),
    ] {
        let asked = ask(&request(kind, DUMP, &vec![0; words])).unwrap();
        assert_eq!(asked, (u64::from(answer), 0), "{what} can be read, as SECURITY.md says");
    }
    let address = [8 << 16 | 1, 0x0100_000a];
    for (what, kind, flags, body) in [
        ("take a link down", libc::RTM_NEWLINK, REQUEST, vec![0, index, 0, 1]),
        ("remove a link", libc::RTM_DELLINK, REQUEST, vec![0, index, 0, 0]),
        (
            "add an address",
            libc::RTM_NEWADDR,
            CREATE,
            [&[v4 | 32 << 8, index], &address[..]].concat(),
        ),
        (
            "add a route",
            libc::RTM_NEWROUTE,
            CREATE,
            [&[v4 | 32 << 8, 254 | 4 << 8 | 253 << 16 | 1 << 24, 0], &address[..]].concat(),
        ),
        ("add a rule", libc::RTM_NEWRULE, CREATE, vec![v4, 1 << 24, 0]),
        ("add a neighbour", libc::RTM_NEWNEIGH, CREATE, vec![v4, index, 0x80, 8 << 16 | 1, 0]),
        ("add a namespace's number", libc::RTM_NEWNSID, CREATE, vec![0, 8 << 16 | 1, 7]),
    ] {
        let refused = (2, -i64::from(libc::EPERM));
        assert_eq!(ask(&request(kind, flags, &body)), Ok(refused), "{what}");
    }
    drop(worker);
    assert_eq!(daemon.netns.run(format!("ip -o link show {}", daemon.interface)), link);
    daemon.wg("show", "listen-port");
}

/// A control message can have a datagram leave by a device of the sender's choice; SECURITY.md says that,
/// too. A source address that is not the machine's is refused.
#[test]
fn attack_18_a_datagram_can_leave_by_any_device_but_only_from_an_address_of_the_machine() {
    require!(Wgsep);
    let daemon = serving();
    daemon.netns.run("ip link add other0 type veth peer name other1");
    daemon.netns.run("ip link set other0 up");
    daemon.netns.run("ip link set other1 up");
    daemon.netns.run("ip address add 192.0.2.1/24 dev other0");
    let link = daemon.netns.run("ip -o link show other0");
    let index: u64 = link.split(':').next().unwrap().trim().parse().unwrap();
    let sent_by_other = || -> u64 {
        let counters = daemon.netns.run("cat /proc/net/dev");
        let line = counters.lines().find(|line| line.trim().starts_with("other0:")).unwrap();
        // After the name, eight counters of what was received.
        line.split_whitespace().nth(9).unwrap().parse().unwrap()
    };
    let before = sent_by_other();
    let sockets = wgsep_tests::descriptors::kinds(daemon.dataplane(), daemon.process.pid());
    let (socket, _) = sockets.iter().find(|(_, kind)| *kind == "udp").unwrap();
    let socket = u64::try_from(*socket).unwrap();
    let mut worker = hijack(&daemon);
    let memory = map_page(&mut worker);
    let [message, name, payload, control] = [0, 128, 192, 256].map(|offset| memory + offset);
    // sockaddr_in: family, port 9, 198.51.100.9, to which there is no route.
    worker.write(name, &[0x0964_33c6_0900_0002, 0]);
    worker.write(message + 56, &[payload, 8]);
    let mut send = |index: u64, source: u64| {
        // cmsghdr: length, level and type; then in_pktinfo: index, source, destination.
        let kind = u64::from(libc::IP_PKTINFO.cast_unsigned()) << 32;
        worker.write(control, &[28, kind, index | source << 32, 0]);
        worker.write(message, &[name, 16, message + 56, 1, control, 32, 0]);
        worker.call(libc::SYS_sendmsg, &[socket, message, libc::MSG_DONTWAIT as u64])
    };
    assert_eq!(send(0, 0), errno(libc::ENETUNREACH));
    assert_eq!(send(index, 0), Outcome::Returned(8));
    wait::until("the datagram or the search for its neighbour left", LIMIT, || {
        sent_by_other() > before
    });
    // 198.51.100.7 is not the machine's; kernels differ in the errno.
    let refused = send(index, 0x0764_33c6);
    assert!([libc::EINVAL, libc::ENETUNREACH].map(errno).contains(&refused), "{refused:?}");
    drop(worker);
    daemon.wg("show", "listen-port");
}

/// Makes a call on the helper of a daemon of its own, of which all of it dies.
#[track_caller]
fn assert_fatal_to_the_helper((name, number, arguments): Call<'_>) {
    let daemon = serving();
    let dataplane = daemon.dataplane();
    let mut helper = hijack_helper(&daemon);
    let page = map_page(&mut helper);
    put(&helper, page, PATH);
    let outcome = helper.call(number, &arguments(page));
    assert_eq!(outcome, Outcome::Died(Signal::SIGSYS), "{name}");
    wait::until("the dataplane is gone", LIMIT, || !procfs::is_running(dataplane));
    wait::until("the interface is gone", LIMIT, || !daemon.has_interface());
}

fn hijack_helper(daemon: &Daemon) -> Hijacked {
    let helper: Pid = daemon.process.pid();
    assert_eq!(threads(helper), [helper]);
    Hijacked::seize(helper, helper)
}

#[test]
fn attack_18_the_helper_can_open_start_trace_and_configure_nothing() {
    require!(Wgsep);
    const EXECUTABLE: u64 = READ_WRITE | libc::PROT_EXEC as u64;
    const STREAM: u64 = libc::SOCK_STREAM as u64;
    const DATAGRAM: u64 = libc::SOCK_DGRAM as u64;
    let calls: [Call<'_>; 19] = [
        ("openat", libc::SYS_openat, &|path| vec![HERE, path, 0]),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, &|path| vec![HERE, path, 0]),
        ("getdents64", libc::SYS_getdents64, &|path| vec![3, path, 512]),
        ("rmdir", libc::SYS_unlinkat, &|path| vec![HERE, path, libc::AT_REMOVEDIR as u64]),
        ("rename", libc::SYS_renameat2, &|path| vec![HERE, path, HERE, path, 0]),
        ("execve", libc::SYS_execve, &|path| vec![path, 0, 0]),
        ("fork", libc::SYS_fork, &|_| vec![]),
        ("clone", libc::SYS_clone, &|_| vec![libc::SIGCHLD as u64, 0, 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, &|_| vec![libc::PTRACE_ATTACH as u64, 1, 0, 0]),
        ("kill", libc::SYS_kill, &|_| vec![1, 0]),
        ("setns", libc::SYS_setns, &|_| vec![3, 0]),
        ("ioctl", libc::SYS_ioctl, &|page| vec![3, libc::SIOCSIFFLAGS, page]),
        ("a netlink socket", libc::SYS_socket, &|_| vec![libc::AF_NETLINK as u64, DATAGRAM, 0]),
        ("a raw socket", libc::SYS_socket, &|_| {
            vec![libc::AF_INET as u64, libc::SOCK_RAW as u64, 1]
        }),
        ("a TCP socket", libc::SYS_socket, &|_| vec![libc::AF_INET as u64, STREAM, 0]),
        ("a unix socket", libc::SYS_socket, &|_| vec![libc::AF_UNIX as u64, STREAM, 0]),
        ("connect", libc::SYS_connect, &|page| vec![3, page, 16]),
        // On a socket that is not the dataplane's or the system log's.
        ("sendmsg", libc::SYS_sendmsg, &|page| vec![0, page, 0]),
        ("executable memory", libc::SYS_mmap, &|_| {
            vec![0, PAGE, EXECUTABLE, PRIVATE, NO_DESCRIPTOR, 0]
        }),
    ];
    calls.into_iter().for_each(assert_fatal_to_the_helper);
}

#[test]
fn attack_18_the_helper_can_signal_its_child_and_remove_files_of_its_directory_only() {
    require!(Wgsep);
    let daemon = serving();
    if daemon.sandbox_report().contains("landlock=unsupported") {
        return wgsep_tests::skip::skip("this kernel has no Landlock");
    }
    let scratch = Scratch::new();
    let file = scratch.join("file");
    fs::write(&file, "kept").unwrap();
    let mut helper = hijack_helper(&daemon);
    let page = map_page(&mut helper);
    put(&helper, page, file.to_str().unwrap());
    assert_eq!(helper.call(libc::SYS_unlinkat, &[HERE, page, 0]), errno(libc::EACCES));
    assert!(file.exists());
    // What SECURITY.md says that it can.
    put(&helper, page, PATH);
    let no_follow = libc::AT_SYMLINK_NOFOLLOW as u64;
    let status = helper.call(libc::SYS_newfstatat, &[HERE, page, page + 1024, no_follow]);
    assert_eq!(status, Outcome::Returned(0));
    // struct stat: device, inode.
    assert_eq!(helper.read(page + 1032, 1), [fs::metadata(PATH).unwrap().ino()]);
    let socket = socket_path("other-of-the-directory");
    fs::write(&socket, "").unwrap();
    // The directory may be sticky.
    let owner = procfs::threads(daemon.process.pid())[0].ids("Uid")[0];
    chown(&socket, Some(owner), None).unwrap();
    put(&helper, page, socket.to_str().unwrap());
    assert_eq!(helper.call(libc::SYS_unlinkat, &[HERE, page, 0]), Outcome::Returned(0));
    assert!(!Path::new(&socket).exists());
    drop(helper);
    daemon.wg("show", "listen-port");
}

/// A message with an address reaches any unix socket, and one to a netlink group its listeners, as root.
#[test]
fn attack_18_the_helper_can_send_on_no_other_socket_and_write_no_file() {
    require!(Wgsep);
    let daemon = serving();
    let pid = daemon.process.pid();
    for (number, target) in procfs::descriptors(pid) {
        let text = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap();
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        let flags = i32::from_str_radix(flags, 8).unwrap();
        let may_write = flags & libc::O_PATH == 0 && flags & libc::O_ACCMODE != libc::O_RDONLY;
        // Its log, which is a file of the test's.
        let is_log = number <= 2 || target.ends_with("(deleted)");
        // What it keeps for a helper that replaces it, and cannot write: see the next test.
        let is_queue = target == "/dev/net/tun" && number >= 32;
        assert!(
            !(may_write && target.starts_with('/')) || is_log || is_queue,
            "{number}: {target} {flags:o}"
        );
    }
    for kind in ["netlink", "udp"] {
        let daemon = serving();
        let held = wgsep_tests::descriptors::kinds(daemon.process.pid(), daemon.process.pid());
        let (number, _) = held.iter().find(|(_, one)| *one == kind).unwrap();
        let dataplane = daemon.dataplane();
        let mut helper = hijack_helper(&daemon);
        let page = map_page(&mut helper);
        let outcome = helper.call(libc::SYS_sendmsg, &[u64::try_from(*number).unwrap(), page, 0]);
        assert_eq!(outcome, Outcome::Died(Signal::SIGSYS), "{kind}");
        wait::until("the dataplane is gone", LIMIT, || !procfs::is_running(dataplane));
    }
}

/// It keeps duplicates of both for a helper that replaces it.
#[test]
fn attack_18_the_helper_can_use_neither_a_tun_queue_nor_the_uapi_listener() {
    require!(Wgsep);
    let held = |kind: &str| {
        let daemon = serving();
        let held = wgsep_tests::descriptors::kinds(daemon.process.pid(), daemon.process.pid());
        let (number, _) = held.iter().find(|(_, one)| *one == kind).unwrap();
        (daemon, u64::try_from(*number).unwrap())
    };
    let cloexec = libc::SOCK_CLOEXEC as u64;
    for (kind, call, rest) in [
        ("tun", libc::SYS_read, [0, 0, 0]),
        ("tun", libc::SYS_write, [0, 0, 0]),
        ("tun", libc::SYS_readv, [0, 0, 0]),
        ("tun", libc::SYS_ioctl, [0, 0, 0]),
        ("UAPI socket", libc::SYS_accept4, [0, 0, cloexec]),
        ("status socket", libc::SYS_accept4, [0, 0, cloexec]),
    ] {
        let (daemon, number) = held(kind);
        let mut helper = hijack_helper(&daemon);
        let [second, third, fourth] = rest;
        let outcome = helper.call(call, &[number, second, third, fourth]);
        assert_eq!(outcome, Outcome::Died(Signal::SIGSYS), "{kind}: {call}");
    }
    // Nor under a number at which it may read.
    let (daemon, number) = held("tun");
    let mut helper = hijack_helper(&daemon);
    let outcome = helper.call(libc::SYS_dup3, &[number, 9, libc::O_CLOEXEC as u64]);
    assert_eq!(outcome, Outcome::Died(Signal::SIGSYS));
}

/// A goodbye is no licence: what follows counts. The control thread is held, because it would end the process for a
/// reply that it did not wait for.
#[test]
fn attack_18_a_goodbye_before_a_forbidden_call_hides_nothing() {
    require!(Wgsep);
    // Version, sequence number, and the number of the request.
    let goodbye = u64::from_le_bytes([wgsep_ipc::VERSION, 1, 0, 0, 0, 4, 0, 0]);
    let daemon = serving();
    let dataplane = daemon.dataplane();
    let held = Hijacked::seize(dataplane, threads(dataplane)[1]);
    let mut worker = hijack(&daemon);
    let page = map_page(&mut worker);
    let channel = descriptor(&daemon, "helper's socket");
    worker.write(page, &[goodbye]);
    assert_eq!(worker.call(libc::SYS_write, &[channel, page, 6]), Outcome::Returned(6));
    let outcome =
        worker.call(libc::SYS_socket, &[libc::AF_INET as u64, libc::SOCK_DGRAM as u64, 0]);
    drop(held);
    assert_ended_by("socket after Bye", outcome, daemon, dataplane);
}
