//! In place of `avx512` where that is not built.

use crate::{KEY_LEN, Lane, PACKETS, Packet, TAG_LEN, Tags};
use zeroize::Zeroize;

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

    pub(crate) fn follow(self, _: &mut Keystream, _: &[u8; KEY_LEN], _: (u32, u64)) {
        match self {}
    }

    pub(crate) fn crypt_one<const SEAL: bool>(
        self,
        _: Option<&mut Keystream>,
        _: &[u8; KEY_LEN],
        _: (u32, u64),
        _: &mut [u8],
    ) -> [u8; TAG_LEN] {
        match self {}
    }
}

/// Nothing is computed ahead.
#[derive(Default, Zeroize)]
pub(crate) struct Keystream;

impl Keystream {
    pub(crate) const fn is_ahead_of(&self, _: &[Packet<'_>]) -> bool {
        false
    }

    pub(crate) const fn is_empty(&self) -> bool {
        true
    }
}
