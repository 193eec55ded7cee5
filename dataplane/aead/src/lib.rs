//! ChaCha20-Poly1305 (RFC 8439, without associated data) for batches of packets, and for single ones.
//!
//! On x86-64 processors with AVX-512 (F, BW, IFMA and VBMI2) and BMI2, up to eight packets at once are sealed or opened, of any
//! keys, nonces and lengths. Too few packets for that, fewer than two to eight depending on their lengths, go one by one, with the
//! blocks of a packet side by side. On other processors all packets go one by one through ring, or without the feature
//! `ring` through chacha20poly1305, and adjacent packets of one key share its expansion.
//!
//! A sender or a receiver of single packets can use [`KeystreamCache`], which computes the keystream of the packets that come next.
//!
//! The vector code is constant in time by construction: no branch, index or shift depends on keys, plaintext or tags.
//! The lengths of packets are public.
//!
//! [`Key`] and [`KeystreamCache`] are erased on drop. The vector code zeroes the vector registers and erases the rows that have the key; not what is
//! left in general registers, and of one-time keys and keystream on the stack. Through ring and chacha20poly1305, a call
//! may leave the key itself there. A program that cares wipes the stack once a key is no longer used.

#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
mod avx512;
#[cfg(not(all(target_arch = "x86_64", feature = "avx512")))]
#[path = "no_vectors.rs"]
mod avx512;
mod single;

use arrayvec::ArrayVec;
use avx512::{Keystream, Vectors};
use core::sync::atomic::{AtomicU8, Ordering};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Length of a key, in bytes.
pub const KEY_LEN: usize = 32;
/// Length of a nonce, in bytes.
pub const NONCE_LEN: usize = 12;
/// Length of a tag, in bytes.
pub const TAG_LEN: usize = 16;

/// Packets that vectors seal or open at once.
const PACKETS: usize = 8;
/// Packets that are collected before they are processed.
const BATCH: usize = 32;
/// Texts that are longer, in bytes, go one by one; their block counters might overflow a lane.
const LONGEST: usize = 1 << 24;

/// A key, erased on drop.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct Key([u8; KEY_LEN]);

impl Key {
    /// The key of these bytes.
    #[must_use]
    pub const fn new(bytes: &[u8; KEY_LEN]) -> Self {
        Self(*bytes)
    }

    /// Its bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }
}

/// A packet that is sealed or opened in place.
pub struct Packet<'p> {
    /// Its key.
    pub key: &'p Key,
    /// Its nonce, which must not be used twice to seal with the same key.
    pub nonce: [u8; NONCE_LEN],
    /// Plaintext, which becomes ciphertext, or the reverse.
    pub text: &'p mut [u8],
    /// Written when the packet is sealed, and compared when it is opened.
    pub tag: &'p mut [u8; TAG_LEN],
    /// Set to true when the packet was sealed, or was authentic; otherwise to false, and the text is zeroed.
    pub done: &'p mut bool,
}

impl Packet<'_> {
    fn set_opened(&mut self, is_authentic: bool) {
        *self.done = is_authentic;
        if !is_authentic {
            self.text.fill(0);
        }
    }
}

/// Encrypts a packet and writes its tag.
#[inline]
pub fn seal(mut packet: Packet<'_>) {
    single::seal(vectors(), None, &mut packet);
}

/// Decrypts a packet and verifies its tag. A text that is not authentic is zeroed.
#[inline]
pub fn open(mut packet: Packet<'_>) {
    single::open(vectors(), None, &mut packet);
}

/// Encrypts the packets and writes their tags.
#[inline]
pub fn seal_batch<'p>(packets: impl IntoIterator<Item = Packet<'p>>) {
    seal_each(packets, None);
}

/// Decrypts the packets and verifies their tags. The text of a packet that is not authentic is zeroed.
#[inline]
pub fn open_batch<'p>(packets: impl IntoIterator<Item = Packet<'p>>) {
    open_each(packets, None);
}

/// Keystream that is computed ahead, for a sender or a receiver of single packets: with vectors, that of several short packets
/// takes little longer than that of one.
///
/// It is computed once a packet follows the one before it: with the same key, and a nonce whose last eight bytes, little-endian, are
/// greater by one. It is that of as many packets as have room in 1,536 bytes, each rounded up to 64 bytes and with 64 more for
/// its one-time key: of 12 packets of up to 64 bytes, or of two of up to 704. The packet with which it is computed takes up to a third
/// longer than by [`seal`] and [`open`], and up to twice as long if it is shorter than 32 bytes; those that use it take 0.3 (64 bytes) to 0.7 times as long, and all others, every
/// packet without vectors included, as long.
///
/// What is computed, and when, depends on nonces, lengths and the packets that have the same key. The cache is as secret as the
/// key, of which it has a copy, and what is moved leaves a copy behind: keep it in a `Box`. It is erased on drop, and by [`Zeroize::zeroize`] when a
/// key is no longer used.
#[derive(Default, Zeroize, ZeroizeOnDrop)]
pub struct KeystreamCache(Keystream);

impl KeystreamCache {
    /// As [`seal_batch`]: single packets, and up to six that follow one another, are sealed with the keystream that was computed ahead.
    #[inline]
    pub fn seal_batch<'p>(&mut self, packets: impl IntoIterator<Item = Packet<'p>>) {
        seal_each(packets, Some(&mut self.0));
    }

    /// As [`open_batch`]: single packets, and up to six that follow one another, are opened with the keystream that was computed ahead.
    #[inline]
    pub fn open_batch<'p>(&mut self, packets: impl IntoIterator<Item = Packet<'p>>) {
        open_each(packets, Some(&mut self.0));
    }

    /// True if it has neither a key nor keystream: before the first packet that went through vectors, and after [`Zeroize::zeroize`].
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Seals packets in groups, and those that are too few for one singly, with what was computed ahead.
#[inline]
fn seal_each<'p>(packets: impl IntoIterator<Item = Packet<'p>>, keystream: Option<&mut Keystream>) {
    let seal_group = |vectors: Vectors, group: &mut [Packet<'_>]| {
        let tags = vectors.seal(&mut lanes(group));
        for (packet, tag) in group.iter_mut().zip(tags) {
            *packet.tag = tag;
            *packet.done = true;
        }
    };
    each_group(packets, keystream, seal_group, single::seal, single::seal_without_vectors);
}

/// Opens packets in groups, and those that are too few for one singly, with what was computed ahead.
#[inline]
fn open_each<'p>(packets: impl IntoIterator<Item = Packet<'p>>, keystream: Option<&mut Keystream>) {
    let open_group = |vectors: Vectors, group: &mut [Packet<'_>]| {
        let tags = vectors.open(&mut lanes(group));
        for (packet, tag) in group.iter_mut().zip(tags) {
            packet.set_opened(equal(packet.tag, &tag));
        }
    };
    each_group(packets, keystream, open_group, single::open, single::open_without_vectors);
}

/// Compares two tags, or two keys, in constant time.
fn equal<const LEN: usize>(a: &[u8; LEN], b: &[u8; LEN]) -> bool {
    const { assert!(LEN.is_multiple_of(16)) };
    let (a, b) = (a.as_chunks().0.iter(), b.as_chunks().0.iter());
    let differences = a.zip(b).map(|(a, b)| u128::from_ne_bytes(*a) ^ u128::from_ne_bytes(*b));
    core::hint::black_box(differences.fold(0, core::ops::BitOr::bitor)) == 0
}

/// Has a single packet processed at once, and more in groups.
#[inline]
fn each_group<'p>(
    packets: impl IntoIterator<Item = Packet<'p>>,
    keystream: Option<&mut Keystream>,
    group: impl FnMut(Vectors, &mut [Packet<'p>]),
    single: impl Fn(Option<Vectors>, Option<&mut Keystream>, &mut Packet<'p>),
    without_vectors: impl Fn(&mut [Packet<'p>]),
) {
    let mut packets = packets.into_iter();
    let Some(mut first) = packets.next() else { return };
    match packets.next() {
        None => single(vectors(), keystream, &mut first),
        Some(second) => {
            each_of_several(first, second, packets, keystream, group, single, without_vectors);
        }
    }
}

/// Has packets of similar lengths processed in groups, and those that are too few for one singly.
#[inline(never)]
fn each_of_several<'p>(
    first: Packet<'p>,
    second: Packet<'p>,
    mut packets: impl Iterator<Item = Packet<'p>>,
    mut keystream: Option<&mut Keystream>,
    mut group: impl FnMut(Vectors, &mut [Packet<'p>]),
    single: impl Fn(Option<Vectors>, Option<&mut Keystream>, &mut Packet<'p>),
    without_vectors: impl Fn(&mut [Packet<'p>]),
) {
    let vectors = vectors();
    let mut batch = ArrayVec::<_, BATCH>::new();
    batch.push(first);
    batch.push(second);
    loop {
        batch.extend(packets.by_ref().take(batch.remaining_capacity()));
        let Some(first) = batch.first() else { return };
        let Some(vectors) = vectors else {
            without_vectors(&mut batch);
            batch.clear();
            continue;
        };
        let len = first.text.len();
        if batch.iter().any(|packet| packet.text.len() != len) {
            // A group takes as long as its longest packet.
            batch.sort_unstable_by_key(|packet| packet.text.len());
        }
        for packets in batch.chunks_mut(PACKETS) {
            let longest = packets.iter().map(|packet| packet.text.len()).max().unwrap_or(0);
            let is_ahead = packets.len() < LEAST_AHEAD
                && keystream.as_ref().is_some_and(|keystream| keystream.is_ahead_of(packets));
            if packets.len() >= least(longest) && longest <= LONGEST && !is_ahead {
                group(vectors, packets);
                if let (Some(keystream), Some(last)) = (&mut keystream, packets.last()) {
                    vectors.follow(keystream, &last.key.0, single::nonce_words(&last.nonce));
                }
            } else {
                for packet in packets {
                    single(Some(vectors), keystream.as_deref_mut(), packet);
                }
            }
        }
        batch.clear();
    }
}

/// Packets from which on a group is faster than one packet after the other, if the longest has this length in bytes: a group
/// takes as long as if it were full, and a single packet little longer than half as many blocks (measured on Zen 5).
const fn least(longest: usize) -> usize {
    let least = match longest.div_ceil(64) {
        0 | 1 => 2,
        blocks => 3 + blocks / 4,
    };
    if least < PACKETS { least } else { PACKETS }
}

/// Packets from which on a group is faster than single packets whose keystream was computed ahead (measured on Zen 5).
const LEAST_AHEAD: usize = 7;

/// The tags of the packets of a group.
type Tags = [[u8; TAG_LEN]; PACKETS];

/// A packet of a group, which is encrypted or decrypted in place.
#[cfg_attr(not(all(target_arch = "x86_64", feature = "avx512")), expect(dead_code))]
struct Lane<'p> {
    key: &'p [u8; KEY_LEN],
    nonce: [u8; NONCE_LEN],
    text: &'p mut [u8],
}

impl<'p> Lane<'p> {
    /// A lane without a packet; one key for all lanes is faster than several.
    fn unused(key: &'p [u8; KEY_LEN]) -> Self {
        Self { key, nonce: [0; NONCE_LEN], text: &mut [] }
    }
}

/// A lane for each packet of a group; the others are unused.
fn lanes<'g>(group: &'g mut [Packet<'_>]) -> [Lane<'g>; PACKETS] {
    let first = group.first().map_or(&[0; KEY_LEN], |packet| &packet.key.0);
    let mut packets = group.iter_mut();
    core::array::from_fn(|_| match packets.next() {
        Some(Packet { key, nonce, text, .. }) => Lane { key: &key.0, nonce: *nonce, text },
        None => Lane::unused(first),
    })
}

/// Whether packets go through vectors: 0 until it is known, and then one of the two others.
static USE: AtomicU8 = AtomicU8::new(0);
const WITHOUT: u8 = 1;
const WITH: u8 = 2;

/// Has every packet of this process sealed and opened singly from now on, without vector code of this crate.
pub fn disable_vectors() {
    USE.store(WITHOUT, Ordering::Relaxed);
}

/// True if packets are sealed and opened with vectors.
#[must_use]
pub fn uses_vectors() -> bool {
    vectors().is_some()
}

fn vectors() -> Option<Vectors> {
    match USE.load(Ordering::Relaxed) {
        WITHOUT => None,
        WITH => Vectors::detect(),
        _ => {
            let detected = Vectors::detect();
            let found = if detected.is_some() { WITH } else { WITHOUT };
            // Unless it has been disabled meanwhile.
            let _ = USE.compare_exchange(0, found, Ordering::Relaxed, Ordering::Relaxed);
            detected
        }
    }
}
