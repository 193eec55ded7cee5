//! The status socket, /var/run/wireguard/INTERFACE.status, and who may connect to it. No key passes there, and it
//! sets nothing. (Its name must not end in `.sock`, or wg(8) would take it for an interface's.)

use crate::uapi_socket::{bind_in_directory, remove_stale};
use nix::fcntl::AT_FDCWD;
use nix::sys::socket::{Backlog, listen};
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat};
use nix::unistd::{Gid, Group, chown, getegid, setegid};
use std::fs::{metadata, remove_file};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use wgsep_journal::{Level, Log};
use wgsep_monitor::{DIRECTORY, Error, OwnFile, Result, Step};

/// The group whose members may connect, where nothing else is said and there is one.
const GROUP: &str = "wgsep";
/// The mode with which a socket is made.
const MADE_WITH: u32 = 0o600;
/// Bits that the mode of a socket may have.
const PERMISSIONS: u32 = 0o666;

/// What the operator says of who may connect.
#[derive(Clone, Debug, Default)]
pub struct StatusAccess {
    /// A group, by name or number.
    pub group: Option<String>,
    /// The mode of the socket's file.
    pub mode: Option<u32>,
}

/// Who may connect.
#[derive(Clone, Copy, Debug)]
pub struct Readers {
    /// The group of the file; `None` for this process's.
    group: Option<Gid>,
    mode: u32,
    /// The operator said so.
    is_wanted: bool,
}

impl StatusAccess {
    /// Looks the group up.
    ///
    /// # Errors
    /// If there is none of that name, or the mode is none of a socket's.
    pub fn readers(&self) -> Result<Readers> {
        if let Some(mode) = self.mode.filter(|mode| mode & !PERMISSIONS != 0) {
            return Err(Error::new(format!(
                "--status-mode {mode:04o}: a socket is read and written alone; choose one up to 0666, such as 0660"
            )));
        }
        let group = match &self.group {
            Some(name) => Some(group_of(name)?),
            // Nobody asked for it: where groups cannot be looked up, root alone may connect.
            None => Group::from_name(GROUP).ok().flatten().map(|group| group.gid),
        };
        let mode = self.mode.unwrap_or(if group.is_some() { 0o660 } else { MADE_WITH });
        Ok(Readers { group, mode, is_wanted: self.group.is_some() || self.mode.is_some() })
    }
}

fn group_of(name: &str) -> Result<Gid> {
    if let Ok(number) = name.parse() {
        return Ok(Gid::from_raw(number));
    }
    let found = Group::from_name(name).step(&format!("look up the group {name}"))?;
    found.map(|group| group.gid).ok_or_else(|| {
        Error::new(format!(
            "--status-group: no group {name:?}; create it: groupadd --system {name}, or leave the option out"
        ))
    })
}

/// Binds the status socket of an interface, which listens. What is served does not depend on it: where it cannot be made
/// the log has a warning, unless the operator asked for it.
///
/// # Errors
/// If the operator asked for it, and it cannot be made.
pub fn bind(
    interface: &str,
    readers: Readers,
    log: &mut Log,
) -> Result<Option<(OwnedFd, OwnFile)>> {
    match try_bind(&format!("{interface}.status"), readers, log) {
        Ok(made) => Ok(Some(made)),
        Err(error) if readers.is_wanted => Err(error),
        Err(error) => {
            log.line(Level::Warn, &format!("{error}; without it, there is no status socket"));
            Ok(None)
        }
    }
}

fn try_bind(name: &str, readers: Readers, log: &mut Log) -> Result<(OwnedFd, OwnFile)> {
    remove_stale(name)?;
    let path = format!("{DIRECTORY}/{name}");
    let (listener, made) = with_group(readers.group, || bind_in_directory(name))??;
    open_to(&path, readers, log).inspect_err(|_| drop(remove_file(&path)))?;
    listen(&listener, Backlog::MAXCONN)
        .step("listen on the status socket")
        .inspect_err(|_| drop(remove_file(&path)))?;
    Ok((listener, made))
}

/// Makes files of a group where this process may: root needs no CAP_CHOWN for that.
fn with_group<T>(group: Option<Gid>, work: impl FnOnce() -> T) -> Result<T> {
    let before = getegid();
    let is_changed = group.is_some_and(|group| group != before && setegid(group).is_ok());
    let done = work();
    if is_changed {
        setegid(before).step("become the own group again")?;
    }
    Ok(done)
}

/// Opens the socket, of mode 0600, to its readers.
fn open_to(path: &str, readers: Readers, log: &mut Log) -> Result<()> {
    if let Some(group) = readers.group {
        // Where that is refused, the file may have the group already.
        let _looked_at_below = chown(path, None, Some(group));
        if metadata(path).step(path)?.gid() != group.as_raw() {
            let line = format!(
                "{path} cannot be given to group {group}: this process is neither in it nor may change groups; add its user to the group, or leave --status-group out"
            );
            if readers.is_wanted {
                return Err(Error::new(line));
            }
            return Ok(());
        }
    }
    if readers.mode == MADE_WITH {
        return Ok(());
    }
    let mode = Mode::from_bits_truncate(readers.mode);
    fchmodat(AT_FDCWD, path, mode, FchmodatFlags::FollowSymlink).step(path)?;
    if let Some(line) = unreachable(readers, &metadata(DIRECTORY).step(DIRECTORY)?) {
        log.line(Level::Warn, &line);
    }
    Ok(())
}

/// A warning where those who may connect cannot reach the socket.
fn unreachable(readers: Readers, directory: &std::fs::Metadata) -> Option<String> {
    const OTHERS_SEARCH: u32 = 0o001;
    const GROUP_SEARCH: u32 = 0o010;
    let group = readers.group.filter(|_| readers.mode & 0o060 != 0)?;
    let (mode, owner) = (directory.mode(), directory.gid());
    let may_search = if owner == group.as_raw() { GROUP_SEARCH } else { OTHERS_SEARCH };
    (mode & may_search == 0).then(|| {
        format!(
            "{DIRECTORY} cannot be searched by group {group}, which may connect to the status socket in it; mend it: chmod a+x {DIRECTORY}"
        )
    })
}
