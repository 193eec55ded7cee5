//! The events that a watching client receives.

use std::net::SocketAddr;

/// An event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The first that a client receives.
    Watching {
        /// Peers that are connected.
        connected: usize,
    },
    /// A handshake completed with a peer that was not connected.
    Connected {
        /// Which.
        public_key: [u8; 32],
        /// Where it is.
        endpoint: Option<SocketAddr>,
    },
    /// A handshake completed with a peer that was connected.
    Rekeyed {
        /// Which.
        public_key: [u8; 32],
    },
    /// No authenticated message of a peer was received for 180 seconds.
    Disconnected {
        /// Which.
        public_key: [u8; 32],
    },
    /// A peer's endpoint changed.
    EndpointMoved {
        /// Whose.
        public_key: [u8; 32],
        /// Where it is now.
        endpoint: SocketAddr,
    },
    /// A handshake failed.
    HandshakeFailed {
        /// With whom, if that is known. A sender that is no peer need not have the key that it names.
        public_key: Option<[u8; 32]>,
        /// Where a message came from, or goes to.
        endpoint: Option<SocketAddr>,
        /// Why.
        cause: &'static str,
    },
    /// The configuration was changed.
    Configured {
        /// Peers that there are now.
        peers: usize,
    },
    /// An offload is no longer in use.
    OffloadLost {
        /// Which.
        offload: &'static str,
    },
    /// An offload is in use again.
    OffloadRegained {
        /// Which.
        offload: &'static str,
    },
    /// Events that this client did not read in time.
    Lost {
        /// How many.
        count: u64,
    },
}

impl Event {
    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Watching { .. } => "watching",
            Self::Connected { .. } => "connect",
            Self::Rekeyed { .. } => "rekey",
            Self::Disconnected { .. } => "disconnect",
            Self::EndpointMoved { .. } => "endpoint",
            Self::HandshakeFailed { .. } => "handshake_failed",
            Self::Configured { .. } => "configuration",
            Self::OffloadLost { .. } => "offload_lost",
            Self::OffloadRegained { .. } => "offload_regained",
            Self::Lost { .. } => "lost",
        }
    }
}
