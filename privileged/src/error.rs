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

    /// A system call that failed, with what helps against its reason.
    pub fn call(step: &str, errno: nix::Error) -> Self {
        Self(format!("{step}: {} ({errno:?}); {}", errno.desc(), remedy(errno)))
    }
}

/// What to do about a refusal of the kernel.
const fn remedy(errno: nix::Error) -> &'static str {
    use nix::Error;
    match errno {
        Error::EPERM | Error::EACCES => {
            "run as root, and where a container or unit filters system calls, allow it"
        }
        Error::ENOMEM | Error::ENOBUFS | Error::EMFILE | Error::ENFILE | Error::EAGAIN => {
            "free some memory or descriptors, or raise the limits it was started with"
        }
        Error::ENOSYS | Error::EINVAL | Error::EOPNOTSUPP | Error::ENOPROTOOPT => {
            "the kernel may be too old or lack it: try a newer one"
        }
        _ => "if nothing explains it, please report it",
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
        self.map_err(|error| match error.raw_os_error() {
            Some(errno) => Error::call(step, nix::Error::from_raw(errno)),
            None => Error(format!("{step}: {error}; please report it")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_failed_has_a_reason_and_a_remedy() {
        for (errno, remedy) in [
            (nix::Error::EPERM, "run as root"),
            (nix::Error::EMFILE, "raise the limits"),
            (nix::Error::ENOSYS, "newer"),
            (nix::Error::EIO, "report it"),
        ] {
            let failed = Err::<(), _>(errno).step("do it").unwrap_err().to_string();
            assert!(failed.starts_with("do it: ") && failed.contains(&format!("({errno:?}); ")));
            assert!(failed.contains(remedy), "{failed}");
            let by_std = std::io::Error::from_raw_os_error(errno as i32);
            assert_eq!(Err::<(), _>(by_std).step("do it").unwrap_err().to_string(), failed);
        }
    }
}
