//! The dataplane's log: lines on the pipe that the helper reads, and a panic hook that needs no file.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU8, Ordering};
use tracing::Level;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::layer::SubscriberExt;

/// Which events are written: 0 none, 1 errors, up to 5 everything.
static VERBOSITY: AtomicU8 = AtomicU8::new(3);

/// Sets which events are written from now on.
pub(crate) fn set_verbosity(verbosity: u8) {
    VERBOSITY.store(verbosity, Ordering::Relaxed);
    // Call sites cache whether they are enabled.
    tracing::callsite::rebuild_interest_cache();
}

/// The verbosity of a level's name, as `--log-level` takes it.
pub(crate) fn verbosity(level: &str) -> Option<u8> {
    Some(match level {
        "silent" => 0,
        "error" => 1,
        "info" => 3,
        "debug" | "verbose" => 4,
        "trace" => 5,
        _ => return None,
    })
}

fn is_wanted(level: Level) -> bool {
    let needed = match level {
        Level::ERROR => 1,
        Level::WARN => 2,
        Level::INFO => 3,
        Level::DEBUG => 4,
        Level::TRACE => 5,
    };
    needed <= VERBOSITY.load(Ordering::Relaxed)
}

/// Descriptor 2, where each event is one write, which is lost if the pipe is full.
struct Pipe;

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _lost = nix::unistd::write(io::stderr(), bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
pub(crate) fn start(level: u8) {
    set_verbosity(level);
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
        let _lost = writeln!(Pipe, "ERROR panic at {file}:{line}: {text}");
    }));
}
