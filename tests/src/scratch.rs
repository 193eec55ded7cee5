//! A directory for what a test must write to disk.

use std::env;
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use crate::daemon::unique_interface;
use crate::sweep::DIRECTORY_PREFIX;

/// An empty directory of a test's own, removed with all in it when dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes the directory.
    ///
    /// # Panics
    ///
    /// When it cannot be made.
    #[track_caller]
    #[must_use]
    pub fn new() -> Self {
        let path = env::temp_dir().join(format!("{DIRECTORY_PREFIX}{}", unique_interface()));
        if let Err(error) = fs::create_dir(&path) {
            panic!("cannot make {}: {error}", path.display());
        }
        Self(path)
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Deref for Scratch {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
