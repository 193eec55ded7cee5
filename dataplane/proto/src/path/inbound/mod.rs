//! The path of a datagram from the network to the TUN device.
//!
//! Stage 1, *read*, is the caller's. The next three have a file each, and none calls back into another:
//!
//! 2. `parse`, [`InboundBatch::parse`]: which of the four messages; handshake messages go to the control thread. The
//!    receiver index of a transport message names its keypair and peer. (parallel; a read lock on a shard of the
//!    indices, once for each keypair of the batch)
//! 3. `open`, [`InboundBatch::open`]: decrypt all transport messages of the batch in place. (parallel; no lock)
//! 4. `accept`, [`InboundBatch::accept`]: drop replays; move endpoint, keypair slots and timers; trim to the inner
//!    length. The inner source must be an allowed IP of this peer. Router advertisements, which would change the
//!    kernel's configuration, are dropped. (in the order of arrival; the locks of the replay window and of the peer, one
//!    after the other, once for consecutive messages of a keypair, and where a keypair is confirmed those of the indices and
//!    of the dirty peers)
//!
//! Stage 5, *write*, is the caller's: it takes the packets of [`InboundBatch::accepted`] in that order.
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod accept;
mod open;
mod parse;

pub(crate) use parse::Parsed;

use crate::path::data_path::DropCause;
use crate::secret::Secret;
use crate::session::index_table::IndexTable;
use crate::session::keypair::Keypair;
use crate::session::peer::{Endpoint, Peer};
use crate::wire::ip::Ecn;
use crate::wire::messages::ReceiverIndex;
use core::net::SocketAddr;
use core::ops::Range;
use std::sync::Arc;
use wgsep_aead::KeystreamCache;
use zeroize::Zeroize;

/// What one read of a socket returned: one datagram, or several that the kernel coalesced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receive {
    /// Where they lie in the caller's memory, end to end.
    pub bytes: Range<usize>,
    /// Length of each datagram but the last, which may be shorter.
    pub segment_len: usize,
    /// From where they came, and to which address of ours.
    pub endpoint: Endpoint,
    /// The outer header's ECN bits.
    pub ecn: Ecn,
}

impl Receive {
    /// One datagram, from a network without ECN.
    #[must_use]
    pub fn new(bytes: Range<usize>, source: SocketAddr) -> Self {
        let segment_len = bytes.len();
        Self { bytes, segment_len, endpoint: Endpoint::new(source), ecn: Ecn::NOT_CAPABLE }
    }
}

/// Transport messages on their way in.
pub struct InboundBatch {
    origins: Vec<Origin>,
    messages: Vec<TransportMessage>,
    keypairs: Vec<ReceivingKeypair>,
    /// [`IndexTable::releases`] when the keypairs were looked up.
    releases: u64,
    keystream: Option<Box<Secret<KeystreamCache>>>,
}

/// From where the datagrams of one read came.
#[derive(Clone, Copy)]
struct Origin {
    endpoint: Endpoint,
    ecn: Ecn,
}

/// A receiver index with what it names.
struct ReceivingKeypair {
    receiver_index: ReceiverIndex,
    peer: Arc<Peer>,
    keypair: Arc<Keypair>,
}

/// A transport message in the caller's memory.
struct TransportMessage {
    /// What follows its header.
    sealed: Range<usize>,
    counter: u64,
    /// Index of its origin.
    origin: usize,
    /// Index of its keypair.
    keypair: usize,
    is_authentic: bool,
    /// Why it has no packet, if it is not a keepalive.
    dropped: Option<DropCause>,
    /// It came from another address than the messages of its peer before.
    has_moved: bool,
    /// The packet inside, once it was accepted.
    packet: Option<Range<usize>>,
}

impl InboundBatch {
    /// An empty batch, with room for this many reads of a socket and for their datagrams.
    #[must_use]
    pub fn with_capacity(reads: usize, datagrams: usize) -> Self {
        Self {
            origins: Vec::with_capacity(reads),
            messages: Vec::with_capacity(datagrams),
            keypairs: Vec::with_capacity(reads),
            releases: 0,
            keystream: None,
        }
    }

    /// The batch, with keystream that is computed ahead for messages that are opened singly, which the caller must keep in memory for secrets.
    /// [`Self::forget_released`] must be called after whatever may release a keypair.
    pub(crate) fn with_keystream_cache(mut self) -> Self {
        self.keystream = Some(Box::default());
        self
    }

    /// Empties the batch but for its latest keypairs, which the next one need not look up. Until then
    /// [`Self::forget_released`] must be called after whatever may release one of them.
    pub(crate) fn clear_messages(&mut self) {
        self.origins.clear();
        self.messages.clear();
        let old = self.keypairs.len().saturating_sub(parse::LOOK_BACK);
        self.keypairs.drain(..old);
    }

    /// Drops the keypairs, and erases keystream, if one was released since they were looked up.
    pub(crate) fn forget_released(&mut self, index_table: &IndexTable) {
        let releases = index_table.releases();
        if self.releases != releases {
            self.releases = releases;
            self.keypairs.clear();
            if let Some(keystream) = &mut self.keystream {
                keystream.zeroize();
            }
        }
    }

    /// Whether its cache has a key or keystream.
    #[cfg(test)]
    pub(crate) fn has_keystream(&self) -> bool {
        self.keystream.as_ref().is_some_and(|keystream| !keystream.is_empty())
    }

    /// Empties the batch.
    pub fn clear(&mut self) {
        self.origins.clear();
        self.messages.clear();
        self.keypairs.clear();
    }
}
