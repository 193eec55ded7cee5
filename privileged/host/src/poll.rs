//! Waiting for descriptors.

use crate::error::{Result, Step};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// Waits until one of the descriptors is readable or closed, or the time is over.
///
/// # Errors
/// As ppoll(2).
pub fn poll<const N: usize>(descriptors: [BorrowedFd<'_>; N], wait: Duration) -> Result<[bool; N]> {
    let mut polled = descriptors.map(|descriptor| PollFd::new(descriptor, PollFlags::POLLIN));
    let timeout = (wait < Duration::MAX).then(|| wait.into());
    match ppoll(&mut polled, timeout, None) {
        Ok(_) | Err(Errno::EINTR) => Ok(polled.map(|polled| polled.any().unwrap_or(false))),
        Err(errno) => Err(errno).step("ppoll"),
    }
}
