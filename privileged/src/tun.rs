//! The TUN device and the socket that tells of its state.

use crate::error::{Error, Result, Step};
use crate::netns::Netns;
use crate::offload::{Offload, Offloads};
use crate::sys;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket,
};
use nix::sys::stat::Mode;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use wgsep_ipc::TunOffload;
use wgsep_policy::{Capability, capabilities};

const DEVICE: &str = "/dev/net/tun";
/// Longest interface name, in bytes.
const MAX_NAME_LEN: usize = libc::IFNAMSIZ - 1;
/// Of the interface at its birth: what fits into 1500 with IPv6 outside.
const DEFAULT_MTU: libc::c_int = 1420;
/// Length of the struct virtio_net_hdr before each packet.
const VNET_HDR_LEN: libc::c_int = 10;
/// Of an interface that is about to be moved to where its own name is free.
const NAME_IN_PASSING: &str = "wgsep%d";
const RTMGRP_LINK: u32 = 0x1;
const RTMGRP_IPV4_ROUTE: u32 = 0x40;
const RTMGRP_IPV4_RULE: u32 = 0x80;
const RTMGRP_IPV6_ROUTE: u32 = 0x400;

/// The interface.
pub struct TunDevice {
    /// Its queues, in order.
    pub queues: Vec<OwnedFd>,
    /// Its real name.
    pub name: String,
    /// Its index, in the network namespace it was made in.
    pub ifindex: u32,
    /// What its queues do besides single packets.
    pub offload: TunOffload,
}

/// Checks a name as an operator typed it.
///
/// # Errors
/// If the kernel would refuse it, or it could not be the name of a socket file.
pub fn check_name(name: &str) -> Result<()> {
    let bad = |why: &str| {
        Err(Error::new(format!("bad interface name {name:?}: {why}; choose one such as wg0")))
    };
    if name.is_empty() || name.len() > MAX_NAME_LEN {
        return bad("it must have 1 to 15 bytes");
    }
    if name == "." || name == ".." {
        return bad("it names a directory");
    }
    if let Some(odd) =
        name.chars().find(|c| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':'))
    {
        return bad(&format!("{odd:?} is not allowed"));
    }
    if name.contains('%') && (name.matches('%').count() > 1 || !name.contains("%d")) {
        return bad("the only use of % is one %d, for the first free number");
    }
    Ok(())
}

impl TunDevice {
    /// Creates the interface, which goes when its last queue is closed.
    ///
    /// # Errors
    /// If there is no /dev/net/tun, no permission, or the name is taken.
    pub fn create(name: &str, without: Offloads) -> Result<Self> {
        let queue = open_device()?;
        let vnet_hdr = !without.contains(Offload::VnetHdr);
        let header = if vnet_hdr { libc::IFF_VNET_HDR } else { 0 };
        let flags = libc::IFF_TUN | libc::IFF_NO_PI | header | libc::IFF_TUN_EXCL;
        let name = sys::attach_tun(queue.as_fd(), name, flags).map_err(|errno| match errno {
            nix::Error::EBUSY | nix::Error::EINVAL | nix::Error::EEXIST => name_taken(name),
            nix::Error::EPERM => Error::new(format!(
                "no permission to create interface {name}: CAP_NET_ADMIN is missing; run as root, or: setcap cap_net_admin+ep wgsep"
            )),
            errno => Error::call(&format!("create interface {name}"), errno),
        })?;
        let device = Self::identified(queue, name, vnet_hdr, without)?;
        device.set_mtu()?;
        device.limit_super_packets();
        Ok(device)
    }

    /// Creates the interface in another network namespace. It is made here and moved there: the
    /// descriptor of a device would keep the namespace alive that it was opened in.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_in(netns: &Netns, name: &str, without: Offloads) -> Result<Self> {
        let Self { queues, ifindex, offload, .. } = Self::create(NAME_IN_PASSING, without)?;
        netns.take_in(ifindex, name).map_err(|errno| match errno {
            nix::Error::EEXIST => name_taken(name),
            errno => Error::call(&format!("move interface {name} to its namespace"), errno),
        })?;
        let (name, _) = match queues.first() {
            Some(queue) => sys::tun_identity(queue.as_fd()).step("name of the interface")?,
            None => {
                return Err(Error::new(
                    "the interface has no queue; this is a fault, please report it",
                ));
            }
        };
        let index = || nix::net::if_::if_nametoindex(name.as_str()).step("index of the interface");
        let ifindex = netns.inside(index)?;
        Ok(Self { queues, name, ifindex, offload })
    }

    /// Takes over an interface that somebody else created (WG_TUN_FD).
    ///
    /// # Errors
    /// If the descriptor is no TUN queue.
    pub fn adopt(queue: OwnedFd, without: Offloads) -> Result<Self> {
        let (name, flags) = sys::tun_identity(queue.as_fd())
            .map_err(|errno| Error::call("WG_TUN_FD is not a TUN device", errno))?;
        if flags & libc::IFF_TUN == 0 || flags & libc::IFF_NO_PI == 0 {
            return Err(Error::new(
                "WG_TUN_FD is opened with other flags; open it with IFF_TUN and IFF_NO_PI",
            ));
        }
        nix::fcntl::fcntl(&queue, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK | OFlag::O_RDWR))
            .step("WG_TUN_FD")?;
        Self::identified(queue, name, flags & libc::IFF_VNET_HDR != 0, without)
    }

    fn identified(queue: OwnedFd, name: String, vnet_hdr: bool, without: Offloads) -> Result<Self> {
        let ifindex =
            nix::net::if_::if_nametoindex(name.as_str()).step("index of the interface")?;
        let offload =
            if vnet_hdr { set_offload(queue.as_fd(), without)? } else { TunOffload::default() };
        Ok(Self { queues: vec![queue], name, ifindex, offload })
    }

    fn set_mtu(&self) -> Result<()> {
        let any = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .step("socket to set the MTU")?;
        sys::set_mtu(any.as_fd(), &self.name, DEFAULT_MTU).step("set the MTU")
    }

    /// Has TCP make super-packets that fit into one send of as many datagrams: with the MTU of 1420,
    /// 45 segments of 1452 bytes. Where the kernel refuses, each takes two sends.
    fn limit_super_packets(&self) {
        const MAX_SIZE: u32 = 62_000;
        let _slower = sys::set_gso_max_size(self.ifindex, MAX_SIZE);
    }

    /// What its queues should do and do not, for the log.
    pub fn missing(&self) -> Option<Offload> {
        let TunOffload { vnet_hdr, tso, uso } = self.offload;
        match (vnet_hdr, tso, uso) {
            (false, ..) => Some(Offload::VnetHdr),
            (true, false, _) => Some(Offload::Tso),
            (true, true, false) => Some(Offload::Uso),
            (true, true, true) => None,
        }
    }
}

fn name_taken(name: &str) -> Error {
    Error::new(format!(
        "interface {name} already exists; delete it (ip link delete {name}) or choose another name"
    ))
}

/// Has the kernel exchange super-packets where it can: UDP's since Linux 6.2.
fn set_offload(queue: BorrowedFd<'_>, without: Offloads) -> Result<TunOffload> {
    sys::set_vnet_header_len(queue, VNET_HDR_LEN).step("set the length of virtio_net_hdr")?;
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    let udp = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    let set = |offloads| sys::set_offload(queue, offloads).is_ok();
    let tso = !without.contains(Offload::Tso);
    let uso = tso && !without.contains(Offload::Uso) && set(tcp | udp);
    let tso = uso || (tso && set(tcp));
    // A queue that was handed over may have been set up for more.
    if !tso && !set(0) {
        return Err(Error::new("the TUN device keeps its offloads; hand over another WG_TUN_FD"));
    }
    Ok(TunOffload { vnet_hdr: true, tso, uso })
}

fn open_device() -> Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    open(DEVICE, flags, Mode::empty()).map_err(|errno| match errno {
        nix::Error::ENOENT | nix::Error::ENXIO | nix::Error::ENODEV => Error::new(format!(
            "{DEVICE} is missing; load it: modprobe tun (in a container, pass the device in)"
        )),
        nix::Error::EACCES | nix::Error::EPERM => {
            let missing = if capabilities::has(Capability::CAP_NET_ADMIN) {
                "allow this user to open the device"
            } else {
                "CAP_NET_ADMIN is missing too; run as root"
            };
            Error::new(format!("no permission to open {DEVICE}; {missing}"))
        }
        errno => Error::call(&format!("open {DEVICE}"), errno),
    })
}

/// A netlink socket that hears of link, route and rule changes; true with it if of the interface also
/// after it was moved to another network namespace.
///
/// # Errors
/// If the kernel refuses the socket.
pub fn open_netlink() -> Result<(OwnedFd, bool)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)
        .step("netlink")?;
    let groups = RTMGRP_LINK | RTMGRP_IPV4_ROUTE | RTMGRP_IPV4_RULE | RTMGRP_IPV6_ROUTE;
    bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, groups)).step("subscribe to link changes")?;
    // Refused without CAP_NET_BROADCAST.
    let all_namespaces =
        sys::set_option(netlink.as_fd(), libc::SOL_NETLINK, libc::NETLINK_LISTEN_ALL_NSID, 1);
    Ok((netlink, all_namespaces.is_ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_not_be_interfaces_or_files_are_refused() {
        for good in ["wg0", "a", "abcdefghijklmno", "wg%d", "wg-home.1", "ünï"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "abcdefghijklmnop",
            ".",
            "..",
            "a/b",
            "../x",
            "a b",
            "a\tb",
            "a\nb",
            "a:b",
            "%",
            "%s",
            "%d%d",
            "\0",
        ] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
