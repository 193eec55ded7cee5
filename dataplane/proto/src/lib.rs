//! The WireGuard protocol as a pure state machine: no sockets, no threads, no clock.
#![forbid(unsafe_code)]

pub mod config;
pub mod keys;
