//! The UAPI socket that wg(8) looks for: /var/run/wireguard/INTERFACE.sock.

use crate::error::{Error, Result, Step};
use nix::fcntl::{AtFlags, FcntlArg, OFlag, fcntl, open, openat};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockname, getsockopt,
    listen, socket, sockopt,
};
use nix::sys::stat::{Mode, SFlag, fstatat, umask};
use nix::unistd::{UnlinkatFlags, unlinkat};
use std::cell::{Cell, RefCell};
use std::ffi::{CString, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

/// Where every WireGuard program looks.
pub const DIRECTORY: &str = "/var/run/wireguard";

/// How long the second half of a renaming may take.
const RENAMING: Duration = Duration::from_millis(50);

/// The listening socket, and its file, which is removed when this is dropped.
pub struct UapiSocket {
    /// `None` once handed over: what the helper keeps open would go on accepting clients after the
    /// dataplane's death.
    listener: Option<OwnedFd>,
    directory: OwnedFd,
    watch: Inotify,
    file: RefCell<CString>,
    /// Where `wgsep audit` finds how the sandbox turned out; opened while that is possible.
    report: Option<(OwnedFd, CString)>,
    was_removed: Cell<bool>,
}

impl UapiSocket {
    /// Binds the socket of an interface, mode 0600. A stale file, of a daemon that was killed, is
    /// replaced; anything else of that name is left alone.
    ///
    /// # Errors
    /// If the name is taken, or the directory cannot be made or written.
    pub fn bind(interface: &str) -> Result<Self> {
        let directory = open_directory()?;
        let path = format!("{DIRECTORY}/{interface}.sock");
        let file = file_name(interface)?;
        remove_stale(directory.as_fd(), &file, &path)?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener =
            socket(AddressFamily::Unix, SockType::Stream, flags, None).step("UAPI socket")?;
        let address = UnixAddr::new(path.as_str()).step("UAPI socket address")?;
        // Before the file exists, so that no removal goes unseen.
        let watch = watch_directory()?;
        let before = umask(Mode::from_bits_truncate(0o177));
        let bound = bind(listener.as_raw_fd(), &address);
        umask(before);
        bound.map_err(|errno| not_writable(&path, errno))?;
        let listening = listen(&listener, Backlog::MAXCONN);
        let bound = Self::new(listener, directory, watch, file);
        listening.step("listen on the UAPI socket").map(|()| bound)
    }

    /// Takes over a socket that is already bound and listening (WG_UAPI_FD).
    ///
    /// # Errors
    /// If it is no listening unix socket, or the directory cannot be watched.
    pub fn adopt(listener: OwnedFd, interface: &str) -> Result<Self> {
        let is_unix = getsockname::<UnixAddr>(listener.as_raw_fd()).is_ok();
        if !is_unix || getsockopt(&listener, sockopt::AcceptConn) != Ok(true) {
            return Err(Error::new(
                "WG_UAPI_FD is not a listening unix socket; hand over one, or unset it",
            ));
        }
        fcntl(&listener, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).step("WG_UAPI_FD")?;
        let file = file_name(interface)?;
        Ok(Self::new(listener, open_directory()?, watch_directory()?, file))
    }

    fn new(listener: OwnedFd, directory: OwnedFd, watch: Inotify, file: CString) -> Self {
        let report = create_report(directory.as_fd(), &file);
        let (file, was_removed) = (RefCell::new(file), Cell::new(false));
        Self { listener: Some(listener), directory, watch, file, report, was_removed }
    }

    /// Leaves the sandbox's report for `wgsep audit`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_report(&self, text: &str) -> Result<()> {
        let Some((report, _)) = &self.report else { return Ok(()) };
        nix::unistd::write(report, text.as_bytes()).step("write the sandbox's report").map(drop)
    }

    /// What the dataplane accepts clients on; gone from here with the returned value.
    pub const fn take_listener(&mut self) -> Option<OwnedFd> {
        self.listener.take()
    }

    /// The directory that the socket is in.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Becomes readable when something in the directory is removed.
    pub fn watch(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    /// Reads the watch: true if our file was removed, replaced, or moved out of the directory.
    ///
    /// Renamed within it, as an operator does who renames the interface, it is ours by its new name.
    pub fn was_removed(&self) -> bool {
        let mut left = None;
        while let Ok(events) = self.next_events(left.is_some()) {
            for event in events {
                let Some(name) = event.name.map(OsString::into_vec) else { continue };
                let is_ours = name == self.file.borrow().as_bytes();
                if event.mask.contains(AddWatchFlags::IN_MOVED_TO) && left == Some(event.cookie) {
                    left = None;
                    // A name from a directory has no NUL.
                    self.file.replace(CString::new(name).unwrap_or_default());
                } else if is_ours && event.mask.contains(AddWatchFlags::IN_MOVED_FROM) {
                    left = Some(event.cookie);
                } else if is_ours {
                    self.was_removed.set(true);
                }
            }
        }
        self.was_removed.set(self.was_removed.get() || left.is_some());
        self.was_removed.get()
    }

    /// The events that wait, if any. The two halves of a renaming need not come together, but the
    /// second is at most one system call away.
    fn next_events(&self, expected: bool) -> nix::Result<Vec<InotifyEvent>> {
        if expected {
            let mut ready = [PollFd::new(self.watch(), PollFlags::POLLIN)];
            ppoll(&mut ready, Some(RENAMING.into()), None)?;
        }
        self.watch.read_events()
    }
}

impl Drop for UapiSocket {
    /// A file that has taken the place of ours is somebody else's.
    fn drop(&mut self) {
        let is_ours = !self.was_removed();
        let file = self.file.borrow();
        let report = self.report.as_ref().map(|(_, name)| name);
        for name in [is_ours.then_some(&*file), report].into_iter().flatten() {
            let name = name.as_c_str();
            let _already_gone = unlinkat(&self.directory, name, UnlinkatFlags::NoRemoveDir);
        }
    }
}

/// Makes `IF.sandbox` anew beside `IF.sock`. A directory that may not be written, below a socket that
/// was handed to us, leaves the audit without the report, and that is what it then says.
fn create_report(directory: BorrowedFd<'_>, socket: &CString) -> Option<(OwnedFd, CString)> {
    let socket = socket.to_str().ok()?;
    let name = CString::new(format!("{}.sandbox", socket.strip_suffix(".sock")?)).ok()?;
    let _stale = unlinkat(directory, name.as_c_str(), UnlinkatFlags::NoRemoveDir);
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let mode = Mode::from_bits_truncate(0o600);
    openat(directory, name.as_c_str(), flags, mode).ok().map(|file| (file, name))
}

fn file_name(interface: &str) -> Result<CString> {
    CString::new(format!("{interface}.sock"))
        .map_err(|_| Error::new("bad interface name: NUL; choose one such as wg0"))
}

/// Hears of every file that leaves the directory, or that another is renamed over.
fn watch_directory() -> Result<Inotify> {
    let flags = InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK;
    let watch = Inotify::init(flags).step("inotify")?;
    let leaves =
        AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_FROM | AddWatchFlags::IN_MOVED_TO;
    watch.add_watch(DIRECTORY, leaves).step("watch the UAPI socket")?;
    Ok(watch)
}

fn not_writable(path: &str, errno: nix::Error) -> Error {
    Error::new(format!(
        "cannot bind {path}: {}; run as root, or make the directory writable: install -d -m 0770 -g \"$(id -gn)\" {DIRECTORY}",
        errno.desc()
    ))
}

/// Opens the directory, making it (0755) if it is missing.
fn open_directory() -> Result<OwnedFd> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_PATH;
    match open(DIRECTORY, flags, Mode::empty()) {
        Err(nix::Error::ENOENT) => {}
        opened => return opened.step(DIRECTORY),
    }
    let before = umask(Mode::from_bits_truncate(0o022));
    let made = nix::unistd::mkdir(DIRECTORY, Mode::from_bits_truncate(0o755));
    umask(before);
    match made {
        Ok(()) | Err(nix::Error::EEXIST) => open(DIRECTORY, flags, Mode::empty()).step(DIRECTORY),
        Err(errno) => Err(not_writable(DIRECTORY, errno)),
    }
}

/// Removes a socket that nobody listens on; refuses everything else.
fn remove_stale(directory: BorrowedFd<'_>, file: &CString, path: &str) -> Result<()> {
    let found = match fstatat(directory, file.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
        Err(nix::Error::ENOENT) => return Ok(()),
        found => found.step(path)?,
    };
    if SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits()) != SFlag::S_IFSOCK {
        return Err(Error::new(format!("{path} exists and is not a socket; move it away")));
    }
    // Not waiting: a stopped daemon with a full backlog would never answer.
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe =
        socket(AddressFamily::Unix, SockType::Stream, flags, None).step("probe the UAPI socket")?;
    let address = UnixAddr::new(path).step("UAPI socket address")?;
    match connect(probe.as_raw_fd(), &address) {
        Err(nix::Error::ECONNREFUSED) => {
            unlinkat(directory, file.as_c_str(), UnlinkatFlags::NoRemoveDir)
                .map_err(|errno| not_writable(path, errno))
        }
        Ok(()) | Err(nix::Error::EAGAIN) => Err(Error::new(format!(
            "{path} is in use by a running daemon; stop it, or choose another interface name"
        ))),
        Err(errno) => Err(Error::call(&format!("{path} exists and cannot be probed"), errno)),
    }
}
