//! `wgsep-dataplane`: started by `wgsep`, never by hand.

use std::process::ExitCode;

fn main() -> ExitCode {
    wgsep_dataplane::run(std::env::args().skip(1))
}
