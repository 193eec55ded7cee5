//! `make soak`.

use std::process::ExitCode;

fn main() -> ExitCode {
    wgsep_soak::run(std::env::args_os())
}
