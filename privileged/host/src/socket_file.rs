//! The file of the UAPI socket: when it is removed, the daemon ends; when the daemon ends, it is removed.
//!
//! What a name in the directory refers to is compared with what this process made, by device and inode,
//! before anything is removed or a renaming is followed.

use crate::error::{Error, Result, Step};
use crate::poll::poll;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::inotify::{AddWatchFlags, Inotify, InotifyEvent};
use nix::sys::stat::{FileStat, fstatat};
use nix::unistd::{AccessFlags, UnlinkatFlags, faccessat, unlinkat};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

/// Where every WireGuard program looks.
pub const DIRECTORY: &str = "/var/run/wireguard";

/// How long the second half of a renaming may take.
const RENAMING: Duration = Duration::from_millis(50);
/// Bits of a mode: the group, or others, may write; only owners may remove or rename.
const WRITABLE: u32 = 0o022;
const OTHERS_WRITE: u32 = 0o002;
const STICKY: u32 = 0o1000;

/// What is wrong with a directory of this owner and mode as the place of a socket of `user`, with the
/// command that mends it; `None` if only root and `user` can replace the socket.
#[must_use]
pub fn objection(path: &str, owner: u32, mode: u32, user: u32) -> Option<String> {
    if ![0, user].contains(&owner) {
        return Some(format!(
            "{path} belongs to uid {owner}, who could replace the UAPI socket; take it back: chown root {path}"
        ));
    }
    if mode & WRITABLE == 0 || mode & STICKY != 0 {
        return None;
    }
    let who = if mode & OTHERS_WRITE == 0 { "its group" } else { "every user" };
    let kept = mode & 0o7777 & !OTHERS_WRITE;
    let mended = if kept & WRITABLE == 0 { kept } else { kept | STICKY };
    Some(format!(
        "{path} can be written by {who} and is not sticky, so that others could replace the UAPI socket; mend it: chmod {mended:04o} {path}"
    ))
}

fn status(directory: BorrowedFd<'_>, name: &OsStr) -> nix::Result<FileStat> {
    fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)
}

/// A file in the directory, by its name and by what the name referred to when it was made.
pub struct OwnFile {
    name: OsString,
    /// Open as long as it is compared with: no other file can have its inode meanwhile.
    _held: File,
    device_and_inode: (u64, u64),
}

impl OwnFile {
    /// The open file that has this name.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn new(name: String, file: File) -> std::io::Result<Self> {
        let status = file.metadata()?;
        Ok(Self { name: name.into(), _held: file, device_and_inode: (status.dev(), status.ino()) })
    }

    /// Whether its name still refers to it.
    #[must_use]
    pub fn is_there(&self, directory: BorrowedFd<'_>) -> bool {
        let found = status(directory, &self.name);
        found.is_ok_and(|found| (found.st_dev, found.st_ino) == self.device_and_inode)
    }
}

/// What became of the socket's file.
pub enum Change {
    /// It is where it was.
    None,
    /// It has another name, by which it is known now; a line for the log.
    Renamed(String),
    /// It was removed, replaced, or moved out of the directory.
    Removed,
    /// It was renamed where others than its owner may do that; a line that says so.
    Unsafe(String),
}

/// The socket's file, and the sandbox's report and other sockets beside it; what this process made of them is removed when
/// this is dropped.
pub struct SocketFile {
    directory: File,
    watch: Inotify,
    /// While it is there; `None` from the start if the socket that was handed over is elsewhere.
    socket: Option<OwnFile>,
    /// Whether this process made it.
    is_made_here: bool,
    /// Where `wgsep audit` finds how the sandbox turned out. `None` where there is no file, as beside a socket that
    /// is elsewhere.
    report: Option<OwnFile>,
    /// The same file until it is written, opened while that is possible, or why it could not be.
    unwritten: Option<std::io::Result<File>>,
    /// Other sockets of this process: the status socket, that for preshared keys, and that to which a helper that replaces
    /// this process announces itself.
    beside: Vec<OwnFile>,
    /// Who runs this process.
    user: u32,
}

impl SocketFile {
    /// The socket of an interface in `directory`, whose removals and renamings `watch` reports.
    #[must_use]
    pub const fn new(
        directory: File,
        watch: Inotify,
        socket: Option<OwnFile>,
        is_made_here: bool,
        user: u32,
    ) -> Self {
        Self {
            directory,
            watch,
            socket,
            is_made_here,
            report: None,
            unwritten: None,
            beside: Vec::new(),
            user,
        }
    }

    /// Takes over the empty file for the sandbox's report, open to be written and as its own, or why there is none.
    pub fn set_report(&mut self, made: std::io::Result<(File, OwnFile)>) {
        self.unwritten = Some(made.map(|(file, report)| {
            self.report = Some(report);
            file
        }));
    }

    /// Leaves the sandbox's report for `wgsep audit`. One that cannot be written whole is removed.
    ///
    /// # Errors
    /// A line for the log, about the report of this interface. What is served does not depend on it.
    pub fn write_report(&mut self, interface: &str, text: &str) -> Result<()> {
        let Some(unwritten) = self.unwritten.take() else { return Ok(()) };
        let written = unwritten.and_then(|mut file| file.write_all(text.as_bytes()));
        if written.is_err() {
            let _audit_finds_it_incomplete = self.remove_report();
        }
        let path = format!("{DIRECTORY}/{interface}.sandbox");
        let in_the_way = format!("{path} is a directory; move it away");
        let known: [(&[Errno], &str); 1] = [(&[Errno::EISDIR], &in_the_way)];
        written.advise(&format!("write {path}"), &known).map_err(|error| {
            Error::new(format!(
                "{error}; until wgsep is started again, `wgsep audit {interface}` lacks what only the helper can report"
            ))
        })
    }

    /// Takes over files of other sockets of this process.
    pub fn add(&mut self, files: impl IntoIterator<Item = OwnFile>) {
        self.beside.extend(files);
    }

    /// Leaves the files to the process that has replaced this one.
    pub fn leave(&mut self) {
        (self.socket, self.report) = (None, None);
        self.beside.clear();
    }

    /// From now on the socket's file is this process's, which has replaced the one that made it.
    pub const fn take_over(&mut self) {
        self.is_made_here = true;
    }

    /// Whether this process made the socket's file, or took it over.
    #[must_use]
    pub const fn is_made_here(&self) -> bool {
        self.is_made_here
    }

    /// Who runs this process.
    #[must_use]
    pub const fn user(&self) -> u32 {
        self.user
    }

    /// The directory that the socket is in.
    #[must_use]
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Whether the files could be removed by this process as it is now.
    ///
    /// # Errors
    /// A line for the log: the helper, once it has no CAP_DAC_OVERRIDE, goes by the directory's mode.
    pub fn check_removable(&self) -> Result<()> {
        let modes = AccessFlags::W_OK | AccessFlags::X_OK;
        // A filter around us may refuse the query; then removal shows it.
        if faccessat(&self.directory, ".", modes, AtFlags::AT_EACCESS) != Err(Errno::EACCES) {
            return Ok(());
        }
        Err(Error::new(format!(
            "{DIRECTORY} cannot be written without CAP_DAC_OVERRIDE, so that the UAPI socket stays there when this ends; mend it: chown root {DIRECTORY}; chmod u+wx {DIRECTORY}"
        )))
    }

    /// Becomes readable when something in the directory is removed or renamed.
    pub fn watch(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    /// Reads the watch, and looks what became of the socket.
    ///
    /// Renamed within the directory, as an operator does who renames the interface, it is followed to its
    /// new name, if only its owner and root could do that. The other files of its old name are removed then,
    /// because another daemon may take that name.
    pub fn changes(&mut self) -> Change {
        let renamed = self.read_renaming();
        let Some(socket) = &mut self.socket else { return Change::None };
        let is_renamed = renamed.is_some();
        if let Some(name) = renamed {
            socket.name = name;
        }
        if !socket.is_there(self.directory.as_fd()) {
            self.socket = None;
            return Change::Removed;
        }
        if !is_renamed {
            return Change::None;
        }
        let name = socket.name.display().to_string();
        if let Some(objection) = self.objection() {
            return Change::Unsafe(format!(
                "the UAPI socket was renamed to {name:?}, and {objection}"
            ));
        }
        let _logged_at_the_end = self.remove_report();
        let _logged_at_the_end = self.remove_beside();
        Change::Renamed(format!("the UAPI socket was renamed to {name:?}"))
    }

    /// What is wrong with the directory as it is now.
    fn objection(&self) -> Option<String> {
        match status(self.directory.as_fd(), OsStr::new(".")) {
            Ok(found) => objection(DIRECTORY, found.st_uid, found.st_mode, self.user),
            Err(errno) => Some(format!("{DIRECTORY} cannot be looked at: {}", errno.desc())),
        }
    }

    /// Reads the watch to its end: the new name of the socket, if it was renamed.
    fn read_renaming(&mut self) -> Option<OsString> {
        let (mut name, mut renaming) = (None, None);
        while let Ok(events) = self.next_events(renaming.is_some()) {
            for event in events {
                if event.mask.contains(AddWatchFlags::IN_MOVED_TO) && renaming == Some(event.cookie)
                {
                    (name, renaming) = (event.name, None);
                } else if event.mask.contains(AddWatchFlags::IN_MOVED_FROM) {
                    let known = name.as_ref().or(self.socket.as_ref().map(|socket| &socket.name));
                    renaming = renaming.or((event.name.as_ref() == known).then_some(event.cookie));
                }
            }
        }
        name
    }

    /// The events that wait, if any. The two halves of a renaming need not come together, but the
    /// second is at most one system call away.
    fn next_events(&self, expected: bool) -> nix::Result<Vec<InotifyEvent>> {
        if expected {
            let _either_way = poll([self.watch()], RENAMING);
        }
        self.watch.read_events()
    }

    /// Removes what this process made and is still there: a file that has taken the place of ours is
    /// not this process's.
    ///
    /// # Errors
    /// If one is still there.
    pub fn remove(&mut self) -> Result<()> {
        let _is_known_now = self.changes();
        let report = self.remove_report();
        let beside = self.remove_beside();
        // The socket last, because its absence means that the daemon has ended.
        let socket = self.socket.take().filter(|_| self.is_made_here);
        socket.map_or(Ok(()), |socket| self.remove_file(&socket)).and(report).and(beside)
    }

    fn remove_report(&mut self) -> Result<()> {
        self.report.take().map_or(Ok(()), |report| self.remove_file(&report))
    }

    fn remove_beside(&mut self) -> Result<()> {
        let files = core::mem::take(&mut self.beside);
        // Each of them, whatever became of the others.
        let removed: Vec<_> = files.iter().map(|file| self.remove_file(file)).collect();
        removed.into_iter().collect()
    }

    fn remove_file(&self, file: &OwnFile) -> Result<()> {
        if !file.is_there(self.directory.as_fd()) {
            return Ok(());
        }
        let path = format!("{DIRECTORY}/{}", file.name.display());
        match unlinkat(&self.directory, &*file.name, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::ENOENT) => Ok(()),
            removed => removed.advise(
                &format!("remove {path}"),
                &[(
                    &[Errno::EACCES, Errno::EPERM],
                    &format!("{path} stays, because {DIRECTORY} is another user's or cannot be written, or a filter refuses unlinkat(2); take it back (chown root {DIRECTORY}) or allow the call, and: rm -f {path}"),
                )],
            ),
        }
    }
}

impl Drop for SocketFile {
    /// No file stays behind that can be removed. Where one cannot, the log has reported that.
    fn drop(&mut self) {
        let _reported = self.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_directory_in_which_others_replace_nothing_is_accepted() {
        const USER: u32 = 1000;
        let command = |owner, mode, user| {
            let objection = objection("/d", owner, mode, user)?;
            objection.split_once(": ").map(|(_, command)| command.to_owned())
        };
        for (owner, mode, user, expected) in [
            (0, 0o40755, 0, None),
            (0, 0o40700, USER, None),
            (USER, 0o40755, USER, None),
            (0, 0o41770, 0, None),
            (0, 0o41777, USER, None),
            (0, 0o40770, 0, Some("chmod 1770 /d")),
            (0, 0o40775, USER, Some("chmod 1775 /d")),
            (0, 0o40777, 0, Some("chmod 1775 /d")),
            (0, 0o40757, 0, Some("chmod 0755 /d")),
            (0, 0o42770, 0, Some("chmod 3770 /d")),
            (USER, 0o40755, 0, Some("chown root /d")),
            (USER, 0o41777, 0, Some("chown root /d")),
            (1001, 0o40755, USER, Some("chown root /d")),
        ] {
            let found = command(owner, mode, user);
            assert_eq!(found.as_deref(), expected, "{owner} {mode:o} {user}");
        }
    }
}
