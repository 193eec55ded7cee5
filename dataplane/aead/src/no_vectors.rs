//! In place of `avx512` where that is not built.

use crate::{Lane, PACKETS, Tags};

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
