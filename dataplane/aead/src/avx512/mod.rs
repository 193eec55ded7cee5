//! Eight packets at once: a step computes two blocks of ChaCha20 of each packet in sixteen lanes of 32 bits, and
//! authenticates the 128 bytes of each from the step before in eight lanes of 64 bits, one packet a lane. The two
//! are interleaved, so that the multiplications of Poly1305 fill what the short dependencies of ChaCha20 leave.
//!
//! Packets of a group proceed together; a lane whose packet has ended is masked. No branch, index or shift depends
//! on keys, plaintext or tags; lengths are public.

mod chacha20;
mod keystream;
mod memory;
mod multiply;
mod one;
mod poly1305;
mod rows;
mod scalar;

pub(crate) use keystream::Keystream;

use crate::{KEY_LEN, Lane, PACKETS, TAG_LEN, Tags};
use chacha20::{BLOCKS, COUNTER, DOUBLE_ROUNDS, Rows};
use core::arch::x86_64::{
    __m512i, __mmask8, _mm512_castsi256_si512, _mm512_inserti64x4, _mm512_mask_add_epi32,
    _mm512_maskz_mov_epi8, _mm512_set1_epi32, _mm512_setzero_si512, _mm512_xor_si512,
};
use poly1305::{Block, Poly1305, Products};

/// Bytes of a block of Poly1305.
const STEP: usize = 16;

/// The vector instructions of this processor: there is a value only where it has them.
#[derive(Clone, Copy)]
pub(crate) struct Vectors(());

impl Vectors {
    /// `None` if this processor lacks one of the extensions.
    pub(crate) fn detect() -> Option<Self> {
        let detected = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512ifma")
            && is_x86_feature_detected!("avx512vbmi2")
            && is_x86_feature_detected!("bmi2");
        detected.then_some(Self(()))
    }

    /// Leaves nothing of a key in the vector registers.
    #[inline]
    fn clear_registers(self) {
        // SAFETY: a value exists only where the processor has the extension.
        unsafe { memory::clear_registers() }
    }

    /// Encrypts the packets, and returns their tags.
    pub(crate) fn seal(self, lanes: &mut [Lane<'_>; PACKETS]) -> Tags {
        // SAFETY: a value exists only where the processor has these extensions.
        let tags = unsafe { crypt::<true>(lanes) };
        self.clear_registers();
        tags
    }

    /// Decrypts the packets, and returns what their tags must be.
    pub(crate) fn open(self, lanes: &mut [Lane<'_>; PACKETS]) -> Tags {
        // SAFETY: a value exists only where the processor has these extensions.
        let tags = unsafe { crypt::<false>(lanes) };
        self.clear_registers();
        tags
    }

    /// Takes a packet of a group as the latest one of a sequence.
    pub(crate) fn follow(self, keystream: &mut Keystream, key: &[u8; KEY_LEN], nonce: (u32, u64)) {
        keystream.follow(key, nonce);
        self.clear_registers();
    }

    /// Encrypts one packet and returns its tag, or decrypts it and returns what its tag must be. `keystream` has what was computed
    /// ahead.
    pub(crate) fn crypt_one<const SEAL: bool>(
        self,
        keystream: Option<&mut Keystream>,
        key: &[u8; KEY_LEN],
        nonce: (u32, u64),
        text: &mut [u8],
    ) -> [u8; TAG_LEN] {
        // SAFETY: a value exists only where the processor has these extensions.
        let tag = unsafe { crypt_one::<SEAL>(keystream, key, nonce, text) };
        self.clear_registers();
        tag
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2,bmi2")]
fn crypt_one<const SEAL: bool>(
    keystream: Option<&mut Keystream>,
    key: &[u8; KEY_LEN],
    nonce: (u32, u64),
    text: &mut [u8],
) -> [u8; TAG_LEN] {
    match keystream {
        Some(keystream) => keystream.crypt::<SEAL>(key, nonce, text),
        None => one::crypt::<SEAL>(key, nonce, text),
    }
}

/// 64 bytes of each packet, which are to be authenticated.
#[derive(Clone, Copy)]
struct Ciphertext {
    blocks: [Block; 4],
    /// The packets that have all four blocks.
    whole: __mmask8,
    /// For each block, the packets that have it, but not all four.
    parts: [__mmask8; 4],
}

#[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
fn crypt<const SEAL: bool>(lanes: &mut [Lane<'_>; PACKETS]) -> Tags {
    let longest = lanes.iter().map(|lane| lane.text.len()).max().unwrap_or(0);
    let zero = _mm512_setzero_si512();
    let none = Ciphertext { blocks: [Block { low: zero, high: zero }; 4], whole: 0, parts: [0; 4] };
    let mut initial = initial(lanes);
    let mut prepared = chacha20::three_columns(initial);
    let mut rows = chacha20::finish_first_double_round(prepared);
    for _ in 1..DOUBLE_ROUNDS {
        rows = chacha20::double_round(rows);
    }
    let blocks = chacha20::transpose(&chacha20::add(rows, &initial));
    // The first block of a packet has the one-time key, in its first half.
    let (one_time_keys, odd) = halves(&blocks);
    let [r, s, _, _] = poly1305::transpose(one_time_keys);
    let mut poly1305 = Poly1305::new(r, s);
    let mut ciphertexts = [xor::<SEAL>(lanes, 0, odd), none];
    let mut offset = memory::LEN;
    let mut block = 2;
    while offset < longest {
        initial[COUNTER] = counters(block);
        prepared[COUNTER] = initial[COUNTER];
        let mut rows = chacha20::finish_first_double_round(prepared);
        for ciphertext in &ciphertexts {
            if ciphertext.whole == 0 {
                for _ in 0..4 {
                    rows = chacha20::double_round(rows);
                }
            } else {
                let mut products = Products::new();
                for (i, block) in ciphertext.blocks.iter().enumerate() {
                    rows = chacha20::double_round(rows);
                    poly1305.multiply(&mut products, i, *block);
                }
                poly1305.set(products, ciphertext.whole);
            }
            if ciphertext.whole != __mmask8::MAX {
                update_parts(&mut poly1305, ciphertext);
            }
        }
        rows = chacha20::double_round(rows);
        let blocks = chacha20::transpose(&chacha20::add(rows, &initial));
        let (even, odd) = halves(&blocks);
        ciphertexts[0] = xor::<SEAL>(lanes, offset, even);
        offset += memory::LEN;
        ciphertexts[1] = if offset < longest { xor::<SEAL>(lanes, offset, odd) } else { none };
        offset += memory::LEN;
        block += 2;
    }
    for ciphertext in &ciphertexts {
        if ciphertext.whole != 0 {
            poly1305.update_four(&ciphertext.blocks, ciphertext.whole);
        }
        update_parts(&mut poly1305, ciphertext);
    }
    memory::erase(&mut initial);
    memory::erase(&mut prepared);
    let lengths = core::array::from_fn(|i| lanes[i].text.len() as u64);
    poly1305.update(Block { low: zero, high: memory::from_u64(&lengths) }, __mmask8::MAX);
    let tags = poly1305.finish();
    let (low, high) = (memory::to_u64(tags.low), memory::to_u64(tags.high));
    core::array::from_fn(|i| {
        let tag = u128::from(low[i]) | u128::from(high[i]) << 64;
        tag.to_le_bytes()
    })
}

#[inline]
#[target_feature(enable = "avx512f,avx512ifma,avx512vbmi2")]
fn update_parts(poly1305: &mut Poly1305, ciphertext: &Ciphertext) {
    for (block, lanes) in ciphertext.blocks.iter().zip(ciphertext.parts) {
        if lanes != 0 {
            poly1305.update(*block, lanes);
        }
    }
}

/// The initial state of blocks 0 and 1 of each packet: lane `i` is block 0 of packet `i`, lane `i + 8` its block 1.
#[target_feature(enable = "avx512f")]
fn initial(lanes: &[Lane<'_>; PACKETS]) -> Rows {
    let mut rows = [_mm512_setzero_si512(); 16];
    rows[..4].copy_from_slice(&chacha20::constants());
    let [first, others @ ..] = lanes;
    if others.iter().all(|lane| core::ptr::eq(lane.key, first.key)) {
        for (i, row) in rows[4..COUNTER].iter_mut().enumerate() {
            *row = _mm512_set1_epi32(word(first.key, i).cast_signed());
        }
    } else {
        for (i, row) in rows[4..COUNTER].iter_mut().enumerate() {
            *row = twice(&lanes.each_ref().map(|lane| word(lane.key, i)));
        }
    }
    rows[COUNTER] = counters(0);
    for (i, row) in rows[COUNTER + 1..].iter_mut().enumerate() {
        *row = twice(&lanes.each_ref().map(|lane| word(&lane.nonce, i)));
    }
    rows
}

/// A word of 32 bits, little-endian.
fn word(bytes: &[u8], i: usize) -> u32 {
    let (words, _) = bytes.as_chunks();
    words.get(i).map_or(0, |word| u32::from_le_bytes(*word))
}

/// A row of both blocks of each packet.
#[inline]
#[target_feature(enable = "avx512f")]
fn twice(packets: &[u32; PACKETS]) -> __m512i {
    let half = memory::from_u32(packets);
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(half), half)
}

/// The counters of a block and the next, of each packet.
#[inline]
#[target_feature(enable = "avx512f")]
fn counters(block: u32) -> __m512i {
    let first = _mm512_set1_epi32(block.cast_signed());
    _mm512_mask_add_epi32(first, 0xff00, first, _mm512_set1_epi32(1))
}

/// The blocks with even numbers, and those with odd ones, of each packet.
#[inline]
fn halves(blocks: &[__m512i; BLOCKS]) -> (&[__m512i; PACKETS], &[__m512i; PACKETS]) {
    let (even, odd) = blocks.split_at(PACKETS);
    let (Some(even), Some(odd)) = (even.first_chunk(), odd.first_chunk()) else {
        unreachable!("sixteen blocks are two of each of eight packets")
    };
    (even, odd)
}

/// Encrypts or decrypts up to 64 bytes of each packet from `offset` on; returns their ciphertext.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn xor<const SEAL: bool>(
    lanes: &mut [Lane<'_>; PACKETS],
    offset: usize,
    keystream: &[__m512i; PACKETS],
) -> Ciphertext {
    if lanes.iter().all(|lane| lane.text.len() >= offset + memory::LEN) {
        // As below, without masks.
        let mut ciphertexts = *keystream;
        for (ciphertext, lane) in ciphertexts.iter_mut().zip(lanes) {
            let text = lane.text.get_mut(offset..).unwrap_or_default();
            let input = memory::load(text);
            let output = _mm512_xor_si512(input, *ciphertext);
            memory::store(text, output);
            *ciphertext = if SEAL { output } else { input };
        }
        return Ciphertext {
            blocks: poly1305::transpose(&ciphertexts),
            whole: __mmask8::MAX,
            parts: [0; 4],
        };
    }
    let mut ciphertexts = [_mm512_setzero_si512(); PACKETS];
    let mut whole = 0;
    let mut parts = [0; 4];
    for (i, (lane, keystream)) in lanes.iter_mut().zip(keystream).enumerate() {
        // An access without a byte would take the processor some hundred cycles.
        let Some(text) = lane.text.get_mut(offset..).filter(|text| !text.is_empty()) else {
            continue;
        };
        let input = memory::load(text);
        let output = _mm512_xor_si512(input, *keystream);
        memory::store(text, output);
        ciphertexts[i] = if SEAL { output } else { input };
        if text.len() >= memory::LEN {
            whole |= 1 << i;
            continue;
        }
        // What is beyond the end counts as zero.
        ciphertexts[i] = _mm512_maskz_mov_epi8(memory::mask(text.len()), ciphertexts[i]);
        let blocks = text.len().div_ceil(STEP);
        if blocks == 4 {
            whole |= 1 << i;
        } else {
            for part in parts.iter_mut().take(blocks) {
                *part |= 1 << i;
            }
        }
    }
    Ciphertext { blocks: poly1305::transpose(&ciphertexts), whole, parts }
}
