//! The kernel's network configuration (rtnetlink(7)): one request and its answer, and the socket that
//! reports changes.

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    setsockopt, socket, sockopt,
};
use nix::{setsockopt_impl, sockopt_impl};
use std::os::fd::{AsRawFd, OwnedFd};
use wgsep_monitor::{Result, Step};

/// The attributes of a request: kind and value.
type Attributes<'a> = &'a [(u16, &'a [u8])];

/// Length of the struct nlmsghdr before each message.
const HEADER_LEN: usize = 16;
const NETLINK_GET_STRICT_CHK: libc::c_int = 12;
const RTMGRP_LINK: u32 = 0x1;
const RTMGRP_IPV4_ROUTE: u32 = 0x40;
const RTMGRP_IPV4_RULE: u32 = 0x80;
const RTMGRP_IPV6_ROUTE: u32 = 0x400;
/// Of the socket that reports changes, in bytes; the kernel doubles it. Some 10,000 messages, as a routing
/// daemon causes them when it loads its table.
const RECEIVE_BUFFER: usize = 4 << 20;

sockopt_impl!(
    /// Hears also of every namespace that has a number in the socket's own.
    ListenAllNsid,
    SetOnly,
    libc::SOL_NETLINK,
    libc::NETLINK_LISTEN_ALL_NSID,
    bool
);
sockopt_impl!(
    /// Joins a group whose number is too high for bind(2).
    AddMembership,
    SetOnly,
    libc::SOL_NETLINK,
    libc::NETLINK_ADD_MEMBERSHIP,
    libc::c_uint
);
sockopt_impl!(
    /// Has the kernel list only the routes that were asked for, since Linux 4.20.
    GetStrictCheck,
    SetOnly,
    libc::SOL_NETLINK,
    NETLINK_GET_STRICT_CHK,
    bool
);

/// Changes an interface of this process's network namespace.
///
/// # Errors
/// As the kernel answers.
pub fn set_link(ifindex: u32, attributes: Attributes<'_>) -> nix::Result<()> {
    change_link(ifindex, 0, attributes)
}

/// Clears flags, IFF_*, of an interface of this process's network namespace.
///
/// # Errors
/// As the kernel answers.
pub fn clear_flags(ifindex: u32, flags: i32) -> nix::Result<()> {
    change_link(ifindex, flags.cast_unsigned(), &[])
}

fn change_link(ifindex: u32, cleared: u32, attributes: Attributes<'_>) -> nix::Result<()> {
    // struct ifinfomsg: family and type, index, flags and which of them change.
    let mut link = [0; 16];
    link[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    link[12..].copy_from_slice(&cleared.to_ne_bytes());
    request(libc::RTM_SETLINK, &link, attributes).map(drop)
}

/// The bytes of one attribute, padded; those of several are the value of one that nests them.
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Sends a request, a fixed structure and attributes; returns the answer without its header.
///
/// # Errors
/// As the kernel answers.
pub fn request(kind: u16, fixed: &[u8], attributes: Attributes<'_>) -> nix::Result<Vec<u8>> {
    let mut body = fixed.to_vec();
    for (kind, value) in attributes {
        body.extend(attribute(*kind, value));
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

/// A socket that receives link, route, rule and nexthop changes; true with it if of the interface also
/// after it was moved to another network namespace.
///
/// Its buffer exceeds net.core.rmem_max only with `large_buffers`.
///
/// # Errors
/// If the kernel refuses the socket.
pub fn subscribe(large_buffers: bool) -> Result<(OwnedFd, bool)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)
        .step("netlink")?;
    // Each of these only saves work or losses, which the dataplane can deal with.
    let beyond_limits = || setsockopt(&netlink, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_ok();
    if !(large_buffers && beyond_limits()) {
        let _smaller = setsockopt(&netlink, sockopt::RcvBuf, &RECEIVE_BUFFER);
    }
    let _longer = setsockopt(&netlink, GetStrictCheck, &true);
    let groups = RTMGRP_LINK | RTMGRP_IPV4_ROUTE | RTMGRP_IPV4_RULE | RTMGRP_IPV6_ROUTE;
    bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, groups)).step("subscribe to link changes")?;
    // Kernels before 5.3 have no nexthops of their own.
    let _none = setsockopt(&netlink, AddMembership, &libc::RTNLGRP_NEXTHOP);
    // Refused without CAP_NET_BROADCAST.
    let all_namespaces = setsockopt(&netlink, ListenAllNsid, &true);
    Ok((netlink, all_namespaces.is_ok()))
}
