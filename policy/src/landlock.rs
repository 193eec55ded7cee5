//! Landlock: no file can be opened, made, changed or removed, whatever the path.
//!
//! Behind the empty root and the filter this is a third wall for the dataplane; for the helper, which
//! keeps its root directory, a second.

use crate::report::State;
use crate::sys;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use nix::errno::Errno;
use std::os::fd::{AsFd, BorrowedFd};

/// The newest ABI whose rights are asked for; an older kernel gives what it has.
const NEWEST: ABI = ABI::V6;

/// Denies everything, the connecting to abstract sockets and the sending of signals included.
#[must_use]
pub fn deny_all() -> State {
    state(&restrict(None::<BorrowedFd<'_>>, true))
}

/// Denies everything but removing files in `directory`. Signals stay allowed: the helper has to be
/// able to end its child.
#[must_use]
pub fn deny_all_but_removing_in(directory: BorrowedFd<'_>) -> State {
    state(&restrict(Some(directory), false))
}

fn restrict(removable: Option<impl AsFd>, scoped: bool) -> Result<RulesetStatus, RulesetError> {
    let rights: BitFlags<AccessFs> = AccessFs::from_all(NEWEST);
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(rights)?
        .handle_access(AccessNet::from_all(NEWEST))?;
    if scoped {
        ruleset = ruleset.scope(Scope::from_all(NEWEST))?;
    }
    let mut created = ruleset.create()?;
    if let Some(directory) = removable {
        created = created.add_rule(PathBeneath::new(directory, AccessFs::RemoveFile))?;
    }
    Ok(created.restrict_self()?.ruleset)
}

/// An older kernel's partial enforcement still denies what it supports, so it counts.
fn state(result: &Result<RulesetStatus, RulesetError>) -> State {
    match result {
        Ok(RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced) => State::Applied,
        Ok(RulesetStatus::NotEnforced) => match sys::landlock_version() {
            // A filter around us refuses what the kernel may well have.
            Err(errno) if ![Errno::ENOSYS, Errno::EOPNOTSUPP].contains(&errno) => {
                State::degraded(errno)
            }
            _ => State::Unsupported,
        },
        Err(_) => State::degraded(nix::Error::last()),
    }
}
