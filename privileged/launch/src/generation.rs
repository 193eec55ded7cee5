//! Opening what reports a new generation of this virtual machine.

use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket,
};
use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use wgsep_monitor::{Generation, kernel_log_number};

/// The multicast group of the kernel's own uevents; udev's are in another.
const KERNEL_UEVENTS: u32 = 1;

/// Opens what there is: neither is to be had everywhere, and most machines are never copied.
pub fn watch() -> Generation {
    Generation { uevents: uevents().ok(), kernel_log: kernel_log().ok().flatten() }
}

/// The kernel sends uevents to the network namespaces of the initial user namespace.
fn uevents() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let protocol = SockProtocol::NetlinkKObjectUEvent;
    let uevents = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    bind(uevents.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_UEVENTS))?;
    Ok(uevents)
}

/// Refused without CAP_SYSLOG where kernel.dmesg_restrict is set.
fn kernel_log() -> std::io::Result<Option<OwnedFd>> {
    let mut log =
        OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open("/dev/kmsg")?;
    if log.metadata()?.rdev() != kernel_log_number() {
        return Ok(None);
    }
    log.seek(SeekFrom::End(0))?;
    Ok(Some(log.into()))
}
