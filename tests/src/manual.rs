//! Blocks of commands in wgsep(8), for tests that run them as they are printed.

use std::fs;

/// The lines of the manual page's first literal block after a text, without the prompt.
///
/// # Panics
///
/// When the page has no such text, or no block after it.
#[track_caller]
#[must_use]
pub fn block(after: &str) -> Vec<String> {
    let text = text(after);
    text.lines().map(|line| line.strip_prefix("# ").unwrap_or(line).to_owned()).collect()
}

/// The manual page's first literal block after a text, as it is shown.
///
/// # Panics
///
/// As [`block`].
#[track_caller]
#[must_use]
pub fn text(after: &str) -> String {
    let path = crate::repository().join("bin/dist/wgsep.8");
    let page = fs::read_to_string(&path).unwrap_or_default();
    let rest = page.split_once(after).map(|(_, rest)| rest);
    let rest = rest.and_then(|rest| rest.split_once(".Bd -literal")?.1.split_once('\n'));
    let Some((block, _)) = rest.and_then(|(_options, rest)| rest.split_once("\n.Ed")) else {
        panic!("{} has no block after {after:?}", path.display());
    };
    block.replace("\\e", "\\")
}
