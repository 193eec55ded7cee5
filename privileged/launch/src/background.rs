//! Going on in the background.

use crate::launcher::Launcher;
use crate::spawn::fork;
use crate::startup::{handled_signals, null};
use crate::sys;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, chdir, setsid};
use std::os::fd::AsFd;
use std::process::exit;
use wgsep_monitor::{Result, Step};

/// Goes on in the background, without the launcher's standard descriptors; the launcher's process waits
/// until all is ready, or says what failed.
///
/// # Errors
/// If the kernel refuses the fork, or there is no /dev/null.
pub fn daemonize(launcher: &mut Launcher) -> Result<()> {
    let (outcome, outcome_end) = std::io::pipe().step("pipe")?;
    if let ForkResult::Parent { child } = fork()? {
        drop(outcome_end);
        // A signal ends this process, as any that waits for another; the daemon is in a session of its own.
        handled_signals().thread_unblock().step("unblock signals")?;
        let _reaped = waitpid(child, None);
        exit(if launcher.wait(outcome) { 0 } else { 1 })
    }
    drop(outcome);
    launcher.report_to(outcome_end);
    setsid().step("setsid")?;
    // Not the leader of its session, so that no terminal can ever become its own.
    if fork()?.is_parent() {
        exit(0);
    }
    chdir("/").step("chdir /")?;
    let null = null()?;
    (0..=2).try_for_each(|number| sys::place_descriptor(null.as_fd(), number)).step("/dev/null")
}
