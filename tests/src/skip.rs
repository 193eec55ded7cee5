//! Saying that a test did not run, so that silence is not taken for a pass.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::PathBuf;
use std::{env, thread};

/// The variable that names the file skips are recorded in; `make test` sets it and reads the file.
const RECORD: &str = "WGSEP_SKIP_FILE";

/// Prints `skipped: reason` with the test's name on a line of its own, past libtest's capture, and
/// records it. The caller returns from the test.
pub fn skip(reason: &str) {
    let name = test_name();
    let reason = reason.replace('\n', " ");
    // The report is a courtesy to the reader: a closed stderr must not fail the test.
    let _ = writeln!(io::stderr(), "\nskipped: {reason} ({name})");
    if let Some(path) = env::var_os(RECORD).map(PathBuf::from) {
        let record = OpenOptions::new().create(true).append(true).open(&path);
        let written = record.and_then(|mut file| writeln!(file, "{name}: {reason}"));
        assert!(written.is_ok(), "cannot record a skip in {}: {written:?}", path.display());
    }
}

/// `binary::test`, as libtest names its threads; `main` where it runs one test at a time.
fn test_name() -> String {
    let binary = env::current_exe().ok();
    let stem = binary.as_deref().and_then(|path| path.file_stem()).unwrap_or_default();
    let stem = stem.to_string_lossy();
    // cargo appends `-<hash>` to the names of test programs.
    let binary = stem.rsplit_once('-').map_or(&*stem, |(name, _hash)| name);
    format!("{binary}::{}", thread::current().name().unwrap_or("unnamed"))
}

/// Whether the test may make namespaces; says so when not.
#[must_use]
pub fn is_root_or_skips() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skip("needs root to make network namespaces");
    }
    root
}

/// Returns from the test, reported as skipped, unless it runs as root.
#[macro_export]
macro_rules! require_root {
    () => {
        if !$crate::skip::is_root_or_skips() {
            return;
        }
    };
}

/// Returns from the test, reported as skipped, unless root runs it and every implementation named
/// is installed.
#[macro_export]
macro_rules! require {
    ($($implementation:expr),+ $(,)?) => {
        $crate::require_root!();
        $(
            if let Err(reason) = $implementation.program() {
                $crate::skip::skip(&reason);
                return;
            }
        )+
    };
}
