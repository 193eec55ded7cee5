//! `wgsep-dataplane`: started by `wgsep`, never by hand.

use std::process::ExitCode;

/// Keeps what the control thread allocates in secret memory.
#[global_allocator]
static HEAP: wgsep_dataplane::Heap = wgsep_dataplane::Heap;

fn main() -> ExitCode {
    wgsep_dataplane::run(std::env::args().skip(1))
}
