//! Stage 4 of the way out: packets become datagrams, which are sealed in place.

use super::{OutboundBatch, PeerRun, RoutedPacket, Segmentation};
use crate::invariant::present;
use crate::path::Parts;
use crate::path::data_path::{DataPath, DropCause};
use crate::session::keypair::{SealJob, seal_batch};
use crate::session::peer::{Endpoint, Peer};
use crate::wire::ip::{Ecn, InnerPacket, padding};
use crate::wire::messages::{MAX_INNER_LEN, TAG_LEN, TRANSPORT_HEADER_LEN};
use core::ops::Range;

/// Datagrams that are written before they are sealed, all of which fit into the L1 cache.
const SEALED_AT_ONCE: usize = 16;

/// A datagram in the caller's memory.
pub struct SealedDatagram {
    /// Where it lies.
    pub bytes: Range<usize>,
    /// The ECN bits of the packet inside.
    pub ecn: Ecn,
    run: usize,
    counter: u64,
    /// Until then its bytes are plaintext.
    is_sealed: bool,
}

/// Consecutive datagrams to one peer.
pub struct SealedRun<'b> {
    /// The peer.
    pub peer: &'b Peer,
    /// Where it was when the nonces were reserved.
    pub endpoint: &'b Endpoint,
    /// The datagrams, in order.
    pub datagrams: &'b [SealedDatagram],
}

/// The segment that is sealed next.
#[derive(Default)]
pub(super) struct Position {
    run: usize,
    /// Number of the packet in its run, which begins with the staged ones.
    packet: usize,
    segment: usize,
    /// Segments of the run before this one: what its counter is above the first.
    counter: u64,
}

impl<S: Segmentation> OutboundBatch<S> {
    /// Stage 4: makes datagrams of the packets that are left, as far as `datagrams` has room. False if
    /// none is left.
    pub fn seal(&mut self, data_path: &DataPath, memory: &[u8], datagrams: &mut [u8]) -> bool {
        self.datagrams.clear();
        let mut used = 0;
        loop {
            let before = self.datagrams.len();
            self.write_datagrams(data_path, memory, datagrams, &mut used);
            let Self { runs, datagrams: written, keystream, .. } = self;
            let (_, written) = written.split_at_mut_checked(before).unwrap_or_default();
            if written.is_empty() {
                return before > 0;
            }
            let mut parts = Parts::new(datagrams);
            let jobs = written.iter_mut().filter_map(|datagram| {
                let reservation = runs.get(datagram.run)?.reservation.as_ref()?;
                let SealedDatagram { bytes, counter, is_sealed, .. } = datagram;
                let (keypair, datagram) = (&*reservation.keypair, parts.take(bytes.clone())?);
                Some(SealJob { keypair, counter: *counter, datagram, is_sealed })
            });
            seal_batch(keystream.as_mut().map(|cache| &mut ***cache), jobs);
            // What is not sealed is plaintext, and must not be sent.
            let unsealed = written.iter().position(|datagram| !datagram.is_sealed);
            debug_assert_eq!(unsealed, None, "lengths are checked, and ranges ascend");
            if let Some(unsealed) = unsealed {
                self.datagrams.truncate(before + unsealed);
                return before + unsealed > 0;
            }
        }
    }

    /// Writes the next few packets to where they are sealed in place.
    fn write_datagrams(
        &mut self,
        data_path: &DataPath,
        memory: &[u8],
        datagrams: &mut [u8],
        used: &mut usize,
    ) {
        let Self { packets, runs, datagrams: sealed, next, max_datagrams, .. } = self;
        let most = (*max_datagrams).min(sealed.len() + SEALED_AT_ONCE);
        while let Some(run) = runs.get(next.run)
            && sealed.len() < most
        {
            let (Some(reservation), Some(packet)) =
                (&run.reservation, run.packet(packets, next.packet))
            else {
                *next = Position { run: next.run + 1, ..Position::default() };
                continue;
            };
            if next.segment >= packet.count() {
                (next.packet, next.segment) = (next.packet + 1, 0);
                continue;
            }
            let room = datagrams.get_mut(*used..).unwrap_or_default();
            match write_datagram(&packet, next.segment, data_path, memory, room) {
                Ok(len) => {
                    let bytes = *used..*used + len;
                    *used = bytes.end;
                    let counter = reservation.first_counter + next.counter;
                    sealed.push(SealedDatagram {
                        bytes,
                        ecn: packet.ecn(),
                        run: next.run,
                        counter,
                        is_sealed: false,
                    });
                }
                Err(NotWritten::NoRoom) if *used > 0 => return,
                Err(NotWritten::NoRoom) => data_path.drops.add(DropCause::TooLong, 1),
                Err(NotWritten::Dropped(cause)) => data_path.drops.add(cause, 1),
            }
            next.segment += 1;
            next.counter += 1;
        }
    }

    /// The datagrams that the last call of [`Self::seal`] made, for the caller to send in this order. It counts what the
    /// socket took with [`Peer::add_tx`].
    pub fn sealed_runs(&self) -> impl Iterator<Item = SealedRun<'_>> {
        let by_run = self.datagrams.chunk_by(|one, next| one.run == next.run);
        by_run.filter_map(|datagrams| {
            let run = self.runs.get(datagrams.first()?.run);
            let run = present(run, "a datagram is of a run of its batch")?;
            let reservation = present(run.reservation.as_ref(), "its nonces were reserved")?;
            Some(SealedRun { peer: &run.peer, endpoint: &reservation.endpoint, datagrams })
        })
    }
}

/// A packet of a run.
enum Queued<'p, S> {
    /// It waited for the keypair. An empty one is a keepalive.
    Staged(&'p [u8]),
    /// It was routed just now.
    Routed(&'p RoutedPacket<S>),
}

impl<S: Segmentation> Queued<'_, S> {
    fn count(&self) -> usize {
        match self {
            Self::Staged(_) => 1,
            Self::Routed(packet) => packet.segments.count(),
        }
    }

    /// Length of a segment, and the MTU that bounds its padding.
    fn len_of(&self, number: usize, data_path: &DataPath) -> (usize, usize) {
        match self {
            Self::Staged(packet) => (packet.len(), data_path.mtu_of(packet)),
            Self::Routed(packet) => (packet.segments.len_of(number), packet.mtu),
        }
    }

    fn ecn(&self) -> Ecn {
        match self {
            Self::Staged(packet) => {
                InnerPacket::parse(packet).map_or(Ecn::NOT_CAPABLE, |inner| inner.ecn)
            }
            Self::Routed(packet) => packet.ecn,
        }
    }

    fn write(&self, memory: &[u8], number: usize, segment: &mut [u8]) -> Option<()> {
        match self {
            Self::Staged(packet) => {
                segment.copy_from_slice(packet);
                Some(())
            }
            Self::Routed(packet) => packet.write(memory, number, segment),
        }
    }
}

impl PeerRun {
    /// The packet with this number, of the staged ones and then of those in `packets`.
    fn packet<'p, S>(
        &'p self,
        packets: &'p [RoutedPacket<S>],
        number: usize,
    ) -> Option<Queued<'p, S>> {
        let staged = self.reservation.as_ref().map(|reservation| &reservation.staged)?;
        match number.checked_sub(staged.len()) {
            None => staged.get(number).map(|packet| Queued::Staged(packet)),
            Some(routed) => {
                packets.get(self.packets.clone())?.get(routed).map(|packet| Queued::Routed(packet))
            }
        }
    }
}

/// Why no datagram was written.
enum NotWritten {
    /// It is longer than what is left of the memory for datagrams.
    NoRoom,
    /// The packet cannot be sent at all.
    Dropped(DropCause),
}

/// Writes a segment and its padding to the start of `room`, behind space for the header and before space for
/// the tag. Returns the length of the datagram.
fn write_datagram<S: Segmentation>(
    packet: &Queued<'_, S>,
    number: usize,
    data_path: &DataPath,
    memory: &[u8],
    room: &mut [u8],
) -> Result<usize, NotWritten> {
    let (len, mtu) = packet.len_of(number, data_path);
    let datagram_len = datagram_len(len, mtu);
    if datagram_len - TRANSPORT_HEADER_LEN - TAG_LEN > MAX_INNER_LEN {
        return Err(NotWritten::Dropped(DropCause::TooLong));
    }
    let datagram = room.get_mut(..datagram_len).ok_or(NotWritten::NoRoom)?;
    let body = datagram.get_mut(TRANSPORT_HEADER_LEN..datagram_len - TAG_LEN).unwrap_or_default();
    let (segment, padding) = body.split_at_mut_checked(len).unwrap_or_default();
    if packet.write(memory, number, segment).is_none() {
        datagram.fill(0);
        return Err(NotWritten::Dropped(DropCause::OutboundMalformed));
    }
    padding.fill(0);
    Ok(datagram_len)
}

/// Length of the datagram that carries a packet of `len` bytes.
#[must_use]
pub const fn datagram_len(len: usize, mtu: usize) -> usize {
    TRANSPORT_HEADER_LEN + len + padding(len, mtu) + TAG_LEN
}

impl DataPath {
    /// The MTU that bounds the padding of a staged packet, which may be empty.
    fn mtu_of(&self, packet: &[u8]) -> usize {
        InnerPacket::parse(packet)
            .map_or_else(|| self.mtu(), |inner| self.mtu_towards(inner.destination, inner.len))
    }
}
