//! The typed, bounded contract between the helper and the dataplane.
//!
//! The dataplane asks, the helper answers, each request once; see [`Request`] and [`Reply`]. The
//! helper takes every frame for hostile: there is no string or path in any, and whatever is not
//! exactly a message is an [`Error`] that ends the dataplane.
//!
//! [`startup`] is what precedes the messages: descriptors and the command line of the dataplane. [`upgrade`] is the
//! contract of two helpers of which one replaces the other.

mod channel;
mod dataplane;
mod message;
mod reply;
pub mod startup;
pub mod upgrade;

pub use channel::{Channel, MAX_DESCRIPTORS, Received};
pub use message::{MAX_FRAME, REPORT_LAYERS, Request, SandboxReport, VERSION, decode};
pub use reply::{FromHelper, Notice, Reply, TunOffload};
pub use startup::{Level, LogLevel, Offload, Startup};

/// What can go wrong on the channel. All but a full socket buffer end the conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The descriptor is no SOCK_SEQPACKET socket.
    NotAChannel,
    /// The frame is none of ours: too short, too long, another version, trailing bytes, unknown tag.
    Malformed,
    /// The message does not fit a frame.
    TooLong,
    /// The number of descriptors is not what the message says.
    Descriptors,
    /// A reply to no request.
    Unexpected,
    /// The kernel refused.
    Io(nix::Error),
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::NotAChannel => f.write_str("not a SOCK_SEQPACKET socket"),
            Self::Malformed => f.write_str("malformed frame"),
            Self::TooLong => f.write_str("message too long for a frame"),
            Self::Descriptors => f.write_str("wrong number of descriptors"),
            Self::Unexpected => f.write_str("reply to no request"),
            Self::Io(errno) => write!(f, "{} ({errno:?})", errno.desc()),
        }
    }
}

impl core::error::Error for Error {}
