//! The UAPI socket that wg(8) looks for: /var/run/wireguard/INTERFACE.sock.

use crate::error::{Error, Result, Step};
use nix::fcntl::{AtFlags, OFlag, open};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::sys::stat::{Mode, SFlag, fstatat, umask};
use nix::unistd::{UnlinkatFlags, unlinkat};
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Where every WireGuard program looks.
pub const DIRECTORY: &str = "/var/run/wireguard";

/// The listening socket, and what it takes to remove its file.
pub struct UapiSocket {
    listener: OwnedFd,
    directory: OwnedFd,
    watch: Inotify,
    file: CString,
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
        let file = CString::new(format!("{interface}.sock"))
            .map_err(|_| Error::new("bad interface name"))?;
        remove_stale(directory.as_fd(), &file, &path)?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener =
            socket(AddressFamily::Unix, SockType::Stream, flags, None).step("UAPI socket")?;
        let address = UnixAddr::new(path.as_str()).step("UAPI socket address")?;
        let before = umask(Mode::from_bits_truncate(0o177));
        let bound = bind(listener.as_raw_fd(), &address);
        umask(before);
        bound.map_err(|errno| not_writable(&path, errno))?;
        listen(&listener, Backlog::MAXCONN).step("listen on the UAPI socket")?;
        Self::watched(listener, directory, file)
    }

    /// Takes over a socket that is already bound and listening (WG_UAPI_FD).
    ///
    /// # Errors
    /// If the directory cannot be watched.
    pub fn adopt(listener: OwnedFd, interface: &str) -> Result<Self> {
        let file = CString::new(format!("{interface}.sock"))
            .map_err(|_| Error::new("bad interface name"))?;
        Self::watched(listener, open_directory()?, file)
    }

    fn watched(listener: OwnedFd, directory: OwnedFd, file: CString) -> Result<Self> {
        let watch =
            Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).step("inotify")?;
        watch
            .add_watch(DIRECTORY, AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_FROM)
            .step("watch the UAPI socket")?;
        Ok(Self { listener, directory, watch, file })
    }

    /// What the dataplane accepts clients on.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// The directory that the socket is in.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Becomes readable when something in the directory is removed.
    pub fn watch(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    /// Reads the watch: true if our file was removed.
    pub fn was_removed(&self) -> bool {
        let file = self.file.as_bytes();
        self.watch.read_events().is_ok_and(|events| {
            events.iter().any(|event| {
                event.name.as_ref().is_some_and(|name| name.as_encoded_bytes() == file)
            })
        })
    }

    /// Removes the file, at the end.
    pub fn remove(&self) {
        let _already_gone =
            unlinkat(&self.directory, self.file.as_c_str(), UnlinkatFlags::NoRemoveDir);
    }
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
    let probe = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .step("probe the UAPI socket")?;
    let address = UnixAddr::new(path).step("UAPI socket address")?;
    match connect(probe.as_raw_fd(), &address) {
        Err(nix::Error::ECONNREFUSED) => {
            unlinkat(directory, file.as_c_str(), UnlinkatFlags::NoRemoveDir)
                .map_err(|errno| not_writable(path, errno))
        }
        Ok(()) => Err(Error::new(format!(
            "{path} is in use by a running daemon; stop it, or choose another interface name"
        ))),
        Err(errno) => Err(Error::call(&format!("{path} exists and cannot be probed"), errno)),
    }
}
