//! wgsep and other implementations of WireGuard: with each other, and side by side.
//!
//! `cargo test -p wgsep-tests --test interop pairs::` runs one file.

mod comparison;
mod continuity;
mod differential;
mod embedded;
mod kernel_peer;
mod pairs;
mod rosenpass;
