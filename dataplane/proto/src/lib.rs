//! The WireGuard protocol as a pure state machine: no sockets, no threads, no clock.
//!
//! [`tunnel::Tunnel`] is a tunnel to one peer; [`device::Device`] an interface with many. Both are
//! told the time and given their random numbers, so that a test can run days of protocol in
//! milliseconds. `send` and `receive` are the two paths of a packet; each opens with its stages.
//!
//! Sources: the WireGuard whitepaper (Donenfeld, 2020) and Linux `drivers/net/wireguard`.
#![forbid(unsafe_code)]

pub mod aead;
pub mod allowed_ips;
pub mod config;
pub mod cookie;
pub mod data_path;
pub mod device;
pub mod handshake;
pub mod icmp;
pub mod index_table;
pub mod inline;
pub mod ip;
pub mod keypair;
pub mod keys;
pub mod messages;
pub mod peer;
pub mod ratelimiter;
pub mod receive;
pub mod replay;
pub mod send;
mod symmetric;
pub mod tai64n;
pub mod time;
pub mod timers;
pub mod tunnel;
