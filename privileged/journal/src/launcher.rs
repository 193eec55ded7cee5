//! Telling whoever started the daemon in the background how that went.

use std::io::{PipeReader, PipeWriter, Read, Write, stderr};

/// What the launcher hears when all is well, which is no error's line.
const READY: &str = "ready";

/// The way back to the process that waits until the daemon is ready, and nothing in the foreground.
#[derive(Default)]
pub struct Launcher(Option<PipeWriter>);

impl Launcher {
    /// The process that reads the other end with [`Launcher::heard`].
    #[must_use]
    pub const fn waiting(pipe: PipeWriter) -> Self {
        Self(Some(pipe))
    }

    /// All is ready.
    pub fn ready(&mut self) {
        self.tell(READY);
    }

    /// It failed: says so to the launcher, or else on standard error.
    pub fn failed(&mut self, line: &str) {
        if !self.tell(line) {
            complain(line);
        }
    }

    fn tell(&mut self, line: &str) -> bool {
        self.0.take().is_some_and(|mut pipe| pipe.write_all(line.as_bytes()).is_ok())
    }

    /// Waits to be told; true if all is ready, else it has said why not.
    #[must_use]
    pub fn heard(mut pipe: PipeReader) -> bool {
        let mut said = String::new();
        let _cut_short = pipe.read_to_string(&mut said);
        match said.as_str() {
            READY => return true,
            "" => complain("the daemon died before it was ready; its log says why"),
            line => complain(line),
        }
        false
    }
}

/// Says what failed, on standard error.
pub fn complain(line: &str) {
    let _nobody_reads = stderr().write_all(format!("wgsep: {line}\n").as_bytes());
}
