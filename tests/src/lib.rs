//! What the tests of wgsep stand on: real namespaces, real daemons, real tools.
//!
//! A system test makes [`netns::Netns`]s joined by a [`link`], starts a [`daemon::Daemon`] of any
//! [`implementation::Implementation`] in each, configures them with [`wg`], sends [`traffic`] and
//! looks at what came of it. Everything is removed when its value is dropped, and what a killed
//! run left is removed by the next.
//!
//! Functions here panic when the machine does not do what it should: they are the assertions
//! of the tests that call them, and name the caller's line.

use std::path::{Path, PathBuf};

pub mod cache;
pub mod cgroup;
pub mod counting;
pub mod crowd;
pub mod daemon;
pub mod descriptors;
pub mod example;
pub mod fuzz;
pub mod guest;
#[cfg(target_arch = "x86_64")]
pub mod hijack;
pub mod implementation;
pub mod kernel;
pub mod launched_as;
pub mod link;
pub mod machine;
pub mod manual;
pub mod netns;
pub mod nft;
pub mod process;
pub mod procfs;
pub mod readme;
pub mod relay;
pub mod scratch;
pub mod service_manager;
pub mod skip;
mod sweep;
pub mod traffic;
pub mod tun_device;
pub mod tunnel;
pub mod uapi;
pub mod uevent;
pub mod unit;
pub mod wait;
pub mod wg;

/// The directory of the repository, without symbolic links.
///
/// # Panics
///
/// When it is no longer where the tests were built.
#[track_caller]
#[must_use]
pub fn repository() -> PathBuf {
    match Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize() {
        Ok(repository) => repository,
        Err(error) => panic!("there is no repository: {error}"),
    }
}
