//! A user of its own for the dataplane.

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

/// Uids that systemd hands out to services without an account (systemd.exec, DynamicUser); one of
/// them where there is no account `wgsep`.
pub const DYNAMIC_UIDS: core::ops::RangeInclusive<u32> = 61_184..=65_519;

/// Becomes `uid` and `gid` for good, with no other group.
///
/// # Errors
/// EPERM without CAP_SETUID and CAP_SETGID.
pub fn become_user(uid: Uid, gid: Gid) -> nix::Result<()> {
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)
}
