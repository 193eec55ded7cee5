//! README's blocks of commands, for tests that type them as they stand.

use std::fs;

/// The lines of README's first block after a text.
///
/// # Panics
///
/// When README has no such text, or no block after it.
#[track_caller]
#[must_use]
pub fn block(after: &str) -> Vec<String> {
    let path = crate::repository().join("README.md");
    let readme = fs::read_to_string(&path).unwrap_or_default();
    let rest = readme.split_once(after).map(|(_, rest)| rest);
    let Some(block) = rest.and_then(|rest| rest.split("```").nth(1)) else {
        panic!("{} has no block after {after:?}", path.display());
    };
    block.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}
