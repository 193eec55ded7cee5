//! Reports to the process that started the daemon in the background how the start went.

use nix::sys::stat::fstat;
use std::io::{PipeReader, PipeWriter, Read, Write, stderr};
use wgsep_monitor::Error;

/// What is written when all is well, which is no error's line.
const READY: &str = "ready";

/// Whether standard error is a stream of systemd's journal (systemd.exec(5), JOURNAL_STREAM), which notes
/// the time itself and reads a priority from the beginning of each line.
#[must_use]
pub fn stderr_is_journal() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM") else { return false };
    let identity = fstat(stderr()).map(|file| format!("{}:{}", file.st_dev, file.st_ino));
    identity.is_ok_and(|identity| stream == *identity)
}

/// The way back to the process that waits until the daemon is ready, and nothing in the foreground.
#[derive(Default)]
pub struct Launcher {
    pipe: Option<PipeWriter>,
    to_journal: bool,
}

impl Launcher {
    /// In the foreground, before the environment is cleared.
    #[must_use]
    pub fn of_environment() -> Self {
        Self { pipe: None, to_journal: stderr_is_journal() }
    }

    /// Whether standard error is a stream of the journal.
    #[must_use]
    pub const fn is_journal(&self) -> bool {
        self.to_journal
    }

    /// From now on, reports to the process that reads the other end with [`Launcher::wait`].
    pub fn report_to(&mut self, pipe: PipeWriter) {
        self.pipe = Some(pipe);
    }

    /// All is ready.
    pub fn ready(&mut self) {
        self.report(READY);
    }

    /// It failed: reports that to the launcher, or else on standard error. An orderly end is in the log.
    pub fn failed(&mut self, error: &Error) {
        if !self.report(&error.line) && error.status != 0 {
            write_error(&error.line, self.to_journal);
        }
    }

    fn report(&mut self, line: &str) -> bool {
        self.pipe.take().is_some_and(|mut pipe| pipe.write_all(line.as_bytes()).is_ok())
    }

    /// Waits for the report; true if all is ready, else it has printed why not.
    #[must_use]
    pub fn wait(&self, mut pipe: PipeReader) -> bool {
        let mut message = String::new();
        let _cut_short = pipe.read_to_string(&mut message);
        let line = match message.as_str() {
            READY => return true,
            "" => "the daemon was killed before it was ready; look for the reason in: dmesg",
            line => line,
        };
        write_error(line, self.to_journal);
        false
    }
}

/// Prints an error line on standard error. It must be called before the environment is cleared.
pub fn print_error(line: &str) {
    write_error(line, stderr_is_journal());
}

fn write_error(line: &str, to_journal: bool) {
    let priority = if to_journal { "<3>" } else { "" };
    let _unread = stderr().write_all(format!("{priority}wgsep: {line}\n").as_bytes());
}
