//! The cross-platform UAPI that wg(8) speaks: lines of `key=value`, a blank line at the end.
//!
//! `inbox` cuts what a client sent into transactions; `parse` turns one into a [`Configuration`], or
//! refuses it as a whole, as `preshared_keys` does on the socket where those alone may be set; `format` writes the answer to a `get`, of which `answer` keeps the part that its client reads;
//! `client` and `server` carry them.
//! The mode of the socket's file alone decides which users may connect: root and the socket's owner, or the group of the
//! socket for preshared keys.

mod answer;
mod client;
mod format;
#[cfg(feature = "fuzzing")]
mod fuzz_session;
mod inbox;
mod parse;
mod preshared_keys;
mod secret_text;
mod server;
#[cfg(test)]
mod tests;

#[cfg(feature = "fuzzing")]
pub use fuzz_session::FuzzSession;
pub(crate) use preshared_keys::require_peers;
#[cfg(test)]
pub(crate) use secret_text::SecretText;
pub(crate) use server::{ClientId, Server, accept, probe_accept};

use wgsep_proto::Configuration;

/// What the clients of a socket may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// All that there is.
    Everything,
    /// Set the preshared keys of peers that exist.
    PresharedKeys,
}

impl Access {
    /// The socket's name in the log.
    const fn socket(self) -> &'static str {
        match self {
            Self::Everything => "UAPI",
            Self::PresharedKeys => "psk socket",
        }
    }
}

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
