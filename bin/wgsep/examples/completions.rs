//! Writes the shell completions of `wgsep` into a directory: bash, zsh and fish.
//!
//! An example, so that what generates them is no part of the helper. `make install` runs it.

#[allow(dead_code)]
#[path = "../src/command_line.rs"]
mod command_line;

use clap_complete::{Shell, generate_to};
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(directory) = std::env::args_os().nth(1) else {
        eprintln!("usage: completions DIRECTORY");
        return ExitCode::from(2);
    };
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        if let Err(error) = generate_to(shell, &mut command_line::command(), "wgsep", &directory) {
            eprintln!("completions for {shell}: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
