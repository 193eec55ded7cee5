//! The WireGuard protocol as a pure state machine: no sockets, no threads, no clock.
//!
//! [`Tunnel`] is a tunnel to one peer, [`Device`] an interface with many. The caller passes
//! the time and the random numbers, so that a test can run days of protocol in milliseconds. What is left to the
//! program is in [`security`].
//!
//! The parts of both are public with the feature `internals`, for a program with threads of its own as the daemon is; any
//! release may change them.
//!
//! ```
//! use std::time::Duration;
//! use wgsep_proto::{Instant, Now, PrivateKey, Random, Tunnel};
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
//! let mut a = Tunnel::new(ours, publics[1], None, Some(there), Box::new(Counting(0)))?;
//! let mut b = Tunnel::new(theirs, publics[0], None, None, Box::new(Counting(99)))?;
//! let now = Now { instant: Instant::from_nanos(1), wall: Duration::from_secs(1_800_000_000) };
//!
//! let packet = [&[0x45, 0, 0, 22][..], &[0; 16], b"hi"].concat(); // 22 bytes of IPv4
//! a.encapsulate(&packet, now)?;
//! let initiation = a.poll_transmit().unwrap();
//! assert_eq!(initiation.endpoint.destination, there);
//! assert_eq!(b.decapsulate(here, initiation.datagram, now)?, None);
//! let response = b.poll_transmit().unwrap();
//! assert_eq!(a.decapsulate(there, response.datagram, now)?, None);
//! let data = a.poll_transmit().unwrap();
//! assert_eq!(b.decapsulate(here, data.datagram, now)?.unwrap(), &packet[..]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Sources: the WireGuard whitepaper (Donenfeld, 2020) and Linux `drivers/net/wireguard`.
#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![cfg_attr(
    not(test),
    deny(
        clippy::expect_used,
        clippy::panic,
        clippy::todo,
        clippy::unimplemented,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]
// The facade needs not all of what the daemon does.
#![cfg_attr(not(feature = "internals"), allow(dead_code, unused_imports))]

#[cfg(not(target_has_atomic = "64"))]
compile_error!("wgsep-proto needs 64-bit atomics, which this target does not have");

mod config;
mod keys;
mod random;
mod time;
mod timer_parameters;
mod tunnel;

#[cfg(feature = "internals")]
pub mod device;
#[cfg(feature = "internals")]
pub mod encoding;
#[cfg(feature = "internals")]
pub mod invariant;
#[cfg(feature = "internals")]
pub mod noise;
#[cfg(feature = "internals")]
pub mod path;
#[cfg(feature = "internals")]
pub mod saved;
#[cfg(feature = "internals")]
pub mod secret;
#[cfg(feature = "internals")]
pub mod session;
#[cfg(feature = "internals")]
pub mod wire;

#[cfg(not(feature = "internals"))]
mod device;
#[cfg(not(feature = "internals"))]
mod encoding;
#[cfg(not(feature = "internals"))]
mod invariant;
#[cfg(not(feature = "internals"))]
mod noise;
#[cfg(not(feature = "internals"))]
mod path;
#[cfg(not(feature = "internals"))]
mod secret;
#[cfg(not(feature = "internals"))]
mod session;
#[cfg(not(feature = "internals"))]
mod wire;

#[doc = include_str!("../SECURITY.md")]
pub mod security {}

/// The examples of the README are code that compiles.
#[cfg(all(doctest, feature = "getrandom"))]
#[doc = include_str!("../README.md")]
mod readme {}

/// Secret keys cannot be printed by way of `Debug`, and so by no struct that derives it.
///
/// ```compile_fail,E0277
/// format!("{:?}", wgsep_proto::PrivateKey::from_bytes([1; 32]));
/// ```
///
/// ```compile_fail,E0277
/// format!("{:?}", wgsep_proto::PresharedKey::from_bytes([1; 32]));
/// ```
///
/// ```compile_fail,E0277
/// format!("{:?}", wgsep_proto::PresharedKey::from_bytes([1; 32]).to_hex());
/// ```
///
/// ```compile_fail,E0277
/// format!("{}", wgsep_proto::PresharedKey::from_bytes([1; 32]).to_base64());
/// ```
#[cfg(doctest)]
mod no_debug_of_secrets {}

pub use config::{
    AllowedIp, AllowedIpChange, AllowedIpError, Configuration, DeviceStatus, PeerConfiguration,
    PeerStatus,
};
pub use device::control_plane::{Event, PeerReport, SessionState, StartHandshakeError};
pub use device::{
    BatchError, Device, EncapsulateError, MAX_OVERHEAD, ReceivedPacket, ReceivedPackets, Transmit,
    Transmits,
};
pub use keys::{KEY_LEN, KeyError, KeyText, PresharedKey, PrivateKey, PublicKey};
pub use path::data_path::{DropCause, DropCounters};
pub use path::inbound::Receive;
pub use random::Random;
#[cfg(feature = "getrandom")]
pub use random::SystemRandom;
pub use session::handshakes::{HandshakeCounters, HandshakeFailure};
pub use session::peer::{Endpoint, PeerId, Source};
pub use time::{Instant, Now};
pub use timer_parameters::{TimerError, TimerParameters};
pub use tunnel::{Tunnel, TunnelError};
pub use wire::ip::Ecn;
