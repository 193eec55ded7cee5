//! The path of a datagram from the network to the TUN device.
//!
//! 1. `Message::parse`: which of the four messages; handshake messages go to the control thread.
//! 2. `IndexTable::lookup_keypair`: the receiver index names the keypair and its peer.
//! 3. `Keypair::open`: decrypt in place. (parallel; all else below is in the order of arrival)
//! 4. `accept`: drop replays; move endpoint, keypair slots and timers.
//! 5. `check_inner`: trim to the inner length; the inner source must be an allowed IP of this peer; drop
//!    router advertisements, which would change the kernel's configuration.
//! 6. The caller writes the packet to the TUN device.
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use crate::data_path::{AllowedIpTable, DataPath, DropCause};
use crate::ip::{Ecn, InnerPacket, propagate_ecn};
use crate::keypair::Keypair;
use crate::messages::TRANSPORT_OVERHEAD;
use crate::ndisc;
use crate::peer::{Endpoint, Peer, event};
use crate::time::Instant;
use crate::timers::RECEIVE_REKEY_AGE;
use std::sync::Arc;

/// An authenticated transport message.
pub struct Received<'a> {
    /// Its sender.
    pub peer: &'a Arc<Peer>,
    /// The keypair that opened it.
    pub keypair: &'a Arc<Keypair>,
    /// Its counter.
    pub counter: u64,
    /// From where, and to which address of ours.
    pub endpoint: Endpoint,
    /// The outer header's ECN bits.
    pub ecn: Ecn,
}

impl DataPath {
    /// Accepts an authenticated message: updates its peer's state and returns the packet inside, trimmed,
    /// or `None` for a keepalive and for anything that must not reach the TUN device (which is counted).
    pub fn accept<'p>(
        &self,
        received: &Received<'_>,
        allowed_ips: &AllowedIpTable,
        plaintext: &'p mut [u8],
        now: Instant,
    ) -> Option<&'p mut [u8]> {
        let Received { peer, keypair, .. } = received;
        if !keypair.validate_counter(received.counter) {
            self.drops.add(DropCause::Replayed, 1);
            return None;
        }
        if !self.move_peer(received, now) {
            self.drops.add(DropCause::UnknownIndex, 1);
            return None;
        }
        let timers = &peer.timers;
        timers.any_authenticated_packet_received();
        let mut examination = timers.any_authenticated_packet_traversal(now);
        let message_len =
            u64::try_from(plaintext.len().saturating_add(TRANSPORT_OVERHEAD)).unwrap_or(0);
        if plaintext.is_empty() {
            self.mark_timer(peer, examination);
            peer.add_rx_bytes(message_len);
            return None;
        }
        examination = examination | timers.data_received(now);
        self.mark_timer(peer, examination);
        let packet = self.check_inner(received, allowed_ips, plaintext)?;
        peer.add_rx_bytes(message_len);
        Some(packet)
    }

    /// Updates the peer's endpoint and keypair slots from this message. False if the peer was removed
    /// after the lookup.
    fn move_peer(&self, received: &Received<'_>, now: Instant) -> bool {
        let Received { peer, keypair, .. } = received;
        let (confirmed, current_is_old) = {
            let mut state = peer.state();
            if !peer.is_alive() {
                return false;
            }
            peer.move_to(&mut state, received.endpoint);
            let confirmed = state.keypairs.received_with_keypair(keypair);
            // The current keypair, which need not be the one of this message.
            let current = state.keypairs.current.as_ref();
            (
                confirmed,
                current.is_some_and(|c| c.wants_rekey_after_receive(RECEIVE_REKEY_AGE, now)),
            )
        };
        if let Some(displaced) = confirmed {
            for keypair in displaced.iter().flatten() {
                self.index_table.release(keypair.sender_index());
            }
            peer.timers.handshake_complete();
            self.mark(peer, event::CONFIRMED);
        }
        if current_is_old && peer.timers.take_lastminute_handshake() {
            self.want_handshake(peer, now);
        }
        true
    }

    /// Returns the inner packet, or drops one that is malformed, has a source that is not the peer's, or
    /// must not reach the kernel.
    fn check_inner<'p>(
        &self,
        received: &Received<'_>,
        allowed_ips: &AllowedIpTable,
        plaintext: &'p mut [u8],
    ) -> Option<&'p mut [u8]> {
        let Some(inner) = InnerPacket::parse(plaintext) else {
            self.drops.add(DropCause::InnerMalformed, 1);
            return None;
        };
        let owner = allowed_ips.lookup(inner.source);
        if !owner.is_some_and(|owner| Arc::ptr_eq(&owner.peer, received.peer)) {
            self.drops.add(DropCause::WrongSource, 1);
            return None;
        }
        let packet = plaintext.get_mut(..inner.len)?;
        if ndisc::is_router_advertisement(packet) {
            self.drops.add(DropCause::RouterAdvertisement, 1);
            return None;
        }
        propagate_ecn(packet, received.ecn);
        Some(packet)
    }
}
