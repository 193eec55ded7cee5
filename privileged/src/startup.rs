//! The first things the helper does, before it opens anything.

use crate::error::{Error, Result, Step};
use crate::notify::ServiceManager;
use crate::sys;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{Mode, umask};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, chdir, setsid};
use std::fs::{File, OpenOptions};
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::process::exit;
use wgsep_policy::limits;

/// Descriptors and settings that came by the environment.
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
/// If WG_TUN_FD or WG_UAPI_FD is not the number of an open descriptor of its own.
pub fn clean_process() -> Result<Inherited> {
    const VARIABLES: [&str; 2] = ["WG_TUN_FD", "WG_UAPI_FD"];
    let [tun, uapi] = VARIABLES.map(descriptor_variable);
    let (tun, uapi) = (tun?, uapi?);
    if tun.is_some() && tun == uapi {
        return Err(Error::new(
            "WG_TUN_FD and WG_UAPI_FD are the same descriptor; unset one of them",
        ));
    }
    let kept: Vec<_> = [tun, uapi].into_iter().flatten().map(RawFd::cast_unsigned).collect();
    wgsep_policy::close_inherited_descriptors(&kept).step("close inherited descriptors")?;
    let manager = ServiceManager::of_environment()?;
    sys::clear_environment();
    umask(Mode::from_bits_truncate(0o077));
    limits::no_core().step("core limit")?;
    let take = |name: &str, number: Option<RawFd>| {
        let step = format!("{name} is not an open descriptor");
        number.map(|number| sys::take_descriptor(number).step(&step)).transpose()
    };
    Ok(Inherited { tun: take("WG_TUN_FD", tun)?, uapi: take("WG_UAPI_FD", uapi)?, manager })
}

fn descriptor_variable(name: &str) -> Result<Option<RawFd>> {
    let Some(value) = std::env::var_os(name).filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    let number = value.to_str().and_then(|value| value.parse().ok()).filter(|number| *number > 2);
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

/// Opens /dev/null.
///
/// # Errors
/// If there is none.
pub fn null() -> Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/null").step("/dev/null")
}

/// The way back to whoever started the daemon in the background, and nothing in the foreground.
#[derive(Default)]
pub struct Launcher(Option<PipeWriter>);

/// What the launcher hears when all is well, which is no error's line.
const READY: &str = "ready";

impl Launcher {
    /// All is ready.
    pub fn ready(&mut self) {
        self.tell(READY);
    }

    /// It failed: says so to the launcher, or else on standard error.
    pub fn failed(&mut self, error: &Error) {
        let line = error.to_string();
        if !self.tell(&line) {
            complain(&line);
        }
    }

    fn tell(&mut self, line: &str) -> bool {
        self.0.take().is_some_and(|mut pipe| pipe.write_all(line.as_bytes()).is_ok())
    }
}

/// Goes on in the background, without the launcher's standard descriptors; the launcher's process waits
/// until all is ready, or says what failed.
///
/// # Errors
/// If the kernel refuses the fork, or there is no /dev/null.
pub fn daemonize(launcher: &mut Launcher) -> Result<()> {
    let (outcome, outcome_end) = std::io::pipe().step("pipe")?;
    if let ForkResult::Parent { child } = sys::fork().step("fork")? {
        drop(outcome_end);
        let _reaped = waitpid(child, None);
        wait_for_daemon(outcome)
    }
    drop(outcome);
    *launcher = Launcher(Some(outcome_end));
    setsid().step("setsid")?;
    // Not the leader of its session, so that no terminal can ever become its own.
    if sys::fork().step("fork")?.is_parent() {
        exit(0);
    }
    chdir("/").step("chdir /")?;
    let null = null()?;
    (0..=2).try_for_each(|number| sys::place_descriptor(null.as_fd(), number)).step("/dev/null")
}

fn wait_for_daemon(mut outcome: PipeReader) -> ! {
    let mut said = String::new();
    let _cut_short = outcome.read_to_string(&mut said);
    match said.as_str() {
        READY => exit(0),
        "" => complain("the daemon died before it was ready; its log says why"),
        line => complain(line),
    }
    exit(1)
}

/// Says what failed, on standard error.
pub fn complain(line: &str) {
    let _nobody_reads =
        nix::unistd::write(std::io::stderr(), format!("wgsep: {line}\n").as_bytes());
}
