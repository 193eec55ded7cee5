//! `make bench`.

use std::process::ExitCode;

fn main() -> ExitCode {
    wgsep_speed::run(std::env::args_os())
}
