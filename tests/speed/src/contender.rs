//! What is measured, and how each is started.

use std::path::PathBuf;
use std::process::Command;

use wgsep_tests::cache;
use wgsep_tests::implementation::Implementation;

/// A program that is both ends of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    /// No protocol, no cryptography: what the machine can do.
    Forwarder,
    /// A WireGuard daemon.
    Daemon(Implementation),
}

/// wgsep.
pub const WGSEP: Contender = Contender::Daemon(Implementation::Wgsep);

impl Contender {
    /// All that can be asked for, in the order of tables.
    pub const ALL: [Self; 6] = [
        Self::Forwarder,
        WGSEP,
        Self::Daemon(Implementation::NewestWireguardGo),
        Self::Daemon(Implementation::WireguardGo),
        Self::Daemon(Implementation::Gotatun),
        Self::Daemon(Implementation::Boringtun),
    ];

    /// What `PEERS=` and tables call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Forwarder => "forwarder",
            Self::Daemon(Implementation::Wgsep) => "wgsep",
            Self::Daemon(Implementation::NewestWireguardGo) => "wireguard-go",
            Self::Daemon(Implementation::WireguardGo) => "wireguard-go-installed",
            Self::Daemon(Implementation::Gotatun) => "gotatun",
            Self::Daemon(Implementation::Boringtun) => "boringtun",
        }
    }

    /// The one of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|contender| contender.name() == name)
    }

    /// What it says it is; the forwarder is of wgsep's own version.
    ///
    /// # Errors
    ///
    /// Where it is not installed: what to do.
    pub fn version(self) -> Result<String, String> {
        let Self::Daemon(implementation) = self else {
            return Ok(env!("CARGO_PKG_VERSION").to_owned());
        };
        let program: PathBuf = implementation.program()?;
        if implementation == Implementation::NewestWireguardGo {
            // What it says itself may be another version than that of its package.
            let file = cache::entry("wireguard-go")?.join("version");
            let version = std::fs::read_to_string(&file);
            let version = version.map_err(|error| format!("{}: {error}", file.display()))?;
            return Ok(version.trim().to_owned());
        }
        let output = Command::new(&program).arg("--version").output();
        let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // Each says it in a sentence of its own.
        let is_version = |word: &&str| {
            let digits = word.trim_start_matches('v');
            digits.starts_with(|first: char| first.is_ascii_digit()) && digits.contains('.')
        };
        let version = text.split_whitespace().find(is_version);
        Ok(version.map_or_else(|| "unknown".to_owned(), |word| word.trim_matches('v').to_owned()))
    }
}
