//! A directory for what a test must write to disk.

use std::env;
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::daemon::unique_interface;
use crate::implementation::wgsep_program;
use crate::process::run;
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

impl Scratch {
    /// Puts a program of this repository here under a name, executable by everybody.
    ///
    /// By install(1): were it written by this process, a child that another test starts meanwhile
    /// would have it open for writing, until it executes its own program, and no process could execute
    /// this one (ETXTBSY).
    #[track_caller]
    pub fn install(&self, program: &str, name: &str) {
        let mut install = Command::new("install");
        run(install.args(["-m", "755"]).arg(wgsep_program(program)).arg(self.join(name)));
    }

    /// Writes a program here that an interpreter runs, executable by everybody; its path.
    ///
    /// By a process of its own, for the reason that [`Scratch::install`] has one.
    #[track_caller]
    pub fn write_script(&self, name: impl AsRef<Path>, text: &str) -> PathBuf {
        let to = self.join(name);
        let line = "printf %s \"$1\" >\"$2\" && chmod 755 \"$2\"";
        run(Command::new("sh").args(["-c", line, "sh", text]).arg(&to));
        to
    }

    /// Puts a script of bin/dist here, as `make install` installs it beside the programs under test.
    ///
    /// By a process of its own, for the reason that [`Scratch::install`] has one.
    #[track_caller]
    #[must_use]
    pub fn install_script(&self, name: &str) -> PathBuf {
        let (template, to) = (format!("../bin/dist/{name}.in"), self.join(name));
        let template = Path::new(env!("CARGO_MANIFEST_DIR")).join(template);
        let programs = wgsep_program("wgsep").parent().map(Path::to_path_buf).unwrap_or_default();
        let line = "sed \"s|@SBINDIR@|$1|\" \"$2\" >\"$3\" && chmod 755 \"$3\"";
        run(Command::new("sh").args(["-c", line, "sh"]).args([&programs, &template, &to]));
        to
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
