//! The sockets beside the UAPI's in /var/run/wireguard, and who may connect to them: INTERFACE.status, over which no key
//! passes and nothing is set, and INTERFACE.psk, which sets preshared keys and nothing else. (Their names must not end in
//! `.sock`, or wg(8) would take them for those of interfaces.)

use crate::Options;
use crate::uapi_socket::{bind_in_directory, remove_stale};
use nix::fcntl::AT_FDCWD;
use nix::sys::socket::{Backlog, listen};
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat};
use nix::unistd::{Gid, Group, chown, getegid, setegid};
use std::fs::{metadata, remove_file};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use wgsep_journal::{Level, Log};
use wgsep_monitor::{DIRECTORY, Error, Result, SocketFile, Step};

/// The group whose members may read the status, where nothing else is said and there is one.
const GROUP: &str = "wgsep";
/// The mode with which a socket is made.
const MADE_WITH: u32 = 0o600;

/// What the operator says of who may connect.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// A group, by name or number.
    pub group: Option<String>,
    /// The mode of the socket's file, up to 0666.
    pub mode: Option<u32>,
}

/// Who may connect to a socket.
#[derive(Clone, Copy, Debug)]
struct Allowed {
    /// What the names of the file and of the options end and begin with.
    socket: &'static str,
    /// The group of the file; `None` for this process's.
    group: Option<Gid>,
    mode: u32,
    /// The operator said so.
    is_wanted: bool,
}

/// The sockets, as far as they are made.
type Listeners = [Option<OwnedFd>; 2];

/// Who may connect to either.
pub struct Sockets([Allowed; 2]);

impl Sockets {
    /// Looks the groups up.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn of(options: &Options) -> Result<Self> {
        // Nobody asked for it: where groups cannot be looked up, root alone may connect.
        let default = || Group::from_name(GROUP).ok().flatten().map(|group| group.gid);
        let psk = Allowed::of(&options.psk, "psk", || None)?;
        Ok(Self([Allowed::of(&options.status, "status", default)?, psk]))
    }

    /// Binds the sockets of an interface, which listen: the status socket, and the one for preshared keys if the operator
    /// asked for it. Their files are added to `files`. What is served does not depend on the first: where it cannot be
    /// made the log has a warning, unless the operator asked for it.
    ///
    /// # Errors
    /// If the operator asked for one, and it cannot be made.
    pub fn bind(self, name: &str, files: &mut SocketFile, log: &mut Log) -> Result<Listeners> {
        let [status, psk] = self.0;
        let listener = match status.bind(name, files, log) {
            Err(error) if !status.is_wanted => {
                log.line(Level::Warn, &format!("{error}; without it, there is no status socket"));
                None
            }
            made => Some(made?),
        };
        Ok([listener, psk.is_wanted.then(|| psk.bind(name, files, log)).transpose()?])
    }
}

fn group_of(name: &str, socket: &str) -> Result<Gid> {
    if let Ok(number) = name.parse() {
        return Ok(Gid::from_raw(number));
    }
    let found = Group::from_name(name).step(&format!("look up the group {name}"))?;
    found.map(|group| group.gid).ok_or_else(|| {
        Error::new(format!(
            "--{socket}-group: no group {name:?}; create it: groupadd --system {name}, or leave the option out"
        ))
    })
}

impl Allowed {
    fn of(access: &Access, socket: &'static str, default: fn() -> Option<Gid>) -> Result<Self> {
        let is_wanted = access.group.is_some() || access.mode.is_some();
        let named = access.group.as_ref().map(|name| group_of(name, socket)).transpose()?;
        let group = named.or_else(default);
        let mode = access.mode.unwrap_or(if group.is_some() { 0o660 } else { MADE_WITH });
        Ok(Self { socket, group, mode, is_wanted })
    }

    fn bind(self, interface: &str, files: &mut SocketFile, log: &mut Log) -> Result<OwnedFd> {
        let name = format!("{interface}.{}", self.socket);
        remove_stale(&name)?;
        let path = format!("{DIRECTORY}/{name}");
        let (listener, made) = with_group(self.group, || bind_in_directory(&name))??;
        let opened = self.open(&path, log);
        let serves = opened.and_then(|()| listen(&listener, Backlog::MAXCONN).step(&path));
        serves.inspect_err(|_| drop(remove_file(&path)))?;
        files.add([made]);
        Ok(listener)
    }

    /// Opens the socket, of mode 0600, to those who may connect.
    fn open(self, path: &str, log: &mut Log) -> Result<()> {
        if let Some(group) = self.group {
            // Where that is refused, the file may have the group already.
            let _looked_at_below = chown(path, None, Some(group));
            if metadata(path).step(path)?.gid() != group.as_raw() {
                let line = format!(
                    "{path} cannot be given to group {group}: this process is neither in it nor may change groups; add its user to the group, or leave --{}-group out",
                    self.socket
                );
                if self.is_wanted {
                    return Err(Error::new(line));
                }
                return Ok(());
            }
        }
        if self.mode == MADE_WITH {
            return Ok(());
        }
        let mode = Mode::from_bits_truncate(self.mode);
        fchmodat(AT_FDCWD, path, mode, FchmodatFlags::FollowSymlink).step(path)?;
        if let Some(line) = self.unreachable(&metadata(DIRECTORY).step(DIRECTORY)?) {
            log.line(Level::Warn, &line);
        }
        Ok(())
    }

    /// A warning where those who may connect cannot reach the socket.
    fn unreachable(self, directory: &std::fs::Metadata) -> Option<String> {
        const OTHERS_SEARCH: u32 = 0o001;
        const GROUP_SEARCH: u32 = 0o010;
        let group = self.group.filter(|_| self.mode & 0o060 != 0)?;
        let (mode, owner) = (directory.mode(), directory.gid());
        let may_search = if owner == group.as_raw() { GROUP_SEARCH } else { OTHERS_SEARCH };
        (mode & may_search == 0).then(|| {
            format!(
                "{DIRECTORY} cannot be searched by group {group}, which may connect to the {} socket in it; mend it: chmod a+x {DIRECTORY}",
                self.socket
            )
        })
    }
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
