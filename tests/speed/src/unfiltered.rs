//! wgsep with a system-call filter that allows everything: the same programs, so that nothing else
//! differs, not even where their code lies in memory.
//!
//! No build of wgsep has such a filter. The dataplane is traced from its birth to the moment when it
//! hands its filter to the kernel; there it is made to hand over another, of one instruction, and is
//! let go.

use std::fs;
use std::os::unix::process::CommandExt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use wgsep_tests::daemon::{Daemon, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::Process;
use wgsep_tests::{uapi, wait};

/// How long the start may take, and any step of it.
const LIMIT: Duration = Duration::from_secs(10);
/// Between two looks at a traced thread.
const INTERVAL: Duration = Duration::from_micros(50);
/// A struct sock_filter: `ret SECCOMP_RET_ALLOW`.
const ALLOW_ALL: u64 =
    (libc::SECCOMP_RET_ALLOW as u64) << 32 | (libc::BPF_RET | libc::BPF_K) as u64;
/// Bytes of a struct sock_fprog: how many instructions, and where they are.
const PROGRAM_LEN: u64 = 16;

/// Starts it and waits until it answers.
///
/// # Panics
///
/// When it does not start, or cannot be traced.
#[track_caller]
pub(crate) fn start(netns: &Arc<Netns>) -> Daemon {
    let interface = unique_interface();
    let mut command = Wgsep.command(netns, &interface);
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe calls are
    // allowed: it makes one bare system call.
    unsafe { command.pre_exec(|| Ok(ptrace::traceme()?)) };
    let process = Process::spawn(command, format!("wgsep unfiltered on {interface}"));
    let replaced = replace_filter(process.pid());
    assert_eq!(replaced, Ok(()), "cannot replace the filter:\n{}", process.log());
    wait::until("the daemon answers", LIMIT, || uapi::is_answering(&interface));
    Daemon { process, interface, netns: Arc::clone(netns) }
}

/// Follows the helper to its child, the dataplane; that to the thread which confines it; and that to
/// its filter.
fn replace_filter(helper: Pid) -> nix::Result<()> {
    if wait_for(helper)? != WaitStatus::Stopped(helper, Signal::SIGTRAP) {
        return Err(Errno::ECHILD);
    }
    let births = Options::PTRACE_O_TRACEFORK | Options::PTRACE_O_TRACECLONE;
    ptrace::setoptions(helper, births)?;
    let dataplane = follow_to_birth(helper)?;
    wait_for(dataplane)?;
    let control = follow_to_birth(dataplane)?;
    wait_for(control)?;
    // No births any more: the workers are not of interest.
    ptrace::setoptions(control, Options::PTRACE_O_TRACESYSGOOD)?;
    loop {
        ptrace::syscall(control, None)?;
        match wait_for(control)? {
            WaitStatus::PtraceSyscall(_) if is_about_to_close_filter(control)? => {
                hand_over_open_filter(dataplane, control)?;
                return ptrace::detach(control, None);
            }
            WaitStatus::PtraceSyscall(_) | WaitStatus::Stopped(..) => {}
            _ended => return Err(Errno::ECHILD),
        }
    }
}

/// Lets a stopped thread go on until it has a child, process or thread; that is traced from then on
/// in its place.
fn follow_to_birth(parent: Pid) -> nix::Result<Pid> {
    loop {
        ptrace::cont(parent, None)?;
        match wait_for(parent)? {
            WaitStatus::PtraceEvent(..) => break,
            WaitStatus::Stopped(..) => {}
            _ended => return Err(Errno::ECHILD),
        }
    }
    let child = ptrace::getevent(parent)?;
    ptrace::detach(parent, None)?;
    i32::try_from(child).map(Pid::from_raw).map_err(|_too_large| Errno::ESRCH)
}

/// Waits until a traced thread stops or ends, which is never long.
fn wait_for(pid: Pid) -> nix::Result<WaitStatus> {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        match waitpid(pid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG))? {
            WaitStatus::StillAlive => thread::sleep(INTERVAL),
            stopped => return Ok(stopped),
        }
    }
    Err(Errno::ETIMEDOUT)
}

/// Whether a stopped thread is about to hand a filter to the kernel.
fn is_about_to_close_filter(thread: Pid) -> nix::Result<bool> {
    let info = ptrace::syscall_info(thread)?;
    if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return Ok(false);
    }
    // SAFETY: at a system call's entry, as `op` says, it is this member that the kernel filled.
    let entry = unsafe { info.u.entry };
    let [operation, ..] = entry.args;
    Ok(entry.nr == libc::SYS_seccomp.cast_unsigned()
        && operation == u64::from(libc::SECCOMP_SET_MODE_FILTER))
}

/// Makes a thread hand over a filter that allows everything. Its own is in secret memory, where
/// cannot be written; this one takes the place of the program's first instructions, which have run.
fn hand_over_open_filter(process: Pid, thread: Pid) -> nix::Result<()> {
    let place = entry_point(process)?;
    let write =
        |at: u64, word: u64| ptrace::write(thread, at as ptrace::AddressType, word.cast_signed());
    write(place, 1)?;
    write(place + 8, place + PROGRAM_LEN)?;
    write(place + PROGRAM_LEN, ALLOW_ALL)?;
    let mut registers = ptrace::getregs(thread)?;
    *third_argument(&mut registers) = place;
    ptrace::setregs(thread, registers)
}

#[cfg(target_arch = "x86_64")]
fn third_argument(registers: &mut libc::user_regs_struct) -> &mut u64 {
    &mut registers.rdx
}

#[cfg(target_arch = "aarch64")]
fn third_argument(registers: &mut libc::user_regs_struct) -> &mut u64 {
    &mut registers.regs[2]
}

/// Where a process began: the kernel tells every program (getauxval(3)).
fn entry_point(process: Pid) -> nix::Result<u64> {
    let vector = fs::read(format!("/proc/{process}/auxv")).map_err(|_unreadable| Errno::EACCES)?;
    let (words, _) = vector.as_chunks::<8>();
    let mut pairs = words.chunks_exact(2).map(|pair| (pair[0], pair[1]));
    let entry = pairs.find(|(kind, _)| u64::from_ne_bytes(*kind) == libc::AT_ENTRY);
    entry.map(|(_, place)| u64::from_ne_bytes(place)).ok_or(Errno::ENOENT)
}
