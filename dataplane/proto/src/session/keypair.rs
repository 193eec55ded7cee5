//! Transport keys: one keypair, and the three slots a peer has for them (whitepaper, section 6).

use crate::invariant::present;
#[cfg(feature = "internals")]
use crate::saved;
use crate::secret::{Secret, in_ordinary_memory};
use crate::session::replay::ReplayWindow;
use crate::time::Instant;
use crate::wire::messages::{
    MAX_INNER_LEN, ReceiverIndex, SenderIndex, TAG_LEN, TRANSPORT_HEADER_LEN, TransportHeader,
};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use wgsep_aead::KeystreamCache;

/// Messages after which the initiator starts a new handshake.
pub const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
/// The first message counter that is never used: 2^64 − 2^13 − 1.
pub const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// Age after which the initiator starts a new handshake.
pub const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// Age after which a keypair neither seals nor opens.
pub const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);

/// A pair of transport keys, shared between the threads that seal and open with it.
pub struct Keypair {
    sending: Secret<wgsep_aead::Key>,
    receiving: Secret<wgsep_aead::Key>,
    sending_counter: AtomicU64,
    sending_valid: AtomicBool,
    /// No key material, and the largest part.
    replay: Box<Mutex<ReplayWindow>>,
    created: Instant,
    /// Age at which its initiator starts the next handshake.
    rekey_after_time: Duration,
    initiator: bool,
    sender_index: SenderIndex,
    receiver_index: ReceiverIndex,
}

/// The result of a handshake, from which a [`Keypair`] is created.
pub struct KeypairParts {
    /// Key for what we send.
    pub sending: Secret,
    /// Key for what we receive.
    pub receiving: Secret,
    /// Our index, by which the peer names this keypair.
    pub sender_index: SenderIndex,
    /// The peer's index, which we write into every header.
    pub receiver_index: ReceiverIndex,
    /// True if we sent the initiation.
    pub initiator: bool,
}

/// A datagram that is sealed in place: 16 bytes for the header, the padded packet, and 16 bytes for the tag.
pub struct SealJob<'b> {
    /// The keypair that seals it.
    pub keypair: &'b Keypair,
    /// Its nonce, which is of this keypair and used once.
    pub counter: u64,
    /// At least 32 bytes, with a packet of at most [`MAX_INNER_LEN`].
    pub datagram: &'b mut [u8],
    /// Set to whether it was sealed. If it was not, it is zeroed.
    pub is_sealed: &'b mut bool,
}

/// Seals datagrams, of any keypairs and lengths, and writes their headers. With a cache, single ones are sealed through it.
pub fn seal_batch<'b>(
    cache: Option<&mut KeystreamCache>,
    jobs: impl IntoIterator<Item = SealJob<'b>>,
) {
    let packets = jobs.into_iter().filter_map(SealJob::packet);
    match cache {
        Some(cache) => cache.seal_batch(packets),
        None => wgsep_aead::seal_batch(packets),
    }
}

impl<'b> SealJob<'b> {
    /// What is sealed, behind the header, which it writes.
    fn packet(self) -> Option<wgsep_aead::Packet<'b>> {
        let Self { keypair, counter, datagram, is_sealed } = self;
        *is_sealed = false;
        let max = TRANSPORT_HEADER_LEN + MAX_INNER_LEN + TAG_LEN;
        if !(TRANSPORT_HEADER_LEN + TAG_LEN..=max).contains(&datagram.len()) {
            datagram.fill(0);
            return None;
        }
        let parts = datagram.split_first_chunk_mut::<TRANSPORT_HEADER_LEN>();
        let (header, sealed) = present(parts, "its length was checked")?;
        let receiver_index = keypair.receiver_index;
        *header = TransportHeader { receiver_index, counter }.to_bytes();
        packet(&keypair.sending, counter, sealed, is_sealed)
    }
}

/// A transport message that is opened in place.
pub struct OpenJob<'b> {
    /// The keypair that its receiver index names.
    pub keypair: &'b Keypair,
    /// The counter of its header.
    pub counter: u64,
    /// What follows the header: the packet and 16 bytes of tag. If it does not open, the packet is zeroed.
    pub sealed: &'b mut [u8],
    /// Set to whether it opened.
    pub is_authentic: &'b mut bool,
}

/// Opens messages, of any keypairs and lengths. With a cache, single ones are opened through it.
pub fn open_batch<'b>(
    cache: Option<&mut KeystreamCache>,
    jobs: impl IntoIterator<Item = OpenJob<'b>>,
) {
    let packets = jobs.into_iter().filter_map(OpenJob::packet);
    match cache {
        Some(cache) => cache.open_batch(packets),
        None => wgsep_aead::open_batch(packets),
    }
}

impl<'b> OpenJob<'b> {
    fn packet(self) -> Option<wgsep_aead::Packet<'b>> {
        let Self { keypair, counter, sealed, is_authentic } = self;
        packet(&keypair.receiving, counter, sealed, is_authentic)
    }
}

/// A packet and its tag behind it; `None` if there is not even the tag, for which `done` is set to false.
fn packet<'b>(
    key: &'b wgsep_aead::Key,
    counter: u64,
    sealed: &'b mut [u8],
    done: &'b mut bool,
) -> Option<wgsep_aead::Packet<'b>> {
    *done = false;
    let (text, tag) = sealed.split_last_chunk_mut::<TAG_LEN>()?;
    Some(wgsep_aead::Packet { key, nonce: nonce(counter), text, tag, done })
}

/// Four zero bytes, then the counter, little-endian (whitepaper, section 5.4.6).
fn nonce(counter: u64) -> [u8; wgsep_aead::NONCE_LEN] {
    let [a, b, c, d, e, f, g, h] = counter.to_le_bytes();
    [0, 0, 0, 0, a, b, c, d, e, f, g, h]
}

impl Keypair {
    /// Creates a keypair whose age counts from `now`.
    #[must_use]
    pub fn new(parts: &KeypairParts, now: Instant) -> Self {
        Self::with_rekey_after_time(parts, REKEY_AFTER_TIME, now)
    }

    /// As [`Self::new`], with another age than [`REKEY_AFTER_TIME`] at which its initiator starts the next handshake.
    #[must_use]
    pub(crate) fn with_rekey_after_time(
        parts: &KeypairParts,
        rekey_after_time: Duration,
        now: Instant,
    ) -> Self {
        Self {
            sending: Secret::new(wgsep_aead::Key::new(&parts.sending)),
            receiving: Secret::new(wgsep_aead::Key::new(&parts.receiving)),
            sending_counter: AtomicU64::new(0),
            sending_valid: AtomicBool::new(true),
            replay: in_ordinary_memory(Box::default),
            created: now,
            rekey_after_time,
            initiator: parts.initiator,
            sender_index: parts.sender_index,
            receiver_index: parts.receiver_index,
        }
    }

    /// Our index.
    #[must_use]
    pub const fn sender_index(&self) -> SenderIndex {
        self.sender_index
    }

    /// True once the keypair is `age` old or older.
    fn is_older_than(&self, age: Duration, now: Instant) -> bool {
        now.since(self.created) >= age
    }

    /// True while the keypair may seal.
    #[must_use]
    pub fn can_send(&self, now: Instant) -> bool {
        self.sending_valid.load(Ordering::Acquire)
            && !self.is_older_than(REJECT_AFTER_TIME, now)
            && self.sending_counter.load(Ordering::Relaxed) < REJECT_AFTER_MESSAGES
    }

    /// Takes `count` consecutive nonces, all of them or none; returns the first.
    ///
    /// `None` means the keypair can send no more, and it then never will.
    #[must_use]
    pub fn assign_nonces(&self, count: u64, now: Instant) -> Option<u64> {
        if !self.can_send(now) {
            self.invalidate_sending();
            return None;
        }
        let taken =
            self.sending_counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                next.checked_add(count).filter(|end| *end <= REJECT_AFTER_MESSAGES)
            });
        if taken.is_err() {
            self.invalidate_sending();
        }
        taken.ok()
    }

    /// Ends sealing with this keypair.
    pub fn invalidate_sending(&self) {
        self.sending_valid.store(false, Ordering::Release);
    }

    /// After sending: is it time for a new handshake? (kernel send.c, keep_key_fresh)
    #[must_use]
    pub fn wants_rekey_after_send(&self, now: Instant) -> bool {
        self.sending_valid.load(Ordering::Acquire)
            && (self.sending_counter.load(Ordering::Relaxed) > REKEY_AFTER_MESSAGES
                || (self.initiator && self.is_older_than(self.rekey_after_time, now)))
    }

    /// After receiving: must the initiator start a new handshake early? (kernel receive.c, keep_key_fresh)
    #[must_use]
    pub fn wants_rekey_after_receive(&self, age: Duration, now: Instant) -> bool {
        self.initiator && self.sending_valid.load(Ordering::Acquire) && self.is_older_than(age, now)
    }

    /// True if a message with this counter may be opened: the keypair is not too old, nor the counter past its end.
    #[must_use]
    pub fn can_receive(&self, counter: u64, now: Instant) -> bool {
        counter < REJECT_AFTER_MESSAGES && !self.is_older_than(REJECT_AFTER_TIME, now)
    }

    /// The window that authenticated counters are to be passed to.
    pub(crate) fn replay_window(&self) -> MutexGuard<'_, ReplayWindow> {
        self.replay.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The keypair for another process, which may send with it only once this one no longer does.
    #[cfg(feature = "internals")]
    pub(crate) fn save(&self) -> saved::Keypair {
        let Self { sending, receiving, sending_counter, sending_valid, .. } = self;
        let Self { created, initiator, sender_index, receiver_index, .. } = self;
        let (replay_next, replay_seen) = self.replay_window().save();
        saved::Keypair {
            sending: Secret::new(*sending.as_bytes()),
            receiving: Secret::new(*receiving.as_bytes()),
            sending_counter: sending_counter.load(Ordering::Relaxed),
            sending_valid: sending_valid.load(Ordering::Acquire),
            replay_next,
            replay_seen,
            created: created.as_nanos(),
            initiator: *initiator,
            sender_index: *sender_index,
            receiver_index: *receiver_index,
        }
    }

    /// The keypair that [`Self::save`] returned; `None` if its replay window is not one.
    #[cfg(feature = "internals")]
    pub(crate) fn restore(saved: &saved::Keypair) -> Option<Self> {
        let replay = ReplayWindow::restore(saved.replay_next, &saved.replay_seen)?;
        Some(Self {
            sending: Secret::new(wgsep_aead::Key::new(&saved.sending)),
            receiving: Secret::new(wgsep_aead::Key::new(&saved.receiving)),
            sending_counter: AtomicU64::new(saved.sending_counter),
            sending_valid: AtomicBool::new(saved.sending_valid),
            replay: in_ordinary_memory(|| Box::new(Mutex::new(replay))),
            created: Instant::from_nanos(saved.created),
            rekey_after_time: REKEY_AFTER_TIME,
            initiator: saved.initiator,
            sender_index: saved.sender_index,
            receiver_index: saved.receiver_index,
        })
    }

    /// The peer's index.
    #[cfg(test)]
    pub(crate) const fn receiver_index(&self) -> ReceiverIndex {
        self.receiver_index
    }

    #[cfg(test)]
    pub(crate) fn set_sending_counter(&self, counter: u64) {
        self.sending_counter.store(counter, Ordering::Relaxed);
    }
}

/// A peer's keypairs: the previous one, the one in use, and the one that the peer has yet to confirm.
#[derive(Default)]
pub struct Keypairs {
    /// Still opens messages that were sent before the current one was created.
    pub previous: Option<Arc<Keypair>>,
    /// Seals and opens.
    pub current: Option<Arc<Keypair>>,
    /// We responded; opens only, until the initiator has used it.
    pub next: Option<Arc<Keypair>>,
}

/// Keypairs that lost their slot; the caller releases their indices.
pub type Displaced = [Option<Arc<Keypair>>; 2];

impl Keypairs {
    /// True if we seal, or recently sealed, messages with this receiver index.
    #[must_use]
    pub fn seals_for(&self, index: ReceiverIndex) -> bool {
        let mut sealing = [&self.current, &self.previous].into_iter().flatten();
        sealing.any(|keypair| keypair.receiver_index == index)
    }

    /// Puts a new keypair into its slot by the kernel's rules (noise.c, add_new_keypair).
    pub fn add(&mut self, keypair: Arc<Keypair>) -> Displaced {
        if keypair.initiator {
            // A `next` means that both sides initiated: it replaces the previous keypair, in case the peer
            // uses it, and the old current one is displaced.
            let old_previous = self.previous.take();
            let old_current = self.current.replace(keypair);
            let Some(next) = self.next.take() else {
                self.previous = old_current;
                return [old_previous, None];
            };
            self.previous = Some(next);
            [old_previous, old_current]
        } else {
            [self.next.replace(keypair), self.previous.take()]
        }
    }

    /// Handles an authenticated message of `keypair`: if that is the unconfirmed one, it becomes the current
    /// one, and the displaced keypairs are returned in `Some`.
    pub fn received_with_keypair(&mut self, keypair: &Arc<Keypair>) -> Option<Displaced> {
        if !self.next.as_ref().is_some_and(|next| Arc::ptr_eq(next, keypair)) {
            return None;
        }
        let displaced = self.previous.take();
        self.previous = self.current.take();
        self.current = self.next.take();
        Some([displaced, None])
    }

    /// Removes and returns all three.
    pub fn clear(&mut self) -> [Option<Arc<Keypair>>; 3] {
        [self.previous.take(), self.current.take(), self.next.take()]
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn keypair(sender_index: u32, initiator: bool) -> Arc<Keypair> {
        let parts = KeypairParts {
            sending: Secret::new([1; 32]),
            receiving: Secret::new([1; 32]),
            sender_index,
            receiver_index: 0,
            initiator,
        };
        Arc::new(Keypair::new(&parts, Instant::from_nanos(0)))
    }

    fn slots(keypairs: &Keypairs) -> [Option<u32>; 3] {
        [&keypairs.previous, &keypairs.current, &keypairs.next]
            .map(|k| k.as_ref().map(|k| k.sender_index))
    }

    fn indices(displaced: &Displaced) -> Vec<u32> {
        displaced.iter().flatten().map(|k| k.sender_index).collect()
    }

    #[test]
    fn initiators_keypairs_move_from_current_to_previous() {
        let mut keypairs = Keypairs::default();
        assert!(indices(&keypairs.add(keypair(1, true))).is_empty());
        assert!(indices(&keypairs.add(keypair(2, true))).is_empty());
        assert_eq!(slots(&keypairs), [Some(1), Some(2), None]);
        assert_eq!(indices(&keypairs.add(keypair(3, true))), [1]);
        assert_eq!(slots(&keypairs), [Some(2), Some(3), None]);
    }

    #[test]
    fn responders_keypair_waits_in_next_until_used() {
        let mut keypairs = Keypairs::default();
        let unconfirmed = keypair(1, false);
        keypairs.add(Arc::clone(&unconfirmed));
        assert_eq!(slots(&keypairs), [None, None, Some(1)]);
        assert!(keypairs.received_with_keypair(&keypair(1, false)).is_none());
        assert!(keypairs.received_with_keypair(&unconfirmed).is_some());
        assert_eq!(slots(&keypairs), [None, Some(1), None]);
        assert!(keypairs.received_with_keypair(&unconfirmed).is_none());
        assert!(indices(&keypairs.add(keypair(2, false))).is_empty());
        assert_eq!(indices(&keypairs.add(keypair(3, false))), [2]);
        assert_eq!(slots(&keypairs), [None, Some(1), Some(3)]);
    }

    #[test]
    fn simultaneous_initiation_keeps_next_as_previous() {
        let mut keypairs = Keypairs::default();
        keypairs.add(keypair(1, true));
        keypairs.add(keypair(2, true));
        keypairs.add(keypair(3, false));
        assert_eq!(slots(&keypairs), [None, Some(2), Some(3)]);
        assert_eq!(indices(&keypairs.add(keypair(4, true))), [2]);
        assert_eq!(slots(&keypairs), [Some(3), Some(4), None]);
    }

    #[test]
    fn nonces_end_exactly_at_the_limit_for_good() {
        let now = Instant::from_nanos(0);
        let keypair = keypair(1, true);
        keypair.set_sending_counter(REJECT_AFTER_MESSAGES - 3);
        assert_eq!(keypair.assign_nonces(2, now), Some(REJECT_AFTER_MESSAGES - 3));
        assert_eq!(keypair.assign_nonces(1, now), Some(REJECT_AFTER_MESSAGES - 1));
        assert_eq!(keypair.assign_nonces(1, now), None);
        assert!(!keypair.can_send(now));
        assert!(!keypair.can_receive(REJECT_AFTER_MESSAGES, now));
        assert!(keypair.can_receive(REJECT_AFTER_MESSAGES - 1, now));
    }

    #[test]
    fn a_keypair_dies_at_180_seconds_both_ways() {
        let keypair = keypair(1, true);
        let just_before = Instant::from_nanos(REJECT_AFTER_TIME.as_nanos() as u64 - 1);
        let at = Instant::from_nanos(REJECT_AFTER_TIME.as_nanos() as u64);
        assert!(keypair.can_send(just_before) && !keypair.can_send(at));
        assert!(keypair.can_receive(0, just_before) && !keypair.can_receive(0, at));
    }

    #[test]
    fn what_is_sealed_opens_with_its_key_and_counter_alone() {
        let keypair = keypair(1, true);
        for len in [0, 16, 1420, MAX_INNER_LEN] {
            let mut datagram = vec![7; TRANSPORT_HEADER_LEN + len + TAG_LEN];
            let mut is_sealed = false;
            let job = SealJob {
                keypair: &keypair,
                counter: 5,
                datagram: &mut datagram,
                is_sealed: &mut is_sealed,
            };
            seal_batch(None, [job]);
            assert!(is_sealed);
            let header = TransportHeader { receiver_index: 0, counter: 5 };
            assert_eq!(datagram[..TRANSPORT_HEADER_LEN], header.to_bytes());
            for counter in [4, 5] {
                let mut sealed = datagram[TRANSPORT_HEADER_LEN..].to_vec();
                let mut is_authentic = false;
                let job = OpenJob {
                    keypair: &keypair,
                    counter,
                    sealed: &mut sealed,
                    is_authentic: &mut is_authentic,
                };
                open_batch(None, [job]);
                assert_eq!(is_authentic, counter == 5);
                let expected = if is_authentic { 7 } else { 0 };
                assert!(sealed[..len].iter().all(|byte| *byte == expected));
            }
        }
    }

    #[test]
    fn what_is_too_short_or_too_long_is_neither_sealed_nor_opened() {
        let keypair = keypair(1, true);
        let longest = TRANSPORT_HEADER_LEN + MAX_INNER_LEN + TAG_LEN;
        for len in [0, TRANSPORT_HEADER_LEN + TAG_LEN - 1, longest + 1] {
            let (mut datagram, mut is_sealed) = (vec![7; len], true);
            let job = SealJob {
                keypair: &keypair,
                counter: 5,
                datagram: &mut datagram,
                is_sealed: &mut is_sealed,
            };
            seal_batch(None, [job]);
            assert_eq!((is_sealed, datagram), (false, vec![0; len]), "no plaintext is left");
        }
        let mut is_authentic = true;
        let sealed = &mut [0; TAG_LEN - 1];
        open_batch(
            None,
            [OpenJob { keypair: &keypair, counter: 5, sealed, is_authentic: &mut is_authentic }],
        );
        assert!(!is_authentic);
    }

    #[test]
    fn only_the_initiator_rekeys_by_age_both_by_count() {
        let at = Instant::from_nanos(REKEY_AFTER_TIME.as_nanos() as u64);
        let before = Instant::from_nanos(REKEY_AFTER_TIME.as_nanos() as u64 - 1);
        assert!(keypair(1, true).wants_rekey_after_send(at));
        assert!(!keypair(1, true).wants_rekey_after_send(before));
        let responder = keypair(1, false);
        assert!(!responder.wants_rekey_after_send(at));
        responder.set_sending_counter(REKEY_AFTER_MESSAGES);
        assert!(!responder.wants_rekey_after_send(before));
        responder.set_sending_counter(REKEY_AFTER_MESSAGES + 1);
        assert!(responder.wants_rekey_after_send(before));
    }
}
