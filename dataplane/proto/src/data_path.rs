//! What the workers share: the way from a packet to its peer and keypair, and back.
//!
//! The control thread publishes routes and indices here; workers seal and open without it, and
//! leave it a note about the few peers it has to look at.

use crate::allowed_ips::AllowedIps;
use crate::handshake::InitiationError;
use crate::icmp::ErrorLimiter;
use crate::index_table::IndexTable;
use crate::keypair::OpenError;
use crate::peer::{Peer, PeerId, event};
use crate::timers::Attention;
use core::net::IpAddr;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, compiler_fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Whose an allowed IP is.
#[derive(Clone)]
pub struct Route {
    /// The peer.
    pub peer: Arc<Peer>,
    /// Its place in the order in which allowed IPs were given.
    pub(crate) order: u64,
}

/// All routes, as published at one moment.
pub type Routes = AllowedIps<Route>;

/// A value that one thread replaces and others read from copies of their own, without a lock until
/// it was replaced.
#[derive(Default)]
pub struct Published<T> {
    generation: AtomicU64,
    value: Mutex<T>,
}

impl<T: Clone> Published<T> {
    /// Publishes a value that holds from the start.
    pub fn new(value: T) -> Self {
        Self { generation: AtomicU64::new(0), value: Mutex::new(value) }
    }

    /// Replaces the value.
    pub fn publish(&self, value: T) {
        let replaced = {
            let mut place = self.value.lock().unwrap_or_else(PoisonError::into_inner);
            self.generation.fetch_add(1, Ordering::Release);
            core::mem::replace(&mut *place, value)
        };
        drop(replaced);
    }

    /// A copy that [`Reader::refresh`] keeps up to date.
    pub fn reader(&self) -> Reader<T> {
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        Reader { generation: self.generation.load(Ordering::Acquire), value: value.clone() }
    }
}

/// One thread's copy of a [`Published`] value.
pub struct Reader<T> {
    generation: u64,
    value: T,
}

impl<T: Clone> Reader<T> {
    /// The value as last published; true if it was replaced since the call before.
    pub fn refresh(&mut self, published: &Published<T>) -> bool {
        let stale = published.generation.load(Ordering::Acquire) != self.generation;
        if stale {
            *self = published.reader();
        }
        stale
    }

    /// The copy.
    pub const fn value(&self) -> &T {
        &self.value
    }
}

/// Packets that went nowhere, by cause.
///
/// All threads count in one place, with one relaxed addition: a packet that arrives costs nothing, and
/// one that does not was received or sent by a system call that takes a hundred times as long. The
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

/// Why a packet went nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropCause {
    /// Out: not an IP packet, or its length is wrong.
    OutboundMalformed,
    /// Out: a router solicitation or an ICMP redirect.
    SolicitationOrRedirect,
    /// Out: no allowed IP contains its destination.
    NoPeer,
    /// Out: its peer has no endpoint.
    NoEndpoint,
    /// Out: it is our own datagram to its very peer, whose endpoint is routed to the interface.
    Loop,
    /// Out: too many waited for a keypair.
    StagedOverflow,
    /// Out: it waited for a keypair until the handshake was given up, the interface went down or the peer was removed.
    StagedExpired,
    /// Out: no route leads to its peer's endpoint.
    SendNoRoute,
    /// Out: a firewall of this machine refused it.
    SendForbidden,
    /// Out: longer than the path takes.
    SendTooLong,
    /// Out: the socket or the link had no room for it.
    SendNoBuffer,
    /// Out: the network refused it for another reason.
    SendFailed,
    /// In: not a WireGuard message.
    InboundMalformed,
    /// In: no handshake or keypair has its index.
    UnknownIndex,
    /// In: a handshake message, and we have no private key.
    NoPrivateKey,
    /// In: mac1 is wrong: whoever sent it has another public key for us.
    InvalidMac,
    /// In: a handshake message without a cookie while under load; it was answered with one.
    UnderLoad,
    /// In: a handshake message with a cookie, one of too many from its source.
    RateLimited,
    /// In: too many handshake messages waited.
    HandshakeQueueFull,
    /// In: an initiation that is not authentic.
    InvalidInitiation,
    /// In: an initiation by a key that is no peer's.
    UnknownPeer,
    /// In: an initiation that is not newer than one before it.
    OldTimestamp,
    /// In: an initiation too soon after the peer's last.
    InitiationFlood,
    /// In: a response that does not fit, mostly for a preshared key that differs.
    InvalidResponse,
    /// In: a cookie reply that does not open, or that nobody asked for.
    InvalidCookie,
    /// In: it does not open.
    Unauthentic,
    /// In: its keypair is too old, or used up.
    KeypairExpired,
    /// In: its counter was seen or is too old.
    Replayed,
    /// In: what is inside is not an IP packet, or its length is wrong.
    InnerMalformed,
    /// In: its source address is not among the peer's allowed IPs.
    WrongSource,
    /// In: a router advertisement.
    RouterAdvertisement,
    /// In: the interface was down when it was written.
    InterfaceDown,
    /// In: the TUN device refused it for another reason.
    WriteFailed,
}

impl DropCause {
    /// Every cause, in the order a packet meets them.
    pub const ALL: [Self; 33] = [
        Self::OutboundMalformed,
        Self::SolicitationOrRedirect,
        Self::NoPeer,
        Self::NoEndpoint,
        Self::Loop,
        Self::StagedOverflow,
        Self::StagedExpired,
        Self::SendNoRoute,
        Self::SendForbidden,
        Self::SendTooLong,
        Self::SendNoBuffer,
        Self::SendFailed,
        Self::InboundMalformed,
        Self::UnknownIndex,
        Self::NoPrivateKey,
        Self::InvalidMac,
        Self::UnderLoad,
        Self::RateLimited,
        Self::HandshakeQueueFull,
        Self::InvalidInitiation,
        Self::UnknownPeer,
        Self::OldTimestamp,
        Self::InitiationFlood,
        Self::InvalidResponse,
        Self::InvalidCookie,
        Self::Unauthentic,
        Self::KeypairExpired,
        Self::Replayed,
        Self::InnerMalformed,
        Self::WrongSource,
        Self::RouterAdvertisement,
        Self::InterfaceDown,
        Self::WriteFailed,
    ];

    /// Its name for operators, which does not change from one release to the next.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::OutboundMalformed => "out_malformed",
            Self::SolicitationOrRedirect => "solicitation_or_redirect",
            Self::NoPeer => "no_peer",
            Self::NoEndpoint => "no_endpoint",
            Self::Loop => "loop",
            Self::StagedOverflow => "staged_overflow",
            Self::StagedExpired => "staged_expired",
            Self::SendNoRoute => "send_no_route",
            Self::SendForbidden => "send_forbidden",
            Self::SendTooLong => "send_too_long",
            Self::SendNoBuffer => "send_no_buffer",
            Self::SendFailed => "send_failed",
            Self::InboundMalformed => "malformed",
            Self::UnknownIndex => "unknown_index",
            Self::NoPrivateKey => "no_private_key",
            Self::InvalidMac => "bad_mac1",
            Self::UnderLoad => "under_load",
            Self::RateLimited => "rate_limited",
            Self::HandshakeQueueFull => "handshake_queue_full",
            Self::InvalidInitiation => "bad_initiation",
            Self::UnknownPeer => "unknown_peer",
            Self::OldTimestamp => "old_timestamp",
            Self::InitiationFlood => "initiation_flood",
            Self::InvalidResponse => "bad_response",
            Self::InvalidCookie => "bad_cookie",
            Self::Unauthentic => "unauthentic",
            Self::KeypairExpired => "keypair_expired",
            Self::Replayed => "replay",
            Self::InnerMalformed => "inner_malformed",
            Self::WrongSource => "wrong_source",
            Self::RouterAdvertisement => "router_advertisement",
            Self::InterfaceDown => "interface_down",
            Self::WriteFailed => "tun_refused",
        }
    }
}

impl From<OpenError> for DropCause {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Expired => Self::KeypairExpired,
            OpenError::Unauthentic => Self::Unauthentic,
        }
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
    pub fn add(&self, cause: DropCause, packets: usize) {
        let packets = u64::try_from(packets).unwrap_or(u64::MAX);
        self.counters[cause as usize].fetch_add(packets, Ordering::Relaxed);
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

/// Everything the packet path needs of a device.
#[derive(Default)]
pub struct DataPath {
    /// Who has which allowed IP.
    pub routes: Published<Routes>,
    /// What indices stand for.
    pub index_table: IndexTable,
    /// What was dropped and why.
    pub drops: DropCounters,
    pub(crate) icmp_errors: ErrorLimiter,
    mtu: AtomicU32,
    has_route_mtus: AtomicBool,
    route_mtus: Mutex<AllowedIps<u32>>,
    has_identity: AtomicBool,
    attention: Mutex<Vec<PeerId>>,
    wake: AtomicBool,
    generation: OnceLock<Box<dyn GenerationCounter>>,
    /// The generation that the keypairs are of.
    known_generation: AtomicU64,
}

impl DataPath {
    /// The interface's MTU, which bounds padding; 0 for no bound.
    #[must_use]
    pub fn mtu(&self) -> usize {
        self.mtu.load(Ordering::Relaxed) as usize
    }

    /// What bounds the padding of a packet of `len` bytes: the MTU of the route that it came by.
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

    /// Follows the MTUs of those routes to the interface that have one of their own.
    pub fn set_route_mtus(&self, mtus: AllowedIps<u32>, any: bool) {
        let before = {
            let mut route_mtus = self.route_mtus.lock().unwrap_or_else(PoisonError::into_inner);
            core::mem::replace(&mut *route_mtus, mtus)
        };
        self.has_route_mtus.store(any, Ordering::Release);
        // Not while a worker waits for the lock.
        drop(before);
    }

    /// Follows the interface's MTU.
    pub fn set_mtu(&self, mtu: u32) {
        self.mtu.store(mtu, Ordering::Relaxed);
    }

    /// Without a private key nobody needs to be asked for a handshake.
    pub(crate) fn set_has_identity(&self, has_identity: bool) {
        self.has_identity.store(has_identity, Ordering::Release);
    }

    pub(crate) fn has_identity(&self) -> bool {
        self.has_identity.load(Ordering::Acquire)
    }

    /// From now on nothing is sealed with the keypairs of another generation than the present one. Only
    /// the first counter counts.
    pub fn watch_generation(&self, counter: Box<dyn GenerationCounter>) {
        self.known_generation.store(counter.read(), Ordering::Relaxed);
        let _first = self.generation.set(counter);
    }

    /// Whether this virtual machine is a copy of the one in which the keypairs were made; then
    /// [`Device::vm_notification`](crate::device::Device::vm_notification) is due.
    #[must_use]
    pub fn is_in_a_copy(&self) -> bool {
        self.generation.get().is_some_and(|generation| {
            // What the caller did before happens before: a copy stops between two instructions.
            compiler_fence(Ordering::SeqCst);
            generation.read() != self.known_generation.load(Ordering::Relaxed)
        })
    }

    /// The keypairs of before are about to be dropped.
    pub(crate) fn note_generation(&self) {
        if let Some(generation) = self.generation.get() {
            self.known_generation.store(generation.read(), Ordering::Relaxed);
        }
    }

    /// True, once, if the control thread has been left a note since the last call.
    #[must_use]
    pub fn take_wake(&self) -> bool {
        self.wake.load(Ordering::Acquire) && self.wake.swap(false, Ordering::AcqRel)
    }

    /// Leaves the control thread a note about a peer.
    pub(crate) fn raise(&self, peer: &Peer, event: u8) {
        if peer.raise(event) {
            self.attention.lock().unwrap_or_else(PoisonError::into_inner).push(peer.id());
            self.wake.store(true, Ordering::Release);
        }
    }

    pub(crate) fn raise_timer(&self, peer: &Peer, attention: Attention) {
        if attention.0 {
            self.raise(peer, event::TIMER);
        }
    }

    pub(crate) fn take_attention(&self) -> Vec<PeerId> {
        core::mem::take(&mut *self.attention.lock().unwrap_or_else(PoisonError::into_inner))
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
