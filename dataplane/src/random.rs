//! Random numbers from the kernel: getrandom(2) needs no descriptor.

use crate::sys;
use wgsep_proto::Random;

/// The kernel's generator. No bytes are buffered: a snapshot of a virtual machine would contain them, and
/// both of its copies would derive the same keys.
#[derive(Debug, Default)]
pub(crate) struct KernelRandom;

impl Random for KernelRandom {
    fn fill(&mut self, bytes: &mut [u8]) {
        bytes.chunks_mut(sys::MAX_RANDOM).for_each(sys::fill_random);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The type has no field that could buffer bytes.
    const _: () = assert!(size_of::<KernelRandom>() == 0);

    #[test]
    fn no_byte_is_given_twice() {
        let mut random = KernelRandom;
        let mut seen = std::collections::BTreeSet::new();
        for len in [8, 32, 200, 16, 300, 8].repeat(50) {
            let mut bytes = vec![0; len];
            random.fill(&mut bytes);
            for eight in bytes.chunks_exact(8) {
                assert!(seen.insert(eight.to_vec()), "eight bytes came twice");
            }
        }
    }
}
