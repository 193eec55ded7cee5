//! Namespaces with nothing in them, and a root directory with nothing in it.

use crate::sys;
use nix::Error;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, chdir, fchdir, pivot_root};
use std::fs;

fn all() -> CloneFlags {
    CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP
}

/// Enters new mount, network, IPC, UTS and cgroup namespaces.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN.
pub fn enter() -> nix::Result<()> {
    unshare(all())
}

/// The same inside a new user namespace, for a launcher without CAP_SYS_ADMIN: whether they were
/// entered, then whether we are still ourselves in there. Without that we are nobody, which confines
/// just as well.
///
/// # Errors
/// EPERM or ENOSPC where user namespaces are not allowed.
pub fn enter_with_user_namespace() -> (nix::Result<()>, nix::Result<()>) {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let entered = unshare(CloneFlags::CLONE_NEWUSER | all());
    (entered, entered.and_then(|()| map_only(uid, gid)))
}

/// Maps one user and one group of the namespace around ours to themselves.
fn map_only(uid: Uid, gid: Gid) -> nix::Result<()> {
    // A program with file capabilities, or one that has changed its uid, does not own its /proc files.
    sys::set_dumpable()?;
    write_own("/proc/self/setgroups", "deny")?;
    write_own("/proc/self/uid_map", &format!("{uid} {uid} 1"))?;
    write_own("/proc/self/gid_map", &format!("{gid} {gid} 1"))
}

fn write_own(file: &str, text: &str) -> nix::Result<()> {
    fs::write(file, text).map_err(|error| error.raw_os_error().map_or(Error::EIO, Error::from_raw))
}

/// Makes the root directory an empty, read-only file system that nothing else refers to. Only inside
/// a mount namespace of one's own.
///
/// # Errors
/// EPERM where mounting is not allowed.
pub fn empty_root() -> nix::Result<()> {
    const NONE: Option<&str> = None;
    // A directory that every system has; only this namespace sees it covered.
    const COVERED: &str = "/proc";
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    mount(Some("none"), COVERED, Some("tmpfs"), flags, Some("size=4k,nr_inodes=2,mode=555"))?;
    chdir(COVERED)?;
    let old_root = open("/", OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    pivot_root(".", ".")?;
    // Both roots are mounted at the same place now, the old one on top.
    fchdir(&old_root)?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    mount(NONE, "/", NONE, flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, NONE)
}
