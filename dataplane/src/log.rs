//! The dataplane's log: lines on the pipe that the helper reads, and a panic hook that needs no file.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use tracing::Level;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::layer::SubscriberExt;
use wgsep_ipc::LogLevel;

/// The [`LogLevel`] whose events are written, by its number of syslog(3).
static LEVEL: AtomicU8 = AtomicU8::new(LogLevel::Info as u8);

/// Sets which events are written from now on.
pub(crate) fn set_level(level: LogLevel) {
    LEVEL.store(level as u8, Ordering::Relaxed);
    // Call sites cache whether they are enabled.
    tracing::callsite::rebuild_interest_cache();
}

fn is_wanted(level: Level) -> bool {
    let needed = match level {
        Level::ERROR => LogLevel::Error,
        Level::WARN | Level::INFO => LogLevel::Info,
        Level::DEBUG => LogLevel::Debug,
        Level::TRACE => return false,
    };
    needed as u8 <= LEVEL.load(Ordering::Relaxed)
}

/// Lines that the pipe had no space for, and that none has counted yet.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Descriptor 2, where each event is one write, which is lost if the pipe is full.
struct Pipe;

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_counted(io::stderr(), bytes, &LOST);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a line without blocking, behind one that counts those lost before, if any.
fn write_counted(pipe: impl AsFd, line: &[u8], lost: &AtomicU64) {
    let before = lost.swap(0, Ordering::Relaxed);
    let count = match before {
        0 => String::new(),
        _ => format!(
            "WARN {before} lines were lost, because the helper did not read them in time; see what keeps the processor busy, or whether it is stopped\n"
        ),
    };
    let text = [count.as_bytes(), line].concat();
    if nix::unistd::write(pipe, &text) != Ok(text.len()) {
        lost.fetch_add(before + 1, Ordering::Relaxed);
    }
}

struct MakePipe;

impl MakeWriter<'_> for MakePipe {
    type Writer = Pipe;
    fn make_writer(&self) -> Self::Writer {
        Pipe
    }
}

/// The helper adds the time, so that it is right also for lines that waited.
struct NoTime;

impl FormatTime for NoTime {
    fn format_time(&self, _: &mut Writer<'_>) -> std::fmt::Result {
        Ok(())
    }
}

/// Starts the log and installs the panic hook.
pub(crate) fn start(level: LogLevel) {
    set_level(level);
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_target(false)
        .with_timer(NoTime)
        .with_writer(MakePipe);
    let wanted = tracing_subscriber::filter::filter_fn(|metadata| is_wanted(*metadata.level()));
    let subscriber = tracing_subscriber::registry().with(wanted).with(lines);
    let _first = tracing::subscriber::set_global_default(subscriber);
    // The standard hook may read the program's own file for a backtrace, which the sandbox ends with
    // SIGSYS before anything is printed.
    std::panic::set_hook(Box::new(|panic| {
        let file = panic.location().map_or("unknown place", |location| location.file());
        let line = panic.location().map_or(0, std::panic::Location::line);
        let text = panic.payload_as_str().unwrap_or("no message");
        let _never_fails = Pipe.write(format!("ERROR panic at {file}:{line}: {text}\n").as_bytes());
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::OFlag;
    use nix::unistd::{pipe2, read};

    #[test]
    fn lines_that_a_full_pipe_does_not_take_are_counted_before_the_next_one() {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK).unwrap();
        let lost = AtomicU64::new(0);
        while lost.load(Ordering::Relaxed) < 3 {
            write_counted(&writer, b"INFO the same\n", &lost);
        }
        let mut buffer = vec![0; 1 << 20];
        let len = read(&reader, &mut buffer).unwrap();
        assert!(!String::from_utf8_lossy(&buffer[..len]).contains("lost"));
        for (line, expected) in [
            ("INFO next\n", "WARN 3 lines were lost, because the helper did not read them in time"),
            ("INFO later\n", "INFO later\n"),
        ] {
            write_counted(&writer, line.as_bytes(), &lost);
            let len = read(&reader, &mut buffer).unwrap();
            let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
            assert!(text.starts_with(expected) && text.ends_with(line), "{text}");
        }
    }
}
