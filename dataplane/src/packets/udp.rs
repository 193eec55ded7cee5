//! The UDP sockets, as the helper opened them, and stage 5 of the way out: datagrams are sent, many at once.

use crate::drops::{Cause, Drops, LocalCause};
use crate::packets::gso::{Gso, can_retry_unsegmented};
use crate::sys;
use nix::libc;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock, Weak};
use wgsep_proto::invariant::part;
use wgsep_proto::path::outbound::{SealedDatagram, SealedRun};
use wgsep_proto::session::peer::{Peer, is_link_local};
use wgsep_proto::{DropCause, Endpoint, Instant, Source};

/// Most segments that one UDP_SEGMENT send takes on every kernel that has it.
pub(crate) const MAX_SEGMENTS: usize = 64;
/// Most bytes that one send takes: what fits into an IPv4 datagram.
pub(crate) const MAX_SEND: usize = 65_507;

/// Contiguous datagrams that are sent at once.
struct Datagrams<'a> {
    payload: &'a [u8],
    /// Length of each datagram but the last, which may be shorter.
    segment_len: usize,
    /// Of the outer header.
    traffic_class: u8,
}

/// A socket, and the address it is bound to.
pub(crate) struct BoundSocket {
    pub(crate) socket: OwnedFd,
    pub(crate) address: IpAddr,
}

/// For destinations the address of one of several sockets that the route to it gives as source.
#[derive(Default)]
pub(crate) struct RouteSources(RwLock<HashMap<SocketAddr, IpAddr>>);

impl RouteSources {
    pub(crate) fn of(&self, destination: SocketAddr) -> Option<IpAddr> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&destination).copied()
    }

    /// Stores the source, or removes it.
    pub(crate) fn set(&self, destination: SocketAddr, source: Option<IpAddr>) {
        let mut sources = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match source {
            Some(source) => sources.insert(destination, source),
            None => sources.remove(&destination),
        };
    }

    /// Removes those of other destinations.
    pub(crate) fn retain(&self, keep: impl Fn(&SocketAddr) -> bool) {
        let mut sources = self.0.write().unwrap_or_else(PoisonError::into_inner);
        sources.retain(|destination, _| keep(destination));
    }
}

/// The sockets: one of each family, either of which a machine may lack, or those of the addresses to listen on.
#[derive(Default)]
pub(crate) struct UdpSockets {
    bound: Vec<BoundSocket>,
    gso: Arc<Gso>,
    sources: Arc<RouteSources>,
    /// Dropped after all are closed, because fields are dropped in this order. The count of an `Arc` of the
    /// whole would reach zero a moment earlier, while the port is still in use.
    open: Arc<()>,
}

/// True if the error may be due to the source address. One that is not ours is EINVAL, over IPv4 on
/// newer kernels ENETUNREACH; a link-local one whose interface is gone is ENODEV.
fn may_be_the_source(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENETUNREACH | libc::ENODEV))
}

/// The drop cause of a failed send. A packet filter's refusal is EPERM (kernel ip_output.c).
pub(crate) fn cause_of(error: &io::Error) -> Cause {
    match error.raw_os_error() {
        // EACCES: a route that prohibits it, or a broadcast address. EINVAL: a route of type blackhole, once
        // no cached source and no segmentation can be the reason. EADDRNOTAVAIL: no address of the family. ENODEV: the
        // interface that the socket is bound to is gone.
        Some(
            libc::ENETUNREACH
            | libc::EHOSTUNREACH
            | libc::EACCES
            | libc::EINVAL
            | libc::EADDRNOTAVAIL
            | libc::ENODEV,
        ) => LocalCause::SendNoRoute.into(),
        Some(libc::EPERM) => LocalCause::SendForbidden.into(),
        Some(libc::EMSGSIZE) => DropCause::TooLong.into(),
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => LocalCause::SendNoBuffer.into(),
        _ => LocalCause::SendFailed.into(),
    }
}

/// Whether the cached source of an endpoint was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SourceOutcome {
    /// It was used, or there was none.
    Kept,
    /// The address is no longer ours: the datagram was sent without it.
    Refused,
}

impl SourceOutcome {
    fn apply(self, peer: &Peer) {
        if self == Self::Refused {
            peer.clear_source();
        }
    }
}

impl UdpSockets {
    /// Takes the sockets, the state of segmentation offload, and by which of several sockets which destination is reached.
    pub(crate) fn new(bound: Vec<BoundSocket>, gso: Arc<Gso>, sources: Arc<RouteSources>) -> Self {
        Self { bound, gso, sources, open: Arc::default() }
    }

    /// A weak reference that is dead once all sockets are closed.
    pub(crate) fn until_closed(&self) -> Weak<()> {
        Arc::downgrade(&self.open)
    }

    /// All of them.
    pub(crate) fn bound(&self) -> &[BoundSocket] {
        &self.bound
    }

    /// Whether there is one of IPv4, and one of IPv6.
    pub(crate) fn families(&self) -> [bool; 2] {
        [true, false].map(|v4| self.bound.iter().any(|one| one.address.is_ipv4() == v4))
    }

    /// Those of the family of an address.
    fn of_family(&self, address: &SocketAddr) -> impl Iterator<Item = &BoundSocket> {
        let is_ipv4 = address.is_ipv4();
        self.bound.iter().filter(move |one| one.address.is_ipv4() == is_ipv4)
    }

    /// The socket that is bound to the endpoint's cached source, else to the one that the route gives, else the first of
    /// the family.
    fn towards(&self, endpoint: &Endpoint) -> Option<&BoundSocket> {
        let mut of_family = self.of_family(&endpoint.destination);
        let (first, mut others) = (of_family.next()?, of_family.peekable());
        if others.peek().is_none() {
            return Some(first);
        }
        let source = endpoint.source.map(|source| source.address);
        let source = source.or_else(|| self.sources.of(endpoint.destination));
        let is_source = |one: &&BoundSocket| Some(one.address) == source;
        let chosen =
            if is_source(&first) { first } else { others.find(is_source).unwrap_or(first) };
        Some(chosen)
    }

    /// Stage 5: sends the datagrams of a run, which lie in `memory`, those that can be segments of one send together.
    /// Counts what was sent, and what was not.
    pub(crate) fn send_run(
        &self,
        run: &SealedRun<'_>,
        memory: &[u8],
        drops: Drops<'_>,
        now: Instant,
    ) {
        let &SealedRun { peer, endpoint, datagrams: mut rest } = run;
        let (mut sent, mut count) = (0, 0);
        while let [first, ..] = rest {
            let (group, others) = rest.split_at(segments(rest));
            rest = others;
            let end = group.last().map_or(first.bytes.end, |last| last.bytes.end);
            let datagrams = Datagrams {
                payload: part(memory, first.bytes.start..end),
                segment_len: first.bytes.len(),
                traffic_class: first.ecn.encapsulated().bits(),
            };
            let (bytes, packets) = self.send(peer, endpoint, &datagrams, drops, now);
            (sent, count) = (sent + bytes, count + packets);
        }
        if sent > 0 {
            peer.add_tx(sent as u64, count as u64);
        }
    }

    /// Sends datagrams to a peer. Returns the bytes sent, and in how many datagrams; counts those that were not.
    fn send(
        &self,
        peer: &Peer,
        endpoint: &Endpoint,
        datagrams: &Datagrams<'_>,
        drops: Drops<'_>,
        now: Instant,
    ) -> (usize, usize) {
        let &Datagrams { payload, segment_len, traffic_class } = datagrams;
        let mut refusal = None;
        if payload.len() > segment_len && self.gso.is_worth_trying(peer, endpoint, segment_len, now)
        {
            let segment = u16::try_from(segment_len).ok();
            match self.send_from_cached_source(endpoint, traffic_class, payload, segment) {
                Ok(source) => {
                    source.apply(peer);
                    self.gso.accepted(peer, endpoint, segment_len, now);
                    return (payload.len(), payload.len().div_ceil(segment_len));
                }
                Err(error) if can_retry_unsegmented(&error) => refusal = Some(error),
                Err(error) => {
                    drops.add(cause_of(&error), payload.len().div_ceil(segment_len));
                    return (0, 0);
                }
            }
        }
        let (mut sent, mut count) = (0, 0);
        for datagram in payload.chunks(segment_len.max(1)) {
            match self.send_from_cached_source(endpoint, traffic_class, datagram, None) {
                Ok(source) => {
                    source.apply(peer);
                    (sent, count) = (sent + datagram.len(), count + 1);
                }
                Err(error) => drops.add(cause_of(&error), 1),
            }
        }
        // If every single datagram failed too, the failure was not due to segmentation.
        if let Some(error) = refusal.filter(|_| sent > 0) {
            self.gso.refused(peer, endpoint, segment_len, &error, now);
        }
        (sent, count)
    }

    /// Sends from the cached source; if that address is no longer ours, lets the route choose one, and by whichever of
    /// several sockets the kernel takes it.
    pub(crate) fn send_from_cached_source(
        &self,
        endpoint: &Endpoint,
        traffic_class: u8,
        payload: &[u8],
        segment: Option<u16>,
    ) -> io::Result<SourceOutcome> {
        let send = |endpoint: &Endpoint, by: Option<&BoundSocket>| {
            // As where the family is missing.
            let socket = by.ok_or(io::Error::from_raw_os_error(libc::ENETUNREACH))?;
            send_by(socket, endpoint, traffic_class, payload, segment)
        };
        let first = self.towards(endpoint);
        let (mut result, mut outcome) = (send(endpoint, first), SourceOutcome::Kept);
        let anywhere = Endpoint { source: None, ..*endpoint };
        if endpoint.source.is_some() && result.as_ref().is_err_and(may_be_the_source) {
            outcome = SourceOutcome::Refused;
            result = send(&anywhere, self.towards(&anywhere));
        }
        for other in self.of_family(&endpoint.destination) {
            if !result.as_ref().is_err_and(may_be_the_source) {
                break;
            }
            if first.is_none_or(|first| first.address != other.address) {
                result = send(&anywhere, Some(other)).or(result);
            }
        }
        result.map(|()| outcome)
    }
}

/// Sends once. A socket that is bound to an address sends from it only while it is ours, which of IPv6 the kernel checks
/// only if the address is given with the datagram.
fn send_by(
    socket: &BoundSocket,
    endpoint: &Endpoint,
    traffic_class: u8,
    payload: &[u8],
    segment: Option<u16>,
) -> io::Result<()> {
    let is_checked = match socket.address {
        IpAddr::V4(_) => true,
        IpAddr::V6(address) => address.is_unspecified() || is_link_local(&address),
    };
    let own = (!is_checked).then_some(Source { address: socket.address, interface: 0 });
    let endpoint = Endpoint { source: endpoint.source.or(own), ..*endpoint };
    sys::send(socket.socket.as_fd(), &endpoint, traffic_class, payload, segment)
}

/// Number of datagrams at the front that can be segments of one send: equal in length and class, the last
/// may be shorter.
fn segments(datagrams: &[SealedDatagram]) -> usize {
    let Some(first) = datagrams.first() else { return 0 };
    let (mut count, mut total, mut previous) = (0, 0, first.bytes.len());
    for datagram in datagrams.iter().take(MAX_SEGMENTS) {
        let len = datagram.bytes.len();
        let fits = previous == first.bytes.len()
            && len <= previous
            && datagram.ecn == first.ecn
            && total + len <= MAX_SEND;
        if !fits && count > 0 {
            break;
        }
        count += 1;
        total += len;
        previous = len;
    }
    count
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::drops::of_protocol;
    use crate::random::KernelRandom;
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrIn, bind, setsockopt, socket, sockopt,
    };
    use std::net::UdpSocket;
    use std::os::fd::AsRawFd;
    use std::sync::atomic::Ordering;
    use wgsep_proto::device::control_plane::ControlPlane;
    use wgsep_proto::{AllowedIp, AllowedIpChange, Configuration, PeerConfiguration, PublicKey};

    #[test]
    fn a_place_that_takes_nothing_does_not_end_sending_many_at_once() {
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let sockets = UdpSockets::new(vec![bound(sender)], gso(), Arc::default());
        let (device, peer) = device_and_peer();
        let nowhere = Endpoint::new(([127, 0, 0, 1], 0).into());
        let send = |to: &Endpoint| {
            let datagrams = Datagrams { payload: &[7; 128], segment_len: 64, traffic_class: 0 };
            sockets.send(
                &peer,
                to,
                &datagrams,
                of_protocol(&device.data_path().drops),
                Instant::from_nanos(1),
            )
        };
        assert_eq!(send(&nowhere), (0, 0));
        assert_eq!(peer.path_cache().load(Ordering::Relaxed), 0);
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        let somewhere = Endpoint::new(receiver.local_addr().unwrap());
        assert_eq!(send(&somewhere), (128, 2));
        assert_eq!(receiver.recv(&mut [0; 128]).unwrap(), 64);
    }

    #[test]
    fn a_route_that_drops_or_refuses_counts_as_none() {
        for errno in
            [libc::EINVAL, libc::EACCES, libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EADDRNOTAVAIL]
        {
            assert_eq!(
                cause_of(&io::Error::from_raw_os_error(errno)),
                LocalCause::SendNoRoute.into()
            );
        }
    }

    fn gso() -> Arc<Gso> {
        Arc::new(Gso::new(true))
    }

    fn bound(socket: UdpSocket) -> BoundSocket {
        let address = socket.local_addr().unwrap().ip();
        BoundSocket { socket: socket.into(), address }
    }

    #[test]
    fn a_datagram_leaves_by_the_socket_of_its_source_or_the_first_of_the_family() {
        let addresses = ["127.0.0.1", "127.0.0.2", "::1"];
        let sockets = addresses.map(|address| bound(UdpSocket::bind((address, 0)).unwrap()));
        let sockets = UdpSockets::new(sockets.into(), gso(), Arc::default());
        assert_eq!(sockets.families(), [true, true]);
        for (receiver, source, sender) in [
            ("127.0.0.9", None, "127.0.0.1"),
            ("127.0.0.9", Some("127.0.0.1"), "127.0.0.1"),
            ("127.0.0.9", Some("127.0.0.2"), "127.0.0.2"),
            ("::1", None, "::1"),
        ] {
            let receiver = UdpSocket::bind((receiver, 0)).unwrap();
            let mut endpoint = Endpoint::new(receiver.local_addr().unwrap());
            let source = source.map(|source| source.parse().unwrap());
            endpoint.source = source.map(|address| Source { address, interface: 0 });
            sockets.send_from_cached_source(&endpoint, 0, b"x", None).unwrap();
            let (_, from) = receiver.recv_from(&mut [0; 1]).unwrap();
            assert_eq!(from.ip().to_string(), sender);
        }
    }

    #[test]
    fn a_datagram_leaves_by_the_socket_that_the_route_gives_and_by_another_where_the_kernel_refuses_it()
     {
        let sources = Arc::<RouteSources>::default();
        let sockets =
            ["127.0.0.1", "127.0.0.2"].map(|address| UdpSocket::bind((address, 0)).unwrap());
        let [first, second] = sockets.map(bound);
        let sockets = vec![bound_to_absent(), first, second];
        let sockets = UdpSockets::new(sockets, gso(), Arc::clone(&sources));
        let receiver = UdpSocket::bind("127.0.0.9:0").unwrap();
        let mut endpoint = Endpoint::new(receiver.local_addr().unwrap());
        let send = |endpoint: &Endpoint| {
            let outcome = sockets.send_from_cached_source(endpoint, 0, b"x", None).unwrap();
            (receiver.recv_from(&mut [0; 1]).unwrap().1.ip().to_string(), outcome)
        };
        assert_eq!(send(&endpoint), ("127.0.0.1".to_owned(), SourceOutcome::Kept));
        sources.set(endpoint.destination, Some([127, 0, 0, 2].into()));
        assert_eq!(send(&endpoint), ("127.0.0.2".to_owned(), SourceOutcome::Kept));
        endpoint.source = Some(Source { address: [192, 0, 2, 1].into(), interface: 0 });
        assert_eq!(send(&endpoint), ("127.0.0.2".to_owned(), SourceOutcome::Refused));
        sources.set(endpoint.destination, None);
        assert_eq!(send(&endpoint), ("127.0.0.1".to_owned(), SourceOutcome::Refused));
    }

    /// A socket that is bound to an address that is not ours, from which the kernel refuses to send.
    fn bound_to_absent() -> BoundSocket {
        let socket =
            socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).unwrap();
        setsockopt(&socket, sockopt::IpFreebind, &true).unwrap();
        bind(socket.as_raw_fd(), &SockaddrIn::new(192, 0, 2, 1, 0)).unwrap();
        bound(socket.into())
    }

    /// A device with one peer, to which everything goes.
    pub(crate) fn device_and_peer() -> (ControlPlane, Arc<Peer>) {
        let mut peer = PeerConfiguration::new(PublicKey::from_bytes([9; 32]));
        let allowed_ip = AllowedIp::new([0, 0, 0, 0].into(), 0).unwrap();
        peer.endpoint = Some(([127, 0, 0, 1], 7).into());
        peer.allowed_ips.push(AllowedIpChange { allowed_ip, remove: false });
        let mut device = ControlPlane::new(Box::new(KernelRandom));
        device.configure(Configuration { peers: vec![peer], ..Configuration::default() });
        let data_path = Arc::clone(device.data_path());
        let mut allowed_ips = data_path.allowed_ips.reader();
        allowed_ips.refresh(&data_path.allowed_ips);
        let mut packet = [0; 20];
        (packet[0], packet[3]) = (0x45, 20);
        let peer =
            data_path.route(allowed_ips.value(), &packet).ok().map(|(peer, _)| Arc::clone(peer));
        (device, peer.unwrap())
    }

    #[test]
    fn sockets_count_as_closed_when_the_port_is_free_again() {
        for _ in 0..200 {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            let address = socket.local_addr().unwrap();
            let sockets = Arc::new(UdpSockets::new(vec![bound(socket)], gso(), Arc::default()));
            let until_closed = sockets.until_closed();
            std::thread::scope(|scope| {
                scope.spawn(move || drop(sockets));
                while until_closed.strong_count() > 0 {
                    std::hint::spin_loop();
                }
                UdpSocket::bind(address).unwrap();
            });
        }
    }

    #[test]
    fn a_source_that_is_not_ours_is_refused_and_the_datagram_goes_all_the_same() {
        for (host, not_ours, interface) in
            [("127.0.0.1", "192.0.2.1", 0), ("::1", "2001:db8::1", 0), ("::1", "fe80::1", 9999)]
        {
            let receiver = UdpSocket::bind((host, 0)).unwrap();
            let sender = UdpSocket::bind((host, 0)).unwrap();
            let sockets = UdpSockets::new(vec![bound(sender)], gso(), Arc::default());
            let mut endpoint = Endpoint::new(receiver.local_addr().unwrap());
            let send = |endpoint: &Endpoint| {
                sockets.send_from_cached_source(endpoint, 0, b"x", None).unwrap()
            };
            assert_eq!(send(&endpoint), SourceOutcome::Kept);
            endpoint.source = Some(Source { address: not_ours.parse().unwrap(), interface });
            assert_eq!(send(&endpoint), SourceOutcome::Refused);
            for _ in 0..2 {
                assert_eq!(receiver.recv(&mut [0; 2]).unwrap(), 1);
            }
        }
    }
}
