//! The status socket: what a tunnel does, for those who may not see a key, and cannot change anything.
//!
//! A client sends one of two requests, each with a blank line after it: `get=1`, which is answered with counters and
//! the state of each peer, and `watch=1`, after which it receives events until it closes the connection. No other
//! request exists.
//!
//! This crate uses none of the crates that have keys, so nothing in it can have one: the caller passes what is reported
//! as [`Counters`], [`Peer`] and [`Event`], which have no place for one. Clients are bounded in number, in the length of
//! what they send and in memory, and none of them is waited for.
#![forbid(unsafe_code)]

mod client;
mod event;
mod format;
mod listener;
mod presence;
mod report;
mod request;
mod server;
#[cfg(test)]
mod tests;

pub use event::Event;
pub use format::write_counters;
pub use listener::Listener;
pub use presence::{DISCONNECTED_AFTER, Presence};
pub use report::{Counters, Item, Peer, Udp};
pub use request::{MAX_REQUEST, Refused, Request, Requests};
pub use server::{MAX_CLIENTS, Server, Source};
