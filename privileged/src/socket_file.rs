//! The file of the UAPI socket: when it goes, the daemon ends; when the daemon ends, it goes.

use crate::error::{Error, Result, Step};
use crate::poll::poll;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::inotify::{AddWatchFlags, Inotify, InotifyEvent};
use nix::unistd::{AccessFlags, UnlinkatFlags, faccessat, unlinkat};
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// Where every WireGuard program looks.
pub const DIRECTORY: &str = "/var/run/wireguard";

/// How long the second half of a renaming may take.
const RENAMING: Duration = Duration::from_millis(50);

/// The socket's file, and the sandbox's report beside it; both are removed when this is dropped.
pub struct SocketFile {
    directory: File,
    watch: Inotify,
    /// The name in the directory, while it is ours.
    file: Option<OsString>,
    /// Where `wgsep audit` finds how the sandbox turned out; opened while that is possible.
    report: Option<(File, OsString)>,
}

impl SocketFile {
    /// `IF.sock` of an interface in `directory`, of which `watch` hears what is removed or renamed. The
    /// open `report` is `IF.sandbox`.
    #[must_use]
    pub fn new(directory: File, watch: Inotify, interface: &str, report: Option<File>) -> Self {
        let file = Some(format!("{interface}.sock").into());
        let report = report.map(|file| (file, format!("{interface}.sandbox").into()));
        Self { directory, watch, file, report }
    }

    /// Leaves the sandbox's report for `wgsep audit`.
    pub(crate) fn write_report(&mut self, text: &str) -> std::io::Result<()> {
        self.report.as_mut().map_or(Ok(()), |(report, _)| report.write_all(text.as_bytes()))
    }

    /// The directory that the socket is in.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Whether the files could be removed by this process as it is now.
    ///
    /// # Errors
    /// A line for the log. Other daemons give the directory to whoever started them, and the helper, once
    /// it has no CAP_DAC_OVERRIDE, is nobody there.
    pub(crate) fn check_removable(&self) -> Result<()> {
        let modes = AccessFlags::W_OK | AccessFlags::X_OK;
        // A filter around us may refuse the question; then the end tells.
        if faccessat(&self.directory, ".", modes, AtFlags::AT_EACCESS) != Err(Errno::EACCES) {
            return Ok(());
        }
        Err(Error::new(format!(
            "{DIRECTORY} is another user's, so that the UAPI socket stays there when this ends; take it back: chown root {DIRECTORY}; chmod u+wx {DIRECTORY}"
        )))
    }

    /// Becomes readable when something in the directory is removed.
    pub(crate) fn watch(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    /// Reads the watch: true if our file was removed, replaced, or moved out of the directory.
    ///
    /// Renamed within it, as an operator does who renames the interface, it is ours by its new name.
    pub(crate) fn was_removed(&mut self) -> bool {
        let mut renaming = None;
        while let Ok(events) = self.next_events(renaming.is_some()) {
            for event in events {
                self.report.take_if(|(_, name)| event.name.as_ref() == Some(name));
                let is_ours = event.name.is_some() && event.name == self.file;
                if event.mask.contains(AddWatchFlags::IN_MOVED_TO) && renaming == Some(event.cookie)
                {
                    renaming = None;
                    self.file = event.name;
                } else if is_ours {
                    let leaves = event.mask.contains(AddWatchFlags::IN_MOVED_FROM);
                    renaming = leaves.then_some(event.cookie);
                    self.file = None;
                }
            }
        }
        self.file.is_none()
    }

    /// The events that wait, if any. The two halves of a renaming need not come together, but the
    /// second is at most one system call away.
    fn next_events(&self, expected: bool) -> nix::Result<Vec<InotifyEvent>> {
        if expected {
            let _either_way = poll([self.watch()], RENAMING);
        }
        self.watch.read_events()
    }

    /// Removes what is still ours: a file that has taken the place of ours is somebody else's.
    ///
    /// # Errors
    /// If one is still there.
    pub(crate) fn remove(&mut self) -> Result<()> {
        let _is_known_now = self.was_removed();
        let report = self.report.take().map(|(_, name)| name);
        let mut outcome = Ok(());
        // The socket last: whoever waits for our end goes by it.
        for name in [report, self.file.take()].into_iter().flatten() {
            let path = format!("{DIRECTORY}/{}", name.display());
            match unlinkat(&self.directory, &*name, UnlinkatFlags::NoRemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => {}
                refused => outcome = refused.advise(
                    &format!("remove {path}"),
                    &[(
                        &[Errno::EACCES],
                        &format!("{path} stays, because {DIRECTORY} is another user's; take it back: chown root {DIRECTORY}; rm -f {path}"),
                    )],
                ),
            }
        }
        outcome
    }
}

impl Drop for SocketFile {
    /// However we get here, none stays behind that can be removed. Where it cannot, the log has told of
    /// that already.
    fn drop(&mut self) {
        let _told = self.remove();
    }
}
