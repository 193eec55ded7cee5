//! `wgsep`: the helper's command line, and the audit.

mod audit;
mod command_line;

use audit::Outcome;
use command_line::Invocation;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    match command_line::parse() {
        Ok(Invocation::Serve(options)) if wgsep_privileged::run(&options) => ExitCode::SUCCESS,
        Ok(Invocation::Serve(_)) => ExitCode::FAILURE,
        Ok(Invocation::Audit { interface, json }) => audit(&interface, json),
        Err(exit) => exit,
    }
}

/// 0 if every layer is in force, 1 if one is degraded, 3 if something could not be read; 2 if there
/// is nothing to audit.
fn audit(interface: &str, json: bool) -> ExitCode {
    match audit::audit(interface, json) {
        Ok((text, outcome)) => {
            let _nobody_reads = std::io::stdout().write_all(text.as_bytes());
            match outcome {
                Outcome::Sound => ExitCode::SUCCESS,
                Outcome::Degraded => ExitCode::from(1),
                Outcome::Incomplete => ExitCode::from(3),
            }
        }
        Err(line) => {
            wgsep_privileged::complain(&line);
            ExitCode::from(2)
        }
    }
}
