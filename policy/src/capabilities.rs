//! Capability sets: taking all away, or all but a few.

use crate::sys;
use caps::{CapSet, Capability};
use nix::Error;
use nix::unistd::geteuid;

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

/// From now on uid 0 gives no capability, for good.
///
/// # Errors
/// EPERM without CAP_SETPCAP.
pub fn lock_securebits() -> nix::Result<()> {
    sys::set_securebits(SECUREBITS)
}

/// True if this process has a capability only because its program's file has it, so that any user has who
/// may execute the file: one that is permitted and not ambient, of a process that is not root's. Real and
/// effective uid have to be the same.
///
/// A user without privilege otherwise has its launcher's ambient capabilities, as a service of systemd with
/// AmbientCapabilities= has; executing a file with capabilities empties the ambient set. AT_SECURE is no
/// substitute for this, because Linux security modules set it for services as well. What cannot be read
/// counts as true.
#[must_use]
pub fn are_of_the_file() -> bool {
    if geteuid().is_root() {
        return false;
    }
    let sets = [CapSet::Permitted, CapSet::Ambient].map(|set| caps::read(None, set));
    let [Ok(permitted), Ok(ambient)] = sets else { return true };
    !permitted.is_subset(&ambient)
}

/// Takes every capability away and reads back that none is left.
///
/// # Errors
/// EPERM if one is left; as capset(2) and capget(2).
pub fn clear_all() -> nix::Result<()> {
    sys::clear_capabilities()?;
    if has_none()? { Ok(()) } else { Err(Error::EPERM) }
}

/// True if no set of this thread but the bounding one holds a capability.
///
/// # Errors
/// As capget(2): what cannot be read is not known to be empty.
pub fn has_none() -> nix::Result<bool> {
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable, CapSet::Ambient] {
        let held = caps::read(None, set).map_err(|_| Error::last())?;
        if !held.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Keeps only `wanted`, and only what of it is there, in the effective and permitted sets.
///
/// # Errors
/// As capset(2).
pub fn keep_only(wanted: &[Capability]) -> nix::Result<()> {
    keep(wanted, &[])
}

/// The same, and keeps `in_reserve` in the permitted set alone: nothing is done by it until
/// [`with_reserve`].
///
/// # Errors
/// As capget(2) and capset(2).
pub fn keep(wanted: &[Capability], in_reserve: &[Capability]) -> nix::Result<()> {
    let held = caps::read(None, CapSet::Permitted).map_err(|_| nix::Error::last())?;
    let bits = |wanted: &[Capability]| {
        let kept = wanted.iter().filter(|one| held.contains(one));
        let set = kept.fold(0, |set, one| set | one.bitmask());
        [set as u32, (set >> 32) as u32]
    };
    sys::capset(bits(wanted), bits(&[wanted, in_reserve].concat()))
}

/// Runs `work` with a capability that was kept in reserve, if it was.
pub fn with_reserve<T>(capability: Capability, work: impl FnOnce() -> T) -> T {
    let is_raised = caps::raise(None, CapSet::Effective, capability).is_ok();
    let done = work();
    if is_raised {
        // Lowering what was just raised cannot fail; and the next step gives it up for good.
        let _cannot_fail = caps::drop(None, CapSet::Effective, capability);
    }
    done
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
