//! What another process needs to go on with the log and the service manager of this one.

use crate::log::{HELPER, escape};
use crate::{Format, Level, Log, ServiceManager, Sink};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;
use wgsep_ipc::LogLevel;

impl AsFd for Sink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Stream(file) | Self::Journal(file) => file.as_fd(),
            Self::Syslog(socket) => socket.as_fd(),
        }
    }
}

impl Log {
    /// Writes a line of which JSON has more: `members` are what stands behind the message, each with a comma before it.
    pub fn event(&self, message: &str, members: &str) {
        self.write(HELPER, Level::Info, [&escape(message), members], 1);
    }

    /// Where the lines go, how they look, and up to which level they are written.
    #[must_use]
    pub const fn settings(&self) -> (&Sink, Format, LogLevel) {
        (&self.sink, self.format, self.most)
    }
}

impl ServiceManager {
    /// The manager's socket, and the interval of its watchdog.
    #[must_use]
    pub fn parts(&self) -> Option<(BorrowedFd<'_>, Option<Duration>)> {
        let watchdog = self.watchdog.map(|(half, _)| half * 2);
        self.socket().map(|socket| (socket, watchdog))
    }

    /// Notifies that another process is the daemon from now on; false if the manager has no space for that at present.
    #[must_use]
    pub fn main_process(&self, pid: i32) -> bool {
        self.send(&format!("MAINPID={pid}"))
    }
}
