//! The cross-platform UAPI that wg(8) speaks: lines of `key=value`, a blank line at the end.
//!
//! `inbox` cuts what a client sent into transactions; `parse` turns one into a [`Configuration`], or
//! refuses it as a whole; `format` writes the answer to a `get`, of which `answer` keeps the part that its client reads;
//! `client` and `server` carry them.
//! The mode of the socket file alone decides which users may connect: root and the socket's owner.

mod answer;
mod client;
mod format;
#[cfg(feature = "fuzzing")]
mod fuzz_session;
mod inbox;
mod parse;
mod secret_text;
mod server;
#[cfg(test)]
mod tests;

#[cfg(feature = "fuzzing")]
pub use fuzz_session::FuzzSession;
#[cfg(test)]
pub(crate) use secret_text::SecretText;
pub(crate) use server::{ClientId, Server, accept, probe_accept};

use wgsep_proto::Configuration;

/// A whole transaction.
pub(crate) enum Operation {
    /// `get=1`.
    Get,
    /// `get=statistics`, an extension of wgsep: counters of dropped packets by cause, without any key.
    Statistics,
    /// `set=1`, checked.
    Set(Configuration),
}

/// The indices of network interfaces, for the scopes of link-local endpoints. A `set` may have names, a
/// `get` answers with numbers.
pub(crate) trait Scopes {
    /// The index of an interface, by name or number.
    fn index_of(&self, name: &str) -> Option<u32>;
}
