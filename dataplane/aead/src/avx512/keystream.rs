//! The keystream of the packets that come next, for short packets one by one: six sets of blocks take little longer than one.

use super::rows::{Initial, MOST, SET, SETS};
use super::{memory, one};
use crate::single::nonce_words;
use crate::{KEY_LEN, Packet, TAG_LEN, equal};
use core::arch::x86_64::__m512i;
use zeroize::Zeroize;

/// Most blocks of a packet whose keystream is computed ahead, so that there is room for two.
const MOST_OF_ONE: usize = MOST / 2;

/// For packets of so many blocks each, the blocks of each set: how far its counter and that of its packet are above the first.
static OFFSETS: [[[u64; 2 * SET]; SETS]; MOST_OF_ONE + 1] = {
    let mut offsets = [[[0; 2 * SET]; SETS]; MOST_OF_ONE + 1];
    let mut count = 1;
    while count <= MOST_OF_ONE {
        let mut i = 0;
        while i < MOST {
            offsets[count][i / SET][2 * (i % SET)] = (i % count) as u64;
            offsets[count][i / SET][2 * (i % SET) + 1] = (i / count) as u64;
            i += 1;
        }
        count += 1;
    }
    offsets
};

/// Blocks that a packet takes: one more than those of its text.
const fn blocks_of(text: &[u8]) -> usize {
    1 + text.len().div_ceil(memory::LEN)
}

/// The blocks of consecutive packets of one key. Which they are depends on nonces and lengths alone.
pub(crate) struct Keystream {
    blocks: [[__m512i; SET]; SETS],
    key: [u8; KEY_LEN],
    /// The first four bytes of the nonces; `None` while there is no key.
    fixed: Option<u32>,
    /// Counter of the first packet that has blocks, and how many packets have some.
    first: u64,
    packets: usize,
    /// Blocks of each.
    count: usize,
    /// Counter of the packet that is expected next.
    next: u64,
}

impl Default for Keystream {
    fn default() -> Self {
        Self {
            blocks: [[memory::ZERO; SET]; SETS],
            key: [0; KEY_LEN],
            fixed: None,
            first: 0,
            packets: 0,
            count: 0,
            next: 0,
        }
    }
}

impl Zeroize for Keystream {
    fn zeroize(&mut self) {
        memory::erase(self.blocks.as_flattened_mut());
        self.key.zeroize();
        (self.fixed, self.packets) = (None, 0);
    }
}

impl Keystream {
    /// Encrypts or decrypts one packet, and returns its tag.
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2,bmi2")]
    pub(super) fn crypt<const SEAL: bool>(
        &mut self,
        key: &[u8; KEY_LEN],
        nonce: (u32, u64),
        text: &mut [u8],
    ) -> [u8; TAG_LEN] {
        let (fixed, counter) = nonce;
        let is_expected = self.follow(key, nonce);
        let count = blocks_of(text);
        if self.blocks(counter, count).is_none() && is_expected && count <= MOST_OF_ONE {
            self.compute(fixed, counter, count);
        }
        match self.blocks(counter, count) {
            Some(blocks) => one::crypt_with_blocks::<SEAL>(blocks, text),
            None => one::crypt::<SEAL>(key, nonce, text),
        }
    }

    /// Takes a packet as the latest one; returns whether it follows the one before it.
    pub(crate) fn follow(&mut self, key: &[u8; KEY_LEN], (fixed, counter): (u32, u64)) -> bool {
        let is_same_key = self.fixed == Some(fixed) && equal(key, &self.key);
        let is_expected = is_same_key && counter == self.next;
        if !is_same_key {
            if self.packets > 0 {
                self.zeroize();
            }
            (self.key, self.fixed) = (*key, Some(fixed));
        }
        self.next = counter.wrapping_add(1);
        is_expected
    }

    /// Whether packets follow the latest one, one after the other, and are short enough for keystream to be computed ahead.
    pub(crate) fn is_ahead_of(&self, packets: &[Packet<'_>]) -> bool {
        (0..).zip(packets).all(|(number, packet)| {
            let (fixed, counter) = nonce_words(&packet.nonce);
            (Some(fixed), counter) == (self.fixed, self.next.wrapping_add(number))
                && blocks_of(packet.text) <= MOST_OF_ONE
                && equal(&packet.key.0, &self.key)
        })
    }

    /// True if there is neither a key nor keystream.
    pub(crate) const fn is_empty(&self) -> bool {
        self.fixed.is_none()
    }

    /// The blocks of a packet, if at least `count` of them were computed.
    #[inline]
    fn blocks(&self, counter: u64, count: usize) -> Option<&[__m512i]> {
        let ahead = usize::try_from(counter.wrapping_sub(self.first)).ok()?;
        if ahead >= self.packets || count > self.count {
            return None;
        }
        let start = ahead * self.count;
        self.blocks.as_flattened().get(start..start + self.count)
    }

    /// Computes as many blocks for the packet with this counter and those that follow it, for as many as there is room.
    #[inline(never)]
    #[target_feature(enable = "avx512f")]
    fn compute(&mut self, fixed: u32, counter: u64, count: usize) {
        (self.first, self.count, self.packets) = (counter, count, MOST / count);
        let initial = Initial::new(&self.key, (fixed, counter));
        initial.write_blocks(&OFFSETS[count], self.packets * count, &mut self.blocks);
    }
}
