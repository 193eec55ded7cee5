//! What a program that embeds the library relies on: tunnels and devices through the public interface alone, on a virtual
//! clock.
#![allow(clippy::unwrap_used)]

mod batches;
#[allow(dead_code)]
#[path = "../shared/dice.rs"]
mod dice;
mod fuzz;
mod network;
mod noise;
#[allow(dead_code)]
#[path = "../shared/oracle.rs"]
mod oracle;
mod settings;
mod state;
