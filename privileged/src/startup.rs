//! The first things the helper does, before it opens anything.

use crate::error::{Error, Result, Step};
use crate::notify::ServiceManager;
use crate::sys::{self, Forked};
use nix::fcntl::{OFlag, open};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{Mode, umask};
use nix::sys::wait::waitpid;
use nix::unistd::{chdir, dup2_stderr, dup2_stdin, dup2_stdout, pipe2, read, setsid, write};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use wgsep_policy::limits;

/// Descriptors and settings that came by the environment.
#[derive(Default)]
pub struct Inherited {
    /// WG_TUN_FD.
    pub tun: Option<OwnedFd>,
    /// WG_UAPI_FD.
    pub uapi: Option<OwnedFd>,
    /// NOTIFY_SOCKET.
    pub manager: ServiceManager,
}

/// Closes what the launcher left open, forgets the environment, and sets mask and core limit.
///
/// # Errors
/// If WG_TUN_FD or WG_UAPI_FD is not the number of an open descriptor.
pub fn clean_process() -> Result<Inherited> {
    let tun = descriptor_variable("WG_TUN_FD")?;
    let uapi = descriptor_variable("WG_UAPI_FD")?;
    let kept: Vec<u32> =
        [tun, uapi].into_iter().flatten().filter_map(|fd| u32::try_from(fd).ok()).collect();
    wgsep_policy::close_inherited_descriptors(&kept).step("close inherited descriptors")?;
    let manager = ServiceManager::of_environment()?;
    for (name, _) in std::env::vars_os() {
        sys::remove_variable(&name);
    }
    umask(Mode::from_bits_truncate(0o077));
    limits::no_core().step("core limit")?;
    let take = |name: &str, number: Option<RawFd>| {
        let missing = |errno| Error::call(&format!("{name} is not an open descriptor"), errno);
        number.map(|number| sys::take_descriptor(number).map_err(missing)).transpose()
    };
    Ok(Inherited { tun: take("WG_TUN_FD", tun)?, uapi: take("WG_UAPI_FD", uapi)?, manager })
}

fn descriptor_variable(name: &str) -> Result<Option<RawFd>> {
    let Some(value) = std::env::var_os(name).filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    let number = value.to_str().and_then(|value| value.parse::<RawFd>().ok()).filter(|fd| *fd > 2);
    number.map(Some).ok_or_else(|| {
        Error::new(format!(
            "{name} must be the number of an open descriptor above 2; unset it, or set it to one"
        ))
    })
}

/// Signals that the monitor reads from a descriptor.
pub fn handled_signals() -> SigSet {
    SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP])
}

/// The way back to whoever started the daemon in the background.
pub struct Launcher(Option<OwnedFd>);

impl Launcher {
    /// In the foreground nobody waits.
    pub const fn foreground() -> Self {
        Self(None)
    }

    /// All is ready.
    pub fn ready(&mut self) {
        if let Some(pipe) = self.0.take() {
            let _launcher_is_gone = write(&pipe, &[0]);
        }
    }

    /// It failed; true if somebody was told.
    pub fn failed(&mut self, error: &Error) -> bool {
        let line = error.to_string();
        self.0.take().is_some_and(|pipe| write(&pipe, line.as_bytes()).is_ok())
    }
}

/// Goes on in the background; the launcher's process waits until all is ready, or says what failed.
///
/// # Errors
/// If the kernel refuses the fork.
pub fn daemonize() -> Result<Launcher> {
    let (outcome, outcome_end) = pipe2(OFlag::O_CLOEXEC).step("pipe")?;
    match sys::fork().step("fork")? {
        Forked::Parent(child) => {
            drop(outcome_end);
            let _reaped = waitpid(child, None);
            wait_for_daemon(outcome)
        }
        Forked::Child => {
            drop(outcome);
            setsid().step("setsid")?;
            // Not the leader of its session, so that no terminal can ever become its own.
            if let Forked::Parent(_) = sys::fork().step("fork")? {
                sys::exit(0);
            }
            chdir("/").step("chdir /")?;
            Ok(Launcher(Some(outcome_end)))
        }
    }
}

/// Lets go of the launcher's standard descriptors.
///
/// # Errors
/// If /dev/null cannot be opened.
pub fn release_standard_descriptors() -> Result<()> {
    let null =
        open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).step("/dev/null")?;
    dup2_stdin(null.as_fd()).step("standard input")?;
    dup2_stdout(null.as_fd()).step("standard output")?;
    dup2_stderr(null.as_fd()).step("standard error")
}

fn wait_for_daemon(outcome: OwnedFd) -> ! {
    let mut first = [0];
    match read(&outcome, &mut first) {
        Ok(1) if first == [0] => sys::exit(0),
        Ok(1) => {
            let mut line = vec![first[0]];
            let _rest = std::fs::File::from(outcome).read_to_end(&mut line);
            complain(&String::from_utf8_lossy(&line));
        }
        _ => complain("the daemon died before it was ready; its log says why"),
    }
    sys::exit(1)
}

/// Says what failed, on standard error.
pub fn complain(line: &str) {
    let _nobody_reads = write(std::io::stderr(), format!("wgsep: {line}\n").as_bytes());
}
