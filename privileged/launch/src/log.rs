//! Opens the log.

use crate::{Options, sys};
use nix::errno::Errno;
use nix::libc;
use nix::sys::statfs::fstatfs;
use nix::unistd::geteuid;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use wgsep_journal::{SYSLOG, Sink};
use wgsep_monitor::{Result, Step};

/// Magic numbers of file systems whose files are interfaces of the kernel, so that a write changes the system
/// (linux/magic.h and their sources): proc, openpromfs, usbfs, sysfs, configfs, debugfs, tracefs, securityfs,
/// selinuxfs, smackfs, apparmorfs, cgroup, cgroup2, resctrl, bpf, efivarfs, pstore, binfmt_misc, fusectl, nfsd,
/// rpc_pipefs, mqueue, xenfs.
const KERNEL_INTERFACES: [u32; 23] = [
    0x9fa0, 0x9fa1, 0x9fa2, 0x62656572, 0x62656570, 0x64626720, 0x74726163, 0x73636673, 0xf97cff8c,
    0x43415d53, 0x5a3c69f0, 0x27e0eb, 0x63677270, 0x7655821, 0xcafe4a11, 0xde5e81e4, 0x6165676c,
    0x42494e4d, 0x65735543, 0x6e667364, 0x67596969, 0x19800202, 0xabba1974,
];

/// Where lines go, if that can be opened before the name of the interface is known: where there is no system log,
/// a daemon in the background has a file of its own, see [`open_default`].
///
/// # Errors
/// If it cannot be opened.
pub fn open(options: &Options, is_journal: bool) -> Result<Option<Sink>> {
    match &options.log_file {
        Some(path) => open_file(path).map(Some),
        None if options.foreground => stderr(is_journal).step("standard error").map(Some),
        None => Ok(syslog().ok()),
    }
}

/// The file of a daemon in the background, by the name that its interface has in the end: that of `wg%d` is the
/// kernel's choice, and each of several daemons has its own.
///
/// # Errors
/// If it cannot be opened.
pub fn open_default(interface: &str) -> Result<Sink> {
    open_file(Path::new(&format!("/var/log/wgsep-{interface}.log")))
}

fn open_file(path: &Path) -> Result<Sink> {
    let path_name = path.display();
    let step = format!("open the log {path_name}");
    let advice = format!(
        "cannot log to {path_name}: it or its directory is missing, read-only or another user's; choose another --log-file"
    );
    let refused = format!(
        "cannot log to {path_name}: it must be a file with a single name and not the kernel's (/proc, /sys), a FIFO or a character device, of root or of this user, and no directory or symbolic link; choose another --log-file"
    );
    let filtered = format!(
        "cannot log to {path_name}: fstatfs(2), which tells the kernel's own files from others, is refused; allow it in the filter of the container or unit"
    );
    let known: [(&[Errno], &str); 3] = [
        (&[Errno::ENOENT, Errno::EROFS, Errno::EACCES, Errno::ENOTDIR], &advice),
        (&[Errno::EPERM, Errno::ELOOP, Errno::EISDIR], &refused),
        (&[Errno::ENOSYS], &filtered),
    ];
    file(path).advise(&step, &known)
}

/// Standard error, which may be a stream of the journal.
///
/// # Errors
/// If it cannot be duplicated.
fn stderr(is_journal: bool) -> io::Result<Sink> {
    let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let stderr = reopen_terminal(&stderr).unwrap_or(stderr);
    Ok(if is_journal { Sink::Journal(stderr) } else { Sink::Stream(stderr) })
}

/// Opens a terminal once more, so that a write returns at once although no process reads from the terminal: the
/// flag O_NONBLOCK on the launcher's own open file would change its writes, too. `None` if it is no terminal, or
/// may not be opened.
fn reopen_terminal(terminal: &File) -> Option<File> {
    let number = sys::terminal_number(terminal.as_fd()).ok()?;
    let mut open = OpenOptions::new();
    open.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let opened = open.open(format!("/proc/self/fd/{}", terminal.as_raw_fd())).ok()?;
    // The master of a pseudo-terminal opens as the master of a new one.
    (sys::terminal_number(opened.as_fd()) == Ok(number)).then_some(opened)
}

/// The end of a file. A FIFO is not waited for.
///
/// # Errors
/// If it cannot be opened. ELOOP if it is a symbolic link; EPERM if it is another user's, has several
/// names, is one of the kernel's interfaces, or is neither a regular file, a FIFO nor a character device. ENOSYS if
/// fstatfs(2) is refused.
fn file(path: &Path) -> io::Result<Sink> {
    let mut open = OpenOptions::new();
    open.append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = open.open(path)?;
    check_is_log(&file).map(|()| Sink::Stream(file))
}

/// The system's log, if there is one.
///
/// # Errors
/// If no process receives at /dev/log.
fn syslog() -> io::Result<Sink> {
    UnixDatagram::unbound()?.connect(SYSLOG)?;
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok(Sink::Syslog(socket))
}

/// Refuses a file that another user may have put in the place of the log, and one that is an interface of the kernel:
/// a setting of /proc/sys, for one.
fn check_is_log(file: &File) -> io::Result<()> {
    let file_system = fstatfs(file).map_err(|_| io::Error::from_raw_os_error(libc::ENOSYS))?;
    let (status, magic) = (file.metadata()?, file_system.filesystem_type().0 as u32);
    let kind = status.file_type();
    let is_stored = status.nlink() <= 1 && !KERNEL_INTERFACES.contains(&magic);
    let is_log = kind.is_file() && is_stored || kind.is_fifo() || kind.is_char_device();
    let is_trusted = [0, geteuid().as_raw()].contains(&status.uid());
    let refused = || io::Error::from_raw_os_error(libc::EPERM);
    (is_log && is_trusted).then_some(()).ok_or_else(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_another_may_have_put_there_is_refused() {
        let directory = std::env::temp_dir().join(format!("wgsep-logs-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let path = |name: &str| directory.join(name);
        let open = |name: &str| {
            let opened = file(&path(name));
            opened.err().and_then(|error| error.raw_os_error())
        };
        assert_eq!(open("log"), None);
        std::os::unix::fs::symlink("log", path("link")).unwrap();
        assert_eq!(open("link"), Some(libc::ELOOP));
        std::fs::hard_link(path("log"), path("another")).unwrap();
        assert_eq!(open("log"), Some(libc::EPERM));
        let _socket = UnixDatagram::bind(path("socket")).unwrap();
        assert_eq!(open("socket"), Some(libc::ENXIO));
        std::fs::write(path("theirs"), "").unwrap();
        // Only root may give a file away.
        if geteuid().is_root() {
            std::os::unix::fs::chown(path("theirs"), Some(61_001), None).unwrap();
            assert_eq!(open("theirs"), Some(libc::EPERM));
        }
        std::fs::remove_dir_all(&directory).unwrap();
        assert!(file(Path::new("/dev/null")).is_ok());
    }
    #[test]
    fn an_interface_of_the_kernel_is_no_log() {
        let refused = |path: &str| file(Path::new(path)).err()?.raw_os_error();
        assert_eq!(refused("/proc/self/comm"), Some(libc::EPERM));
        // Root may write these.
        for path in [
            "/proc/sys/net/ipv4/route/flush",
            "/sys/fs/cgroup/cgroup.procs",
            "/sys/kernel/mm/transparent_hugepage/enabled",
        ] {
            let may_be_opened = OpenOptions::new().append(true).open(path).is_ok();
            assert!(!may_be_opened || refused(path) == Some(libc::EPERM), "{path}");
        }
    }
}
