//! One packet: the blocks of ChaCha20 side by side, then Poly1305 over the ciphertext, in scalar registers if it is short
//! and otherwise in eight lanes.
//!
//! Up to 1,472 bytes, the keystream and the one-time key take a single pass; longer texts take one for each 1,536 bytes.

use super::poly1305::message::{GROUP, Message};
use super::rows::{Initial, MOST};
use super::{memory, scalar};
use crate::{KEY_LEN, TAG_LEN};
use core::arch::x86_64::{__m512i, _mm512_xor_si512};
use core::hint::black_box;

/// Texts up to this length, in bytes, are authenticated in scalar registers: there, no powers need to be computed.
const SHORT: usize = 160;
/// Bytes of the first pass if there are others: a multiple of what [`Message`] takes at once.
const FIRST: usize = (MOST - 1) * memory::LEN / GROUP * GROUP;

#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2,bmi2")]
pub(super) fn crypt<const SEAL: bool>(
    key: &[u8; KEY_LEN],
    nonce: (u32, u64),
    text: &mut [u8],
) -> [u8; TAG_LEN] {
    let initial = Initial::new(key, nonce);
    let len = text.len();
    let count = 1 + len.div_ceil(memory::LEN);
    if count > MOST {
        return crypt_long::<SEAL>(&initial, text);
    }
    initial.blocks(0, count, |blocks| crypt_with_blocks::<SEAL>(blocks, text))
}

/// As [`crypt`], with the blocks of ChaCha20 that it takes: one more than those of the text.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2,bmi2")]
pub(super) fn crypt_with_blocks<const SEAL: bool>(
    blocks: &[__m512i],
    text: &mut [u8],
) -> [u8; TAG_LEN] {
    let len = text.len();
    let (first, keystream) = split_first(blocks);
    if len <= SHORT {
        let [r0, r1, s0, s1, ..] = memory::to_u64(*first);
        let key = scalar::Key::new([r0, r1], [s0, s1]);
        authenticate::<SEAL, _>(text, keystream, |text| scalar::tag(&key, text))
    } else {
        let mut message = Message::new(*first, len);
        authenticate::<SEAL, _>(text, keystream, |text| message.finish(text))
    }
}

/// As [`crypt`], where a text takes more blocks than are computed at once.
#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2,bmi2")]
fn crypt_long<const SEAL: bool>(initial: &Initial, text: &mut [u8]) -> [u8; TAG_LEN] {
    let len = text.len();
    let (mut part, mut rest) = text.split_at_mut(FIRST);
    let mut message = initial.blocks(0, MOST, |blocks| {
        let (first, keystream) = split_first(blocks);
        let mut message = Message::new(*first, len);
        authenticate::<SEAL, _>(part, keystream, |part| message.update(part));
        message
    });
    let mut block = 1 + FIRST / memory::LEN;
    // `black_box`, so that each pass reads the rows again: see `Initial::blocks`.
    while rest.len() > MOST * memory::LEN {
        (part, rest) = rest.split_at_mut(MOST * memory::LEN);
        black_box(initial).blocks(block as u32, MOST, |blocks| {
            authenticate::<SEAL, _>(part, blocks, |part| message.update(part));
        });
        block += MOST;
    }
    black_box(initial).blocks(block as u32, rest.len().div_ceil(memory::LEN), |blocks| {
        authenticate::<SEAL, _>(rest, blocks, |rest| message.finish(rest))
    })
}

/// The first block of a packet, which has the one-time key in its first half, and the keystream.
#[inline]
fn split_first(blocks: &[__m512i]) -> (&__m512i, &[__m512i]) {
    let Some(split) = blocks.split_first() else { unreachable!("a set has four blocks") };
    split
}

/// Calls `poly1305` with the ciphertext: after encryption, or before decryption.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn authenticate<const SEAL: bool, T>(
    text: &mut [u8],
    keystream: &[__m512i],
    poly1305: impl FnOnce(&[u8]) -> T,
) -> T {
    if SEAL {
        xor(text, keystream);
        return poly1305(text);
    }
    let authenticated = poly1305(text);
    xor(text, keystream);
    authenticated
}

/// Encrypts or decrypts a text that is no longer than the keystream.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn xor(text: &mut [u8], keystream: &[__m512i]) {
    debug_assert!(text.len() <= memory::LEN * keystream.len(), "text without keystream");
    for (text, keystream) in text.chunks_mut(memory::LEN).zip(keystream) {
        let output = _mm512_xor_si512(memory::load(text), *keystream);
        memory::store(text, output);
    }
}
