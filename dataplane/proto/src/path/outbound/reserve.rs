//! Stage 3 of the way out: nonces for packets whose peer has a keypair; the others are staged.

use super::{OutboundBatch, PeerRun, RoutedPacket, Segmentation};
use crate::invariant::part;
use crate::path::data_path::{DataPath, DropCause};
use crate::session::keypair::Keypair;
use crate::session::peer::{Endpoint, Peer, PeerState, StagedPackets, dirty};
use crate::session::timers::Timer;
use crate::time::Instant;
use std::collections::VecDeque;
use std::sync::Arc;

/// Nonces reserved for packets to one peer: a keypair, a first counter and an endpoint.
pub struct NonceReservation {
    /// The keypair that seals the packets.
    pub keypair: Arc<Keypair>,
    /// Where the datagrams are sent.
    pub endpoint: Endpoint,
    /// Counter of the first packet; the staged ones come first.
    pub first_counter: u64,
    /// Packets that waited for the keypair, oldest first.
    pub staged: VecDeque<Vec<u8>>,
}

impl<S: Segmentation> OutboundBatch<S> {
    /// Stage 3: reserves nonces for each run, or stages its packets, which it copies by way of `scratch`.
    pub fn reserve_nonces(
        &mut self,
        data_path: &DataPath,
        memory: &[u8],
        scratch: &mut [u8],
        now: Instant,
    ) {
        let Self { packets, runs, keypair: kept, .. } = self;
        for run in runs.iter_mut().filter(|run| run.reservation.is_none()) {
            let packets = part(packets, run.packets.clone());
            let count = packets.iter().map(|packet| packet.segments.count()).sum();
            run.reservation = data_path.reserve(&run.peer, count, now, kept, |staged| {
                let stage = |packet| stage(packet, memory, scratch, staged, data_path);
                packets.iter().map(stage).sum()
            });
        }
        runs.retain(|run| run.reservation.is_some());
    }

    /// Stage 3 for a peer that has staged packets and, now, a keypair. Returns how many packets are added. It comes
    /// after [`Self::reserve_nonces`], which takes the staged packets of a peer to which others were read, so that they
    /// stay ahead of those.
    pub fn reserve_staged(&mut self, data_path: &DataPath, peer: Arc<Peer>, now: Instant) -> usize {
        let Some(reservation) = data_path.reserve_nonces(&peer, 0, now, |_| 0) else { return 0 };
        let (at, staged) = (self.packets.len(), reservation.staged.len());
        let reservation = Some(reservation);
        self.runs.push(PeerRun { peer, packets: at..at, reservation });
        staged
    }
}

/// Stages each segment of a packet. Returns how many packets the queue dropped.
fn stage<S: Segmentation>(
    packet: &RoutedPacket<S>,
    memory: &[u8],
    scratch: &mut [u8],
    staged: &mut StagedPackets,
    data_path: &DataPath,
) -> usize {
    let mut dropped = 0;
    for number in 0..packet.segments.count() {
        let segment = scratch.get_mut(..packet.segments.len_of(number));
        let written = segment.and_then(|segment| {
            packet.write(memory, number, segment)?;
            Some(&*segment)
        });
        match written {
            Some(segment) => dropped += staged.stage_packet(segment),
            None => data_path.drops.add(DropCause::OutboundMalformed, 1),
        }
    }
    dropped
}

impl DataPath {
    /// Reserves nonces for the staged packets of `peer` and `count` more; without a keypair, stages those
    /// by calling `stage`, which returns how many packets the queue dropped.
    pub fn reserve_nonces(
        &self,
        peer: &Arc<Peer>,
        count: usize,
        now: Instant,
        stage: impl FnOnce(&mut StagedPackets) -> usize,
    ) -> Option<NonceReservation> {
        self.reserve(peer, count, now, &mut None, stage)
    }

    /// As [`Self::reserve_nonces`]; takes `kept` if it is the keypair.
    fn reserve(
        &self,
        peer: &Arc<Peer>,
        count: usize,
        now: Instant,
        kept: &mut Option<Arc<Keypair>>,
        stage: impl FnOnce(&mut StagedPackets) -> usize,
    ) -> Option<NonceReservation> {
        let mut state = peer.state();
        if !peer.is_alive() {
            // It was removed after the lookup.
            self.drops.add(DropCause::NoPeer, count);
            return None;
        }
        if count == 0 && state.staged.is_empty() {
            return None;
        }
        if state.endpoint.is_none() {
            self.drops.add(DropCause::NoEndpoint, count);
            return None;
        }
        let reservation = try_reserve(&mut state, count, now, kept);
        // Read after the nonces are taken: a copy that is made later uses each for the same packet.
        let vm_generation_changed = reservation.is_some() && self.vm_generation_changed();
        match reservation {
            Some(reservation) if vm_generation_changed => {
                state.staged.put_back(reservation.staged);
                let dropped = stage(&mut state.staged);
                drop(state);
                self.drops.add(DropCause::StagedOverflow, dropped);
                self.mark(peer, dirty::HANDSHAKE);
                None
            }
            Some(reservation) => {
                drop(state);
                let has_data =
                    count > 0 || reservation.staged.iter().any(|packet| !packet.is_empty());
                self.sent(peer, &reservation.keypair, has_data, now);
                Some(reservation)
            }
            None => {
                let dropped = stage(&mut state.staged);
                let wanted = !state.staged.is_empty();
                drop(state);
                self.drops.add(self.overflow_cause(), dropped);
                if wanted {
                    self.initiate_for_staged(peer, now);
                }
                None
            }
        }
    }

    /// Updates the timers for packets that are about to be sent, and checks the age of their keypair.
    fn sent(&self, peer: &Peer, keypair: &Keypair, has_data: bool, now: Instant) {
        let timers = &peer.timers;
        let mut examination = timers.any_authenticated_packet_traversal(now);
        timers.any_authenticated_packet_sent();
        if has_data {
            examination = examination | timers.data_sent(now);
        }
        self.mark_timer(peer, examination);
        if keypair.wants_rekey_after_send(now) {
            self.initiate_rekey(peer, now);
        }
    }

    /// Requests an initiation for packets that wait for one, unless it is under way. If it may not be sent
    /// yet, the control thread schedules it.
    ///
    /// While a retransmission is scheduled, its timer sends the initiation. The kernel also sends it for
    /// the first packet after REKEY_TIMEOUT, without jitter. If both ends have steady traffic and their
    /// initiations cross, they would cross again after each REKEY_TIMEOUT.
    ///
    /// Without a private key that timer only limits how long packets wait, and no further packet extends the time.
    fn initiate_for_staged(&self, peer: &Peer, now: Instant) {
        let has_identity = self.has_identity();
        if has_identity {
            peer.timers.reset_handshake_attempts();
        }
        let is_scheduled = peer.timers.is_pending(Timer::RetransmitHandshake);
        if !is_scheduled || (has_identity && peer.timers.is_initiation_overdue(now)) {
            self.mark(peer, dirty::HANDSHAKE);
        }
    }

    /// The drop cause of a staged packet when too many wait.
    fn overflow_cause(&self) -> DropCause {
        if self.has_identity() { DropCause::StagedOverflow } else { DropCause::NoPrivateKey }
    }
}

fn try_reserve(
    state: &mut PeerState,
    count: usize,
    now: Instant,
    kept: &mut Option<Arc<Keypair>>,
) -> Option<NonceReservation> {
    let endpoint = state.endpoint?;
    let keypair = state.keypairs.current.as_ref()?;
    let packets = u64::try_from(state.staged.len().checked_add(count)?).ok()?;
    let first_counter = keypair.assign_nonces(packets, now)?;
    let kept = kept.take_if(|kept| Arc::ptr_eq(kept, keypair));
    let keypair = kept.unwrap_or_else(|| Arc::clone(keypair));
    Some(NonceReservation { keypair, endpoint, first_counter, staged: state.take_staged() })
}
