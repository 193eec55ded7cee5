//! The WireGuard protocol as a pure state machine: no sockets, no threads, no clock.
//!
//! [`tunnel::Tunnel`] is a tunnel to one peer, [`device::Device`] an interface with many. The caller passes
//! the time and the random numbers, so that a test can run days of protocol in milliseconds. [`path`] is what
//! both call for packets, and a program with threads of its own; it opens with the stages of a packet.
//!
//! ```
//! use std::time::Duration;
//! use wgsep_proto::{device::Random, keys::PrivateKey, time::{Instant, Now}, tunnel::Tunnel};
//!
//! /// Fit for an example alone: take yours from the system.
//! struct Counting(u8);
//! impl Random for Counting {
//!     fn fill(&mut self, bytes: &mut [u8]) {
//!         bytes.fill_with(|| { self.0 = self.0.wrapping_add(1); self.0 });
//!     }
//! }
//!
//! let [ours, theirs] = [1, 2].map(|byte| PrivateKey::from_bytes([byte; 32]).unwrap());
//! let publics = [ours.public_key(), theirs.public_key()];
//! let [here, there] = [1, 2].map(|host| ([192, 0, 2, host], 51820).into());
//! let mut a = Tunnel::new(ours, publics[1], None, Some(there), Box::new(Counting(0)));
//! let mut b = Tunnel::new(theirs, publics[0], None, None, Box::new(Counting(99)));
//! let now = Now { instant: Instant::from_nanos(1), wall: Duration::from_secs(1_800_000_000) };
//!
//! let packet = [&[0x45, 0, 0, 22][..], &[0; 16], b"hi"].concat(); // 22 bytes of IPv4
//! a.encapsulate(&packet, now);
//! let initiation = a.poll_transmit().unwrap();
//! assert_eq!(initiation.endpoint.destination, there);
//! assert_eq!(b.decapsulate(here, initiation.datagram, now), None);
//! let response = b.poll_transmit().unwrap();
//! assert_eq!(a.decapsulate(there, response.datagram, now), None);
//! let data = a.poll_transmit().unwrap();
//! assert_eq!(b.decapsulate(here, data.datagram, now), Some(&packet[..]));
//! ```
//!
//! Sources: the WireGuard whitepaper (Donenfeld, 2020) and Linux `drivers/net/wireguard`.
#![forbid(unsafe_code)]

pub mod aead;
pub mod allowed_ips;
pub mod config;
pub mod control_plane;
pub mod cookie;
pub mod data_path;
pub mod device;
pub mod handshake;
pub mod icmp;
pub mod index_table;

pub mod ip;
pub mod keypair;
pub mod keys;
pub mod messages;
mod ndisc;
pub mod peer;
pub mod ratelimiter;

pub mod path;
pub mod replay;
mod symmetric;
pub mod tai64n;
pub mod time;
pub mod timers;
pub mod tunnel;
mod x25519;
