//! What a program that embeds the library relies on: tunnels and devices through the public interface alone, on a virtual
//! clock.
#![allow(clippy::unwrap_used)]

mod batches;
mod network;
mod settings;
mod state;
