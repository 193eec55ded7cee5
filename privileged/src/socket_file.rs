//! The file of the UAPI socket: when it goes, the daemon ends; when the daemon ends, it goes.

use crate::poll::poll;
use nix::sys::inotify::{AddWatchFlags, Inotify, InotifyEvent};
use nix::unistd::{UnlinkatFlags, unlinkat};
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

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
}

impl Drop for SocketFile {
    /// A file that has taken the place of ours is somebody else's.
    fn drop(&mut self) {
        let _is_known_now = self.was_removed();
        let report = self.report.take().map(|(_, name)| name);
        // The socket last: whoever waits for our end goes by it.
        for name in [report, self.file.take()].into_iter().flatten() {
            let _already_gone = unlinkat(&self.directory, &*name, UnlinkatFlags::NoRemoveDir);
        }
    }
}
