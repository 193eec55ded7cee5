//! Attack 13: machines, or launchers, that keep a layer of the confinement from wgsep. A filter on
//! the launcher answers the layer's system calls with an errno, as containers' filters do.
#![allow(clippy::unwrap_used)]

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use wgsep_tests::daemon::{Daemon, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::Process;
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
    let refuse = SeccompAction::Errno(errno.cast_unsigned());
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let filter =
        SeccompFilter::new(rules.collect(), SeccompAction::Allow, refuse, architecture).unwrap();
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
    assert!(procfs::with_argument(&interface).is_empty(), "a process is left");
    assert!(!netns.run("ip -o link").contains(&interface), "the interface is left");
    assert!(socket_path(&interface).symlink_metadata().is_err(), "the socket is left");
    log
}

#[test]
fn attack_13_without_landlock_the_report_says_so_and_strict_mode_refuses() {
    require!(Wgsep);
    let landlock = [
        Blocked(libc::SYS_landlock_create_ruleset, None),
        Blocked(libc::SYS_landlock_add_rule, None),
        Blocked(libc::SYS_landlock_restrict_self, None),
    ];
    for (errno, state) in [
        (libc::ENOSYS, "unsupported"),
        (libc::EOPNOTSUPP, "unsupported"),
        (libc::EPERM, "degraded(EPERM)"),
    ] {
        let netns = Netns::new();
        let daemon = Daemon::start_with(Wgsep, &netns, |command| block(command, &landlock, errno));
        // It answers before it logs.
        wait::until("the report is logged", LIMIT, || daemon.process.log().contains("started: "));
        let log = daemon.process.log();
        // The dataplane's and the helper's own.
        assert_eq!(log.matches(&format!("landlock={state}")).count(), 2, "{log}");
        let said = refusal(&netns, &["--sandbox", "strict"], &landlock, errno);
        assert!(said.contains(&format!("landlock {state}")), "{said}");
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
        (&[Blocked(libc::SYS_prlimit64, None)], libc::EPERM, "core limit"),
        (&[Blocked(libc::SYS_close_range, None)], libc::ENOSYS, "close inherited descriptors"),
    ] {
        let said = refusal(&netns, &[], calls, errno);
        assert!(said.contains(named), "{named}: {said}");
    }
}
