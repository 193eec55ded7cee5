//! A user of its own for the dataplane.

use nix::unistd::{Gid, Uid, User, getegid, geteuid, setgroups, setresgid, setresuid};

/// Account of the dataplane, if there is one.
const ACCOUNT: &str = "wgsep";

/// Uids that systemd hands out to services without an account (systemd.exec, DynamicUser); one of
/// them where there is no account `wgsep`.
pub const DYNAMIC_UIDS: core::ops::RangeInclusive<u32> = 61_184..=65_519;

/// Becomes `uid` and `gid` for good, with no other group; or keeps both, so that [`crate::verify`] knows
/// which to expect. In between, `by_real_uid` does what the kernel is to count as the user's, with the
/// privileges of before.
///
/// # Errors
/// EPERM without CAP_SETUID and CAP_SETGID.
pub fn become_user(uid: Uid, gid: Gid, by_real_uid: impl FnOnce()) -> nix::Result<()> {
    let (before, as_before) = (getegid(), Uid::from_raw(u32::MAX));
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, as_before, as_before).inspect_err(|_| {
        // A gid that was kept against expectation ends the start.
        let _verified = setresgid(before, before, before);
    })?;
    by_real_uid();
    setresuid(uid, uid, uid)
}

/// Whom the dataplane is to run as, an account of this name or of the usual one; `None` if this process
/// may not choose.
///
/// # Errors
/// If the account does not exist, or is one that the dataplane must not share: a line that says so, and
/// what to do about it.
pub fn choose(name: Option<&str>) -> Result<Option<(Uid, Gid)>, String> {
    if !geteuid().is_root() {
        let denied = |name| Err(format!("--user {name} needs root; leave it out or run as root"));
        return name.map_or(Ok(None), denied);
    }
    let account = known(User::from_name(name.unwrap_or(ACCOUNT)))
        .map_err(|errno| format!("look up the account: {}; see getent passwd", errno.desc()))?;
    match (account, name) {
        (Some(user), _) if user.uid.is_root() => Err(format!(
            "--user {}: the dataplane must not be root; create an account: useradd --system wgsep",
            user.name
        )),
        (Some(_), Some("nobody")) => Err(
            "--user nobody: shared by other services; create an account: useradd --system wgsep"
                .into(),
        ),
        (Some(user), _) => Ok(Some((user.uid, user.gid))),
        (None, Some(uid)) if uid.bytes().all(|byte| byte.is_ascii_digit()) => {
            Err(format!("--user {uid}: write the name of an account; see getent passwd {uid}"))
        }
        (None, Some(name)) => {
            Err(format!("no account {name:?}; create it: useradd --system {name}"))
        }
        (None, None) => unallocated().map(Some),
    }
}

/// What a look-up found. ENOENT is how the C libraries say that there is no list of accounts at all, as in a
/// container without files.
fn known(found: nix::Result<Option<User>>) -> nix::Result<Option<User>> {
    match found {
        Err(nix::Error::ENOENT) => Ok(None),
        found => found,
    }
}

/// An unused uid of the range meant for services without an account. Each daemon starts to look at
/// another, so that two of them hardly ever share one.
fn unallocated() -> Result<(Uid, Gid), String> {
    let (first, last) = (*DYNAMIC_UIDS.start(), *DYNAMIC_UIDS.end());
    let start = first + std::process::id() % (last - first + 1);
    let mut uids = (start..=last).chain(first..start);
    let unused = uids.find(|uid| matches!(known(User::from_uid(Uid::from_raw(*uid))), Ok(None)));
    unused.map(|uid| (Uid::from_raw(uid), Gid::from_raw(uid))).ok_or_else(|| {
        "no unused uid for the dataplane; create an account: useradd --system wgsep".into()
    })
}
