//! Opens the log.

use nix::libc;
use nix::unistd::geteuid;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use wgsep_journal::{SYSLOG, Sink};

/// Standard error, which may be a stream of the journal.
///
/// # Errors
/// If it cannot be duplicated.
pub fn stderr(is_journal: bool) -> io::Result<Sink> {
    let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    Ok(if is_journal { Sink::Journal(stderr) } else { Sink::Stream(stderr) })
}

/// The end of a file. A FIFO is not waited for.
///
/// # Errors
/// If it cannot be opened. ELOOP if it is a symbolic link; EPERM if it is another user's, has several
/// names, or is neither a regular file, a FIFO nor a character device.
pub fn file(path: &Path) -> io::Result<Sink> {
    let mut open = OpenOptions::new();
    open.append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = open.open(path)?;
    check_owned(&file.metadata()?)?;
    Ok(Sink::Stream(file))
}

/// The system's log, if there is one.
///
/// # Errors
/// If no process receives at /dev/log.
pub fn syslog() -> io::Result<Sink> {
    UnixDatagram::unbound()?.connect(SYSLOG)?;
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok(Sink::Syslog(socket))
}

/// Refuses a file that another user may have put in the place of the log.
fn check_owned(status: &Metadata) -> io::Result<()> {
    let kind = status.file_type();
    let is_log = kind.is_file() && status.nlink() <= 1 || kind.is_fifo() || kind.is_char_device();
    if is_log && [0, geteuid().as_raw()].contains(&status.uid()) {
        return Ok(());
    }
    Err(io::Error::from_raw_os_error(libc::EPERM))
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
}
