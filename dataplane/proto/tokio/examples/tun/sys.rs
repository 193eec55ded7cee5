//! How a TUN device is opened.

use nix::libc::{IFF_NO_PI, IFF_TUN, IFNAMSIZ, O_NONBLOCK, TUNSETIFF, c_short};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use tokio::io::unix::AsyncFd;

/// What `struct ifreq` has for TUNSETIFF, at its full size.
#[repr(C)]
struct Request {
    name: [u8; IFNAMSIZ],
    flags: c_short,
    rest: [u8; 22],
}

nix::ioctl_write_ptr_bad!(tunsetiff, TUNSETIFF, Request);

/// Creates an interface of this name.
pub fn create(name: &str) -> io::Result<AsyncFd<File>> {
    let flags = (IFF_TUN | IFF_NO_PI) as c_short;
    let mut request = Request { name: [0; IFNAMSIZ], flags, rest: [0; 22] };
    // The last byte stays zero.
    if name.len() >= IFNAMSIZ {
        let what = "the name of an interface has up to 15 bytes";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).custom_flags(O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: the descriptor is open, and the request is as long as the kernel's `struct ifreq`, which it reads and
    // writes within this call.
    unsafe { tunsetiff(file.as_raw_fd(), &raw const request) }?;
    // SAFETY: the file has this descriptor until it is dropped, and it is not replaced.
    Ok(unsafe { AsyncFd::register(file) }?)
}
