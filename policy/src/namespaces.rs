//! Namespaces with nothing in them, and a root directory with nothing in it.

use crate::State;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, fchdir, pivot_root};

/// The kinds, the most important first: the name in /proc/PID/ns, and the flag of unshare(2).
pub const KINDS: [(&str, CloneFlags); 5] = [
    ("mnt", CloneFlags::CLONE_NEWNS),
    ("net", CloneFlags::CLONE_NEWNET),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
];

/// The bit of the mount namespace.
pub const MOUNT: u8 = 1;

/// Enters new namespaces of all [`KINDS`]; where the kernel refuses that, of each kind that it does not refuse.
/// Returns those that were entered, a bit for each, and how the first of the others was refused.
///
/// With CLONE_NEWUSER they are inside a new user namespace, for a launcher without CAP_SYS_ADMIN; it is not entered
/// without any of them. No uid or gid is mapped there. Writing the maps takes a process that owns its files in
/// /proc, which is a dumpable one: the launching user, who owns the new namespace, could attach to it with ptrace(2)
/// at that moment, and stay attached. The kernel checks the ids of the namespace around, which do not
/// change, so that nothing else depends on a map.
#[must_use]
pub fn enter(mut user: CloneFlags) -> (u8, State) {
    if unshare(KINDS.iter().fold(user, |all, (_, kind)| all | *kind)).is_ok() {
        return (u8::MAX, State::Applied);
    }
    let (mut entered, mut refused) = (0, Ok(()));
    for (bit, (_, kind)) in KINDS.iter().enumerate() {
        let result = unshare(user | *kind);
        if result.is_ok() {
            user = CloneFlags::empty();
            entered |= 1 << bit;
        }
        refused = refused.and(result);
    }
    (entered, refused.into())
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
