//! Attacks on a daemon and on its start, by their numbers in SECURITY.md, and what they rely on.
//!
//! `cargo test -p wgsep-tests --test attacks hijacked::` runs one file. `tests/attacks_as.sh` runs those on a daemon
//! that was started with less than root has.
#![allow(clippy::unwrap_used)]

mod blocked;
mod claims;
mod confinement;
mod dataplane_memory;
mod faults;
mod helper;
mod hijacked;
mod launching;
mod psk_socket;
mod start;
mod status_socket;
mod uapi_socket;
