//! What `make deps` made for the tests, outside the tree.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use crate::process;

/// Entries found, by name: the look-up is a shell script, and some tests start hundreds of peers.
static FOUND: Mutex<BTreeMap<String, PathBuf>> = Mutex::new(BTreeMap::new());

/// The cache entry that this tree's recipe makes, as `tests/deps.sh` names it.
///
/// # Errors
///
/// Where it is missing: what to do.
pub fn entry(name: &str) -> Result<PathBuf, String> {
    let mut found = FOUND.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(entry) = found.get(name) {
        return Ok(entry.clone());
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deps.sh");
    let link = process::run(Command::new(script).args(["where", name]));
    // Resolved once: a run of `make deps` meanwhile may point the link at a newer entry.
    let entry = fs::canonicalize(link.trim_end())
        .map_err(|_| format!("{} is missing: run `make deps`", link.trim_end()))?;
    found.insert(name.to_owned(), entry.clone());
    Ok(entry)
}
