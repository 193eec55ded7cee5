//! UDP sockets, marked and bound: one for each address, or each family, all on the same port.

use crate::sys;
use nix::errno::Errno;
use nix::libc::{self, c_int};
use nix::sys::socket::{
    AddressFamily, Shutdown, SockFlag, SockType, SockaddrStorage, bind, setsockopt, shutdown,
    socket, sockopt,
};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use wgsep_ipc::startup::Listen;

/// How often a port that the kernel chose for one family may be taken in the other.
const TRIES: usize = 100;
/// The index of no interface: the kernel counts up from 1.
const NO_INTERFACE: c_int = c_int::MAX;
/// Of sockets that could not be made useless. No system call here returns it.
pub const NOT_SILENCED: Errno = Errno::ENOTRECOVERABLE;
/// In bytes, as every other implementation has it.
const RECEIVE_BUFFER: c_int = 7 << 20;
/// All peers share a socket's send buffer, and what waits for a congested link counts against it: more than
/// a queueing discipline holds by default, or that link would keep the datagrams of all others out. (The
/// kernel's WireGuard is not charged for what waits.)
const SEND_BUFFER: c_int = 64 << 20;

/// For each buffer the option without limits, the one within those of the system, and the length.
const BUFFERS: [(c_int, c_int, c_int); 2] = [
    (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, RECEIVE_BUFFER),
    (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, SEND_BUFFER),
];

/// Level, name and value of the options of each family.
const V4_OPTIONS: [(c_int, c_int, c_int); 3] = [
    (libc::IPPROTO_IP, libc::IP_PKTINFO, 1),
    (libc::IPPROTO_IP, libc::IP_RECVTOS, 1),
    (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_OMIT),
];
const V6_OPTIONS: [(c_int, c_int, c_int); 4] = [
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1),
    (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT),
];

/// How sockets are set up.
#[derive(Clone, Copy, Default)]
pub struct UdpOptions {
    /// Where they listen.
    pub listen: Listen,
    /// Receive datagrams many at a time, where the kernel can.
    pub gro: bool,
    /// Buffers beyond the limits of the system.
    pub large_buffers: bool,
}

/// The open sockets, of which the dataplane has duplicates.
pub struct UdpSockets {
    /// At most one for each family, or for each address.
    pub sockets: Vec<UdpSocket>,
    /// The port bound.
    pub port: u16,
    /// SO_MARK.
    pub mark: u32,
    /// Whether datagrams are received many at a time; without it, they come one by one.
    pub joins: bool,
}

impl UdpSockets {
    /// Has sockets on `port`, 0 for any: those that are held, if they are on it, or new ones beside the
    /// old, which go only once the new ones are there.
    ///
    /// # Errors
    /// EADDRINUSE if the port is taken in either family; ENOSYS if a filter refuses another call than bind(2),
    /// whichever errno it answers.
    pub fn ensure(
        held: &mut Option<Self>,
        port: u16,
        mark: u32,
        options: UdpOptions,
    ) -> nix::Result<&Self> {
        if held.as_ref().is_none_or(|sockets| sockets.port != port) {
            let old = held.replace(Self::open(port, mark, options)?);
            old.map_or(Ok(()), Self::give_up)?;
        }
        let sockets = held.as_mut().ok_or(Errno::EBADF)?;
        sockets.set_mark(mark).map(|()| &*sockets)
    }

    /// Makes duplicates useless: a dataplane that keeps one can neither send nor receive through it, except
    /// for what is in its receive buffer. The port stays bound.
    ///
    /// # Errors
    /// ENOTRECOVERABLE if one continues to receive; never by the dataplane's doing.
    pub fn give_up(self) -> nix::Result<()> {
        for socket in self.descriptors() {
            // It returns ENOTCONN, and sends fail from then on all the same,
            let _not_connected = shutdown(socket.as_raw_fd(), Shutdown::Write);
            // but for a datagram that was begun with MSG_MORE, which is sent here as it is.
            let _without_one = sys::set_option(socket, libc::SOL_UDP, libc::UDP_CORK, 0);
            sys::reject_packets(socket).or_else(|_| receive_from_nowhere(socket))?;
        }
        Ok(())
    }

    fn open(port: u16, mark: u32, options: UdpOptions) -> nix::Result<Self> {
        let mut tries = 0..if port == 0 { TRIES } else { 0 };
        loop {
            match Self::open_once(port, mark, options) {
                Err(Errno::EADDRINUSE) if tries.next().is_some() => {}
                opened => return opened,
            }
        }
    }

    /// Opens one for each address. Of the two families a machine may lack one, not both.
    fn open_once(port: u16, mark: u32, options: UdpOptions) -> nix::Result<Self> {
        let mut opened = Self { sockets: Vec::new(), port, mark, joins: false };
        for address in options.listen.bound() {
            if let Some(socket) = open_socket((address, opened.port).into(), mark, &options)? {
                opened.port = bound_port(&socket)?;
                opened.sockets.push(socket);
            }
        }
        opened.joins = options.gro && opened.descriptors().all(join_datagrams);
        if opened.sockets.is_empty() { Err(Errno::EAFNOSUPPORT) } else { Ok(opened) }
    }

    /// The sockets.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.sockets.iter().map(AsFd::as_fd)
    }

    /// Changes the mark of both, or of none.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub fn set_mark(&mut self, mark: u32) -> nix::Result<()> {
        let set_all = |mark| self.descriptors().try_for_each(|s| set_mark(s, mark));
        if let Err(errno) = set_all(mark) {
            let _restored = set_all(self.mark);
            return Err(errno);
        }
        self.mark = mark;
        Ok(())
    }
}

fn set_mark(socket: BorrowedFd<'_>, mark: u32) -> nix::Result<()> {
    let set = sys::set_option(socket, libc::SOL_SOCKET, libc::SO_MARK, mark.cast_signed());
    // EPERM may also be for lack of CAP_NET_ADMIN where the sockets are.
    set.map_err(|errno| if errno == Errno::EPERM { errno } else { filtered(errno) })
}

/// The errno for a call of which the port is not the cause: what kernels and filters refuse a whole call with, or
/// an option, is also what they refuse a port with.
const fn filtered(errno: Errno) -> Errno {
    match errno {
        Errno::EPERM | Errno::EACCES | Errno::EINVAL | Errno::ENOPROTOOPT => Errno::ENOSYS,
        other => other,
    }
}

/// Binds a socket to an interface that does not exist. Where a filter is not to be had this does the same: it takes no
/// memory, of which net.core.optmem_max, net.core.bpf_jit_limit, the dataplane's messages or other users may leave none.
/// It is second because it can be undone: with CAP_NET_RAW, and by connect(2), which the dataplane's filter forbids.
fn receive_from_nowhere(socket: BorrowedFd<'_>) -> nix::Result<()> {
    sys::set_option(socket, libc::SOL_SOCKET, libc::SO_BINDTOIFINDEX, NO_INTERFACE)
        .map_err(|_| NOT_SILENCED)
}

/// Has a socket receive many datagrams at once; false if the kernel cannot.
fn join_datagrams(socket: BorrowedFd<'_>) -> bool {
    sys::set_option(socket, libc::SOL_UDP, libc::UDP_GRO, 1).is_ok()
}

/// A family that the machine does not have is `None`: not compiled in, or switched off so that not
/// even the wildcard address can be bound.
fn open_socket(
    address: SocketAddr,
    mark: u32,
    &UdpOptions { large_buffers, listen, .. }: &UdpOptions,
) -> nix::Result<Option<UdpSocket>> {
    let (family, options) = match address {
        SocketAddr::V4(_) => (AddressFamily::Inet, &V4_OPTIONS[..]),
        SocketAddr::V6(_) => (AddressFamily::Inet6, &V6_OPTIONS[..]),
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = match socket(family, SockType::Datagram, flags, None) {
        Err(Errno::EAFNOSUPPORT) if address.ip().is_unspecified() => return Ok(None),
        opened => opened.map_err(filtered)?,
    };
    set_mark(socket.as_fd(), mark)?;
    for (beyond_limits, within, len) in BUFFERS {
        let set = |option| sys::set_option(socket.as_fd(), libc::SOL_SOCKET, option, len);
        // Only CAP_NET_ADMIN of the first user namespace may exceed the limits; smaller buffers work too.
        if !(large_buffers && set(beyond_limits).is_ok()) {
            let _smaller = set(within);
        }
    }
    for (level, name, value) in options {
        sys::set_option(socket.as_fd(), *level, *name, *value).map_err(filtered)?;
    }
    if let Some(name) = listen.device() {
        setsockopt(&socket, sockopt::BindToDevice, &name.into()).map_err(filtered)?;
    }
    match bind(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
        Err(Errno::EADDRNOTAVAIL) if address.ip().is_unspecified() => Ok(None),
        bound => bound.map(|()| Some(socket.into())),
    }
}

fn bound_port(socket: &UdpSocket) -> nix::Result<u16> {
    socket.local_addr().map(|address| address.port()).map_err(|_| Errno::ENOSYS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::io::IoSlice;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn options() -> UdpOptions {
        UdpOptions { gro: true, large_buffers: true, listen: Listen::default() }
    }

    /// Of each socket a duplicate, and the loopback address of its family.
    fn keep(sockets: &UdpSockets) -> Vec<(UdpSocket, &'static str)> {
        let kept = sockets.sockets.iter().map(|socket| {
            let is_ipv4 = socket.local_addr().unwrap().is_ipv4();
            (socket.try_clone().unwrap(), if is_ipv4 { "127.0.0.1" } else { "::1" })
        });
        kept.collect()
    }

    #[test]
    fn both_families_share_a_port_and_a_taken_one_is_refused() {
        let sockets = UdpSockets::open(0, 0, options()).unwrap();
        assert_ne!(sockets.port, 0);
        for socket in &sockets.sockets {
            assert_eq!(bound_port(socket), Ok(sockets.port));
        }
        assert_eq!(UdpSockets::open(sockets.port, 0, options()).err(), Some(Errno::EADDRINUSE));
    }

    fn on(addresses: &[&str]) -> UdpOptions {
        let mut listen = Listen::default();
        for (slot, address) in listen.addresses.iter_mut().zip(addresses) {
            *slot = Some(address.parse().unwrap());
        }
        UdpOptions { listen, ..options() }
    }

    #[test]
    fn the_sockets_of_several_addresses_share_a_port_with_others_elsewhere() {
        let here = ["127.0.0.1", "127.0.0.2", "::1"];
        let sockets = UdpSockets::open(0, 0, on(&here)).unwrap();
        let port = sockets.port;
        let bound = sockets.sockets.iter().map(|socket| socket.local_addr().unwrap());
        assert!(bound.eq(here.map(|address| SocketAddr::new(address.parse().unwrap(), port))));
        let elsewhere = UdpSockets::open(port, 0, on(&["127.0.0.3"])).unwrap();
        let taken = UdpSockets::open(port, 0, on(&["127.0.0.4", "127.0.0.3"]));
        assert_eq!(taken.err(), Some(Errno::EADDRINUSE));
        assert_eq!(elsewhere.give_up(), Ok(()));
    }

    #[test]
    fn an_address_that_this_machine_has_not_is_refused_rather_than_left_out() {
        let opened = UdpSockets::open(0, 0, on(&["127.0.0.1", "192.0.2.1"]));
        assert_eq!(opened.err(), Some(Errno::EADDRNOTAVAIL));
    }

    #[test]
    fn sockets_of_one_interface_are_given_up_as_the_others_are() {
        let mut one = on(&["127.0.0.1"]);
        one.listen.device[..2].copy_from_slice(b"lo");
        let sockets = UdpSockets::open(0, 0, one).unwrap();
        let (kept, port) = (keep(&sockets).remove(0).0, sockets.port);
        assert_eq!(sockets.give_up(), Ok(()));
        let other = UdpSocket::bind("127.0.0.1:0").unwrap();
        other.send_to(b"in", ("127.0.0.1", port)).unwrap();
        assert_eq!(kept.recv(&mut [0; 9]).unwrap_err().raw_os_error(), Some(libc::EAGAIN));
        one.listen.device[..8].copy_from_slice(b"nowhere0");
        assert_eq!(UdpSockets::open(0, 0, one).err(), Some(Errno::ENODEV));
    }

    #[test]
    fn a_kept_duplicate_of_what_was_given_up_neither_sends_nor_receives() {
        let sockets = UdpSockets::open(0, 0, options()).unwrap();
        let kept = keep(&sockets);
        assert!(!kept.is_empty());
        for (kept, host) in &kept {
            let other = UdpSocket::bind((*host, 0)).unwrap();
            kept.send_to(b"out", other.local_addr().unwrap()).unwrap();
            other.send_to(b"in", (*host, sockets.port)).unwrap();
            assert_eq!(kept.recv(&mut [0; 9]).unwrap(), 2);
        }
        let port = sockets.port;
        let sinks = ["127.0.0.1:0", "[::1]:0"].map(|address| UdpSocket::bind(address).ok());
        let send_more = |from: &UdpSocket, flags| {
            let is_v6 = from.local_addr().unwrap().is_ipv6();
            let sink = sinks[usize::from(is_v6)].as_ref().unwrap();
            let to = SockaddrStorage::from(sink.local_addr().unwrap());
            sendmsg(from.as_raw_fd(), &[IoSlice::new(b"more")], &[], flags, Some(&to))
        };
        for (kept, _) in &kept {
            assert_eq!(
                send_more(kept, MsgFlags::from_bits_retain(libc::MSG_MORE)),
                Ok(4),
                "a datagram is begun"
            );
        }
        assert_eq!(sockets.give_up(), Ok(()));
        for (kept, host) in &kept {
            assert_eq!(send_more(kept, MsgFlags::MSG_NOSIGNAL), Err(Errno::EPIPE));
            let other = UdpSocket::bind((*host, 0)).unwrap();
            let sent = kept.send_to(b"out", other.local_addr().unwrap());
            assert_eq!(sent.unwrap_err().raw_os_error(), Some(Errno::EPIPE as i32));
            other.send_to(b"in", (*host, port)).unwrap();
            let received = kept.recv(&mut [0; 9]);
            assert_eq!(received.unwrap_err().raw_os_error(), Some(Errno::EAGAIN as i32));
        }
    }

    #[test]
    fn the_same_port_keeps_its_sockets_and_a_failure_keeps_the_old_ones() {
        let mut held = None;
        let port = UdpSockets::ensure(&mut held, 0, 0, options()).unwrap().port;
        let taken = UdpSocket::bind("0.0.0.0:0").unwrap();
        let taken_port = taken.local_addr().unwrap().port();
        let refused = UdpSockets::ensure(&mut held, taken_port, 7, options());
        assert_eq!(refused.err(), Some(Errno::EADDRINUSE));
        assert_eq!(held.as_ref().map(|sockets| (sockets.port, sockets.mark)), Some((port, 0)));
        assert_eq!(UdpSockets::ensure(&mut held, port, 7, options()).unwrap().mark, 7);
        assert_ne!(UdpSockets::ensure(&mut held, 0, 7, options()).unwrap().port, port);
    }

    /// Control messages and filters share a socket's memory for options (net.core.optmem_max).
    #[test]
    fn what_is_given_up_receives_no_more_however_its_memory_for_options_is_used() {
        for _ in 0..20 {
            let sockets = UdpSockets::open(0, 0, options()).unwrap();
            let (kept, _) = keep(&sockets).remove(0);
            let (port, ended) = (sockets.port, AtomicBool::new(false));
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let to =
                        SockaddrStorage::from(SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, 9)));
                    let descriptors = vec![0; 30_000];
                    while !ended.load(Ordering::Relaxed) {
                        let control = [ControlMessage::ScmRights(&descriptors)];
                        let bytes = [IoSlice::new(&[0; 60_000])];
                        let flags = MsgFlags::MSG_NOSIGNAL;
                        let _refused =
                            sendmsg(kept.as_raw_fd(), &bytes, &control, flags, Some(&to));
                    }
                });
                let silenced = sockets.give_up();
                ended.store(true, Ordering::Relaxed);
                assert_eq!(silenced, Ok(()));
                let other = UdpSocket::bind("127.0.0.1:0").unwrap();
                other.send_to(b"in", ("127.0.0.1", port)).unwrap();
                assert!(kept.recv(&mut [0; 9]).is_err(), "it receives");
            });
        }
    }

    /// As where limits of the host leave no memory for one; here because it is locked.
    #[test]
    fn what_is_given_up_receives_no_more_though_the_kernel_refuses_a_filter() {
        let sockets = UdpSockets::open(0, 0, options()).unwrap();
        for socket in sockets.descriptors() {
            sys::set_option(socket, libc::SOL_SOCKET, libc::SO_LOCK_FILTER, 1).unwrap();
            assert_eq!(sys::reject_packets(socket), Err(Errno::EPERM));
        }
        let kept = keep(&sockets);
        let port = sockets.port;
        assert_eq!(sockets.give_up(), Ok(()));
        let opened = UdpSockets::open(port, 0, options()).err();
        assert_eq!(opened, Some(Errno::EADDRINUSE), "the port stays bound");
        for (kept, host) in &kept {
            let other = UdpSocket::bind((*host, 0)).unwrap();
            other.send_to(b"in", (*host, port)).unwrap();
            let received = kept.recv(&mut [0; 9]);
            assert_eq!(received.unwrap_err().raw_os_error(), Some(Errno::EAGAIN as i32));
        }
    }
}
