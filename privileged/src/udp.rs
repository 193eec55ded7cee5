//! UDP sockets, marked and bound: one for each family, both on the same port.

use crate::sys;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, SockaddrStorage,
    bind, getsockname, socket,
};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// How often a port that the kernel chose for one family may be taken in the other.
const TRIES: usize = 100;
/// Of both buffers, in bytes, as every other implementation has it.
const BUFFER: libc::c_int = 7 << 20;

/// The open sockets, of which the dataplane has duplicates.
pub struct UdpSockets {
    v4: Option<OwnedFd>,
    v6: Option<OwnedFd>,
    /// The port bound.
    pub port: u16,
    /// The mark set.
    pub mark: u32,
    /// Whether datagrams are received many at a time; without it, they come one by one.
    pub joins: bool,
}

impl UdpSockets {
    /// Opens both families on one port, 0 for any. A machine may lack one family, not both.
    ///
    /// # Errors
    /// EADDRINUSE if the port is taken in either family.
    pub fn open(port: u16, mark: u32, gro: bool) -> nix::Result<Self> {
        let mut tries = 0;
        loop {
            tries += 1;
            match Self::open_once(port, mark, gro) {
                Err(nix::Error::EADDRINUSE) if port == 0 && tries < TRIES => {}
                opened => return opened,
            }
        }
    }

    fn open_once(port: u16, mark: u32, gro: bool) -> nix::Result<Self> {
        let v4 = missing_family(open_v4(port, mark))?;
        let port = match &v4 {
            Some(socket) => bound_port(socket.as_fd())?,
            None => port,
        };
        let v6 = missing_family(open_v6(port, mark))?;
        let port = match (&v4, &v6) {
            (None, None) => return Err(nix::Error::EAFNOSUPPORT),
            (None, Some(socket)) => bound_port(socket.as_fd())?,
            (Some(_), _) => port,
        };
        let mut sockets = Self { v4, v6, port, mark, joins: false };
        sockets.joins = gro && sockets.families().into_iter().flatten().all(join_datagrams);
        Ok(sockets)
    }

    /// Those there are, in the order IPv4, IPv6.
    pub fn families(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [self.v4.as_ref().map(AsFd::as_fd), self.v6.as_ref().map(AsFd::as_fd)]
    }

    /// Changes the mark of both, or of none.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub fn set_mark(&mut self, mark: u32) -> nix::Result<()> {
        let set_all =
            |mark| self.families().into_iter().flatten().try_for_each(|s| set_mark(s, mark));
        if let Err(errno) = set_all(mark) {
            let _restored = set_all(self.mark);
            return Err(errno);
        }
        self.mark = mark;
        Ok(())
    }
}

/// A family that the machine does not have is `None`: not compiled in, or switched off so that not
/// even the wildcard address can be bound.
fn missing_family(opened: nix::Result<OwnedFd>) -> nix::Result<Option<OwnedFd>> {
    match opened {
        Ok(socket) => Ok(Some(socket)),
        Err(nix::Error::EAFNOSUPPORT | nix::Error::EADDRNOTAVAIL) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn set_mark(socket: BorrowedFd<'_>, mark: u32) -> nix::Result<()> {
    sys::set_option(socket, libc::SOL_SOCKET, libc::SO_MARK, mark.cast_signed())
}

/// Has a socket receive many datagrams at once; false if the kernel cannot.
fn join_datagrams(socket: BorrowedFd<'_>) -> bool {
    sys::set_option(socket, libc::SOL_UDP, libc::UDP_GRO, 1).is_ok()
}

fn open_socket(family: AddressFamily, mark: u32) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Datagram, flags, None)?;
    set_mark(socket.as_fd(), mark)?;
    for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
        // Only CAP_NET_ADMIN of the first user namespace may; smaller buffers work too.
        let _refused = sys::set_option(socket.as_fd(), libc::SOL_SOCKET, option, BUFFER);
    }
    Ok(socket)
}

fn open_v4(port: u16, mark: u32) -> nix::Result<OwnedFd> {
    let socket = open_socket(AddressFamily::Inet, mark)?;
    let set = |name, value| sys::set_option(socket.as_fd(), libc::IPPROTO_IP, name, value);
    set(libc::IP_PKTINFO, 1)?;
    set(libc::IP_RECVTOS, 1)?;
    set(libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)?;
    bind(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port)))?;
    Ok(socket)
}

fn open_v6(port: u16, mark: u32) -> nix::Result<OwnedFd> {
    let socket = open_socket(AddressFamily::Inet6, mark)?;
    let set = |name, value| sys::set_option(socket.as_fd(), libc::IPPROTO_IPV6, name, value);
    set(libc::IPV6_V6ONLY, 1)?;
    set(libc::IPV6_RECVPKTINFO, 1)?;
    set(libc::IPV6_RECVTCLASS, 1)?;
    set(libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)?;
    let any = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0);
    bind(socket.as_raw_fd(), &SockaddrIn6::from(any))?;
    Ok(socket)
}

fn bound_port(socket: BorrowedFd<'_>) -> nix::Result<u16> {
    let address: SockaddrStorage = getsockname(socket.as_raw_fd())?;
    match address.family() {
        Some(AddressFamily::Inet) => address.as_sockaddr_in().map(SockaddrIn::port),
        _ => address.as_sockaddr_in6().map(SockaddrIn6::port),
    }
    .ok_or(nix::Error::EAFNOSUPPORT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_share_a_port_and_a_taken_one_is_refused() {
        let sockets = UdpSockets::open(0, 0, true).unwrap();
        assert_ne!(sockets.port, 0);
        for socket in sockets.families().into_iter().flatten() {
            assert_eq!(bound_port(socket), Ok(sockets.port));
        }
        assert_eq!(UdpSockets::open(sockets.port, 0, true).err(), Some(nix::Error::EADDRINUSE));
    }
}
