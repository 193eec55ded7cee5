//! The first things the helper does, before it opens anything.

use crate::notify_socket::{Store, capacity_of_environment, manager_of_environment};
use crate::sys;
use caps::CapSet;
use nix::fcntl::OFlag;
use nix::sys::signal::{SigHandler, SigSet, Signal};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{getpid, getresgid, getresuid};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use wgsep_journal::{STORED_QUEUE, ServiceManager};
use wgsep_monitor::{Error, Result, Step};
use wgsep_policy::capabilities::are_of_the_file;
use wgsep_policy::limits;

/// Bytes that a file must be able to have: the sandbox's report, and a log that is worth reading.
const MIN_FILE_SIZE: u64 = 1 << 20;

/// Descriptors and settings that came by the environment.
pub struct Inherited {
    /// WG_TUN_FD.
    pub tun: Option<OwnedFd>,
    /// WG_UAPI_FD.
    pub uapi: Option<OwnedFd>,
    /// LISTEN_FDS and FDSTORE.
    pub store: Store,
    /// NOTIFY_SOCKET.
    pub manager: ServiceManager,
    /// Why the service manager is not notified although NOTIFY_SOCKET is set.
    pub unnotified: Option<String>,
    /// Whether this process's capabilities are its program's, and not its launcher's.
    pub is_file_capable: bool,
}

/// Makes the calls that by their manuals always succeed, and which the libraries take at their word: a
/// filter of system calls around this process may refuse them all the same.
///
/// # Errors
/// If one is refused.
pub fn check_infallible_calls() -> Result<()> {
    sys::INFALLIBLE.iter().try_for_each(|(name, call)| sys::try_call(*call).step(name))
}

/// Makes a write past the limit on the size of files an error (EFBIG) of that write, which otherwise kills the
/// process. Standard error may be a file, so this precedes every step whose failure is printed.
///
/// # Errors
/// If the action cannot be changed.
pub fn survive_file_limit() -> Result<()> {
    sys::set_action(Signal::SIGXFSZ, SigHandler::SigIgn).map(drop).step("ignore SIGXFSZ")
}

/// Allows descriptors and the growth of files, within the launcher's own limits.
///
/// # Errors
/// If there are too few descriptors for so many workers.
pub fn set_limits(workers: usize) -> Result<()> {
    let limit = limits::allow_file_growth().step("limit on the size of files")?;
    if limit < MIN_FILE_SIZE {
        return Err(Error::new(format!(
            "the hard limit on the size of files is {limit} bytes, and reports and logs need {MIN_FILE_SIZE}; raise it: ulimit -Hf, LimitFSIZE= of a unit"
        )));
    }
    let limit = limits::allow_descriptors().step("limit on descriptors")?;
    let needed = limits::min_descriptors(workers);
    if limit >= needed {
        return Ok(());
    }
    Err(Error::new(format!(
        "the hard limit on open files is {limit}, and {workers} workers need {needed}; raise it (ulimit -Hn {needed}, LimitNOFILE= of a unit), or start with fewer --workers"
    )))
}

/// Refuses a program that is setuid or setgid: its launcher would choose the log, sockets and namespaces
/// that are opened as another user.
///
/// # Errors
/// If real and effective ids differ, or cannot be read.
pub fn check_ids() -> Result<()> {
    let (user, group) = (getresuid().step("getresuid")?, getresgid().step("getresgid")?);
    if (user.real, group.real) == (user.effective, group.effective) {
        return Ok(());
    }
    Err(Error::new(
        "the program is setuid or setgid, which lets its launcher act as another user; take that away (chmod ug-s), and see README.md, \"Without root\"",
    ))
}

/// Closes what the launcher left open, forgets the environment, and sets mask, core limit and SIGCHLD.
///
/// # Errors
/// If WG_TUN_FD, WG_UAPI_FD or one of LISTEN_FDS is not the number of an open descriptor of its own, or comes
/// from a user who has no capability but the program's.
pub fn clean_process() -> Result<Inherited> {
    const VARIABLES: [&str; 2] = ["WG_TUN_FD", "WG_UAPI_FD"];
    let is_file_capable = are_of_the_file();
    let [tun, uapi] = VARIABLES.map(|name| descriptor_variable(name, is_file_capable));
    let (tun, uapi, stored) = (tun?, uapi?, stored_queues(is_file_capable)?);
    if tun.is_some() && tun == uapi {
        return Err(Error::new(
            "WG_TUN_FD and WG_UAPI_FD are the same descriptor; unset one of them",
        ));
    }
    let named: Vec<_> = [tun, uapi].into_iter().flatten().collect();
    if named.iter().any(|number| stored.contains(number)) {
        return Err(Error::new(format!(
            "WG_TUN_FD or WG_UAPI_FD is a descriptor that is named {STORED_QUEUE} by LISTEN_FDNAMES; unset one of them"
        )));
    }
    let kept: Vec<_> = named.iter().chain(&stored).map(|number| number.cast_unsigned()).collect();
    wgsep_policy::close_inherited_descriptors(&kept).step("close inherited descriptors")?;
    // Before anything is opened, which would get a number that is not.
    let take =
        |name: &str, number| sys::take_descriptor(number).map_err(|_| not_a_descriptor(name));
    let tun = tun.map(|number| take("WG_TUN_FD", number)).transpose()?;
    let uapi = uapi.map(|number| take("WG_UAPI_FD", number)).transpose()?;
    let stored = stored.into_iter().map(|number| take(&format!("{number} of LISTEN_FDS"), number));
    let store = Store {
        queues: stored.collect::<Result<_>>()?,
        // The user who named the socket would get the interface.
        capacity: if is_file_capable { 0 } else { capacity_of_environment() },
    };
    // As with sd_notify(3), no socket keeps the daemon from serving.
    let (manager, unnotified) = match with_callers_rights(is_file_capable, manager_of_environment)?
    {
        Ok(manager) => (manager, None),
        Err(error) => (ServiceManager::default(), Some(unnotified(&error))),
    };
    sys::clear_environment();
    umask(Mode::from_bits_truncate(0o077));
    limits::no_core().step("core limit")?;
    // Where the launcher ignores it, the kernel keeps no exit status, and a breach of the contract looks like any
    // other end.
    sys::set_action(Signal::SIGCHLD, SigHandler::SigDfl).step("reset SIGCHLD")?;
    Ok(Inherited { tun, uapi, store, manager, unnotified, is_file_capable })
}

/// Runs `work`, which opens what the caller named, without the capabilities that are the program's.
///
/// # Errors
/// If they cannot be given up or taken back.
pub fn with_callers_rights<T>(is_file_capable: bool, work: impl FnOnce() -> T) -> Result<T> {
    if !is_file_capable {
        return Ok(work());
    }
    let run = || {
        let held = caps::read(None, CapSet::Effective)?;
        caps::clear(None, CapSet::Effective)?;
        let done = work();
        caps::set(None, CapSet::Effective, &held).map(|()| done)
    };
    run().map_err(|_| nix::Error::last()).step("open with the caller's own rights")
}

fn unnotified(error: &io::Error) -> String {
    let name = std::env::var_os("NOTIFY_SOCKET").unwrap_or_default();
    let errno = error.raw_os_error().map(nix::Error::from_raw);
    let reason = errno.map_or_else(|| error.to_string(), wgsep_policy::described);
    format!(
        "cannot notify the service manager: NOTIFY_SOCKET is {}: {reason}; unset it, or set it to a Unix socket on which a program receives",
        name.display()
    )
}

fn descriptor_variable(name: &str, is_file_capable: bool) -> Result<Option<RawFd>> {
    let Some(value) = std::env::var_os(name).filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    if is_file_capable {
        return Err(refused_of_a_user(name));
    }
    let number = value.to_str().and_then(|value| value.parse().ok()).filter(|number| *number > 2);
    number.map(Some).ok_or_else(|| not_a_descriptor(name))
}

fn not_a_descriptor(name: &str) -> Error {
    Error::new(format!(
        "{name} must be the number of an open descriptor above 2; unset it, or set it to one"
    ))
}

/// The numbers of the TUN queues that the service manager has stored (sd_listen_fds(3)). Others are ignored, as are all
/// that are another process's.
fn stored_queues(is_file_capable: bool) -> Result<Vec<RawFd>> {
    const FIRST: RawFd = 3;
    const VARIABLES: [&str; 3] = ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];
    let [count, pid, names] = VARIABLES.map(|name| std::env::var(name).unwrap_or_default());
    let names: Vec<_> = names.split(':').collect();
    if pid != getpid().to_string() || !names.contains(&STORED_QUEUE) {
        return Ok(Vec::new());
    }
    if is_file_capable {
        return Err(refused_of_a_user(VARIABLES[0]));
    }
    if count != names.len().to_string() {
        return Err(Error::new(format!(
            "LISTEN_FDS is {count:?}, and LISTEN_FDNAMES has {} names; have the service manager set both, or unset them",
            names.len()
        )));
    }
    let numbered = (FIRST..).zip(names).filter(|(_, name)| *name == STORED_QUEUE);
    Ok(numbered.map(|(number, _)| number).collect())
}

fn refused_of_a_user(name: &str) -> Error {
    Error::new(format!(
        "{name} is refused, because wgsep has its capability from its program's file and not from who started it; unset it, or start wgsep as root"
    ))
}

/// A warning where any user may execute this program with the capabilities of its file.
pub fn warn_of_a_grant_to_all() -> Option<&'static str> {
    const EXECUTABLE_BY_OTHERS: u32 = 0o001;
    let mode = std::fs::metadata("/proc/self/exe").ok()?.mode();
    (mode & EXECUTABLE_BY_OTHERS != 0).then_some(
        "every user of this machine may execute this program with its capability, and so create interfaces and mark sockets; keep it to a group: chgrp wgsep, chmod 0750, and setcap again (README.md, \"Without root\")",
    )
}

/// Signals that the monitor reads from a descriptor.
pub fn handled_signals() -> SigSet {
    SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD])
}

/// Signals that would end the tunnel and mean nothing here, as what rotates logs sends, or an inherited timer.
const IGNORED: [Signal; 7] = [
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGIO,
    Signal::SIGPWR,
];

/// The same, without SIGHUP where the launcher ignores it for a daemon in the foreground: nohup(1) promises that a
/// terminal that is closed changes nothing. What is handled is blocked, and reaches the descriptor though it is
/// ignored.
///
/// # Errors
/// If the action cannot be changed.
pub fn signals_to_handle(foreground: bool) -> Result<SigSet> {
    let mut handled = handled_signals();
    let before = sys::set_action(Signal::SIGHUP, SigHandler::SigIgn).step("ignore SIGHUP")?;
    for signal in IGNORED {
        sys::set_action(signal, SigHandler::SigIgn).step("ignore a signal")?;
    }
    if foreground && matches!(before, SigHandler::SigIgn) {
        handled.remove(Signal::SIGHUP);
    }
    Ok(handled)
}

/// Opens a path itself, and not what a symbolic link in its place leads to, without the right to read it
/// (O_PATH). std's OpenOptions drop that flag with musl, which counts it among the modes of access.
///
/// # Errors
/// As open(2).
pub(crate) fn open_path(path: impl AsRef<Path>, more: OFlag) -> nix::Result<File> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | more;
    nix::fcntl::open(path.as_ref(), flags, Mode::empty()).map(File::from)
}

/// Opens /dev/null.
///
/// # Errors
/// If there is none.
pub fn null() -> Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/null").step("/dev/null")
}
