//! A TUN device of Linux.

mod sys;

use std::fs::File;
use std::io::{self, Read, Write};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A TUN device, removed with its descriptor.
pub struct Tun(AsyncFd<File>);

impl Tun {
    /// Creates an interface, which takes CAP_NET_ADMIN.
    pub fn create(name: &str) -> io::Result<Self> {
        sys::create(name).map(Self)
    }

    /// Reads the next packet that the system sends.
    pub async fn read(&self, packet: &mut [u8]) -> io::Result<usize> {
        self.0.async_io(Interest::READABLE, |mut file| file.read(packet)).await
    }

    /// Hands a packet to the system. One that it refuses is lost, as is each that comes while the interface is down.
    pub fn write(&self, packet: &[u8]) -> io::Result<()> {
        match self.0.get_ref().write(packet) {
            // The interface is gone.
            Err(error) if error.raw_os_error() == Some(nix::libc::EBADFD) => Err(error),
            _ => Ok(()),
        }
    }
}
