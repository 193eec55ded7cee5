//! What is counted of the handshakes with a peer, for reports. It has no key, and is in ordinary memory.

use crate::noise::handshake::InitiationError;
use crate::time::Instant;
use core::fmt;
use core::time::Duration;

/// Why a handshake with a peer failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "internals"), non_exhaustive)]
pub enum HandshakeFailure {
    /// An initiation was not answered within five seconds.
    Unanswered,
    /// 20 initiations in a row were not answered.
    GivenUp,
    /// The peer did not use a response before it asked for another.
    Unconfirmed,
    /// A response was not authentic, mostly because the preshared keys differ.
    BadResponse,
    /// An initiation of the peer was not newer than one before it.
    OldTimestamp,
    /// The peer sent more than 50 initiations a second.
    InitiationFlood,
    /// The network did not take a handshake message.
    Unsent,
    /// A packet waited for a handshake, and there was no private key.
    NoPrivateKey,
}

impl HandshakeFailure {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Unanswered,
        Self::GivenUp,
        Self::Unconfirmed,
        Self::BadResponse,
        Self::OldTimestamp,
        Self::InitiationFlood,
        Self::Unsent,
        Self::NoPrivateKey,
    ];

    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unanswered => "unanswered",
            Self::GivenUp => "given_up",
            Self::Unconfirmed => "unconfirmed",
            Self::BadResponse => "bad_response",
            Self::OldTimestamp => "old_timestamp",
            Self::InitiationFlood => "initiation_flood",
            Self::Unsent => "unsent",
            Self::NoPrivateKey => "no_private_key",
        }
    }

    /// The cause that is the peer's; `None` for an initiation that need not be its own.
    pub(crate) const fn of_initiation(error: InitiationError) -> Option<Self> {
        match error {
            InitiationError::Replayed => Some(Self::OldTimestamp),
            InitiationError::Flooding => Some(Self::InitiationFlood),
            InitiationError::Unauthentic => None,
        }
    }
}

impl fmt::Display for HandshakeFailure {
    /// What happened, and what to check.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Unanswered => {
                "an initiation was not answered; check the endpoint, firewalls and both public keys"
            }
            Self::GivenUp => "no initiation was answered; the next packet tries again",
            Self::Unconfirmed => {
                "the peer did not use a response; check the preshared key of both sides and the way to the peer"
            }
            Self::BadResponse => {
                "a response is not authentic; check the preshared key of both sides"
            }
            Self::OldTimestamp => {
                "an initiation is not newer than one before it; check the clock of the peer"
            }
            Self::InitiationFlood => "the peer sent more than 50 initiations a second",
            Self::Unsent => "a handshake message could not be sent; check the network",
            Self::NoPrivateKey => "there is no private key; set one",
        })
    }
}

/// Handshakes with a peer since it was configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "internals", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(not(feature = "internals"), non_exhaustive)]
pub struct HandshakeCounters {
    /// Initiations sent.
    pub initiations: u64,
    /// Responses sent.
    pub responses: u64,
    /// Handshakes that both sides completed.
    pub completed: u64,
    /// In the order of [`HandshakeFailure::ALL`].
    failures: [u64; HandshakeFailure::ALL.len()],
}

impl HandshakeCounters {
    /// Failures by cause.
    pub fn failures(&self) -> impl Iterator<Item = (HandshakeFailure, u64)> {
        HandshakeFailure::ALL.into_iter().zip(self.failures)
    }

    const fn fail(&mut self, failure: HandshakeFailure) {
        let count = &mut self.failures[failure as usize];
        *count = count.saturating_add(1);
    }
}

/// The counters of a peer, and the round trip that is being measured.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HandshakeLog {
    pub(crate) counters: HandshakeCounters,
    /// From our message to the peer's answer, of the last complete handshake.
    pub(crate) round_trip: Option<Duration>,
    /// When our last handshake message was sent, until it is answered or given up.
    sent: Option<Instant>,
}

impl HandshakeLog {
    pub(crate) const fn fail(&mut self, failure: HandshakeFailure) {
        self.counters.fail(failure);
    }

    pub(crate) const fn initiation_sent(&mut self, now: Instant) {
        self.counters.initiations = self.counters.initiations.saturating_add(1);
        self.sent = Some(now);
    }

    pub(crate) const fn response_sent(&mut self, now: Instant) {
        self.counters.responses = self.counters.responses.saturating_add(1);
        self.sent = Some(now);
    }

    /// Whether a message was sent that was not answered by now; only once.
    pub(crate) const fn take_unanswered(&mut self) -> bool {
        self.sent.take().is_some()
    }

    pub(crate) fn completed(&mut self, now: Instant) {
        self.counters.completed = self.counters.completed.saturating_add(1);
        if let Some(sent) = self.sent.take() {
            self.round_trip = Some(now.since(sent));
        }
    }
}
