//! What a handshake leaves: keypairs, replay windows, the indices that name them, and the timers and state of a peer.

pub mod handshakes;
pub mod index_table;
pub mod keypair;
pub mod peer;
pub mod replay;
pub mod timers;
