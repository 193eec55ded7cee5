//! The confinement of both processes: what they give up, in which order, and the proof.
//!
//! The dataplane is confined in two steps. Before it is executed, the helper's child calls
//! [`prepare_dataplane`]; the dataplane itself then calls [`Sandbox::enter`] before it reads a byte,
//! starts its threads, and calls [`Sandbox::lock_down`]. The helper confines itself with
//! [`drop_helper_privileges`] and, once the dataplane is verified, [`lock_down_helper`].

pub mod capabilities;
pub mod descriptors;
pub mod filters;
mod grants;
mod in_flight;
pub mod landlock;
mod layers;
pub mod limits;
#[cfg(target_env = "musl")]
mod musl;
pub mod namespaces;
mod new_ports;
mod port_range;
mod proof;
mod report;
pub mod seccomp;
mod status;
mod sys;
pub mod user;

pub use caps::Capability;
pub use grants::Grants;
pub use in_flight::Send;
pub use layers::{Layer, Process};
pub use new_ports::NewPorts;
pub use proof::{check_proc, untraceable, verify};
pub use report::{Report, Sandboxes, State};
pub use seccomp::Named;
pub use status::ThreadStatus;
pub use sys::{Heap, exit};

use nix::sched::CloneFlags;
use nix::unistd::{Gid, Pid, Uid};
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// A step of confinement that failed though nothing may run without it.
#[derive(Debug)]
pub struct Refused {
    /// What failed.
    pub step: &'static str,
    /// What the kernel said.
    pub reason: String,
}

impl core::fmt::Display for Refused {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "sandbox: {}: {}; it is never done without: allow it in the container or unit around, or take a newer kernel",
            self.step, self.reason
        )
    }
}

impl core::error::Error for Refused {}

fn required(step: &'static str, result: nix::Result<()>) -> Result<(), Refused> {
    result.map_err(|errno| Refused { step, reason: described(errno) })
}

/// An errno as our lines have it: what it means, and its name to search for.
#[must_use]
pub fn described(errno: nix::Error) -> String {
    format!("{} ({errno:?})", errno.desc())
}

/// What to do where the daemons of an account have too many descriptors in flight for one more.
pub const TOO_MANY_IN_FLIGHT: &str = "too many daemons share the dataplane's account for the hard limit on open files: raise it to 257 for each (ulimit -Hn, LimitNOFILE= of a unit, --ulimit nofile= of a container), or give this one another account (--user)";

/// What to do about a refusal of the kernel, or of a filter of system calls that answers for it.
#[must_use]
pub const fn remedy(errno: nix::Error) -> &'static str {
    use nix::Error as Errno;
    match errno {
        Errno::EPERM | Errno::EACCES => {
            "run as root, or allow it in the container or unit that refuses it"
        }
        Errno::ENOBUFS => {
            "free some memory, or raise net.core.optmem_max where it is lower than this: sysctl net.core.optmem_max=131072"
        }
        Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE | Errno::EAGAIN => {
            "free some memory or descriptors, or raise the limits it was started with"
        }
        Errno::ENOSYS | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOPROTOOPT => {
            "take a newer kernel, or allow it in the filter of the container or unit that hides it"
        }
        Errno::EAFNOSUPPORT => {
            "allow the address family (RestrictAddressFamilies= of a unit), or take a kernel that has it"
        }
        Errno::ETOOMANYREFS => TOO_MANY_IN_FLIGHT,
        Errno::ENOENT => "make or mount what is missing there",
        Errno::EFBIG => "raise the limit on the size of files (ulimit -f, LimitFSIZE= of a unit)",
        Errno::ENXIO => "start what reads from it or serves it, or name another file",
        Errno::EROFS => "mount a writable file system there",
        Errno::ENOSPC | Errno::EDQUOT => "free space or inodes there, or raise the limit or quota",
        Errno::EBUSY | Errno::EEXIST | Errno::EADDRINUSE => {
            "end or move away what has it, or choose another"
        }
        Errno::EISDIR | Errno::ENOTDIR | Errno::ELOOP | Errno::ENAMETOOLONG => {
            "correct what is at that path, or choose another"
        }
        Errno::ENOEXEC => "install the program again: that file cannot be executed on this machine",
        Errno::EOVERFLOW => {
            "give this user a number in its user namespace: uid_map and gid_map, as by unshare --map-root-user"
        }
        Errno::ENODEV => "load or make the device that is missing",
        Errno::EIO => "see what failed in the kernel's log: dmesg",
        _ => "if nothing explains it, please report it",
    }
}

/// Forbids other processes of the same user to trace this one and to read its memory, and forbids core
/// files. The first thing that the helper does: its child inherits it, and no process of the two is
/// dumpable again.
///
/// # Errors
/// If the kernel refuses it.
pub fn become_non_dumpable() -> Result<(), Refused> {
    required("become non-dumpable", sys::set_non_dumpable())
}

/// The dataplane's first half, in the helper's child: everything that needs privileges, and giving
/// them up. Ends with no capability and no_new_privs; only executing the program is left to do.
///
/// `user` is `None` where the launcher may not change it. `send` sends descriptors over a unix socket that is
/// closed when the program is executed, and whose other end the helper keeps and never reads. All layers are
/// tried; see the report for those that the kernel refused.
#[must_use]
pub fn prepare_dataplane(user: Option<(Uid, Gid)>, send: Send<'_>) -> Report {
    let mut report = Report::default();
    report.note(Layer::Limits, limits::limit_dataplane().into());
    let mut most_descriptors = limits::MAX_DESCRIPTORS;
    let (mut entered, mut refused) = namespaces::enter(CloneFlags::empty());
    if entered == 0 {
        // While there may be CAP_SETPCAP, which another uid has not. A user namespace begins with all anew.
        drop_bounding_set(&mut report);
        // No other user can be chosen inside a user namespace without a map.
        most_descriptors = take_user(&mut report, user, send);
        (entered, refused) = namespaces::enter(CloneFlags::CLONE_NEWUSER);
        report.note(Layer::UserNamespace, if entered == 0 { refused } else { State::Applied });
    }
    report.note(Layer::Namespaces, refused.but(entered));
    // In the mount namespace of everybody else it would empty everybody's root.
    let is_own = entered & namespaces::MOUNT != 0;
    report.note(Layer::EmptyRoot, if is_own { namespaces::empty_root().into() } else { refused });
    if entered != 0 {
        drop_bounding_set(&mut report);
    }
    if report.state(Layer::User) == State::Absent {
        most_descriptors = take_user(&mut report, user, send);
    }
    report.note(Layer::Capabilities, capabilities::clear_all().into());
    // Not before the quota is full: as long as the limit is high, others of the same user may have theirs too.
    let few = limits::limit_descriptors(most_descriptors);
    if report.state(Layer::Limits) == State::Applied {
        report.note(Layer::Limits, few.into());
    }
    if report.state(Layer::NoDescriptorsOut) == State::Applied {
        report.note(Layer::NoDescriptorsOut, in_flight::is_full(send));
    }
    report.note(Layer::NoNewPrivs, sys::set_no_new_privs().into());
    report
}

/// No capability can be had any more by executing a program, whatever its file grants.
fn drop_bounding_set(report: &mut Report) {
    report.note(Layer::BoundingSet, capabilities::drop_bounding_set().into());
    report.note(Layer::SecureBits, capabilities::lock_securebits().into());
}

/// Takes the user, and uses up the quota of descriptors in flight, which is the user's: if it were shared with
/// the launcher's programs, these would lose it too. Returns the most descriptors that a process of the user may have
/// for the quota to be used up.
fn take_user(report: &mut Report, user: Option<(Uid, Gid)>, send: Send<'_>) -> u64 {
    let mut filled = Err(nix::Error::EPERM);
    let taken = user.map_or(State::degraded(nix::Error::EPERM), |(uid, gid)| {
        let limit = limits::descriptors();
        user::become_user(uid, gid, || filled = in_flight::fill(send, limit)).into()
    });
    report.note(Layer::User, taken);
    report.note(Layer::NoDescriptorsOut, filled.map(drop).into());
    filled.unwrap_or(limits::MAX_DESCRIPTORS)
}

/// Closes every descriptor that the launcher left open, but standard input, output, error and `kept`.
/// To be called first, before anything is opened.
///
/// # Errors
/// As close_range(2).
pub fn close_inherited_descriptors(kept: &[u32]) -> nix::Result<()> {
    let mut kept = kept.to_vec();
    kept.sort_unstable();
    let mut first = 3;
    for number in kept {
        if number > first {
            sys::close_range(first, number - 1)?;
        }
        first = first.max(number.saturating_add(1));
    }
    sys::close_range(first, u32::MAX)
}

/// The dataplane's sandbox, between its first layers and the lock-down.
pub struct Sandbox {
    report: Report,
}

impl Sandbox {
    /// Before anything else, on the only thread: dies with its parent, which must be `helper`; cannot
    /// be traced; can open no file.
    ///
    /// # Errors
    /// If a capability is left, the parent is not the helper, or a mandatory layer is refused.
    pub fn enter(helper: Pid) -> Result<Self, Refused> {
        let mut report = Report::default();
        #[cfg(target_env = "musl")]
        required("protect relocated memory", musl::protect_relocated())?;
        required("take signal handlers away", sys::take_signal_handlers())?;
        required("set the death signal", sys::set_death_signal())?;
        if nix::unistd::getppid() != helper {
            let reason = "started by someone else, or the helper is already gone".to_owned();
            return Err(Refused { step: "find the helper", reason });
        }
        report.note(Layer::DeathSignal, State::Applied);
        become_non_dumpable()?;
        report.note(Layer::NonDumpable, State::Applied);
        check_no_capability("check capabilities")?;
        if !sys::no_new_privs() {
            let reason = "no_new_privs is missing".to_owned();
            return Err(Refused { step: "check what the helper left", reason });
        }
        report.note(Layer::Landlock, landlock::deny_all());
        Ok(Self { report })
    }

    /// Notes how a layer turned out that the dataplane has to see to itself.
    pub fn note(&mut self, layer: Layer, state: State) {
        self.report.note(layer, state);
    }

    /// Completes the sandbox once all threads run and wait: no further threads, and only the filter's system
    /// calls, on every thread. The program and `kept`, whole pages, can be neither unmapped nor remapped.
    ///
    /// # Errors
    /// If the filter is refused: nothing runs without it.
    pub fn lock_down(mut self, kept: &[Range<usize>]) -> Result<Report, Refused> {
        let refused =
            |error: seccompiler::Error| Refused { step: "seccomp", reason: error.to_string() };
        let program = seccomp::compile(filters::DATAPLANE, Named::default()).map_err(refused)?;
        required("forbid files to grow", limits::no_file_growth())?;
        self.report.note(Layer::SealedMemory, seal_memory(kept));
        self.report.note(Layer::NoProcesses, State::from(limits::no_processes()));
        check_no_capability("check capabilities again")?;
        seccomp::close(&program).map_err(refused)?;
        self.report.note(Layer::Seccomp, State::Applied);
        Ok(self.report)
    }
}

/// Seals all that the program and its libraries have mapped, and `kept`. Without it, code that was taken over
/// could map memory of its own in the place of constants, whose pages the filter lets it unmap.
fn seal_memory(kept: &[Range<usize>]) -> State {
    let loaded = sys::segments(nix::libc::PT_LOAD);
    match loaded.iter().chain(kept).try_for_each(sys::seal_mapping) {
        Err(nix::Error::ENOSYS) => State::Unsupported,
        sealed => sealed.into(),
    }
}

fn check_no_capability(step: &'static str) -> Result<(), Refused> {
    match capabilities::has_none() {
        Ok(true) => Ok(()),
        Ok(false) => Err(Refused { step, reason: "some are left".to_owned() }),
        Err(errno) => Err(Refused { step, reason: described(errno) }),
    }
}

/// Capabilities that the helper keeps: to mark sockets; to end a child of another uid; and, if low
/// ports are allowed, to bind them.
#[must_use]
pub fn helper_capabilities(low_ports: bool) -> Vec<Capability> {
    let mut kept = vec![Capability::CAP_NET_ADMIN, Capability::CAP_KILL];
    if low_ports {
        kept.push(Capability::CAP_NET_BIND_SERVICE);
    }
    kept
}

/// The helper's first half: all capabilities but the few it needs, for good. The one that [`verify`]
/// needs where /proc hides other users' processes stays in reserve until [`drop_reserve`]. What only a
/// full root may do is in the report where the kernel refuses it.
///
/// # Errors
/// If a mandatory layer is refused.
pub fn drop_helper_privileges(low_ports: bool) -> Result<Report, Refused> {
    let mut report = Report::default();
    #[cfg(target_env = "musl")]
    required("protect relocated memory", musl::protect_relocated())?;
    required("take signal handlers away", sys::take_signal_handlers())?;
    required("core limit", limits::no_core())?;
    report.note(Layer::Limits, State::Applied);
    // Its launcher's groups; without CAP_SETGID it keeps them, as it keeps its uid.
    let _without_setgid = nix::unistd::setgroups(&[]);
    report.note(Layer::BoundingSet, capabilities::drop_bounding_set().into());
    report.note(Layer::SecureBits, capabilities::lock_securebits().into());
    let kept = helper_capabilities(low_ports);
    required("reduce capabilities", capabilities::keep(&kept, &[proof::READING]))?;
    report.note(Layer::Capabilities, State::Applied);
    required("no_new_privs", sys::set_no_new_privs())?;
    report.note(Layer::NoNewPrivs, State::Applied);
    become_non_dumpable()?;
    report.note(Layer::NonDumpable, State::Applied);
    Ok(report)
}

/// Gives up what was kept in reserve for [`verify`], before anything else happens.
///
/// # Errors
/// If the kernel refuses it.
pub fn drop_reserve(low_ports: bool) -> Result<(), Refused> {
    required("reduce capabilities", capabilities::keep_only(&helper_capabilities(low_ports)))
}

/// The helper's second half, once the dataplane is verified: it can only remove files in the socket
/// directory, and only make the filter's system calls; of all processes it can signal the child alone, and
/// send messages on the named sockets alone. Completes the report of the first half.
///
/// # Errors
/// If the filter is refused.
pub fn lock_down_helper(
    mut report: Report,
    socket_directory: BorrowedFd<'_>,
    named: Named<'_>,
) -> Result<Report, Refused> {
    let refused =
        |error: seccompiler::Error| Refused { step: "seccomp", reason: error.to_string() };
    let program = seccomp::compile(filters::HELPER, named).map_err(refused)?;
    report.note(Layer::Landlock, landlock::deny_all_but_removing_in(socket_directory));
    report.note(Layer::SealedMemory, seal_memory(&[]));
    seccomp::close(&program).map_err(refused)?;
    report.note(Layer::Seccomp, State::Applied);
    Ok(report)
}
