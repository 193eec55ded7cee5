//! Installation and packages, the unit, manual pages and completions, and programs for other targets.
//!
//! `cargo test -p wgsep-tests --test packaging version::` runs one file.
#![allow(clippy::unwrap_used)]

mod aarch64;
mod completions;
mod configure;
mod containers;
mod crash;
mod directory;
mod hardened;
mod install;
mod notify;
mod package;
mod quick;
mod recipes;
mod rosenpass;
mod source;
mod targets;
mod update;
mod upgrade;
mod version;
