//! The UAPI socket that wg(8) looks for: /var/run/wireguard/INTERFACE.sock.

use crate::startup::open_path;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::socket::{
    self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr, getsockname, getsockopt, listen,
    socket, sockopt,
};
use nix::sys::stat::{Mode, umask};
use nix::unistd::mkdir;
use std::fs::{File, OpenOptions, remove_file, symlink_metadata};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixDatagram;
use std::thread::sleep;
use std::time::{Duration, Instant};
use wgsep_privileged::{DIRECTORY, Error, Result, SocketFile, Step};

/// How long a daemon may take to end after its interface is gone.
const ENDING: Duration = Duration::from_secs(1);

/// Binds the socket of an interface, mode 0600. A stale file, of a daemon that was killed, is replaced;
/// anything else of that name is left alone.
///
/// # Errors
/// If the name is taken, or the directory cannot be made or written.
pub fn bind(interface: &str) -> Result<(OwnedFd, SocketFile)> {
    let directory = open_directory()?;
    let path = format!("{DIRECTORY}/{interface}.sock");
    remove_stale(&path)?;
    // Before the file exists, so that no removal goes unseen.
    let watch = watch_directory(interface)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener =
        socket(AddressFamily::Unix, SockType::Stream, flags, None).step("UAPI socket")?;
    let address = UnixAddr::new(&*path).step("UAPI socket")?;
    writable(&path, with_umask(0o177, || socket::bind(listener.as_raw_fd(), &address)))?;
    // From here on the file goes if anything fails.
    let file = SocketFile::new(directory, watch, interface, create_report(interface));
    listen(&listener, Backlog::MAXCONN).step("listen on the UAPI socket")?;
    Ok((listener, file))
}

/// Takes over a socket that is already bound and listening (WG_UAPI_FD).
///
/// # Errors
/// If it is no listening unix socket, or the directory cannot be watched.
pub fn adopt(listener: OwnedFd, interface: &str) -> Result<(OwnedFd, SocketFile)> {
    let is_unix = getsockname::<UnixAddr>(listener.as_raw_fd()).is_ok();
    if !is_unix || getsockopt(&listener, sockopt::AcceptConn) != Ok(true) {
        return Err(Error::new(
            "WG_UAPI_FD is not a listening unix socket; hand over one, or unset it",
        ));
    }
    fcntl(&listener, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).step("WG_UAPI_FD")?;
    let (directory, watch) = (open_directory()?, watch_directory(interface)?);
    Ok((listener, SocketFile::new(directory, watch, interface, create_report(interface))))
}

/// Makes `IF.sandbox` beside `IF.sock`. A directory that may not be written, below a socket that
/// was handed to us, leaves the audit without the report, and that is what it then says.
fn create_report(interface: &str) -> Option<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(report_path(interface)).ok()
}

fn report_path(interface: &str) -> String {
    format!("{DIRECTORY}/{interface}.sandbox")
}

/// Hears of every file that leaves the directory, or that another is renamed over; the report of a
/// daemon that was killed leaves before that.
fn watch_directory(interface: &str) -> Result<Inotify> {
    let _seldom_there = remove_file(report_path(interface));
    let flags = InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK;
    let used_up = |sysctl| {
        format!("inotify is used up on this host; raise its limit: sysctl fs.inotify.{sysctl}=1024")
    };
    let watch = Inotify::init(flags)
        .advise("inotify", &[(&[Errno::EMFILE], &used_up("max_user_instances"))])?;
    let leaves =
        AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_FROM | AddWatchFlags::IN_MOVED_TO;
    watch
        .add_watch(DIRECTORY, leaves)
        .advise("watch the UAPI socket", &[(&[Errno::ENOSPC], &used_up("max_user_watches"))])?;
    Ok(watch)
}

/// What it may mean that a path in the directory, or the directory, cannot be written.
fn writable<T, E: Into<io::Error>>(path: &str, result: core::result::Result<T, E>) -> Result<T> {
    result.advise(
        &format!("write {path}"),
        &[
            (
                &[Errno::EACCES],
                &format!("no permission to write {path}; run as root, or make the directory writable: install -d -m 0770 -g \"$(id -gn)\" {DIRECTORY}"),
            ),
            (
                &[Errno::EROFS],
                &format!("{path} is on a read-only file system; mount one there that can be written: mount -t tmpfs -o mode=755 none {DIRECTORY}"),
            ),
            (
                &[Errno::ENOTDIR],
                &format!("cannot write {path}: {DIRECTORY} is no directory; move it away"),
            ),
        ],
    )
}

fn with_umask<T>(mask: libc::mode_t, work: impl FnOnce() -> T) -> T {
    let before = umask(Mode::from_bits_truncate(mask));
    let done = work();
    umask(before);
    done
}

/// Opens the directory, making it (0755) if it is missing.
fn open_directory() -> Result<File> {
    match with_umask(0o022, || mkdir(DIRECTORY, Mode::from_bits_truncate(0o755))) {
        Err(Errno::EEXIST) => {}
        made => writable(DIRECTORY, made)?,
    }
    writable(DIRECTORY, open_path(DIRECTORY, OFlag::O_DIRECTORY))
}

/// Removes a socket that nobody holds; refuses everything else.
fn remove_stale(path: &str) -> Result<()> {
    let began = Instant::now();
    while is_in_use(path)? {
        // The daemon of an interface that was just deleted may still be ending.
        if began.elapsed() > ENDING {
            return Err(Error::new(format!(
                "{path} is in use by a running daemon; stop it, or choose another interface name"
            )));
        }
        sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Removes a socket that nobody holds, too.
fn is_in_use(path: &str) -> Result<bool> {
    let found = match symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        found => found.step(path)?,
    };
    if !found.file_type().is_socket() {
        return Err(Error::new(format!("{path} exists and is not a socket; move it away")));
    }
    // A socket of another type finds out at once whether anybody holds this one; waiting to be accepted
    // by a stopped daemon would take for ever.
    let probe = UnixDatagram::unbound().step("probe the UAPI socket")?;
    let errno = probe.connect(path).map_or_else(|error| error.raw_os_error(), |()| None);
    match errno {
        Some(libc::ECONNREFUSED) => match remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => writable(path, Err(error)),
            _gone => Ok(false),
        },
        // Its daemon has removed it in the meantime.
        Some(libc::ENOENT) => Ok(false),
        None | Some(libc::EPROTOTYPE) => Ok(true),
        Some(errno) => {
            Err(Errno::from_raw(errno)).step(&format!("{path} exists and cannot be probed"))
        }
    }
}
