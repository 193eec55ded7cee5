//! In place of `avx512` where that is not built.

use crate::{KEY_LEN, NONCE_LEN, TAG_LEN};

pub(crate) const PACKETS: usize = 8;

pub(crate) type Tags = [[u8; TAG_LEN]; PACKETS];

/// As that of `avx512`.
#[expect(dead_code, reason = "no value of Vectors reads it")]
pub(crate) struct Lane<'p> {
    pub(crate) key: &'p [u8; KEY_LEN],
    pub(crate) nonce: [u8; NONCE_LEN],
    pub(crate) text: &'p mut [u8],
}

impl<'p> Lane<'p> {
    pub(crate) fn unused(key: &'p [u8; KEY_LEN]) -> Self {
        Self { key, nonce: [0; NONCE_LEN], text: &mut [] }
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
