//! A simulated network of WireGuard devices on a virtual clock.
//!
//! [`simulation::Simulation`] holds any number of devices and the datagrams between them, and jumps
//! from one thing that happens to the next: the arrival of a datagram, or the timer of a device. So
//! days of protocol pass in milliseconds, and a seed reproduces every run. Nothing here sleeps, reads
//! a clock or opens a socket.
//!
//! [`fuzz`] is what fuzzers call.
//!
//! [`oracle`] speaks WireGuard by other means, for the other end of a device under test.

// In the package of wgsep-proto, whose tests so need nothing that is not in it.
#[path = "../../tests/shared/dice.rs"]
pub mod dice;
pub mod fuzz;
pub mod host;
pub mod link;
#[path = "../../tests/shared/oracle.rs"]
pub mod oracle;
pub mod packet;
pub mod simulation;
