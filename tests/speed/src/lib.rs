//! How fast wgsep is, beside its peers and beside a forwarder without cryptography: `make bench`.
//!
//! Every contender in turn is the tunnel between two namespaces, the same program at both ends, and
//! is measured; then the round begins anew. What disturbs the machine for a while so disturbs all of
//! them, and ratios within a round mean more than the numbers themselves.

mod bed;
mod chart;
mod command_line;
mod contender;
mod cpu;
mod flood;
pub mod forwarder;
mod handshakes;
mod iperf;
mod machine;
mod memory;
mod ping;
mod quantity;
mod readme;
mod results;
mod round;
mod sandbox;
mod scale;
mod statistics;
mod table;
mod targets;
mod tcp;
mod udp;
mod unfiltered;

pub use command_line::run;
