//! Batches and single packets agree with ring and with chacha20poly1305, and refuse what these refuse.
//!
//! `make miri` interprets the vector code of the tests of every length and number, less often, and without ring, which
//! it cannot run.
#![allow(clippy::unwrap_used)]

mod dice;

use chacha20poly1305::aead::AeadInOut;
use chacha20poly1305::aead::inout::InOutBuf;
use chacha20poly1305::{ChaCha20Poly1305, KeyInit};
use dice::Dice;
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use std::num::NonZeroUsize;
use wgsep_aead::{
    KEY_LEN, Key, KeystreamCache, NONCE_LEN, Packet, TAG_LEN, open_batch, seal_batch,
};

/// Of how many cases one is tried: the interpreter is some thousand times as slow as the processor.
const STEP: usize = if cfg!(miri) { 500 } else { 1 };

fn below(dice: &mut Dice, bound: usize) -> usize {
    (dice.roll() % bound as u64) as usize
}

/// A packet with its own memory.
#[derive(Clone)]
struct Sample {
    key: [u8; KEY_LEN],
    nonce: [u8; NONCE_LEN],
    text: Vec<u8>,
    tag: [u8; TAG_LEN],
    done: bool,
}

impl Sample {
    fn new(dice: &mut Dice, len: usize) -> Self {
        let (key, nonce) = (dice.bytes(), dice.bytes());
        let text = (0..len).map(|_| dice.roll() as u8).collect();
        Self { key, nonce, text, tag: [0; TAG_LEN], done: false }
    }

    fn sealed_by_ring(&self) -> (Vec<u8>, [u8; TAG_LEN]) {
        let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &self.key).unwrap());
        let nonce = Nonce::assume_unique_for_key(self.nonce);
        let mut text = self.text.clone();
        let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut text).unwrap();
        (text, tag.as_ref().try_into().unwrap())
    }

    /// Ciphertext and tag by chacha20poly1305, which ring agrees with.
    fn expected(&self) -> (Vec<u8>, [u8; TAG_LEN]) {
        let mut text = self.text.clone();
        let cipher = ChaCha20Poly1305::new(&self.key.into());
        let tag = cipher
            .encrypt_inout_detached(&self.nonce.into(), &[], InOutBuf::from(&mut *text))
            .unwrap()
            .into();
        if !cfg!(miri) {
            assert_eq!((text.clone(), tag), self.sealed_by_ring());
        }
        (text, tag)
    }
}

/// How packets are sealed and opened.
#[derive(Clone, Copy, Debug)]
enum Way {
    Batch,
    Singly,
}

const WAYS: [Way; 2] = [Way::Batch, Way::Singly];

impl Way {
    fn seal(self, packets: Vec<Packet<'_>>) {
        match self {
            Self::Batch => seal_batch(packets),
            Self::Singly => packets.into_iter().for_each(wgsep_aead::seal),
        }
    }

    fn open(self, packets: Vec<Packet<'_>>) {
        match self {
            Self::Batch => open_batch(packets),
            Self::Singly => packets.into_iter().for_each(wgsep_aead::open),
        }
    }
}

fn run(samples: &mut [Sample], process: impl FnOnce(Vec<Packet<'_>>)) {
    let keys: Vec<_> = samples.iter().map(|sample| Key::new(&sample.key)).collect();
    let packets = samples.iter_mut().zip(&keys).map(|(sample, key)| Packet {
        key,
        nonce: sample.nonce,
        text: &mut sample.text,
        tag: &mut sample.tag,
        done: &mut sample.done,
    });
    process(packets.collect());
}

fn seal(samples: &mut [Sample], way: Way) {
    run(samples, |packets| way.seal(packets));
}

fn open(samples: &mut [Sample], way: Way) {
    run(samples, |packets| way.open(packets));
}

/// Seals and opens the samples, and compares.
#[track_caller]
fn assert_agreement(samples: &[Sample]) {
    for way in WAYS {
        let mut ours = samples.to_vec();
        seal(&mut ours, way);
        for (ours, plain) in ours.iter().zip(samples) {
            let (text, tag) = plain.expected();
            let len = text.len();
            assert!(ours.done && ours.text == text && ours.tag == tag, "length {len}, {way:?}");
        }
        ours.iter_mut().for_each(|sample| sample.done = false);
        open(&mut ours, way);
        for (ours, plain) in ours.iter().zip(samples) {
            let len = plain.text.len();
            assert!(ours.done && ours.text == plain.text, "length {len}, {way:?}");
        }
    }
}

#[test]
fn every_length_agrees() {
    let mut dice = Dice(1);
    for len in (0..=2048).step_by(STEP) {
        let samples: Vec<_> = (0..8).map(|_| Sample::new(&mut dice, len)).collect();
        assert_agreement(&samples);
    }
}

/// Those around the ends of the passes that a longer text takes.
#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn lengths_of_several_passes_agree() {
    let mut dice = Dice(7);
    for passes in 1..4 {
        for len in (0..300).map(|above| 1280 + 1536 * passes + above) {
            assert_agreement(&[Sample::new(&mut dice, len)]);
        }
    }
    assert_agreement(&[Sample::new(&mut dice, 65_535)]);
}

#[test]
fn mixtures_of_lengths_keys_and_nonces_agree() {
    let mut dice = Dice(2);
    for _ in (0..2000).step_by(2 * STEP) {
        let longest = [1, 64, 130, 1500, 9000][below(&mut dice, if cfg!(miri) { 3 } else { 5 })];
        let count = below(&mut dice, 40);
        let mut samples: Vec<_> = (0..count)
            .map(|_| {
                let len = below(&mut dice, longest);
                Sample::new(&mut dice, len)
            })
            .collect();
        if below(&mut dice, 2) == 0 {
            // One key for all, as the packets to one peer have.
            let key = dice.bytes();
            samples.iter_mut().for_each(|sample| sample.key = key);
        }
        assert_agreement(&samples);
    }
}

#[test]
fn every_number_of_packets_agrees() {
    let mut dice = Dice(3);
    for count in (0..=100).step_by(STEP.div_ceil(20)) {
        let samples: Vec<_> = (0..count).map(|_| Sample::new(&mut dice, 100)).collect();
        assert_agreement(&samples);
    }
}

/// A changed packet fails, is zeroed, and leaves its neighbours alone.
#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn a_change_fails_its_packet_alone() {
    let mut dice = Dice(4);
    for (count, way) in
        [1, 4, 8, 13].map(|count| (count, Way::Batch)).into_iter().chain([(2, Way::Singly)])
    {
        for len in [0, 1, 16, 63, 64, 100, 256] {
            let plain: Vec<_> = (0..count).map(|_| Sample::new(&mut dice, len)).collect();
            let mut sealed = plain.clone();
            seal(&mut sealed, way);
            for bit in 0..8 * (len + TAG_LEN + KEY_LEN + NONCE_LEN) {
                let changed = bit % count;
                let mut samples = sealed.clone();
                let Sample { key, nonce, text, tag, .. } = &mut samples[changed];
                let bytes = key.iter_mut().chain(nonce).chain(tag).chain(text);
                *bytes.into_iter().nth(bit / 8).unwrap() ^= 1 << (bit % 8);
                open(&mut samples, way);
                for (i, (sample, plain)) in samples.iter().zip(&plain).enumerate() {
                    assert_eq!(sample.done, i != changed, "packet {i} of {count}, bit {bit}");
                    let zeroed = vec![0; len];
                    let expected = if sample.done { &plain.text } else { &zeroed };
                    assert_eq!(&sample.text, expected);
                }
            }
        }
    }
}

/// Has each sample processed by itself.
fn each(samples: &mut [Sample], mut process: impl FnMut(Packet<'_>)) {
    samples.iter_mut().for_each(|sample| {
        run(core::slice::from_mut(sample), |packets| packets.into_iter().for_each(&mut process));
    });
}

/// Seals and opens the samples one by one through a cache each, and compares. Returns the caches.
#[track_caller]
fn assert_cached_agreement(samples: &[Sample]) -> [KeystreamCache; 2] {
    let mut caches = [KeystreamCache::default(), KeystreamCache::default()];
    let mut ours = samples.to_vec();
    each(&mut ours, |packet| caches[0].seal_batch([packet]));
    for (number, (ours, plain)) in ours.iter().zip(samples).enumerate() {
        let len = plain.text.len();
        let is_same = (ours.text.clone(), ours.tag) == plain.expected();
        assert!(ours.done && is_same, "packet {number}, length {len}");
    }
    each(&mut ours, |packet| caches[1].open_batch([packet]));
    for (number, (ours, plain)) in ours.iter().zip(samples).enumerate() {
        let len = plain.text.len();
        assert!(ours.done && ours.text == plain.text, "packet {number}, length {len}");
    }
    caches
}

/// Packets of one key whose nonces count up.
fn sequence(dice: &mut Dice, lengths: impl IntoIterator<Item = usize>) -> Vec<Sample> {
    let (key, fixed, counter) = (dice.bytes(), dice.bytes::<4>(), dice.roll());
    let mut samples: Vec<_> = lengths.into_iter().map(|len| Sample::new(dice, len)).collect();
    for (number, sample) in (0..).zip(&mut samples) {
        sample.key = key;
        sample.nonce[..4].copy_from_slice(&fixed);
        sample.nonce[4..].copy_from_slice(&counter.wrapping_add(number).to_le_bytes());
    }
    samples
}

/// Enough packets of each length for keystream to be computed ahead twice.
#[test]
fn every_length_agrees_through_a_cache() {
    let mut dice = Dice(8);
    for len in (0..=800).step_by(STEP) {
        let samples = sequence(&mut dice, [len; 27]);
        let caches = assert_cached_agreement(&samples);
        assert!(caches.iter().all(|cache| cache.is_empty() != wgsep_aead::uses_vectors()));
    }
}

/// Lengths, keys and the fixed part of nonces that change between packets, and counters that repeat, jump and overflow.
#[test]
fn every_order_of_nonces_agrees_through_a_cache() {
    let mut dice = Dice(9);
    for _ in (0..300).step_by(STEP) {
        let longest = [64, 65, 300, 710, 1500][below(&mut dice, 5)];
        let count = if cfg!(miri) { 8 } else { 60 };
        let lengths: Vec<_> = (0..count).map(|_| below(&mut dice, longest + 1)).collect();
        let mut samples = sequence(&mut dice, lengths);
        let (keys, fixed): ([_; 2], [[u8; 4]; 2]) =
            ([dice.bytes(), dice.bytes()], [dice.bytes(), dice.bytes()]);
        let (mut key, mut part) = (0, 0);
        let mut counter = u64::MAX - below(&mut dice, 40) as u64;
        for sample in &mut samples {
            match below(&mut dice, 40) {
                0 => key = 1 - key,
                1 => part = 1 - part,
                2 | 3 => counter = counter.wrapping_sub(below(&mut dice, 15) as u64),
                4 | 5 => counter = counter.wrapping_add(below(&mut dice, 15) as u64),
                6 => counter = dice.roll(),
                _ => counter = counter.wrapping_add(1),
            }
            sample.key = keys[key];
            sample.nonce[..4].copy_from_slice(&fixed[part]);
            sample.nonce[4..].copy_from_slice(&counter.to_le_bytes());
        }
        let _caches = assert_cached_agreement(&samples);
    }
}

/// In batches of one to nine of a sequence, of which a few are processed singly.
#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn batches_of_every_number_agree_through_a_cache() {
    let mut dice = Dice(11);
    for longest in [32, 64, 300, 704, 1500] {
        for _ in 0..40 {
            let lengths: Vec<_> = (0..80).map(|_| below(&mut dice, longest + 1)).collect();
            let mut plain = sequence(&mut dice, lengths);
            if below(&mut dice, 4) == 0 {
                let at = below(&mut dice, 80);
                plain.swap(0, at);
            }
            let mut caches = [KeystreamCache::default(), KeystreamCache::default()];
            let mut ours = plain.clone();
            let mut rest = &mut ours[..];
            while !rest.is_empty() {
                let count = (1 + below(&mut dice, 9)).min(rest.len());
                let (batch, others) = rest.split_at_mut(count);
                run(batch, |packets| caches[0].seal_batch(packets));
                for (sample, number) in batch.iter().zip(80 - others.len() - count..) {
                    let (text, tag) = plain[number].expected();
                    assert!(sample.done && sample.text == text && sample.tag == tag, "{number}");
                }
                run(batch, |packets| caches[1].open_batch(packets));
                rest = others;
            }
            for (ours, plain) in ours.iter().zip(&plain) {
                assert!(ours.done && ours.text == plain.text);
            }
        }
    }
}

/// A packet that is forged takes no keystream from the one whose nonce it has.
#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn a_forged_packet_fails_through_a_cache_and_the_others_open() {
    let mut dice = Dice(10);
    for len in [0, 1, 64, 160, 161, 512, 704, 705] {
        let plain = sequence(&mut dice, [len; 30]);
        let mut sealed = plain.clone();
        each(&mut sealed, wgsep_aead::seal);
        let mut cache = KeystreamCache::default();
        for (sealed, plain) in sealed.into_iter().zip(&plain) {
            let mut copies = [sealed.clone(), sealed];
            let forged = &mut copies[0];
            let at = below(&mut dice, len + TAG_LEN);
            *forged.tag.iter_mut().chain(&mut forged.text).nth(at).unwrap() ^= 1;
            each(&mut copies, |packet| cache.open_batch([packet]));
            let [forged, genuine] = copies;
            assert!(!forged.done && forged.text == vec![0; len], "length {len}");
            assert!(genuine.done && genuine.text == plain.text, "length {len}");
        }
    }
}

/// Vectors of Project Wycheproof without associated data, each among packets of other lengths.
#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn wycheproof() {
    let mut dice = Dice(5);
    let set = wycheproof::aead::TestSet::load(wycheproof::aead::TestName::ChaCha20Poly1305);
    let mut run = 0;
    for group in set.unwrap().test_groups {
        if group.nonce_size != 8 * NONCE_LEN || group.tag_size != 8 * TAG_LEN {
            continue;
        }
        for test in group.tests.iter().filter(|test| test.aad.is_empty()) {
            let (Ok(key), Ok(nonce)) = (test.key[..].try_into(), test.nonce[..].try_into()) else {
                panic!("test {}: a key or nonce of another length", test.tc_id);
            };
            let tag = test.tag[..].try_into().unwrap();
            let vector = Sample { key, nonce, text: test.ct.to_vec(), tag, done: false };
            for (others, way) in
                [(0, Way::Singly), (0, Way::Batch), (3, Way::Batch), (11, Way::Batch)]
            {
                let mut samples: Vec<_> =
                    (0..others).map(|i| Sample::new(&mut dice, i * 40)).collect();
                seal(&mut samples, way);
                let at = below(&mut dice, others + 1);
                samples.insert(at, vector.clone());
                open(&mut samples, way);
                assert_eq!(samples[at].done, !test.result.must_fail(), "test {}", test.tc_id);
                if samples[at].done {
                    assert_eq!(samples[at].text, test.pt[..], "test {}", test.tc_id);
                }
                run += 1;
            }
        }
    }
    assert!(run > 100, "{run} only");
}

/// Texts that begin and end at pages beyond which nothing can be read or written.
#[test]
#[cfg_attr(miri, ignore = "the interpreter has no mprotect")]
fn nothing_beyond_a_packet_is_accessed() {
    // SAFETY: sysconf has no requirements.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap();
    let len = NonZeroUsize::new(3 * page).unwrap();
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping.
    let mapping = unsafe { mmap_anonymous(None, len, access, MapFlags::MAP_PRIVATE) }.unwrap();
    for guard in [0, 2 * page] {
        // SAFETY: within the mapping.
        let guard = unsafe { mapping.byte_add(guard) };
        // SAFETY: a page of the mapping that nothing refers to.
        unsafe { mprotect(guard, page, ProtFlags::PROT_NONE) }.unwrap();
    }
    // SAFETY: the middle page.
    let first = unsafe { mapping.byte_add(page) }.cast::<u8>();
    // SAFETY: the middle page can be read and written, and nothing else refers to it.
    let memory = unsafe { core::slice::from_raw_parts_mut(first.as_ptr(), page) };
    let mut dice = Dice(6);
    for len in (0..300).chain([1424, 1500, page]) {
        for start in [0, page - len] {
            let samples: Vec<_> = (0..8).map(|_| Sample::new(&mut dice, len)).collect();
            let keys: Vec<_> = samples.iter().map(|sample| Key::new(&sample.key)).collect();
            let ways = (0..8).map(|lane| (lane, Way::Batch)).chain([(0, Way::Singly)]);
            for (i, way) in ways {
                let sample = &samples[i];
                let (expected, expected_tag) = sample.expected();
                let text = &mut memory[start..start + len];
                text.copy_from_slice(&sample.text);
                let mut others: Vec<_> = (0..7).map(|_| Sample::new(&mut dice, len)).collect();
                let (mut tag, mut done) = ([0; TAG_LEN], false);
                let packet = Packet {
                    key: &keys[i],
                    nonce: sample.nonce,
                    text,
                    tag: &mut tag,
                    done: &mut done,
                };
                let mut packets: Vec<_> = others
                    .iter_mut()
                    .map(|other| Packet {
                        key: &keys[0],
                        nonce: other.nonce,
                        text: &mut other.text,
                        tag: &mut other.tag,
                        done: &mut other.done,
                    })
                    .collect();
                packets.insert(i, packet);
                way.seal(packets);
                assert!(done && tag == expected_tag && memory[start..start + len] == expected);

                let text = &mut memory[start..start + len];
                let (key, nonce) = (&keys[i], sample.nonce);
                way.open(vec![Packet { key, nonce, text, tag: &mut tag, done: &mut done }]);
                assert!(done && memory[start..start + len] == sample.text);
            }
        }
    }
    // SAFETY: the mapping, which nothing refers to any more.
    unsafe { munmap(mapping, 3 * page) }.unwrap();
}
