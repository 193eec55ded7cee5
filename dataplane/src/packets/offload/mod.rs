//! Super-packets: what the TUN device and the kernel's TCP and UDP exchange instead of single
//! packets, split on the way out and put together again on the way in.
//!
//! Pure functions on bytes: no descriptor, no clock. What comes here from the network is
//! authenticated, but by a peer that may be hostile: nothing panics, and a packet whose checksum is
//! wrong stays a packet whose checksum is wrong.

mod checksum;
mod coalesce;
mod header;
mod segments;
mod split;
#[cfg(test)]
mod tests;
mod vnet;

pub(crate) use checksum::sum_words;
pub use coalesce::{Coalesce, Coalescer};
pub use segments::Segments;
pub use vnet::{GsoType, VNET_HDR_LEN, VnetHeader};
