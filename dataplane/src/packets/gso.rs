//! UDP segmentation offload (UDP_SEGMENT), and where the kernel refused it.
//!
//! Most refusals concern one path: a segment is longer than its MTU (EMSGSIZE, EINVAL on older
//! kernels), the datagram goes through a device or an IPsec policy that cannot segment it (EIO), or a
//! packet filter drops packets as long as the unsegmented one (EPERM). Such a refusal is cached in the
//! peer, for its path only; that of a packet filter once it has dropped [`FILTERED`] in a row, because a filter that
//! drops now and then drops a datagram of any length. A socket without the offload counts for all peers. Both expire after
//! [`HOLDS`]; the refusal of a path also expires with another endpoint and after each change of routes
//! or links. The next send then tries again.
//!
//! A path MTU that is too small may come from a forged ICMP message, so no refusal is permanent.

use crate::line_limit::LineLimit;
use crate::refusal::{HOLDS, Refusal, seconds};
use nix::libc;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use wgsep_proto::session::peer::Peer;
use wgsep_proto::{Endpoint, Instant};

/// The state that all sends of the daemon share. If nothing was refused, checking costs two loads.
#[derive(Default)]
pub(crate) struct Gso {
    is_off: bool,
    /// The socket cannot do it.
    unsupported: Refusal,
    /// Number of changes of routes and links; the refusals of earlier epochs have expired.
    epoch: AtomicU16,
    lines: Mutex<LineLimit>,
}

/// Refusals by a packet filter, without a send that it accepts between them, that are taken to be due to the length.
const FILTERED: u16 = 8;
/// Lengths of segments are below this; where a refusal has no length, it counts those of a packet filter from here on.
const UNREFUSED: u16 = u16::MAX - FILTERED;

/// The refusal that is cached in a peer, in 64 bits, so that workers read and write it atomically.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PathRefusal {
    /// Length of the longest segment that was not refused; above [`UNREFUSED`], how many a packet filter refused in a row.
    longest: u16,
    /// Which path was refused: see [`path_of`].
    path: u16,
    epoch: u16,
    /// When it expires, in seconds.
    until: u16,
}

impl PathRefusal {
    /// `None` for 0. No refusal is packed as 0, because its `path` never is.
    fn unpack(bits: u64) -> Option<Self> {
        let field = |number: u32| (bits >> (16 * number)) as u16;
        let [longest, path, epoch, until] = [0, 1, 2, 3].map(field);
        (bits != 0).then_some(Self { longest, path, epoch, until })
    }

    /// True if it is of this path and has not expired.
    fn is_recent(self, endpoint: &Endpoint, now: Instant) -> bool {
        let left = u64::from(self.until.wrapping_sub(seconds(now) as u16));
        (1..=HOLDS.as_secs()).contains(&left) && self.path == path_of(endpoint)
    }

    /// How many datagrams in a row a packet filter has refused, if they are too few to count.
    fn filtered(self) -> Option<u16> {
        self.longest.checked_sub(UNREFUSED)
    }

    fn pack(self) -> u64 {
        let Self { longest, path, epoch, until } = self;
        [until, epoch, path, longest]
            .into_iter()
            .fold(0, |bits, field| bits << 16 | u64::from(field))
    }
}

/// A number for the path to an endpoint: its address, and ours if that is cached. It is not 0.
fn path_of(endpoint: &Endpoint) -> u16 {
    let mut hasher = DefaultHasher::new();
    let scope = match endpoint.destination {
        SocketAddr::V4(_) => 0,
        SocketAddr::V6(v6) => v6.scope_id(),
    };
    let source = endpoint.source.map(|source| source.address);
    (endpoint.destination.ip(), scope, source).hash(&mut hasher);
    hasher.finish() as u16 | 1
}

/// True if the kernel might take the same datagrams one by one.
pub(crate) fn can_retry_unsegmented(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EIO | libc::EMSGSIZE | libc::EPERM))
        || is_unsupported(error)
}

/// True if the socket takes no UDP_SEGMENT at all.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOPROTOOPT))
}

impl Gso {
    /// Creates the state; the offload is used only if `gso_enabled`.
    pub(crate) fn new(gso_enabled: bool) -> Self {
        Self { is_off: !gso_enabled, ..Self::default() }
    }

    /// True if the offload should be tried for segments of this length to this endpoint of the peer.
    pub(crate) fn is_worth_trying(
        &self,
        peer: &Peer,
        endpoint: &Endpoint,
        segment_len: usize,
        now: Instant,
    ) -> bool {
        let refusal = PathRefusal::unpack(peer.path_cache().load(Ordering::Relaxed));
        let fits = |refusal: PathRefusal| {
            segment_len <= usize::from(refusal.longest)
                || refusal.epoch != self.epoch.load(Ordering::Relaxed)
                || !refusal.is_recent(endpoint, now)
        };
        !self.is_off && !self.unsupported.holds(now) && refusal.is_none_or(fits)
    }

    /// Records that the kernel accepted segments of this length, which clears a refusal to the contrary.
    pub(crate) fn accepted(
        &self,
        peer: &Peer,
        endpoint: &Endpoint,
        segment_len: usize,
        now: Instant,
    ) {
        if self.unsupported.clear() {
            self.log(now, || tracing::info!("UDP segmentation offload is in use again"));
        }
        let bits = peer.path_cache().load(Ordering::Relaxed);
        let Some(refusal) = PathRefusal::unpack(bits) else { return };
        let is_of_path = refusal.path == path_of(endpoint);
        let is_counting = refusal.filtered().is_some();
        if is_of_path && !is_counting && segment_len <= usize::from(refusal.longest) {
            // The routes may have changed, and so may the MTU for which the segments were longer. It is kept as expired, so that
            // it is no news if longer ones are refused again.
            if refusal.epoch != self.epoch.load(Ordering::Relaxed)
                && refusal.is_recent(endpoint, now)
            {
                let expired = PathRefusal { until: seconds(now) as u16, ..refusal };
                let _another_send_was_refused = peer.path_cache().compare_exchange(
                    bits,
                    expired.pack(),
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                );
            }
            return;
        }
        let cleared =
            peer.path_cache().compare_exchange(bits, 0, Ordering::Relaxed, Ordering::Relaxed);
        if is_of_path && !is_counting && cleared.is_ok() {
            let (name, to) = (peer.public_key(), endpoint.destination.ip());
            self.log(now, || {
                tracing::info!(
                    "{name}: UDP segmentation offload is in use again on the path to {to}"
                );
            });
        }
    }

    /// Records that the kernel refused segments of this length, and accepted them one by one.
    pub(crate) fn refused(
        &self,
        peer: &Peer,
        endpoint: &Endpoint,
        segment_len: usize,
        error: &io::Error,
        now: Instant,
    ) {
        let minutes = HOLDS.as_secs() / 60;
        if is_unsupported(error) {
            if self.unsupported.set(now) {
                self.log(now, || {
                    tracing::info!(
                        "UDP segmentation offload is not supported ({error}); sending datagrams one by one for {minutes} minutes"
                    );
                });
            }
            return;
        }
        let path = path_of(endpoint);
        let before = PathRefusal::unpack(peer.path_cache().load(Ordering::Relaxed))
            .filter(|before| before.path == path);
        let longest = match error.raw_os_error() {
            // It is about the device or the policy, whatever the length.
            Some(libc::EIO) => 0,
            Some(libc::EPERM) => {
                let filtered = before.map_or(Some(0), PathRefusal::filtered);
                match filtered.map(|filtered| filtered + 1) {
                    Some(filtered) if filtered < FILTERED => UNREFUSED + filtered,
                    _ => 0,
                }
            }
            _ => {
                u16::try_from(segment_len.saturating_sub(1)).unwrap_or(UNREFUSED).min(UNREFUSED - 1)
            }
        };
        let refusal = PathRefusal {
            longest,
            path,
            epoch: self.epoch.load(Ordering::Relaxed),
            until: seconds(now.after(HOLDS)) as u16,
        };
        peer.path_cache().store(refusal.pack(), Ordering::Relaxed);
        let is_known = before.is_some_and(|before| before.filtered().is_none());
        if !is_known && refusal.filtered().is_none() {
            let (name, to) = (peer.public_key(), endpoint.destination.ip());
            let by = match error.raw_os_error() {
                Some(libc::EPERM) => "by a packet filter of this host ",
                _ => "",
            };
            self.log(now, || {
                tracing::info!(
                    "{name}: UDP segmentation offload refused {by}on the path to {to} for {segment_len}-byte datagrams ({error}); sending those one by one for {minutes} minutes, or until routes or links change"
                );
            });
        }
    }

    /// Expires the refusals of all paths, after routes or links changed.
    pub(crate) fn forget_paths(&self) {
        self.epoch.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the offload is in use, and how many of these peers have a path that refused it. It is not in
    /// use if all paths refused it. A refusal counts after a change of routes until a send succeeds.
    pub(crate) fn in_use<'a>(
        &self,
        peers: impl Iterator<Item = &'a Arc<Peer>>,
        now: Instant,
    ) -> (bool, usize) {
        let (mut paths, mut refused) = (0, 0);
        for peer in peers {
            let Some(endpoint) = peer.endpoint() else { continue };
            let refusal = PathRefusal::unpack(peer.path_cache().load(Ordering::Relaxed))
                .filter(|refusal| refusal.filtered().is_none());
            paths += 1;
            refused +=
                usize::from(refusal.is_some_and(|refusal| refusal.is_recent(&endpoint, now)));
        }
        let is_in_use = !self.is_off && !self.unsupported.holds(now);
        (is_in_use && (refused == 0 || refused < paths), refused)
    }

    fn log(&self, now: Instant, write: impl FnOnce()) {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).write(now, write);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packets::udp::tests::device_and_peer;
    use core::time::Duration;
    use wgsep_proto::Source;
    use wgsep_proto::device::control_plane::ControlPlane;

    const START: Instant = Instant::from_nanos(1_000_000_000_000);

    struct Bench {
        gso: Gso,
        peer: Arc<Peer>,
        _device: ControlPlane,
    }

    impl Bench {
        fn new() -> Self {
            let (device, peer) = device_and_peer();
            Self { gso: Gso::new(true), peer, _device: device }
        }

        fn tries(&self, endpoint: &Endpoint, segment_len: usize, now: Instant) -> bool {
            self.gso.is_worth_trying(&self.peer, endpoint, segment_len, now)
        }

        fn refuse(&self, endpoint: &Endpoint, segment_len: usize, errno: i32, now: Instant) {
            let error = io::Error::from_raw_os_error(errno);
            self.gso.refused(&self.peer, endpoint, segment_len, &error, now);
        }

        fn in_use(&self, now: Instant) -> (bool, usize) {
            self.gso.in_use([&self.peer].into_iter(), now)
        }
    }

    fn endpoint(last: u8) -> Endpoint {
        Endpoint::new(([192, 0, 2, last], 7).into())
    }

    #[test]
    fn a_refusal_unpacks_as_it_was_packed() {
        let refusal = PathRefusal { longest: 1451, path: 0xfedd, epoch: 0xffff, until: 3 };
        assert_eq!(PathRefusal::unpack(refusal.pack()), Some(refusal));
        assert_eq!(PathRefusal::unpack(0), None);
    }

    #[test]
    fn a_refusal_is_of_one_path_and_of_longer_segments() {
        let (bench, [a, b]) = (Bench::new(), [1, 2].map(endpoint));
        for errno in [libc::EMSGSIZE, libc::EINVAL] {
            bench.refuse(&a, 1452, errno, START);
            assert!(!bench.tries(&a, 1452, START) && bench.tries(&a, 1451, START));
            assert!(bench.tries(&b, 1452, START), "another endpoint");
            let ours = Some(Source { address: [192, 0, 2, 9].into(), interface: 0 });
            assert!(bench.tries(&Endpoint { source: ours, ..a }, 1452, START), "another source");
        }
        bench.refuse(&a, 1452, libc::EIO, START);
        assert!(!bench.tries(&a, 1, START) && bench.tries(&b, 1452, START));
    }

    #[test]
    fn a_refusal_of_a_path_lapses_and_lapses_again_when_it_is_repeated() {
        for errno in [libc::EMSGSIZE, libc::EIO, libc::EPERM] {
            let (bench, a) = (Bench::new(), endpoint(1));
            let mut now = START;
            for round in 0..3 {
                // Only the first time must a packet filter prove that it is about the length.
                let repeats = if errno == libc::EPERM && round == 0 { FILTERED } else { 1 };
                for _ in 0..repeats {
                    assert!(bench.tries(&a, 1452, now));
                    bench.refuse(&a, 1452, errno, now);
                }
                assert!(!bench.tries(&a, 1452, now.after(HOLDS - Duration::from_secs(1))));
                now = now.after(HOLDS);
                assert!(bench.tries(&a, 1452, now));
            }
        }
    }

    #[test]
    fn a_packet_filter_that_drops_now_and_then_does_not_end_the_offload() {
        let (bench, a) = (Bench::new(), endpoint(1));
        for _ in 0..100 {
            for _ in 1..FILTERED {
                bench.refuse(&a, 1452, libc::EPERM, START);
                assert!(bench.tries(&a, 1452, START));
            }
            bench.gso.accepted(&bench.peer, &a, 1452, START);
        }
        for _ in 1..FILTERED {
            bench.refuse(&a, 1452, libc::EPERM, START);
        }
        let elsewhere = endpoint(9);
        bench.refuse(&elsewhere, 1452, libc::EPERM, START);
        assert!(bench.tries(&elsewhere, 1452, START), "each path counts for itself");
        for _ in 1..FILTERED {
            bench.refuse(&elsewhere, 1452, libc::EPERM, START);
        }
        assert!(!bench.tries(&elsewhere, 1452, START));
    }

    #[test]
    fn a_change_of_routes_forgets_what_paths_refused() {
        let (bench, a) = (Bench::new(), endpoint(1));
        bench.refuse(&a, 1452, libc::EIO, START);
        bench.gso.forget_paths();
        assert!(bench.tries(&a, 1452, START));
    }

    #[test]
    fn what_the_socket_cannot_do_is_refused_everywhere_and_tried_again() {
        for errno in [libc::EOPNOTSUPP, libc::ENOPROTOOPT] {
            let bench = Bench::new();
            bench.refuse(&endpoint(1), 1452, errno, START);
            assert!(!bench.tries(&endpoint(2), 100, START));
            bench.gso.forget_paths();
            assert!(!bench.tries(&endpoint(2), 100, START), "no route changes that");
            assert_eq!(bench.in_use(START), (false, 0));
            assert!(bench.tries(&endpoint(2), 100, START.after(HOLDS)));
            assert_eq!(bench.in_use(START.after(HOLDS)), (true, 0));
        }
        let bench = Bench { gso: Gso::new(false), ..Bench::new() };
        assert!(!bench.tries(&endpoint(1), 100, START));
        assert_eq!(bench.in_use(START), (false, 0));
    }

    #[test]
    fn what_is_in_use_is_what_is_in_use_now() {
        let bench = Bench::new();
        let a = bench.peer.endpoint().unwrap();
        assert_eq!(bench.in_use(START), (true, 0));
        bench.refuse(&a, 1452, libc::EPERM, START);
        assert_eq!(bench.in_use(START), (true, 0), "a packet filter dropped one datagram");
        bench.refuse(&a, 1452, libc::EMSGSIZE, START);
        assert_eq!(bench.in_use(START), (false, 1));
        bench.gso.accepted(&bench.peer, &a, 1451, START);
        assert_eq!(
            bench.in_use(START),
            (false, 1),
            "shorter segments prove nothing about longer ones"
        );
        bench.gso.forget_paths();
        assert_eq!(bench.in_use(START), (false, 1), "nothing was sent since");
        bench.gso.accepted(&bench.peer, &a, 1451, START);
        assert_eq!(bench.in_use(START), (true, 0), "longer ones may not come any more");
        assert!(bench.tries(&a, 1452, START));
        bench.refuse(&a, 1452, libc::EMSGSIZE, START);
        assert_eq!(bench.in_use(START), (false, 1));
        bench.gso.accepted(&bench.peer, &a, 1452, START);
        assert_eq!(bench.in_use(START), (true, 0));
        bench.refuse(&a, 1452, libc::EMSGSIZE, START);
        assert_eq!(bench.in_use(START.after(HOLDS)), (true, 0));
        bench.refuse(&a, 1452, libc::EMSGSIZE, START);
        bench.peer.set_endpoint(endpoint(77));
        assert_eq!(bench.in_use(START), (true, 0), "it has moved");
    }
}
