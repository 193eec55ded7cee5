//! Namespaces with nothing in them, and a root directory with nothing in it.

use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, fchdir, pivot_root};

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

/// Enters the same namespaces inside a new user namespace, for a launcher without CAP_SYS_ADMIN.
///
/// No uid or gid is mapped there. Writing the maps takes a process that owns its files in /proc, which
/// is a dumpable one: the launching user, who owns the new namespace, could attach to it with ptrace(2)
/// at that moment, and stay attached. The kernel checks the ids of the namespace around, which do not
/// change, so that nothing else depends on a map.
///
/// # Errors
/// EPERM or ENOSPC where user namespaces are not allowed.
pub fn enter_with_user_namespace() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER | all())
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
