//! Events of devices, as the kernel sends them to programs (NETLINK_KOBJECT_UEVENT).

use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sendto, socket,
};

use crate::netns::Netns;

/// Length of a struct nlmsghdr.
const HEADER_LEN: usize = 16;
/// The lowest type that is a message.
const NLMSG_MIN_TYPE: u16 = 0x10;
/// The group of the kernel's events.
const KERNEL: u32 = 1;

/// Who is to send an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// The kernel, asked by a process with CAP_SYS_ADMIN over the namespace.
    Kernel,
    /// This process itself, which takes CAP_NET_ADMIN.
    Process,
}

/// Has a device event sent to every program of a namespace.
///
/// # Panics
///
/// When the kernel refuses it.
#[track_caller]
pub fn send(netns: &Netns, sender: Sender, variables: &[&str]) {
    let path = "/devices/LNXSYSTM:00/LNXSYBUS:00/QEMUVGID:00";
    let mut event = format!("change@{path}\0ACTION=change\0DEVPATH={path}\0SUBSYSTEM=acpi\0");
    for variable in variables {
        event += &format!("{variable}\0");
    }
    let (message, group) = match sender {
        Sender::Kernel => (with_header(event.as_bytes()), 0),
        Sender::Process => (event.into_bytes(), KERNEL),
    };
    let sent = netns.inside(|| {
        let protocol = SockProtocol::NetlinkKObjectUEvent;
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        let to = NetlinkAddr::new(0, group);
        sendto(socket.as_raw_fd(), &message, &to, MsgFlags::empty())
    });
    // A process's own message goes to the kernel too, which refuses it as malformed.
    assert!(sender == Sender::Process || sent == Ok(message.len()), "{sent:?}");
}

fn with_header(event: &[u8]) -> Vec<u8> {
    let mut message = ((HEADER_LEN + event.len()) as u32).to_ne_bytes().to_vec();
    message.extend(NLMSG_MIN_TYPE.to_ne_bytes());
    message.extend((nix::libc::NLM_F_REQUEST as u16).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(event);
    message
}
