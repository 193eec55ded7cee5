//! The machine that was measured on.

use std::fs;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// What matters of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) processors: usize,
    pub(crate) kernel: String,
    pub(crate) system: String,
}

impl Machine {
    /// This one, as its kernel and its distribution describe it.
    pub(crate) fn this() -> Self {
        let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            processor: field(&processors, "model name", ':'),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: kernel.trim().to_owned(),
            system: field(&release, "PRETTY_NAME", '='),
        }
    }
}

fn field(text: &str, name: &str, separator: char) -> String {
    let value = text.lines().find_map(|line| {
        let (found, value) = line.split_once(separator)?;
        (found.trim() == name).then(|| value.trim().trim_matches('"').to_owned())
    });
    value.unwrap_or_else(|| "unknown".to_owned())
}

/// The time of day in UTC, as `date` writes it.
pub(crate) fn date() -> String {
    output(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]))
}

/// The commit that is measured; with a `+` where files differ from it.
pub(crate) fn commit() -> String {
    let directory = env!("CARGO_MANIFEST_DIR");
    let mut git = Command::new("git");
    git.args(["-C", directory, "describe", "--always", "--dirty=+", "--exclude=*"]);
    output(&mut git)
}

fn output(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    let text = String::from_utf8_lossy(&output).trim().to_owned();
    if text.is_empty() { "unknown".to_owned() } else { text }
}
