//! `wgsep-dataplane`: started by `wgsep`, never by hand.

use std::io::Write;
use std::process::ExitCode;

/// What `make` calls this build (`bin/dist/version`); with cargo alone, the workspace's version.
const VERSION: &str = match option_env!("WGSEP_VERSION") {
    Some(version) => version,
    None => env!("CARGO_PKG_VERSION"),
};

/// Keeps what the control thread allocates in secret memory.
#[global_allocator]
static HEAP: wgsep_dataplane::Heap = wgsep_dataplane::Heap;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("--version") {
        let printed = writeln!(std::io::stdout(), "wgsep-dataplane {VERSION}");
        return if printed.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    wgsep_dataplane::run(VERSION, std::env::args().skip(1))
}
