//! A TUN device that exchanges super-packets.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::libc;

nix::ioctl_write_ptr_bad!(
    /// Attaches a descriptor to an interface, which this makes.
    attach,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);
nix::ioctl_write_int_bad!(
    /// Says which super-packets the reader can split.
    set_offload,
    nix::request_code_write!(b'T', 208, size_of::<libc::c_uint>())
);

/// Makes the interface; reads and writes of the descriptor do not wait.
///
/// # Errors
/// As open(2) and ioctl(2); the kernel must know UDP super-packets, as it does since 6.2.
pub(super) fn open(name: &str) -> io::Result<File> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: an all-zero ifreq is valid: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    let room = &mut request.ifr_name[..libc::IFNAMSIZ - 1];
    for (place, byte) in room.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: the request is live, and TUNSETIFF reads an ifreq.
    unsafe { attach(device.as_raw_fd(), &raw const request) }?;
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    let all = tcp | libc::TUN_F_USO4 | libc::TUN_F_USO6;
    // SAFETY: TUNSETOFFLOAD takes a number, no pointer.
    unsafe { set_offload(device.as_raw_fd(), all.cast_signed()) }?;
    Ok(device)
}
