//! One line for an operator: which step failed, why, and what to do about it.

use core::fmt;

/// A failure that ends the daemon, told in one line.
#[derive(Debug)]
pub struct Error(String);

/// Short for what most steps return.
pub type Result<T> = core::result::Result<T, Error>;

impl Error {
    /// A line that says it all.
    pub fn new(line: impl Into<String>) -> Self {
        Self(line.into())
    }

    /// A system call that failed without a remedy that we know of.
    pub fn call(step: &str, errno: nix::Error) -> Self {
        Self(format!("{step}: {} ({errno:?})", errno.desc()))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for Error {}

impl From<wgsep_policy::Refused> for Error {
    fn from(refused: wgsep_policy::Refused) -> Self {
        Self(refused.to_string())
    }
}

/// Turns a failed system call into an [`Error`] that names its step.
pub(crate) trait Step<T> {
    fn step(self, step: &str) -> Result<T>;
}

impl<T> Step<T> for nix::Result<T> {
    fn step(self, step: &str) -> Result<T> {
        self.map_err(|errno| Error::call(step, errno))
    }
}

impl<T> Step<T> for std::io::Result<T> {
    fn step(self, step: &str) -> Result<T> {
        self.map_err(|error| Error(format!("{step}: {error}")))
    }
}
