//! Capability sets: taking all away, or all but a few.

use crate::sys;
use caps::{CapSet, Capability, CapsHashSet};
use nix::Error;

/// SECBIT_NOROOT, SECBIT_NO_SETUID_FIXUP, SECBIT_NO_CAP_AMBIENT_RAISE, each with its lock, and the
/// lock of SECBIT_KEEP_CAPS (linux/securebits.h).
const SECUREBITS: u32 = 0b1110_1111;

/// Empties the bounding set, until the kernel knows no capability of the next number. (The caps
/// crate stops at those it has names for.)
///
/// # Errors
/// EPERM without CAP_SETPCAP.
pub fn drop_bounding_set() -> nix::Result<()> {
    sys::clear_ambient()?;
    for capability in 0.. {
        match sys::drop_bounding(capability) {
            Ok(()) => {}
            Err(Error::EINVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Root is nobody special from now on, for good.
///
/// # Errors
/// EPERM without CAP_SETPCAP.
pub fn lock_securebits() -> nix::Result<()> {
    sys::set_securebits(SECUREBITS)
}

/// Takes every capability away and reads back that none is left.
///
/// # Errors
/// EPERM if one is left.
pub fn clear_all() -> nix::Result<()> {
    sys::clear_capabilities()?;
    if has_none() { Ok(()) } else { Err(Error::EPERM) }
}

/// True if no set of this thread but the bounding one holds a capability.
#[must_use]
pub fn has_none() -> bool {
    [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable, CapSet::Ambient]
        .into_iter()
        .all(|set| caps::read(None, set).is_ok_and(|held| held.is_empty()))
}

/// Keeps only `wanted`, and only what of it is there, in the effective and permitted sets.
///
/// # Errors
/// As capset(2).
pub fn keep_only(wanted: &[Capability]) -> nix::Result<()> {
    let held = caps::read(None, CapSet::Permitted).unwrap_or_default();
    let kept: CapsHashSet = wanted.iter().copied().filter(|one| held.contains(one)).collect();
    let mut bits = [0u32; 2];
    for capability in kept {
        let index = u32::from(capability.index());
        if let Some(word) = bits.get_mut(index as usize / 32) {
            *word |= 1 << (index % 32);
        }
    }
    sys::capset(bits)
}

/// The name of the capability of a number, if the caps crate knows it.
#[must_use]
pub fn name(number: u8) -> Option<String> {
    let known = caps::all().into_iter().find(|capability| capability.index() == number);
    known.map(|capability| capability.to_string())
}

/// True if this thread has a capability.
#[must_use]
pub fn has(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}
