//! The WireGuard implementations under test and their command lines: wgsep and its peers, each a
//! value, so that a test that holds for one can be asked of all.

use std::env;
use std::path::{Path, PathBuf};

use crate::cache;
use crate::launched_as::LaunchedAs;
use crate::netns::Netns;

/// The variable naming the directory of the built programs; `target/release` without it.
const PROGRAMS: &str = "WGSEP_BIN_DIR";

/// A userspace WireGuard daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Implementation {
    /// The program this repository builds.
    Wgsep,
    /// The `wireguard-go` that is installed: the package of this release of Debian.
    WireguardGo,
    /// The newest release of `wireguard-go`: the package of Debian's sid.
    NewestWireguardGo,
    /// `boringtun-cli` from crates.io.
    Boringtun,
    /// `gotatun-cli` from crates.io, whose program is called `gotatun`.
    Gotatun,
}

impl Implementation {
    /// Where the program is.
    ///
    /// # Errors
    ///
    /// For a peer that is not installed, with what to do about it.
    ///
    /// # Panics
    ///
    /// When wgsep itself is not built: no test of it may pass for skipped.
    pub fn program(self) -> Result<PathBuf, String> {
        let path = match self {
            Self::Wgsep => return Ok(wgsep_program("wgsep")),
            Self::WireguardGo => in_path("wireguard-go"),
            Self::NewestWireguardGo => cache::entry("wireguard-go")?.join("usr/bin/wireguard-go"),
            Self::Boringtun => cache::entry("boringtun-cli")?.join("bin/boringtun-cli"),
            Self::Gotatun => cache::entry("gotatun-cli")?.join("bin/gotatun"),
        };
        if path.is_file() {
            Ok(path)
        } else {
            Err(format!("{} is missing: run `make deps`", path.display()))
        }
    }

    /// The arguments that make it serve `interface` in the foreground, and log what an operator
    /// would want to see.
    ///
    /// boringtun and gotatun, run as root, give their privileges to the user who logged in, and
    /// fail where there is none (`getlogin` gives NULL); each has an option against that.
    #[must_use]
    pub fn foreground(self, interface: &str) -> Vec<&str> {
        match self {
            Self::Wgsep | Self::WireguardGo | Self::NewestWireguardGo => vec!["-f", interface],
            Self::Boringtun | Self::Gotatun => {
                vec!["-f", "--disable-drop-privileges", "-v", "info", interface]
            }
        }
    }

    /// A command that serves `interface` in the foreground of `netns`.
    ///
    /// # Panics
    ///
    /// When the program is not installed: `require!` comes first.
    #[track_caller]
    #[must_use]
    pub fn command(self, netns: &Netns, interface: &str) -> std::process::Command {
        let program = match self.program() {
            Ok(program) => program,
            Err(reason) => panic!("{reason}"),
        };
        let mut command = match self {
            Self::Wgsep => {
                let prefix = LaunchedAs::this_run().prefix();
                let mut command = netns.command(&prefix[0]);
                command.args(&prefix[1..]).arg(program);
                command
            }
            _ => netns.command(program),
        };
        command.args(self.foreground(interface));
        if matches!(self, Self::WireguardGo | Self::NewestWireguardGo) {
            // Without it Debian's release refuses to run beside a kernel that has WireGuard.
            command.env("WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD", "1");
        }
        command
    }
}

/// The path of one of this repository's programs, built by `make`.
///
/// # Panics
///
/// When it is not there.
#[track_caller]
#[must_use]
pub fn wgsep_program(name: &str) -> PathBuf {
    let directory = env::var_os(PROGRAMS).map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release"),
        PathBuf::from,
    );
    let path = directory.join(name);
    assert!(path.is_file(), "{} is missing: run `make` first", path.display());
    path
}

/// The path of a program that `make other-targets` built for another target.
///
/// # Errors
///
/// Where it is missing, because that target cannot be built for here: what to do.
pub fn built_for(target: &str, program: &str) -> Result<PathBuf, String> {
    let directory = env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    let path = directory.join(target).join("release").join(program);
    if path.is_file() {
        Ok(path)
    } else {
        Err(format!("{} is missing: run `make other-targets`", path.display()))
    }
}

/// The first `program` of the search path, or its bare name.
pub(crate) fn in_path(program: &str) -> PathBuf {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|entry| entry.join(program)).find(|at| at.is_file());
    found.unwrap_or_else(|| PathBuf::from(program))
}
