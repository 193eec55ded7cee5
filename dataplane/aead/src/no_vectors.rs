//! In place of `avx512` where that is not built.

use crate::TAG_LEN;

pub(crate) const PACKETS: usize = 8;

pub(crate) type Tags = [[u8; TAG_LEN]; PACKETS];

/// As that of `avx512`.
#[expect(dead_code, reason = "no value of Vectors reads it")]
pub(crate) struct Lane<'p> {
    pub(crate) key: &'p [u32; 8],
    pub(crate) nonce: [u32; 3],
    pub(crate) text: &'p mut [u8],
}

impl Lane<'_> {
    pub(crate) fn unused() -> Self {
        Self { key: &[0; 8], nonce: [0; 3], text: &mut [] }
    }
}

/// Instructions that this program has no code for.
#[derive(Clone, Copy)]
pub(crate) enum Vectors {}

impl Vectors {
    pub(crate) const fn detect() -> Option<Self> {
        None
    }

    pub(crate) fn seal(self, _: &mut [Lane<'_>; PACKETS]) -> Tags {
        match self {}
    }

    pub(crate) fn open(self, _: &mut [Lane<'_>; PACKETS]) -> Tags {
        match self {}
    }
}
