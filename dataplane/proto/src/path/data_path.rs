//! The state that the packet path needs: allowed IPs, indices, drop counters and dirty peers.
//!
//! The control thread publishes the allowed IPs here, and adds handshakes and keypairs to the indices. Workers seal and
//! open without that thread, and mark the few peers that it must examine as dirty.

use crate::noise::handshake::InitiationError;
use crate::path::allowed_ips::AllowedIps;
use crate::session::index_table::IndexTable;
use crate::session::peer::{Peer, PeerId, dirty};
use crate::session::timers::NeedsReschedule;
use crate::time::Instant;
use crate::wire::icmp::ErrorLimiter;
use core::fmt::{self, Write as _};
use core::net::IpAddr;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, compiler_fence};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// The owner of an allowed IP.
#[derive(Clone)]
pub struct AllowedIpOwner {
    /// The peer.
    pub peer: Arc<Peer>,
    /// The allowed IP's position in the order of configuration.
    pub(crate) order: u64,
}

/// A snapshot of all allowed IPs with their owners.
pub type AllowedIpTable = AllowedIps<AllowedIpOwner>;

/// A value that one thread replaces and others read from their own copies, which they refresh under a
/// lock only after it was replaced.
#[derive(Default)]
pub struct Versioned<T> {
    version: AtomicU64,
    value: Mutex<T>,
}

impl<T: Clone> Versioned<T> {
    /// Creates it with an initial value.
    pub fn new(value: T) -> Self {
        Self { version: AtomicU64::new(0), value: Mutex::new(value) }
    }

    /// Replaces the value.
    pub fn replace(&self, value: T) {
        let replaced = {
            let mut current = self.value.lock().unwrap_or_else(PoisonError::into_inner);
            self.version.fetch_add(1, Ordering::Release);
            core::mem::replace(&mut *current, value)
        };
        drop(replaced);
    }

    /// A copy that [`Reader::refresh`] keeps up to date.
    pub fn reader(&self) -> Reader<T> {
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        Reader { version: self.version.load(Ordering::Acquire), value: value.clone() }
    }
}

/// One thread's copy of a [`Versioned`] value.
pub struct Reader<T> {
    version: u64,
    value: T,
}

impl<T: Clone> Reader<T> {
    /// The value as last replaced; true if it was replaced since the call before.
    pub fn refresh(&mut self, versioned: &Versioned<T>) -> bool {
        let stale = versioned.version.load(Ordering::Acquire) != self.version;
        if stale {
            *self = versioned.reader();
        }
        stale
    }

    /// The copy.
    pub const fn value(&self) -> &T {
        &self.value
    }
}

/// Defines the causes, one row each: what it means, its variant and its name.
macro_rules! drop_causes {
    ($(#[doc = $meaning:literal] $cause:ident = $name:literal,)*) => {
        /// Why a packet was dropped.
        ///
        /// It is the error of the calls that take one packet, and a key of [`DropCounters`].
        #[cfg_attr(not(feature = "internals"), non_exhaustive)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum DropCause {
            $(#[doc = $meaning] $cause,)*
        }

        impl DropCause {
            /// Every cause, in the order a packet meets them.
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$cause),*];

            /// Its name for operators, which does not change from one release to the next.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$cause => $name,)*
                }
            }

            /// What it means, as it is documented.
            const fn meaning(self) -> &'static str {
                match self {
                    $(Self::$cause => $meaning,)*
                }
            }
        }
    };
}

drop_causes! {
    /// To send: not an IP packet, or its length is wrong.
    OutboundMalformed = "out_malformed",
    /// To send: a router solicitation or an ICMP redirect.
    SolicitationOrRedirect = "solicitation_or_redirect",
    /// To send: no allowed IP contains its destination.
    NoPeer = "no_peer",
    /// To send: its peer has no endpoint.
    NoEndpoint = "no_endpoint",
    /// To send: it is our own datagram to its very peer, whose endpoint is routed to the interface.
    Loop = "loop",
    /// To send: too many waited for a keypair.
    StagedOverflow = "staged_overflow",
    /// To send: it waited for a keypair until the handshake was given up, the interface went down or the peer was removed.
    StagedExpired = "staged_expired",
    /// To send: longer than any datagram.
    TooLong = "send_too_long",
    /// Received: not a WireGuard message.
    InboundMalformed = "malformed",
    /// Received: no handshake or keypair has its index.
    UnknownIndex = "unknown_index",
    /// Received: a handshake message; or to send: a packet that waited for a handshake; and there is no private key.
    NoPrivateKey = "no_private_key",
    /// Received: mac1 is wrong: the sender has another public key for us.
    InvalidMac = "bad_mac1",
    /// Received: a handshake message without a cookie while under load; it was answered with one.
    UnderLoad = "under_load",
    /// Received: a handshake message with a cookie, one of too many from its source.
    RateLimited = "rate_limited",
    /// Received: an initiation that is not authentic.
    InvalidInitiation = "bad_initiation",
    /// Received: an initiation by a key that is no peer's.
    UnknownPeer = "unknown_peer",
    /// Received: an initiation that is not newer than one before it.
    OldTimestamp = "old_timestamp",
    /// Received: an initiation too soon after the peer's last.
    InitiationFlood = "initiation_flood",
    /// Received: a response that does not fit, mostly for a preshared key that differs.
    InvalidResponse = "bad_response",
    /// Received: a cookie reply that does not open, or that was not requested.
    InvalidCookie = "bad_cookie",
    /// Received: its authentication tag is wrong.
    Unauthentic = "unauthentic",
    /// Received: its keypair is too old, or used up.
    KeypairExpired = "keypair_expired",
    /// Received: its counter was seen or is too old.
    Replayed = "replay",
    /// Received: what is inside is not an IP packet, or its length is wrong.
    InnerMalformed = "inner_malformed",
    /// Received: its source address is not among the peer's allowed IPs.
    WrongSource = "wrong_source",
    /// Received: a router advertisement.
    RouterAdvertisement = "router_advertisement",
}

impl fmt::Display for DropCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut meaning = self.meaning().trim().trim_end_matches('.').chars();
        // The documentation begins with a capital letter.
        meaning
            .next()
            .into_iter()
            .try_for_each(|first| f.write_char(first.to_ascii_lowercase()))?;
        f.write_str(meaning.as_str())
    }
}

impl core::error::Error for DropCause {}

/// Dropped packets, by cause.
///
/// All threads share the counters, with one relaxed addition: a delivered packet costs nothing, and
/// a dropped one was received or sent by a system call that takes a hundred times as long. The
/// alignment keeps a flood of drops away from the cache lines that every packet reads.
#[repr(align(128))]
pub struct DropCounters {
    counters: [AtomicU64; DropCause::ALL.len()],
}

impl Default for DropCounters {
    fn default() -> Self {
        Self { counters: [const { AtomicU64::new(0) }; DropCause::ALL.len()] }
    }
}

impl fmt::Debug for DropCounters {
    /// The causes that there were.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.counts().filter(|(_, count)| *count > 0)).finish()
    }
}

impl From<InitiationError> for DropCause {
    fn from(error: InitiationError) -> Self {
        match error {
            InitiationError::Unauthentic => Self::InvalidInitiation,
            InitiationError::Replayed => Self::OldTimestamp,
            InitiationError::Flooding => Self::InitiationFlood,
        }
    }
}

impl DropCounters {
    /// Counts `packets` lost to one cause.
    #[cfg_attr(not(feature = "internals"), doc(hidden))]
    pub fn add(&self, cause: DropCause, packets: usize) {
        let packets = u64::try_from(packets).unwrap_or(u64::MAX);
        self.counters[cause as usize].fetch_add(packets, Ordering::Relaxed);
    }

    /// Packets lost so far, of each cause.
    pub fn counts(&self) -> impl Iterator<Item = (DropCause, u64)> {
        DropCause::ALL.into_iter().map(|cause| (cause, self.count(cause)))
    }

    /// Packets lost to one cause so far.
    #[must_use]
    pub fn count(&self, cause: DropCause) -> u64 {
        self.counters[cause as usize].load(Ordering::Relaxed)
    }
}

/// Counts the copies of this virtual machine: two that go on from one snapshot read different numbers.
pub trait GenerationCounter: Send + Sync {
    /// The number of this one.
    fn read(&self) -> u64;
}

/// The part of a device that the packet path uses.
#[derive(Default)]
pub struct DataPath {
    /// The allowed IPs and their owners.
    pub allowed_ips: Versioned<AllowedIpTable>,
    /// The receiver indices in use.
    pub index_table: IndexTable,
    /// Counters of dropped packets.
    pub drops: DropCounters,
    pub(crate) icmp_errors: ErrorLimiter,
    mtu: AtomicU32,
    has_route_mtus: AtomicBool,
    route_mtus: Mutex<AllowedIps<u32>>,
    has_identity: AtomicBool,
    dirty_peers: Mutex<VecDeque<PeerId>>,
    /// Whether there are any, for those who would only look.
    has_dirty_peers: AtomicBool,
    wake: AtomicBool,
    generation: OnceLock<Box<dyn GenerationCounter>>,
    /// The generation in which the keypairs were made.
    known_generation: AtomicU64,
}

impl DataPath {
    /// The interface's MTU, which bounds padding; 0 for no bound.
    #[must_use]
    pub fn mtu(&self) -> usize {
        self.mtu.load(Ordering::Relaxed) as usize
    }

    /// The MTU of the route by which a packet of `len` bytes came, which bounds its padding.
    #[must_use]
    pub fn mtu_towards(&self, destination: IpAddr, len: usize) -> usize {
        let mtu = self.mtu();
        if !self.has_route_mtus.load(Ordering::Acquire) {
            return mtu;
        }
        let route_mtus = self.route_mtus.lock().unwrap_or_else(PoisonError::into_inner);
        let of_route = route_mtus.lookup(destination).and_then(|mtu| usize::try_from(*mtu).ok());
        // A longer packet did not come by that route.
        of_route.filter(|of_route| (len..mtu).contains(of_route)).unwrap_or(mtu)
    }

    /// Sets the MTUs of the kernel's routes to the interface that have their own.
    pub fn set_route_mtus(&self, mtus: AllowedIps<u32>, any: bool) {
        let before = {
            let mut route_mtus = self.route_mtus.lock().unwrap_or_else(PoisonError::into_inner);
            core::mem::replace(&mut *route_mtus, mtus)
        };
        self.has_route_mtus.store(any, Ordering::Release);
        // After the lock is released, so that no worker waits for it.
        drop(before);
    }

    /// Sets the interface's MTU.
    pub fn set_mtu(&self, mtu: u32) {
        self.mtu.store(mtu, Ordering::Relaxed);
    }

    /// Records whether there is a private key.
    pub(crate) fn set_has_identity(&self, has_identity: bool) {
        self.has_identity.store(has_identity, Ordering::Release);
    }

    pub(crate) fn has_identity(&self) -> bool {
        self.has_identity.load(Ordering::Acquire)
    }

    /// From now on nothing is sealed with the keypairs of another generation than the present one. Only
    /// the first call has an effect.
    pub fn watch_generation(&self, counter: Box<dyn GenerationCounter>) {
        self.known_generation.store(counter.read(), Ordering::Relaxed);
        let _first = self.generation.set(counter);
    }

    /// Whether this virtual machine is a copy of the one in which the keypairs were made; then
    /// [`ControlPlane::vm_notification`](crate::device::control_plane::ControlPlane::vm_notification) is due.
    #[must_use]
    pub fn vm_generation_changed(&self) -> bool {
        self.generation.get().is_some_and(|generation| {
            // Orders the read after what the caller did, as a snapshot falls between two instructions.
            compiler_fence(Ordering::SeqCst);
            generation.read() != self.known_generation.load(Ordering::Relaxed)
        })
    }

    /// Records the present generation; the caller drops the keypairs of the previous one.
    pub(crate) fn update_generation(&self) {
        if let Some(generation) = self.generation.get() {
            self.known_generation.store(generation.read(), Ordering::Relaxed);
        }
    }

    /// True once after a peer was marked, so that the control thread must be woken.
    #[must_use]
    pub fn take_wake(&self) -> bool {
        self.wake.load(Ordering::Acquire) && self.wake.swap(false, Ordering::AcqRel)
    }

    /// Marks a peer as dirty, with the reason for which the control thread must examine it.
    pub(crate) fn mark(&self, peer: &Peer, reason: u8) {
        if peer.mark(reason) {
            let mut queue = self.dirty_peers();
            queue.push_back(peer.id());
            self.has_dirty_peers.store(true, Ordering::Release);
            drop(queue);
            self.wake.store(true, Ordering::Release);
        }
    }

    /// Marks a peer if its timers must be examined earlier than scheduled.
    pub(crate) fn mark_timer(&self, peer: &Peer, examination: NeedsReschedule) {
        if examination.0 {
            self.mark(peer, dirty::TIMER);
        }
    }

    /// Asks the control thread for an initiation, unless one was sent within `REKEY_TIMEOUT`.
    pub(crate) fn initiate_rekey(&self, peer: &Peer, now: Instant) {
        peer.timers.reset_handshake_attempts();
        if peer.timers.may_send_initiation(now) {
            self.mark(peer, dirty::HANDSHAKE);
        }
    }

    /// Takes at most `most` dirty peers, in the order in which they were marked, and returns whether more
    /// are left. Those that no longer exist are removed.
    pub(crate) fn take_dirty_peers(
        &self,
        most: usize,
        exists: impl Fn(PeerId) -> bool,
    ) -> (Vec<PeerId>, bool) {
        let (mut queue, mut taken) = (self.dirty_peers(), Vec::new());
        while taken.len() < most
            && let Some(id) = queue.pop_front()
        {
            if exists(id) {
                taken.push(id);
            }
        }
        let more = !queue.is_empty();
        self.has_dirty_peers.store(more, Ordering::Release);
        (taken, more)
    }

    /// Whether a peer is dirty, without the lock.
    pub(crate) fn has_dirty_peers(&self) -> bool {
        self.has_dirty_peers.load(Ordering::Acquire)
    }

    fn dirty_peers(&self) -> MutexGuard<'_, VecDeque<PeerId>> {
        self.dirty_peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_cause_has_a_counter_and_a_name_of_its_own() {
        let drops = DropCounters::default();
        for (expected, cause) in (1..).zip(DropCause::ALL) {
            drops.add(cause, expected);
        }
        for (expected, cause) in (1..).zip(DropCause::ALL) {
            assert_eq!(drops.count(cause), expected, "{cause:?}");
        }
        let names: BTreeSet<_> = DropCause::ALL.map(DropCause::name).into_iter().collect();
        assert_eq!(names.len(), DropCause::ALL.len());
    }
}
