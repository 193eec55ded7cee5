//! Keys are erased, and what a call leaves on the stack has no part of a key. Other compilers and other options may store more there, so a
//! program that cares wipes its stack all the same.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::print_stdout)]

mod dice;

use core::hint::black_box;
use core::mem::ManuallyDrop;
use dice::Dice;
use std::collections::BTreeMap;
use wgsep_aead::{
    KEY_LEN, Key, KeystreamCache, NONCE_LEN, Packet, TAG_LEN, open_batch, seal_batch, uses_vectors,
};
use zeroize::Zeroize;

/// More than a call takes of the stack, in bytes.
const DEPTH: usize = 32 << 10;
/// A word of the cipher, in bytes. One may be there by chance, but not with two keys.
const WORD: usize = 4;

type Process = for<'k> fn(&mut Vec<Packet<'k>>);

/// How packets are processed. A build with debug assertions tries the first two only: in it, the compiler copies rows of a
/// batch to where nothing erases them.
const WAYS: [(&str, Process); 4] = [
    ("seal", |packets| packets.drain(..).for_each(wgsep_aead::seal)),
    ("open", |packets| packets.drain(..).for_each(wgsep_aead::open)),
    ("seal_batch", |packets| seal_batch(packets.drain(..))),
    ("open_batch", |packets| open_batch(packets.drain(..))),
];

/// Fills the stack below the caller, so that nothing of an earlier call is found there.
#[inline(never)]
fn fill_stack() {
    black_box(&mut [0x5a_u8; 2 * DEPTH]);
}

/// Copies what is on the stack below this function.
#[inline(always)]
fn copy_stack(copy: &mut [u8; DEPTH]) {
    // SAFETY: reads as many bytes below the stack pointer as the array has, which `fill_stack` wrote, and writes them to the
    // array.
    unsafe {
        core::arch::asm!(
            "lea rsi, [rsp - {depth}]",
            "rep movsb",
            depth = const DEPTH,
            inout("rcx") DEPTH => _,
            out("rsi") _,
            inout("rdi") copy.as_mut_ptr() => _,
            options(nostack, preserves_flags)
        );
    }
}

/// The number of words of the keys that are on the stack after a call.
#[inline(never)]
fn words_left(
    process: Process,
    packets: &mut Vec<Packet<'_>>,
    keys: &[Key],
    copy: &mut [u8; DEPTH],
) -> usize {
    fill_stack();
    process(packets);
    copy_stack(copy);
    words_in(copy, keys.iter().flat_map(Key::as_bytes))
}

/// The number of words of a secret that are among other bytes.
fn words_in<'s>(bytes: &[u8], secret: impl Iterator<Item = &'s u8>) -> usize {
    let secret: Vec<_> = secret.copied().collect();
    let is_found = |word: &&[u8]| bytes.windows(WORD).any(|bytes| bytes == *word);
    secret.chunks(WORD).filter(is_found).count()
}

#[test]
fn no_part_of_a_key_is_left_on_the_stack() {
    if !uses_vectors() {
        println!("skipped: this processor has no AVX-512 IFMA");
        return;
    }
    let mut dice = Dice(1);
    let mut copy = Box::new([0; DEPTH]);
    let mut left = BTreeMap::new();
    for len in (0..=1600).step_by(32).chain((1600..5000).step_by(64)) {
        for count in [1, 3, 8] {
            for (way, process) in &WAYS[..if cfg!(debug_assertions) { 2 } else { 4 }] {
                let words = [(); 2].map(|()| {
                    let key = |_| Key::new(&dice.bytes::<KEY_LEN>());
                    let keys: Vec<_> = (0..count).map(key).collect();
                    let mut texts = vec![vec![7; len]; count];
                    let mut tags = vec![[0; TAG_LEN]; count];
                    let mut done = vec![false; count];
                    let parts = keys.iter().zip(&mut texts).zip(&mut tags).zip(&mut done);
                    let packet = |(((key, text), tag), done)| {
                        let text: &mut Vec<u8> = text;
                        Packet { key, nonce: [1; NONCE_LEN], text, tag, done }
                    };
                    let mut packets: Vec<_> = parts.map(packet).collect();
                    words_left(*process, &mut packets, &keys, &mut copy)
                });
                if !words.contains(&0) {
                    left.insert((*way, count, len), words);
                }
            }
        }
    }
    assert!(left.is_empty(), "{left:?}");
}

/// Seals a packet of zeros, which becomes its keystream.
fn keystream(key: &Key, counter: u8, len: usize, seal: impl FnOnce(Packet<'_>)) -> Vec<u8> {
    let (mut text, mut nonce) = (vec![0; len], [1; NONCE_LEN]);
    nonce[4] = counter;
    let (text, tag, done) = (&mut text, &mut [0; TAG_LEN], &mut false);
    seal(Packet { key, nonce, text, tag, done });
    core::mem::take(text)
}

/// Neither of the key nor of the keystream of packets that are still to come.
#[test]
fn what_is_computed_ahead_is_in_the_cache_alone() {
    #[inline(never)]
    fn seal(cache: &mut KeystreamCache, key: &Key, len: usize, copy: &mut [u8; DEPTH]) {
        keystream(key, 1, len, |packet| cache.seal_batch([packet]));
        fill_stack();
        keystream(key, 2, len, |packet| cache.seal_batch([packet]));
        copy_stack(copy);
    }
    if !uses_vectors() || cfg!(debug_assertions) {
        println!("skipped: it takes AVX-512 IFMA and an optimised build");
        return;
    }
    let (mut dice, mut copy) = (Dice(2), Box::new([0; DEPTH]));
    for len in (16..=704).step_by(16) {
        let left = [(); 2].map(|()| {
            let key = Key::new(&dice.bytes());
            let mut cache = Box::<KeystreamCache>::default();
            seal(&mut cache, &key, len, &mut copy);
            let next = keystream(&key, 3, len, wgsep_aead::seal);
            assert_eq!(words_in(&bytes_of(&cache), next.iter()), len / WORD);
            assert_eq!(words_in(&bytes_of(&cache), key.as_bytes().iter()), KEY_LEN / WORD);
            words_in(&copy[..], next.iter().chain(key.as_bytes()))
        });
        assert!(left.contains(&0), "length {len}: {left:?}");
    }
}

/// Copies the memory of a cache, gaps between its fields included.
fn bytes_of(cache: &KeystreamCache) -> Vec<u8> {
    let len = size_of_val(cache);
    let mut copy = vec![0; len];
    // SAFETY: reads the memory of a reference and writes as many bytes to the vector.
    unsafe {
        core::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") core::ptr::from_ref(cache) => _,
            inout("rdi") copy.as_mut_ptr() => _,
            options(nostack, preserves_flags)
        );
    }
    copy
}

#[test]
fn keystream_is_erased_at_will_and_when_it_is_dropped() {
    let mut dice = Dice(3);
    let mut cache = Box::new(ManuallyDrop::new(KeystreamCache::default()));
    let mut fill = |cache: &mut KeystreamCache| {
        let key = Key::new(&dice.bytes());
        for counter in [1, 2] {
            keystream(&key, counter, 100, |packet| cache.seal_batch([packet]));
        }
        let secret = [key.as_bytes().to_vec(), keystream(&key, 3, 100, wgsep_aead::seal)].concat();
        let filled = if uses_vectors() { secret.len() / WORD } else { 0 };
        assert_eq!(words_in(&bytes_of(cache), secret.iter()), filled);
        secret
    };
    let secret = fill(&mut cache);
    cache.zeroize();
    assert!(cache.is_empty());
    assert_eq!(words_in(&bytes_of(&cache), secret.iter()), 0);
    let secret = fill(&mut cache);
    // SAFETY: it is dropped once, and only its memory, which is still there, is read afterwards.
    unsafe { ManuallyDrop::drop(&mut cache) };
    assert_eq!(words_in(&bytes_of(&cache), secret.iter()), 0);
}

#[test]
fn a_key_is_erased_when_it_is_dropped() {
    let mut key = ManuallyDrop::new(Key::new(&[7; KEY_LEN]));
    let bytes = core::ptr::from_ref(key.as_bytes());
    // SAFETY: it is dropped once, and not used afterwards.
    unsafe { ManuallyDrop::drop(&mut key) };
    // SAFETY: the memory is that of `key`, which is still there; any bytes are an array.
    let left = unsafe { bytes.read_volatile() };
    assert_eq!(left, [0; KEY_LEN]);
}
