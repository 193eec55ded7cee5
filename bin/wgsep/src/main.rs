//! `wgsep`: the helper's command line.

mod command_line;

use std::process::ExitCode;

fn main() -> ExitCode {
    match command_line::parse() {
        Ok(options) if wgsep_privileged::run(&options) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(exit) => exit,
    }
}
