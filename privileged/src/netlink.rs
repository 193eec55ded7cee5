//! One request to the kernel's network configuration and its answer (rtnetlink(7)).

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use std::os::fd::AsRawFd;

/// The attributes of a request: kind and value.
type Attributes<'a> = &'a [(u16, &'a [u8])];

/// Length of the struct nlmsghdr before each message.
const HEADER_LEN: usize = 16;

/// Changes an interface of this process's network namespace.
///
/// # Errors
/// As the kernel answers.
pub fn set_link(ifindex: u32, attributes: Attributes<'_>) -> nix::Result<()> {
    // struct ifinfomsg: family and type, index, flags and which of them change.
    let mut link = [0; 16];
    link[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    request(libc::RTM_SETLINK, &link, attributes).map(drop)
}

/// Sends a request, a fixed structure and attributes; returns the answer without its header.
///
/// # Errors
/// As the kernel answers.
pub fn request(kind: u16, fixed: &[u8], attributes: Attributes<'_>) -> nix::Result<Vec<u8>> {
    let mut body = fixed.to_vec();
    for (attribute, value) in attributes {
        body.extend(((4 + value.len()) as u16).to_ne_bytes());
        body.extend(attribute.to_ne_bytes());
        body.extend(*value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    // struct nlmsghdr: length, kind, flags, sequence, sender.
    let mut message = ((HEADER_LEN + body.len()) as u32).to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(((libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);

    let protocol = SockProtocol::NetlinkRoute;
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    send(netlink.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = vec![0; 4096];
    let len = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    answer.truncate(len);
    let is_error = answer.get(4..6) == Some(&(libc::NLMSG_ERROR as u16).to_ne_bytes());
    let body = answer.split_off(HEADER_LEN.min(answer.len()));
    // struct nlmsgerr: minus the errno, or 0.
    match body.first_chunk().map(|errno| i32::from_ne_bytes(*errno)) {
        None => Err(Errno::EPROTO),
        Some(errno) if is_error && errno != 0 => Err(Errno::from_raw(-errno)),
        Some(_) => Ok(body),
    }
}
