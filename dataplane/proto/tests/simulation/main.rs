//! The protocol between simulated devices, on a virtual clock.
#![allow(clippy::unwrap_used)]

mod bursts;
mod configuration;
mod cookies;
mod fuzz;
mod handover;
mod handshake;
mod network;
mod oracle;
mod packets;
mod reports;
mod threads;
mod timers;
mod vm_generation;
