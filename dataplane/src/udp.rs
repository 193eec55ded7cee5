//! The UDP sockets, as the helper opened them, and sending many datagrams at once.

use crate::sys;
use nix::libc;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use wgsep_proto::data_path::{DataPath, DropCause};
use wgsep_proto::peer::{Endpoint, Peer};

/// Most segments that one UDP_SEGMENT send takes on every kernel that has it.
pub(crate) const MAX_SEGMENTS: usize = 64;
/// Most bytes that one send takes: what fits into an IPv4 datagram.
pub(crate) const MAX_SEND: usize = 65_507;

/// The sockets of both families, either of which a machine may lack.
#[derive(Default)]
pub(crate) struct UdpSockets {
    pub(crate) v4: Option<OwnedFd>,
    pub(crate) v6: Option<OwnedFd>,
    segment_limit: SegmentLimit,
}

/// The longest segment that the kernel has not refused to split for us.
struct SegmentLimit {
    len: AtomicUsize,
    reported: AtomicBool,
}

impl Default for SegmentLimit {
    fn default() -> Self {
        Self { len: AtomicUsize::new(usize::MAX), reported: AtomicBool::new(false) }
    }
}

impl SegmentLimit {
    fn refuses(&self, segment_len: usize) -> bool {
        segment_len > self.len.load(Ordering::Relaxed)
    }

    /// Remembers a refusal. EINVAL means that a segment does not fit the path's MTU, so a shorter one
    /// may; EIO that the device cannot do it at all.
    fn learn(&self, segment_len: usize, error: &io::Error) {
        let limit =
            if error.raw_os_error() == Some(libc::EIO) { 0 } else { segment_len.saturating_sub(1) };
        self.len.fetch_min(limit, Ordering::Relaxed);
        if !self.reported.swap(true, Ordering::Relaxed) {
            tracing::info!(
                "UDP segmentation offload refused for {segment_len}-byte datagrams ({error}); sending those one by one"
            );
        }
    }
}

/// True if the kernel might take the same datagrams one by one.
fn may_go_singly(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EIO | libc::EMSGSIZE | libc::EOPNOTSUPP | libc::ENOPROTOOPT)
    )
}

/// True if the source address may be to blame. One that is not ours is EINVAL, over IPv4 on
/// newer kernels ENETUNREACH; a link-local one whose interface is gone is ENODEV.
fn may_be_the_source(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENETUNREACH | libc::ENODEV))
}

/// What a failed send is counted as. A packet filter's refusal is EPERM (kernel ip_output.c).
pub(crate) fn cause_of(error: &io::Error) -> DropCause {
    match error.raw_os_error() {
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH) => DropCause::SendNoRoute,
        Some(libc::EPERM | libc::EACCES) => DropCause::SendForbidden,
        Some(libc::EMSGSIZE) => DropCause::SendTooLong,
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => DropCause::SendNoBuffer,
        _ => DropCause::SendFailed,
    }
}

/// What became of the cached source of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// It was used, or there was none.
    Kept,
    /// The address is no longer ours: the peer should be sent to without it.
    Refused,
}

impl Source {
    fn settle(self, peer: &Peer) {
        if self == Self::Refused {
            peer.clear_source();
        }
    }
}

impl UdpSockets {
    /// Takes the sockets; `gso` if many datagrams may go at once.
    pub(crate) fn new(v4: Option<OwnedFd>, v6: Option<OwnedFd>, gso: bool) -> Self {
        let segment_limit = SegmentLimit::default();
        if !gso {
            segment_limit.len.store(0, Ordering::Relaxed);
        }
        Self { v4, v6, segment_limit }
    }

    /// Both, in the order IPv4, IPv6.
    pub(crate) fn families(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [self.v4.as_ref().map(AsFd::as_fd), self.v6.as_ref().map(AsFd::as_fd)]
    }

    /// Whether many datagrams go at once: unless the kernel has refused that for any length.
    pub(crate) fn sends_many(&self) -> bool {
        let SegmentLimit { len, reported } = &self.segment_limit;
        len.load(Ordering::Relaxed) > 0 && !reported.load(Ordering::Relaxed)
    }

    fn towards(&self, destination: SocketAddr) -> Option<BorrowedFd<'_>> {
        let [v4, v6] = self.families();
        if destination.is_ipv4() { v4 } else { v6 }
    }

    /// Sends `payload` as datagrams of `segment_len` bytes, the last maybe shorter, to a peer.
    /// Returns the bytes that went; counts the datagrams that did not.
    pub(crate) fn send(
        &self,
        peer: &Peer,
        endpoint: &Endpoint,
        traffic_class: u8,
        payload: &[u8],
        segment_len: usize,
        data_path: &DataPath,
    ) -> usize {
        let mut refusal = None;
        if payload.len() > segment_len && !self.segment_limit.refuses(segment_len) {
            let segment = u16::try_from(segment_len).ok();
            match self.send_from_any(endpoint, traffic_class, payload, segment) {
                Ok(source) => {
                    source.settle(peer);
                    return payload.len();
                }
                Err(error) if may_go_singly(&error) => refusal = Some(error),
                Err(error) => {
                    data_path.drops.add(cause_of(&error), payload.len().div_ceil(segment_len));
                    return 0;
                }
            }
        }
        let mut sent = 0;
        for datagram in payload.chunks(segment_len.max(1)) {
            match self.send_from_any(endpoint, traffic_class, datagram, None) {
                Ok(source) => {
                    source.settle(peer);
                    sent += datagram.len();
                }
                Err(error) => data_path.drops.add(cause_of(&error), 1),
            }
        }
        // A place to which not even one goes says nothing of segmentation.
        if let Some(error) = refusal.filter(|_| sent > 0) {
            self.segment_limit.learn(segment_len, &error);
        }
        sent
    }

    /// Sends from the cached source; if that address is no longer ours, lets the route choose one.
    pub(crate) fn send_from_any(
        &self,
        endpoint: &Endpoint,
        traffic_class: u8,
        payload: &[u8],
        segment: Option<u16>,
    ) -> io::Result<Source> {
        match self.send_once(endpoint, traffic_class, payload, segment) {
            Err(error) if endpoint.source.is_some() && may_be_the_source(&error) => {
                let anywhere = Endpoint { source: None, ..*endpoint };
                self.send_once(&anywhere, traffic_class, payload, segment)?;
                Ok(Source::Refused)
            }
            result => result.map(|()| Source::Kept),
        }
    }

    /// One send; no socket of the family is ENETUNREACH.
    fn send_once(
        &self,
        endpoint: &Endpoint,
        traffic_class: u8,
        payload: &[u8],
        segment: Option<u16>,
    ) -> io::Result<()> {
        let socket = self
            .towards(endpoint.destination)
            .ok_or(io::Error::from_raw_os_error(libc::ENETUNREACH))?;
        sys::send(socket, endpoint, traffic_class, payload, segment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::KernelRandom;
    use std::net::UdpSocket;
    use std::sync::Arc;
    use wgsep_proto::config::{AllowedIp, AllowedIpChange, Configuration, PeerConfiguration};
    use wgsep_proto::device::Device;
    use wgsep_proto::keys::PublicKey;
    use wgsep_proto::peer::Source as CachedSource;
    use wgsep_proto::time::{Instant, Now};

    #[test]
    fn a_place_that_takes_nothing_does_not_end_sending_many_at_once() {
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let sockets = UdpSockets::new(Some(sender.into()), None, true);
        let (device, peer) = device_and_peer();
        let nowhere = Endpoint::new(([127, 0, 0, 1], 0).into());
        assert_eq!(sockets.send(&peer, &nowhere, 0, &[7; 128], 64, device.data_path()), 0);
        assert!(sockets.sends_many());
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        let somewhere = Endpoint::new(receiver.local_addr().unwrap());
        assert_eq!(sockets.send(&peer, &somewhere, 0, &[7; 128], 64, device.data_path()), 128);
        assert_eq!(receiver.recv(&mut [0; 128]).unwrap(), 64);
    }

    /// A device with one peer, to which everything goes.
    fn device_and_peer() -> (Device, Arc<Peer>) {
        let now = Now { instant: Instant::from_nanos(1), wall: core::time::Duration::ZERO };
        let mut peer = PeerConfiguration::new(PublicKey::from_bytes([9; 32]));
        let allowed_ip = AllowedIp::new([0, 0, 0, 0].into(), 0).unwrap();
        peer.endpoint = Some(([127, 0, 0, 1], 7).into());
        peer.allowed_ips.push(AllowedIpChange { allowed_ip, remove: false });
        let mut device = Device::new(Box::new(KernelRandom));
        device.configure(Configuration { peers: vec![peer], ..Configuration::default() }, now);
        let data_path = Arc::clone(device.data_path());
        let mut routes = data_path.routes.reader();
        routes.refresh(&data_path.routes);
        let mut packet = [0; 20];
        (packet[0], packet[3]) = (0x45, 20);
        let peer = data_path.route(routes.value(), &packet).ok().map(|(peer, _)| Arc::clone(peer));
        (device, peer.unwrap())
    }

    #[test]
    fn a_source_that_is_not_ours_is_refused_and_the_datagram_goes_all_the_same() {
        for (host, not_ours, interface) in
            [("127.0.0.1", "192.0.2.1", 0), ("::1", "2001:db8::1", 0), ("::1", "fe80::1", 9999)]
        {
            let receiver = UdpSocket::bind((host, 0)).unwrap();
            let sender = UdpSocket::bind((host, 0)).unwrap();
            let sockets = if host == "::1" {
                UdpSockets::new(None, Some(sender.into()), true)
            } else {
                UdpSockets::new(Some(sender.into()), None, true)
            };
            let mut endpoint = Endpoint::new(receiver.local_addr().unwrap());
            let send =
                |endpoint: &Endpoint| sockets.send_from_any(endpoint, 0, b"x", None).unwrap();
            assert_eq!(send(&endpoint), Source::Kept);
            endpoint.source = Some(CachedSource { address: not_ours.parse().unwrap(), interface });
            assert_eq!(send(&endpoint), Source::Refused);
            for _ in 0..2 {
                assert_eq!(receiver.recv(&mut [0; 2]).unwrap(), 1);
            }
        }
    }
}
