//! Random numbers from the kernel: getrandom(2) needs no descriptor.

use wgsep_proto::device::Random;

/// The kernel's generator.
pub(crate) struct KernelRandom;

impl Random for KernelRandom {
    fn fill(&mut self, bytes: &mut [u8]) {
        // Up to 256 bytes at once come whole, and never late, once the kernel has booted.
        for chunk in bytes.chunks_mut(256) {
            crate::sys::fill_random(chunk);
        }
    }
}
