//! Attack 13: machines, or launchers, that keep a layer of the confinement from wgsep. A filter on
//! the launcher answers the layer's system calls with an errno, as containers' filters do.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use wgsep_tests::daemon::{Daemon, remove_files, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{self, Process};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::skip::skip;
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::{End, Tunnel};
use wgsep_tests::{procfs, require, wait};

/// How long a refusal may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(20);

/// A system call that is refused: whatever its arguments, or where the first is this.
#[derive(Clone, Copy)]
struct Blocked(i64, Option<i32>);

const fn prctl(option: i32) -> Blocked {
    Blocked(libc::SYS_prctl, Some(option))
}

/// Lets a command run where calls are refused with an errno.
fn block(command: &mut Command, calls: &[Blocked], errno: i32) {
    let rules = calls.iter().map(|Blocked(call, first)| {
        let condition = |first: i32| {
            let value = u64::from(first.cast_unsigned());
            SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value).unwrap()
        };
        let rules = first.map(|first| SeccompRule::new(vec![condition(first)]).unwrap());
        (*call, rules.into_iter().collect())
    });
    refuse(command, rules.collect(), errno);
}

/// Lets a command run where no namespace of a kind can be entered, as RestrictNamespaces= of a unit has it.
fn block_namespace(command: &mut Command, flag: i32, errno: i32) {
    let flag = u64::from(flag.cast_unsigned());
    block_if(command, libc::SYS_unshare, [(0, SeccompCmpOp::MaskedEq(flag), flag)], errno);
}

/// Lets a command run where a call is refused if all these of its arguments compare so, by their low halves.
fn block_if<const N: usize>(
    command: &mut Command,
    call: i64,
    arguments: [(u8, SeccompCmpOp, u64); N],
    errno: i32,
) {
    let conditions = arguments.map(|(number, operator, value)| {
        SeccompCondition::new(number, SeccompCmpArgLen::Dword, operator, value).unwrap()
    });
    let rule = SeccompRule::new(conditions.to_vec()).unwrap();
    refuse(command, BTreeMap::from([(call, vec![rule])]), errno);
}

/// Lets a command run under a filter that answers these calls with an errno.
fn refuse(command: &mut Command, rules: BTreeMap<i64, Vec<SeccompRule>>, errno: i32) {
    let refuse = SeccompAction::Errno(errno.cast_unsigned());
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, architecture).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe calls are allowed:
    // it makes one.
    unsafe {
        command.pre_exec(move || close(&program));
    }
}

/// Puts a filter over this thread, without no_new_privs, which only root may.
fn close(program: &BpfProgram) -> std::io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap_or(u16::MAX),
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the program is live, as long as it says, and of the kernel's layout; it is only read.
    let closed =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if closed == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// What wgsep says when it refuses to run, of which nothing is left then.
#[track_caller]
fn refusal(netns: &Arc<Netns>, arguments: &[&str], calls: &[Blocked], errno: i32) -> String {
    let interface = unique_interface();
    let mut command = Wgsep.command(netns, &interface);
    command.args(arguments);
    block(&mut command, calls, errno);
    let mut process = Process::spawn(command, "wgsep, to be refused");
    let status = process.exit_within(LIMIT);
    let log = process.log();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(!log.contains("started"), "{log}");
    assert_nothing_left(netns, &interface, &log);
    log
}

#[track_caller]
fn assert_nothing_left(netns: &Netns, interface: &str, log: &str) {
    assert!(procfs::with_argument(interface).is_empty(), "a process is left: {log}");
    assert!(!netns.run("ip -o link").contains(interface), "the interface is left: {log}");
    for file in [socket_path(interface), socket_path(interface).with_extension("sandbox")] {
        assert!(file.symlink_metadata().is_err(), "{} is left: {log}", file.display());
    }
}

#[test]
fn attack_13_without_landlock_or_mseal_the_report_says_so_and_strict_mode_refuses() {
    require!(Wgsep);
    let landlock = [
        Blocked(libc::SYS_landlock_create_ruleset, None),
        Blocked(libc::SYS_landlock_add_rule, None),
        Blocked(libc::SYS_landlock_restrict_self, None),
    ];
    let mseal = [Blocked(libc::SYS_mseal, None)];
    for (layer, calls, errno, state) in [
        ("landlock", &landlock[..], libc::ENOSYS, "unsupported"),
        ("landlock", &landlock, libc::EOPNOTSUPP, "unsupported"),
        ("landlock", &landlock, libc::EPERM, "degraded(EPERM)"),
        ("sealed-memory", &mseal, libc::ENOSYS, "unsupported"),
        ("sealed-memory", &mseal, libc::EPERM, "degraded(EPERM)"),
    ] {
        let netns = Netns::new();
        let daemon = Daemon::start_with(Wgsep, &netns, |command| block(command, calls, errno));
        // It answers before it logs.
        wait::until("the report is logged", LIMIT, || daemon.process.log().contains("started: "));
        // The dataplane's and the helper's own.
        let report = daemon.sandbox_report();
        assert_eq!(report.matches(&format!("{layer}={state}")).count(), 2, "{report}");
        let log = daemon.process.log();
        let [its, helpers] =
            ["dataplane", "helper"].map(|name| format!("{name}'s {layer} {state}"));
        assert!(log.contains(&format!("; sandbox: not in force: {its}, {helpers}\n")), "{log}");
        let said = refusal(&netns, &["--sandbox", "strict"], calls, errno);
        assert!(said.contains(&format!("{layer} {state}")), "{said}");
    }
}

/// As the default filter of a container's runtime does. Becoming another user gives up what the bounding set is
/// dropped by, so that has to come before.
#[test]
fn attack_13_without_namespaces_all_other_layers_are_applied() {
    require!(Wgsep);
    let calls = [libc::SYS_unshare, libc::SYS_mount, libc::SYS_umount2, libc::SYS_pivot_root];
    let calls = calls.map(|call| Blocked(call, None));
    let netns = Netns::new();
    let daemon = Daemon::start_with(Wgsep, &netns, |command| block(command, &calls, libc::EPERM));
    wait::until("the report is logged", LIMIT, || daemon.process.log().contains("started: "));
    let report = daemon.sandbox_report();
    let degraded = report.split_whitespace().filter(|word| word.contains("=degraded"));
    assert_eq!(
        degraded.collect::<Vec<_>>(),
        ["user-namespace", "namespaces", "empty-root"]
            .map(|layer| format!("{layer}=degraded(EPERM)"))
    );
    for thread in procfs::threads(daemon.dataplane()) {
        assert_eq!(thread.capabilities("CapBnd"), 0);
    }
}

/// What `wgsep audit` says to do about a layer of the dataplane, and what it has seen.
#[track_caller]
fn advice(daemon: &Daemon, layer: &str) -> String {
    let mut audit = daemon.netns.command(wgsep_program("wgsep"));
    let said = process::output(audit.args(["audit", "--json", &daemon.interface]));
    let json: serde_json::Value =
        serde_json::from_slice(&said.stdout).unwrap_or_else(|_| panic!("no JSON: {said:?}"));
    let findings = json["findings"].as_array().unwrap();
    let is = |one: &&serde_json::Value| one["process"] == "dataplane" && one["layer"] == layer;
    let finding = findings.iter().find(is).unwrap();
    assert_eq!(finding["state"], "degraded", "{finding}");
    finding["remedy"].as_str().unwrap().to_owned()
}

/// The unit's own settings, a limit of the system or a kernel that was built without it refuse one kind.
#[test]
fn attack_13_a_refused_kind_of_namespace_costs_no_other_and_the_audit_names_it_and_the_cause() {
    require!(Wgsep);
    let kinds = [
        ("mnt", libc::CLONE_NEWNS, libc::EPERM, "allow mnt in RestrictNamespaces="),
        ("net", libc::CLONE_NEWNET, libc::ENOSPC, "user.max_net_namespaces"),
        ("ipc", libc::CLONE_NEWIPC, libc::EINVAL, "CONFIG_IPC_NS"),
        ("uts", libc::CLONE_NEWUTS, libc::EPERM, "allow uts in RestrictNamespaces="),
        ("cgroup", libc::CLONE_NEWCGROUP, libc::ENOSPC, "user.max_cgroup_namespaces"),
    ];
    for (refused, flag, errno, cause) in kinds {
        let netns = Netns::new();
        let daemon = Daemon::start_with(Wgsep, &netns, |command| {
            block_namespace(command, flag, errno);
        });
        wait::until("the report is logged", LIMIT, || daemon.process.log().contains("started: "));
        let report = daemon.sandbox_report();
        let [helper, dataplane] = [daemon.process.pid(), daemon.dataplane()];
        for (kind, ..) in kinds {
            let [helpers, its] = [helper, dataplane]
                .map(|pid| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap());
            assert_eq!(helpers == its, kind == refused, "{kind} where {refused} is refused");
        }
        // The rest does not suffer.
        let errno = Errno::from_raw(errno);
        let mut expected = vec![format!("namespaces=degraded({errno:?}:{refused})")];
        if refused == "mnt" {
            expected.push(format!("empty-root=degraded({errno:?})"));
        }
        let degraded: Vec<_> =
            report.split_whitespace().filter(|word| word.contains("=degraded")).collect();
        assert_eq!(degraded, expected, "{report}");
        let root = std::fs::read_dir(format!("/proc/{dataplane}/root")).unwrap();
        assert_eq!(root.count() == 0, refused != "mnt", "the root where {refused} is refused");
        for thread in procfs::threads(dataplane) {
            assert_eq!(thread.capabilities("CapBnd"), 0);
        }
        let said = advice(&daemon, "namespaces");
        assert!(said.contains(cause) && !said.contains("as root"), "{refused}: {said}");
        if refused == "mnt" {
            assert_eq!(advice(&daemon, "empty-root"), said);
        }
    }
}

#[test]
fn attack_13_where_mounting_is_refused_the_audit_names_the_calls() {
    require!(Wgsep);
    let netns = Netns::new();
    let without = [Blocked(libc::SYS_pivot_root, None)];
    let daemon = Daemon::start_with(Wgsep, &netns, |command| block(command, &without, libc::EPERM));
    wait::until("the report is logged", LIMIT, || daemon.process.log().contains("started: "));
    let log = daemon.process.log();
    assert!(
        log.contains("sandbox: not in force: dataplane's empty-root degraded(EPERM)\n"),
        "{log}"
    );
    let said = advice(&daemon, "empty-root");
    assert!(said.contains("pivot_root(2)") && !said.contains("as root"), "{said}");
}

/// As an emulation of the kernel's system calls may.
#[test]
fn attack_13_without_a_request_of_the_tun_device_it_serves_and_says_which_offload_is_missing() {
    require!(Wgsep);
    for (request, missing) in [
        (libc::TUNSETOFFLOAD, Some("tso")),
        (libc::TUNSETQUEUE, Some("flow-queues")),
        (libc::TUNSETVNETHDRSZ, None),
        (libc::TUNSETLINK, None),
    ] {
        for errno in [libc::ENOTTY, libc::EINVAL, libc::EPERM] {
            let (left, right) = link::joined();
            let filtered = Daemon::start_with(Wgsep, &left, |command| {
                let is = (1, SeccompCmpOp::Eq, u64::from(request as u32));
                block_if(command, libc::SYS_ioctl, [is], errno);
            });
            let tunnel = Tunnel {
                left: End::new(Side::Left, filtered),
                right: End::new(Side::Right, Daemon::start(Wgsep, &right)),
            };
            for (end, other) in tunnel.directions() {
                end.configure(&other.key.public, Some(other.endpoint(Family::V4)), None);
            }
            until_ping(&left, Side::Right.inner(Family::V4));
            let log = tunnel.left.daemon.process.log();
            let said: Vec<_> = log
                .lines()
                .filter_map(|line| line.split_once("going on without "))
                .filter_map(|(_, offload)| offload.split_once(','))
                .map(|(offload, _)| offload)
                .collect();
            assert_eq!(said, Vec::from_iter(missing), "{request:#x}, {errno}: {log}");
        }
    }
}

/// There is no mode that does without these.
#[test]
fn attack_13_without_a_mandatory_layer_it_refuses_always_and_says_which() {
    require!(Wgsep);
    let netns = Netns::new();
    for (calls, errno, named) in [
        (
            &[Blocked(libc::SYS_seccomp, None), prctl(libc::PR_SET_SECCOMP)][..],
            libc::EPERM,
            "sandbox: seccomp: ",
        ),
        (
            &[Blocked(libc::SYS_seccomp, None), prctl(libc::PR_SET_SECCOMP)],
            libc::ENOSYS,
            "sandbox: seccomp: ",
        ),
        (&[prctl(libc::PR_SET_NO_NEW_PRIVS)], libc::EPERM, "no_new_privs"),
        (&[prctl(libc::PR_SET_DUMPABLE)], libc::EPERM, "become non-dumpable"),
        (&[Blocked(libc::SYS_capset, None)], libc::EPERM, "reduce capabilities"),
        (&[Blocked(libc::SYS_prlimit64, None)], libc::EPERM, "limit"),
        (&[Blocked(libc::SYS_close_range, None)], libc::ENOSYS, "close inherited descriptors"),
    ] {
        let said = refusal(&netns, &[], calls, errno);
        assert!(said.contains(named), "{named}: {said}");
    }
}

/// What becomes of a start in which every call of one number is refused.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
enum Outcome {
    /// It serves; layers may be degraded.
    Serves,
    /// It refuses to run, in one line with the step that failed and the errno.
    Refuses(&'static str),
    /// The loader, libc or the runtime end before main, or nothing can be written: nothing is left.
    Ends,
}

#[cfg(target_arch = "x86_64")]
macro_rules! calls {
    ($($call:ident => $outcome:expr,)*) => { &[$((stringify!($call), libc::$call, $outcome)),*] };
}

/// Every system call of a start, of both processes, as strace(1) sees them. With musl they are others, and
/// it retries many of them in another way by itself, so that `run.sh` leaves that pair out of this table.
#[cfg(target_arch = "x86_64")]
const CALLS: &[(&str, i64, Outcome)] = {
    use Outcome::{Ends, Refuses, Serves};
    calls![
        SYS_accept4 => Refuses("set up the control thread"),
        SYS_access => Serves,
        SYS_arch_prctl => Ends,
        SYS_bind => Refuses("write /var/run/wireguard/"),
        SYS_brk => Serves,
        SYS_capget => Refuses("sandbox: reduce capabilities"),
        SYS_capset => Refuses("sandbox: reduce capabilities"),
        SYS_chdir => Refuses("prepare the dataplane"),
        SYS_clone => Refuses("fork"),
        // ENOSYS has glibc take clone instead.
        SYS_clone3 => Refuses("start the control thread"),
        SYS_close => Ends,
        SYS_close_range => Refuses("close inherited descriptors"),
        SYS_connect => Serves,
        SYS_dup2 => Refuses("prepare the dataplane"),
        SYS_epoll_create1 => Refuses("set up the control thread"),
        SYS_epoll_ctl => Refuses("set up the control thread"),
        SYS_epoll_wait => Refuses("set up the control thread"),
        SYS_eventfd2 => Refuses("set up the control thread"),
        SYS_execveat => Refuses("execute wgsep-dataplane"),
        SYS_exit => Serves,
        SYS_exit_group => Serves,
        SYS_faccessat2 => Serves,
        SYS_fchdir => Serves,
        SYS_fcntl => Refuses("standard error"),
        SYS_ftruncate => Serves,
        SYS_futex => Ends,
        SYS_getdents64 => Refuses("verify the dataplane"),
        SYS_getegid => Refuses("getegid"),
        SYS_geteuid => Refuses("geteuid"),
        SYS_getpid => Refuses("getpid"),
        SYS_getppid => Refuses("getppid"),
        SYS_getpriority => Serves,
        SYS_getrandom => Refuses("getrandom"),
        SYS_getresgid => Refuses("getresgid"),
        SYS_getresuid => Refuses("getresuid"),
        SYS_getsockopt => Refuses("channel"),
        SYS_gettid => Serves,
        SYS_inotify_add_watch => Refuses("watch the UAPI socket"),
        SYS_inotify_init1 => Refuses("inotify"),
        SYS_ioctl => Refuses("create interface"),
        SYS_kill => Serves,
        SYS_landlock_add_rule => Serves,
        SYS_landlock_create_ruleset => Serves,
        SYS_landlock_restrict_self => Serves,
        SYS_listen => Refuses("listen on the UAPI socket"),
        SYS_lseek => Serves,
        SYS_madvise => Serves,
        SYS_memfd_secret => Serves,
        SYS_mkdir => Refuses("write /var/run/wireguard"),
        SYS_mlock2 => Serves,
        SYS_mmap => Ends,
        SYS_mount => Serves,
        SYS_mprotect => Ends,
        SYS_mseal => Serves,
        SYS_munmap => Serves,
        SYS_newfstatat => Ends,
        SYS_openat => Ends,
        SYS_pidfd_open => Refuses("pidfd_open"),
        SYS_pidfd_send_signal => Serves,
        SYS_pipe2 => Refuses("pipe"),
        SYS_pivot_root => Serves,
        SYS_poll => Ends,
        SYS_ppoll => Refuses("ppoll"),
        SYS_prctl => Refuses("sandbox: become non-dumpable"),
        SYS_pread64 => Ends,
        SYS_prlimit64 => Refuses("limit"),
        SYS_read => Ends,
        // Way to the socket's directory, or the helper's own program.
        SYS_readlink => Refuses("find the "),
        SYS_readlinkat => Serves,
        SYS_recvfrom => Refuses("set the MTU"),
        SYS_recvmsg => Refuses("receive a request"),
        SYS_rseq => Serves,
        SYS_rt_sigaction => Ends,
        SYS_rt_sigprocmask => Ends,
        SYS_rt_sigreturn => Serves,
        SYS_sched_getaffinity => Serves,
        SYS_seccomp => Refuses("sandbox: seccomp"),
        SYS_sendmsg => Refuses("cannot ask the helper"),
        SYS_sendto => Refuses("set the MTU"),
        SYS_set_robust_list => Serves,
        SYS_set_tid_address => Serves,
        SYS_setgroups => Serves,
        SYS_setpriority => Serves,
        SYS_setresgid => Serves,
        SYS_setresuid => Serves,
        SYS_setsid => Refuses("prepare the dataplane"),
        SYS_setsockopt => Serves,
        SYS_sigaltstack => Serves,
        SYS_signalfd4 => Refuses("signalfd"),
        SYS_socket => Refuses("index of the interface"),
        SYS_socketpair => Refuses("socketpair"),
        SYS_statx => Serves,
        SYS_timerfd_create => Refuses("set up the control thread"),
        SYS_timerfd_settime => Refuses("set up the control thread"),
        SYS_umask => Refuses("umask"),
        SYS_umount2 => Serves,
        SYS_unlink => Serves,
        SYS_unlinkat => Serves,
        SYS_unshare => Serves,
        SYS_wait4 => Serves,
        SYS_waitid => Serves,
        SYS_write => Ends,
    ]
};

/// Starts wgsep where `call` is refused: how it ended, if it did, its log, and the interface's name.
#[cfg(target_arch = "x86_64")]
fn start_without(
    netns: &Arc<Netns>,
    what: &str,
    call: Blocked,
    errno: i32,
) -> (Option<i32>, String, String) {
    let interface = unique_interface();
    let mut command = Wgsep.command(netns, &interface);
    block(&mut command, &[call], errno);
    let mut process = Process::spawn(command, "wgsep without a call");
    let ended = wait::poll(LIMIT, || match process.try_exit() {
        // A signal is no exit code.
        Some(status) => Some(Some(status.code().unwrap_or(-1))),
        None => process.log().contains("started: ").then_some(None),
    });
    let Some(ended) = ended else { panic!("{what} hangs: {}", process.log()) };
    (ended, process.log(), interface)
}

/// None of these is a layer, and the line names the call that the filter has to allow.
#[test]
fn attack_13_calls_that_a_filter_refuses_are_named_where_the_errno_alone_misleads() {
    require!(Wgsep);
    for errno in [libc::EPERM, libc::ENOSYS] {
        let netns = Netns::new();
        let blocked = |call| [Blocked(call, None)];
        let directory = Scratch::new();
        let log = directory.join("log");
        let arguments = ["--log-file", log.to_str().unwrap()];
        let said = refusal(&netns, &arguments, &blocked(libc::SYS_fstatfs), errno);
        assert!(said.contains("fstatfs(2)") && said.contains("filter of the container"), "{said}");

        let named = "and getsockname(2) in the filter of the container";
        let interface = unique_interface();
        let mut command = Wgsep.command(&netns, &interface);
        block(&mut command, &blocked(libc::SYS_getsockname), errno);
        let process = Process::spawn(command, named);
        wait::until("it is started", LIMIT, || process.log().contains("started: "));
        netns.run(format!("ip link set {interface} up"));
        let _client = std::os::unix::net::UnixStream::connect(socket_path(&interface)).unwrap();
        wait::until(named, LIMIT, || process.log().contains(named));
        process.signal(nix::sys::signal::Signal::SIGTERM);
        wait::until("it has ended", LIMIT, || process.log().contains("ended: SIGTERM"));
    }
}

#[test]
fn attack_13_a_socket_that_a_filter_keeps_from_being_removed_is_not_blamed_on_the_directory_alone()
{
    require!(Wgsep);
    let netns = Netns::new();
    let without = [Blocked(libc::SYS_unlinkat, None)];
    let mut daemon =
        Daemon::start_with(Wgsep, &netns, |command| block(command, &without, libc::EPERM));
    wait::until("it has started", LIMIT, || daemon.process.log().contains("started: "));
    daemon.process.signal(nix::sys::signal::Signal::SIGTERM);
    let status = daemon.process.exit_within(LIMIT);
    let log = daemon.process.log();
    assert_eq!(status.code(), Some(0), "{log}");
    let line = log.lines().find(|line| line.contains(".sock stays")).unwrap();
    assert!(line.contains("unlinkat(2)") && line.contains("allow the call"), "{line}");
}

/// As containers and units that were written for another program do.
#[cfg(target_arch = "x86_64")]
#[test]
fn attack_13_whichever_call_is_refused_it_serves_or_names_the_failed_step_in_one_line() {
    require!(Wgsep);
    let netns = Netns::new();
    for (name, call, expected) in CALLS {
        for errno in [libc::EPERM, libc::ENOSYS] {
            let what = format!("{name} {:?}", Errno::from_raw(errno));
            let (ended, log, interface) = start_without(&netns, &what, Blocked(*call, None), errno);
            if ended.is_none() {
                let falls_back = (*call, errno) == (libc::SYS_clone3, libc::ENOSYS);
                assert!(falls_back || matches!(expected, Outcome::Serves), "{what} serves: {log}");
                remove_files(&interface);
                continue;
            }
            assert_nothing_left(&netns, &interface, &format!("{what}: {log}"));
            match expected {
                Outcome::Refuses(step) => {
                    assert_eq!(ended, Some(1), "{what}: {log}");
                    assert_eq!(log.lines().count(), 1, "{what}: {log}");
                    let errno = Errno::from_raw(errno);
                    let names_it = log.contains(step)
                        && (log.contains(errno.desc()) || log.contains("a filter of system calls"))
                        && log.contains("; ");
                    assert!(names_it, "{what}: {log}");
                    for wrong in ["is a bug", "under attack", "memory", "mount /proc", "setcap"] {
                        assert!(!log.contains(wrong), "{what}: {log}");
                    }
                }
                Outcome::Ends => assert_ne!(ended, Some(0), "{what}: {log}"),
                Outcome::Serves => panic!("{what}: it ended with {ended:?}: {log}"),
            }
        }
    }
}

/// The table above is of no use for a call that it lacks.
#[cfg(target_arch = "x86_64")]
#[test]
fn every_call_of_a_start_is_in_the_table() {
    require!(Wgsep);
    if Command::new("strace").arg("-V").output().is_err() {
        return skip("strace is missing: install it to look for new system calls");
    }
    let (netns, scratch, interface) = (Netns::new(), Scratch::new(), unique_interface());
    let trace = scratch.join("trace");
    let mut command = netns.command("strace");
    command.args(["-f", "-qq", "-o"]).arg(&trace);
    command.arg(wgsep_program("wgsep")).args(["-f", &interface]);
    let process = Process::spawn(command, "wgsep under strace");
    wait::until("it has started", LIMIT, || process.log().contains("started: "));
    drop(process);
    remove_files(&interface);
    let is_known = |made: &&str| {
        // Numbers stand for calls that are younger than strace(1).
        let is = |(name, number, _): &(&str, i64, Outcome)| {
            name.strip_prefix("SYS_") == Some(*made) || format!("syscall_{number:#x}") == **made
        };
        CALLS.iter().any(is)
    };
    let text = std::fs::read_to_string(&trace).unwrap();
    let made = text.lines().filter_map(|line| {
        let (name, _) = line.split_once(' ')?.1.trim_start().split_once('(')?;
        name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_').then_some(name)
    });
    let missing: std::collections::BTreeSet<_> =
        made.filter(|name| *name != "execve" && !is_known(name)).collect();
    assert!(missing.is_empty(), "add these to CALLS: {missing:?}");
}

/// Neither is the port's fault.
#[test]
fn attack_13_a_socket_or_an_option_that_a_filter_refuses_is_not_blamed_on_the_port() {
    require!(Wgsep);
    let eq = |number, value: i32| (number, SeccompCmpOp::Eq, u64::from(value.cast_unsigned()));
    let option = |level, name| (libc::SYS_setsockopt, [eq(1, level), eq(2, name)]);
    let socket = |family| (libc::SYS_socket, [eq(0, family), eq(2, 0)]);
    // EAGAIN is also that of a new port that is opened only later.
    let refusals = [libc::EPERM, libc::EACCES, libc::EAGAIN, libc::ENOPROTOOPT];
    for ((call, arguments), errnos) in [
        (socket(libc::AF_INET), &refusals[..3]),
        (socket(libc::AF_INET6), &refusals[..3]),
        (option(libc::IPPROTO_IP, libc::IP_PKTINFO), &refusals),
        (option(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY), &refusals),
        // EPERM is also that of a mark that may not be set.
        (option(libc::SOL_SOCKET, libc::SO_MARK), &refusals[1..]),
        (option(libc::SOL_SOCKET, libc::SO_MARK), &refusals[..1]),
    ] {
        for errno in errnos {
            let netns = Netns::new();
            let daemon = Daemon::start_with(Wgsep, &netns, |command| {
                block_if(command, call, arguments.clone(), *errno);
            });
            netns.run(format!("ip link set {} up", daemon.interface));
            let log = || daemon.process.log();
            wait::until("it is logged", LIMIT, || log().contains("cannot open UDP port"));
            let log = log();
            let line = log.lines().find(|line| line.contains("cannot open UDP port")).unwrap();
            let is_mark = call == libc::SYS_setsockopt && line.contains("EPERM");
            let named = if is_mark { "CAP_NET_ADMIN" } else { "setsockopt(2)" };
            assert!(line.contains(named), "{call} {errno}: {line}");
            assert!(!line.contains("listen-port"), "{call} {errno}: {line}");
            assert!(!line.contains("ip_unprivileged_port_start"), "{call} {errno}: {line}");
        }
    }
}

/// Of an address family, as RestrictAddressFamilies= refuses it, or a kernel that was built without it.
#[test]
fn attack_13_without_an_address_family_it_serves_or_names_it() {
    require!(Wgsep);
    let netns = Netns::new();
    for (family, step) in
        [(libc::AF_UNIX, "index of the interface"), (libc::AF_NETLINK, "set the MTU")]
    {
        let without = [Blocked(libc::SYS_socket, Some(family))];
        let said = refusal(&netns, &[], &without, libc::EAFNOSUPPORT);
        assert!(said.contains(step) && said.contains("allow the address family"), "{said}");
    }
    for family in [libc::AF_INET, libc::AF_INET6] {
        let netns = Netns::new();
        let without = [Blocked(libc::SYS_socket, Some(family))];
        let daemon = Daemon::start_with(Wgsep, &netns, |command| {
            block(command, &without, libc::EAFNOSUPPORT);
        });
        netns.run(format!("ip link set {} up", daemon.interface));
        wait::until("it has a port in the other family", LIMIT, || {
            netns.run("ss -Hlnu").lines().count() == 1
        });
    }
}

/// In the background the dataplane has no terminal to log to: the one line has the reason.
#[test]
fn in_the_background_a_refusal_has_the_dataplanes_reason() {
    require!(Wgsep);
    let (netns, interface) = (Netns::new(), unique_interface());
    for level in ["info", "silent"] {
        let mut command = netns.command(wgsep_program("wgsep"));
        command.args([&interface, "--log-level", level, "--log-file", "/dev/null"]);
        block(&mut command, &[Blocked(libc::SYS_timerfd_create, None)], libc::EPERM);
        let output = process::output(&mut command);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains("set up the control thread: Operation not permitted"), "{said}");
        assert!(!said.contains("above"), "{said}");
        // The process in the background ends just after the launcher has its line.
        wait::until("the helper is gone", LIMIT, || procfs::with_argument(&interface).is_empty());
        assert_nothing_left(&netns, &interface, &said);
    }
}
