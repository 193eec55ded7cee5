//! The handshake: Noise IK with a preshared key, its cookies, and the limit on its messages.

pub mod cookie;
pub mod handshake;
pub mod ratelimiter;
pub mod symmetric;
pub mod tai64n;
pub mod x25519;
