//! Random numbers from the kernel: getrandom(2) needs no descriptor.

use crate::sys;
use wgsep_proto::device::Random;
use zeroize::Zeroizing;

/// Drawn at once: up to this many bytes come whole, and never late, once the kernel has booted.
const DRAWN: usize = 256;

/// The kernel's generator. Most of what is asked for are a few bytes, so they are drawn in advance,
/// and erased as they are given out.
pub(crate) struct KernelRandom {
    drawn: Zeroizing<[u8; DRAWN]>,
    left: usize,
}

impl Default for KernelRandom {
    fn default() -> Self {
        Self { drawn: Zeroizing::new([0; DRAWN]), left: 0 }
    }
}

impl Random for KernelRandom {
    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(DRAWN) {
            if self.left < chunk.len() {
                sys::fill_random(self.drawn.as_mut());
                self.left = DRAWN;
            }
            let start = self.left - chunk.len();
            let given = &mut self.drawn[start..self.left];
            chunk.copy_from_slice(given);
            given.fill(0);
            self.left = start;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_byte_is_given_twice_and_none_is_kept() {
        let mut random = KernelRandom::default();
        let mut seen = std::collections::BTreeSet::new();
        for len in [8, 32, 200, 16, 300, 8].repeat(50) {
            let mut bytes = vec![0; len];
            random.fill(&mut bytes);
            for eight in bytes.chunks_exact(8) {
                assert!(seen.insert(eight.to_vec()), "eight bytes came twice");
            }
            assert!(random.drawn[random.left..].iter().all(|byte| *byte == 0));
        }
    }
}
