//! The UAPI socket that wg(8) looks for: /var/run/wireguard/INTERFACE.sock.

use crate::startup::open_path;
use crate::sys;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::socket::{
    self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr, getsockname, getsockopt, listen,
    socket, sockopt,
};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{geteuid, mkdir};
use std::fs::{
    File, Metadata, OpenOptions, read_link, read_to_string, remove_file, symlink_metadata,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use wgsep_monitor::{DIRECTORY, Error, OwnFile, Result, SocketFile, Step, objection};
use wgsep_policy::State;

/// How long a daemon may take to end after its interface is gone.
const ENDING: Duration = Duration::from_secs(1);
/// How long a program may take to remove a socket that it could not connect to.
const REMOVING: Duration = Duration::from_millis(1);
/// Most sockets that are made, one after the other, because others remove them.
const TRIES: usize = 100;
/// Most symbolic links on the way to a directory, as the kernel has it.
const MAX_LINKS: usize = 40;
/// Whom the kernel names where a user namespace has no number for the owner.
const UNMAPPED: u32 = 65_534;

/// Binds the socket of an interface, mode 0600. A stale file, of a daemon that was killed, is replaced;
/// anything else of that name is left alone.
///
/// # Errors
/// If the name is taken, the directory cannot be made or written, or others could replace the socket.
pub fn bind(interface: &str) -> Result<(OwnedFd, SocketFile)> {
    let directory = open_directory()?;
    let name = format!("{interface}.sock");
    remove_stale(&name)?;
    // Before the file exists, so that no removal goes unseen.
    let watch = watch_directory()?;
    let (listener, made) = bind_and_listen(&name, &directory)?;
    // From here on the file goes if anything fails.
    let mut file = SocketFile::new(directory, watch, Some(made), true, geteuid().as_raw());
    file.set_report(create_report(interface));
    Ok((listener, file))
}

/// wg(8), when it lists the interfaces, takes a socket that is bound and does not listen yet for a dead daemon's, and
/// removes the file; then another one is made.
fn bind_and_listen(name: &str, directory: &File) -> Result<(OwnedFd, OwnFile)> {
    let path = format!("{DIRECTORY}/{name}");
    for _ in 0..TRIES {
        let (listener, made) = make(name)?;
        let listening = listen(&listener, Backlog::MAXCONN).step("listen on the UAPI socket");
        listening.inspect_err(|_| drop(remove_file(&path)))?;
        sys::pause(REMOVING);
        match made {
            Ok(made) if made.is_there(directory.as_fd()) => return Ok((listener, made)),
            Err(error) if symlink_metadata(&path).is_ok() => {
                let _made_here = remove_file(&path);
                return Err(error).step(&path);
            }
            _removed => {}
        }
    }
    Err(Error::new(format!(
        "another program removes {path} each time it is made; stop it, and start wgsep again"
    )))
}

/// Binds a socket of this name in the directory, mode 0600, that does not listen yet.
///
/// # Errors
/// If the name is taken, or the directory cannot be written.
pub(crate) fn bind_in_directory(name: &str) -> Result<(OwnedFd, OwnFile)> {
    let path = format!("{DIRECTORY}/{name}");
    let (listener, made) = make(name)?;
    // Nothing but this process made it, though it cannot be looked at.
    let made = made.inspect_err(|_| drop(remove_file(&path))).step(&path)?;
    Ok((listener, made))
}

/// A socket of this name that does not listen yet, and its file, which another program may have removed already.
fn make(name: &str) -> Result<(OwnedFd, io::Result<OwnFile>)> {
    let path = format!("{DIRECTORY}/{name}");
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None).step(&path)?;
    let address = UnixAddr::new(&*path).step(&path)?;
    writable(&path, with_umask(0o177, || socket::bind(listener.as_raw_fd(), &address)))?;
    let made = open_path(&path, OFlag::empty()).map_err(io::Error::from);
    Ok((listener, made.and_then(|file| OwnFile::new(name.to_owned(), file))))
}

/// The file that a socket is bound to, by this name, wherever it is.
pub(crate) fn file_of(listener: &OwnedFd, name: &str) -> Option<OwnFile> {
    let bound = sys::bound_file(listener.as_fd()).map_err(io::Error::from);
    bound.and_then(|file| OwnFile::new(name.to_owned(), file)).ok()
}

/// Takes over a socket that is already bound and listening (WG_UAPI_FD). If it is the interface's own in
/// the usual place, its removal ends the daemon; its file is its maker's to remove.
///
/// # Errors
/// If it is no listening unix socket, the directory cannot be watched, or others could replace the socket.
pub fn adopt(listener: OwnedFd, interface: &str) -> Result<(OwnedFd, SocketFile)> {
    let is_unix = getsockname::<UnixAddr>(listener.as_raw_fd()).is_ok();
    if !is_unix || getsockopt(&listener, sockopt::AcceptConn) != Ok(true) {
        return Err(Error::new(
            "WG_UAPI_FD is not a listening unix socket; hand over one, or unset it",
        ));
    }
    fcntl(&listener, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).step("WG_UAPI_FD")?;
    let (directory, watch) = (open_directory()?, watch_directory()?);
    // Another daemon's socket may have the interface's name there.
    let bound = file_of(&listener, &format!("{interface}.sock"));
    let own = bound.filter(|bound| bound.is_there(directory.as_fd()));
    let has_name = own.is_some();
    let mut file = SocketFile::new(directory, watch, own, false, geteuid().as_raw());
    if has_name {
        file.set_report(create_report(interface));
    }
    Ok((listener, file))
}

/// The file of the socket of a running daemon, which stays that daemon's until this one has replaced it; true with it
/// if the file has the interface's name.
///
/// # Errors
/// If the directory cannot be watched, or others could replace the socket.
pub fn of_running(listener: &OwnedFd, interface: &str) -> Result<(SocketFile, bool)> {
    let (directory, watch) = (open_directory()?, watch_directory()?);
    let bound = file_of(listener, &format!("{interface}.sock"));
    let own = bound.filter(|bound| bound.is_there(directory.as_fd()));
    let has_name = own.is_some();
    Ok((SocketFile::new(directory, watch, own, false, geteuid().as_raw()), has_name))
}

/// The report of a running daemon, to be written anew in its place.
///
/// # Errors
/// If there is none, or it is another user's.
pub fn report_of_running(interface: &str) -> io::Result<(File, OwnFile)> {
    let path = format!("{DIRECTORY}/{interface}.sandbox");
    let report = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(&path)?;
    let held = open_path(&path, OFlag::empty())?;
    Ok((report, OwnFile::new(format!("{interface}.sandbox"), held)?))
}

/// Keeps clients of any of the sockets from passing descriptors to the dataplane, where the kernel can do that.
pub fn refuse_descriptors(sockets: [Option<&OwnedFd>; 3]) -> State {
    let mut sockets = sockets.into_iter().flatten();
    match sockets.try_for_each(|socket| sys::refuse_descriptors(socket.as_fd())) {
        Err(Errno::ENOPROTOOPT) => State::Unsupported,
        refused => refused.into(),
    }
}

/// Makes `IF.sandbox` beside the `IF.sock` that is this process's, in the place of one that a killed daemon
/// of that name left. Where it cannot be made, the log has a warning, and the audit lacks the report.
fn create_report(interface: &str) -> io::Result<(File, OwnFile)> {
    let path = format!("{DIRECTORY}/{interface}.sandbox");
    match remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _gone => {}
    }
    let report = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    // What is held after it is written can only be compared.
    let held = open_path(&path, OFlag::empty())?;
    Ok((report, OwnFile::new(format!("{interface}.sandbox"), held)?))
}

/// Reports every file that leaves the directory, or that another is renamed over.
fn watch_directory() -> Result<Inotify> {
    let flags = InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK;
    let watch = Inotify::init(flags)
        .advise("inotify", &[(&[Errno::EMFILE], &inotify_limit("instances", 1024))])?;
    let leaves =
        AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_FROM | AddWatchFlags::IN_MOVED_TO;
    watch.add_watch(DIRECTORY, leaves).advise(
        "watch the UAPI socket",
        &[(&[Errno::ENOSPC], &inotify_limit("watches", 65_536))],
    )?;
    Ok(watch)
}

/// What to do where a user has all the inotify instances or watches that are allowed. The limit that was reached is the
/// lower one: a user namespace has one of its own, which usually is none.
fn inotify_limit(what: &str, at_least: u32) -> String {
    let sysctls = [format!("fs.inotify.max_user_{what}"), format!("user.max_inotify_{what}")];
    let limits = sysctls.map(|name| {
        let value = read_to_string(format!("/proc/sys/{}", name.replace('.', "/")));
        (value.ok().and_then(|value| value.trim().parse::<u32>().ok()).unwrap_or(u32::MAX), name)
    });
    let [host, namespace] = limits;
    let (present, name) = if namespace.0 < host.0 { namespace } else { host };
    let more = present.saturating_mul(2).clamp(at_least, i32::MAX.unsigned_abs());
    format!("all inotify {what} of this host are in use; raise the limit: sysctl {name}={more}")
}

/// What it may mean that a path in the directory, or the directory, cannot be written.
fn writable<T, E: Into<io::Error>>(path: &str, result: core::result::Result<T, E>) -> Result<T> {
    result.advise(
        &format!("write {path}"),
        &[
            (
                &[Errno::EACCES],
                &format!("no permission to write {path}; run as root, or make the directory writable: install -d -m 1770 -g \"$(id -gn)\" {DIRECTORY}"),
            ),
            (
                &[Errno::EROFS],
                &format!("{path} is on a read-only file system; mount one there that can be written: mount -t tmpfs -o mode=755 none {DIRECTORY}"),
            ),
            (
                &[Errno::ENOTDIR],
                &format!("cannot write {path}: {DIRECTORY} is no directory, or a symbolic link to one; make it a directory: mkdir {DIRECTORY}, after it was moved away"),
            ),
        ],
    )
}

pub(crate) fn with_umask<T>(mask: libc::mode_t, work: impl FnOnce() -> T) -> T {
    let before = umask(Mode::from_bits_truncate(mask));
    let done = work();
    umask(before);
    done
}

/// Opens the directory, making it (0755) if it is missing.
///
/// # Errors
/// If others than root and the caller could replace it, or what is in it.
fn open_directory() -> Result<File> {
    let user = geteuid().as_raw();
    check_way(DIRECTORY, user)?;
    match with_umask(0o022, || mkdir(DIRECTORY, Mode::from_bits_truncate(0o755))) {
        Err(Errno::EEXIST) => {}
        made => writable(DIRECTORY, made)?,
    }
    let directory = writable(DIRECTORY, open_path(DIRECTORY, OFlag::O_DIRECTORY))?;
    let status = directory.metadata().step(DIRECTORY)?;
    refuse(objection(DIRECTORY, status.uid(), status.mode(), user))?;
    Ok(directory)
}

/// Refuses a way to a directory, as far as it exists, on which others could replace a directory or a
/// symbolic link. The last directory is for the caller to check.
fn check_way(path: &str, user: u32) -> Result<()> {
    let words = |path: &Path| -> Vec<_> {
        path.iter().rev().filter(|word| *word != "/").map(ToOwned::to_owned).collect()
    };
    let (mut at, mut ahead, mut links) = (PathBuf::from("/"), words(Path::new(path)), 0);
    while let Some(word) = ahead.pop() {
        let status = at.metadata().step(path)?;
        let owner = trusted(status.uid());
        refuse(objection(&at.display().to_string(), owner, status.mode(), user))?;
        if word == ".." {
            at.pop();
            continue;
        }
        let next = at.join(&word);
        let Ok(found) = symlink_metadata(&next) else { return Ok(()) };
        if !found.is_symlink() {
            at = next;
            continue;
        }
        links += 1;
        let target = read_link(&next).step(&format!("find the way to {path}"))?;
        let (owner, link) = (trusted(found.uid()), next.display());
        refuse((![0, user].contains(&owner)).then(|| {
            format!(
                "{link} is a symbolic link of uid {owner}, who could replace the UAPI socket; take it back: chown -h root {link}"
            )
        }))?;
        if links > MAX_LINKS {
            return Err(Errno::ELOOP).step(path);
        }
        if target.is_absolute() {
            at = PathBuf::from("/");
        }
        ahead.extend(words(&target));
    }
    Ok(())
}

/// In a user namespace the machine's root, whose directories are above those of the namespace, may have
/// no number there.
fn trusted(owner: u32) -> u32 {
    let is_all = |map: String| map.split_whitespace().eq(["0", "0", "4294967295"]);
    let is_unmapped = owner == UNMAPPED && !read_to_string("/proc/self/uid_map").is_ok_and(is_all);
    if is_unmapped { 0 } else { owner }
}

fn refuse(objection: Option<String>) -> Result<()> {
    objection.map_or(Ok(()), |line| Err(Error::new(line)))
}

/// Removes a socket of this name that no process listens on; refuses everything else.
pub(crate) fn remove_stale(name: &str) -> Result<()> {
    let (began, path) = (Instant::now(), format!("{DIRECTORY}/{name}"));
    while is_in_use(&path)? {
        // The daemon of an interface that was just deleted may still be ending.
        if began.elapsed() > ENDING {
            return Err(Error::new(format!(
                "{path} is in use by a running daemon; stop it, or choose another interface name"
            )));
        }
        sys::pause(Duration::from_millis(5));
    }
    Ok(())
}

/// Removes a socket that no process listens on, too.
fn is_in_use(path: &str) -> Result<bool> {
    let found = match symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        found => found.step(path)?,
    };
    if !found.file_type().is_socket() {
        return Err(Error::new(format!("{path} exists and is not a socket; move it away")));
    }
    let is_same = |now: Metadata| (now.dev(), now.ino()) == (found.dev(), found.ino());
    // A socket of another type finds out at once whether anybody holds this one; waiting to be accepted
    // by a stopped daemon would take for ever.
    let probe = UnixDatagram::unbound().step("probe the UAPI socket")?;
    let errno = probe.connect(path).map_or_else(|error| error.raw_os_error(), |()| None);
    match errno {
        // Another daemon that starts may have replaced it in the meantime.
        Some(libc::ECONNREFUSED) if !symlink_metadata(path).is_ok_and(is_same) => Ok(true),
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
