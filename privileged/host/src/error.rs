//! One line for an operator: which step failed, why, and what to do about it.

use core::fmt;
use nix::errno::Errno;
use std::io;
use wgsep_policy::{described, remedy};

/// Exit status of a failure.
pub const FAILURE: u8 = 1;
/// Exit status after the dataplane broke the contract, or made a system call that its filter forbids: it
/// may be under attack, and another start would be another try. EX_PROTOCOL of sysexits(3).
pub const BREACH: u8 = 76;

/// A failure that ends the daemon, described in one line.
#[derive(Debug)]
pub struct Error {
    /// What failed, on what, why, and what to do.
    pub line: String,
    /// The daemon's exit status.
    pub status: u8,
}

/// Short for what most steps return.
pub type Result<T> = core::result::Result<T, Error>;

impl Error {
    /// A line that says it all.
    pub fn new(line: impl Into<String>) -> Self {
        Self { line: line.into(), status: FAILURE }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line)
    }
}

impl core::error::Error for Error {}

impl From<String> for Error {
    fn from(line: String) -> Self {
        Self::new(line)
    }
}

impl From<wgsep_policy::Refused> for Error {
    fn from(refused: wgsep_policy::Refused) -> Self {
        Self::new(refused.to_string())
    }
}

/// Turns a failed system call into an [`Error`].
pub trait Step<T>: Sized {
    /// Names the step, and what the kernel said.
    ///
    /// # Errors
    /// As `self`.
    fn step(self, step: &str) -> Result<T> {
        self.advise(step, &[])
    }

    /// The same, but for the errnos of which more is known: those get a line that says what to do.
    ///
    /// # Errors
    /// As `self`.
    fn advise(self, step: &str, known: &[(&[Errno], &str)]) -> Result<T>;
}

impl<T, E: Into<io::Error>> Step<T> for core::result::Result<T, E> {
    fn advise(self, step: &str, known: &[(&[Errno], &str)]) -> Result<T> {
        self.map_err(|error| {
            let error: io::Error = error.into();
            let Some(errno) = error.raw_os_error().map(Errno::from_raw) else {
                return Error::new(format!("{step}: {error}; please report it"));
            };
            let advice = known.iter().find(|(errnos, _)| errnos.contains(&errno));
            advice.map_or_else(
                || Error::new(format!("{step}: {}; {}", described(errno), remedy(errno))),
                |(_, line)| Error::new(*line),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_failed_has_a_reason_and_a_remedy() {
        for (errno, remedy) in [
            (Errno::EPERM, "run as root"),
            (Errno::EMFILE, "raise the limits"),
            (Errno::ENOBUFS, "sysctl net.core.optmem_max="),
            (Errno::ENOSYS, "newer"),
            (Errno::EAFNOSUPPORT, "address family"),
            (Errno::EROFS, "writable"),
            (Errno::ENOSPC, "free space or inodes"),
            (Errno::EDQUOT, "quota"),
            (Errno::EBUSY, "end or move away what has it"),
            (Errno::EISDIR, "what is at that path"),
            (Errno::EIO, "dmesg"),
            (Errno::EOVERFLOW, "user namespace"),
            (Errno::EBADF, "report it"),
        ] {
            let failed = Err::<(), _>(errno).step("do it").unwrap_err().to_string();
            assert!(failed.starts_with("do it: ") && failed.contains(&format!("({errno:?}); ")));
            assert!(failed.contains(remedy), "{failed}");
            let by_std = io::Error::from_raw_os_error(errno as i32);
            assert_eq!(Err::<(), _>(by_std).step("do it").unwrap_err().to_string(), failed);
        }
    }

    #[test]
    fn errnos_of_which_more_is_known_have_a_line_of_their_own() {
        let known = [(&[Errno::ENOENT][..], "find it"), (&[Errno::EINTR, Errno::EPERM], "buy it")];
        for (errno, line) in [(Errno::ENOENT, "find it"), (Errno::EPERM, "buy it")] {
            let failed = Err::<(), _>(errno).advise("do it", &known);
            assert_eq!(failed.unwrap_err().to_string(), line);
        }
        let failed = Err::<(), _>(Errno::EIO).advise("do it", &known).unwrap_err().to_string();
        assert!(failed.starts_with("do it: "), "{failed}");
    }
}
