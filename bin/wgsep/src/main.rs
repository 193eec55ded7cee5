//! `wgsep`: the helper's command line, and its queries of a running daemon.

mod audit;
mod command_line;
mod json;
mod stats;
mod status;
mod uapi;
mod watch;

use audit::Outcome;
use command_line::{Invocation, Question};
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

/// Makes no call that the helper's filter does not allow.
#[global_allocator]
static HEAP: wgsep_policy::Heap = wgsep_policy::Heap;

fn main() -> ExitCode {
    match command_line::parse() {
        Ok(Invocation::Serve(options)) => wgsep_policy::exit(wgsep_launch::run(&options)),
        Ok(Invocation::Upgrade(interface)) => {
            wgsep_policy::exit(wgsep_launch::upgrade(command_line::VERSION, &interface))
        }
        Ok(Invocation::Audit(question)) => audit(&question),
        Ok(Invocation::Stats(question)) => print_pieces(|write| stats::stats(&question, write)),
        Ok(Invocation::Watch(question)) => print_pieces(|write| watch::watch(&question, write)),
        Ok(Invocation::Print(text)) => answer(&text, ExitCode::SUCCESS),
        Err(exit) => exit,
    }
}

/// Writes an answer; `status`, or 2 if it cannot be written to the end.
fn answer(text: &str, status: ExitCode) -> ExitCode {
    written_or(text, status).0
}

/// Writes a text; `status`, or 2 if it cannot be written to the end, and whether more is wanted. A reader that wants no
/// more is none of our business.
fn written_or(text: &str, status: ExitCode) -> (ExitCode, bool) {
    let mut out = std::io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            wgsep_launch::print_error(&format!(
                "cannot write the answer: {error}; free space where it goes, or send it elsewhere"
            ));
            (ExitCode::from(2), false)
        }
        written => (status, written.is_ok()),
    }
}

/// 0 if every layer is in force, 1 if one is degraded, 3 if something could not be read; 2 if there
/// is nothing to audit.
fn audit(Question { interface, json }: &Question) -> ExitCode {
    match audit::audit(interface, *json) {
        Ok((text, outcome)) => {
            let status = match outcome {
                Outcome::Sound => ExitCode::SUCCESS,
                Outcome::Degraded => ExitCode::from(1),
                Outcome::Incomplete => ExitCode::from(3),
            };
            answer(&text, status)
        }
        Err(line) => {
            wgsep_launch::print_error(&line);
            ExitCode::from(2)
        }
    }
}

/// Prints what a command produces, piece by piece; 0, or 2 if there is no daemon to ask.
fn print_pieces(
    produce: impl FnOnce(&mut dyn FnMut(&str) -> bool) -> Result<(), String>,
) -> ExitCode {
    let mut written = ExitCode::SUCCESS;
    let produced = produce(&mut |text| {
        let (status, is_wanted) = written_or(text, ExitCode::SUCCESS);
        written = status;
        is_wanted
    });
    match produced {
        Ok(()) => written,
        Err(line) => {
            wgsep_launch::print_error(&line);
            ExitCode::from(2)
        }
    }
}
