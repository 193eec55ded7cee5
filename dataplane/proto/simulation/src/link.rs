//! Datagrams on their way, and what may happen to them there.

use crate::dice::Dice;
use std::net::SocketAddr;
use std::time::Duration;
use wgsep_proto::Instant;

/// Which of WireGuard's messages a datagram is, by its type and length alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Type 1.
    Initiation,
    /// Type 2.
    Response,
    /// Type 3.
    CookieReply,
    /// Type 4 with nothing inside.
    Keepalive,
    /// Type 4 with a packet inside.
    Data,
    /// Anything else.
    Unknown,
}

/// A datagram that a host sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// When.
    pub at: Instant,
    /// From where, as the receiver sees it.
    pub from: SocketAddr,
    /// Where to.
    pub to: SocketAddr,
    /// The traffic class of its outer header.
    pub traffic_class: u8,
    /// UDP payload.
    pub payload: Vec<u8>,
}

impl Datagram {
    /// Which message it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match (self.payload.first(), self.payload.len()) {
            (Some(1), 148) => Kind::Initiation,
            (Some(2), 92) => Kind::Response,
            (Some(3), 64) => Kind::CookieReply,
            (Some(4), 32) => Kind::Keepalive,
            (Some(4), 33..) => Kind::Data,
            _ => Kind::Unknown,
        }
    }

    /// The field at `at` of a handshake or transport message, such as an index.
    ///
    /// # Panics
    /// If the datagram is too short.
    #[must_use]
    pub fn word(&self, at: usize) -> u32 {
        let [a, b, c, d] = self.payload[at..at + 4] else { panic!("four bytes") };
        u32::from_le_bytes([a, b, c, d])
    }
}

/// What datagrams meet on their way. Unequal latencies reorder them.
#[derive(Clone, Debug)]
pub struct Link {
    /// The least time a datagram takes.
    pub latency: Duration,
    /// The most that chance adds to it.
    pub jitter: Duration,
    /// How many of a thousand are lost.
    pub loss: u64,
    /// How many of a thousand arrive twice.
    pub duplication: u64,
}

impl Default for Link {
    /// 10 ms one way, and nothing goes wrong.
    fn default() -> Self {
        Self { latency: Duration::from_millis(10), jitter: Duration::ZERO, loss: 0, duplication: 0 }
    }
}

impl Link {
    /// How long each copy of a datagram takes that arrives.
    pub fn fates(&self, dice: &mut Dice) -> Vec<Duration> {
        let copies = if dice.chance(self.duplication) { 2 } else { 1 };
        let jitter = u64::try_from(self.jitter.as_nanos()).unwrap_or(u64::MAX);
        (0..copies)
            .filter_map(|_| {
                let late = Duration::from_nanos(dice.below(jitter.saturating_add(1)));
                (!dice.chance(self.loss)).then_some(self.latency + late)
            })
            .collect()
    }
}
