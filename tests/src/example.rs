//! Programs that embed the protocol's library: the examples of `wgsep-tokio`.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::process::run;

/// Builds an example, and returns where it is.
///
/// # Panics
///
/// When it cannot be built.
#[track_caller]
#[must_use]
pub fn build(name: &str) -> PathBuf {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")));
    command.args(["build", "--locked", "--quiet", "--package", "wgsep-tokio"]);
    let messages = run(command.args(["--example", name, "--message-format", "json"]));
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let built = { messages }
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from));
    match built {
        Some(program) => program,
        None => panic!("cargo names no program of the example {name}"),
    }
}
