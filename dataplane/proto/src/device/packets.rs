//! Packets through a device, one or a batch at a time: the stages of [`crate::path`], one after the other.

use super::Device;
use super::transmit::{Transmit, Transmits, sealed};
use crate::invariant::part;
use crate::path::Parts;
use crate::path::data_path::DropCause;
use crate::path::inbound::{Parsed, Receive};
use crate::path::outbound::Whole;
use crate::session::peer::{Endpoint, PeerId};
use crate::time::Now;
use crate::wire::ip::{Ecn, MAX_PADDING};
use crate::wire::messages::TRANSPORT_OVERHEAD;
use core::fmt;
use core::ops::Range;
use core::slice;
use std::sync::Arc;

/// Most bytes by which a datagram is longer than its packet: 16 of header, up to 15 of padding, 16 of tag.
pub const MAX_OVERHEAD: usize = TRANSPORT_OVERHEAD + MAX_PADDING;

/// A packet that came out of the tunnel.
#[derive(Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "internals"), non_exhaustive)]
pub struct ReceivedPacket<'d> {
    /// Who sent it, and is entitled to its source address. [`Device::public_key`] has the key.
    pub peer: PeerId,
    /// The IP packet, in the datagram that it came in.
    pub packet: &'d mut [u8],
}

/// Why there is no datagram for a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EncapsulateError {
    /// The packet was dropped, and counted.
    Dropped(DropCause),
    /// The memory for the datagram is too short, and nothing was done.
    BufferTooShort {
        /// An upper bound of the bytes that it needs: those of the packet and [`MAX_OVERHEAD`].
        needed: usize,
    },
}

impl From<DropCause> for EncapsulateError {
    fn from(cause: DropCause) -> Self {
        Self::Dropped(cause)
    }
}

impl fmt::Display for EncapsulateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dropped(cause) => cause.fmt(f),
            Self::BufferTooShort { needed } => write!(f, "the datagram needs {needed} bytes"),
        }
    }
}

impl core::error::Error for EncapsulateError {}

/// Why a batch was not taken: nothing was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BatchError {
    /// The memory for datagrams is too short.
    BufferTooShort {
        /// An upper bound of the bytes that it needs: those of the packets and [`MAX_OVERHEAD`] for each.
        needed: usize,
    },
    /// A range is not within the memory, or begins before the end of the one before it.
    InvalidRange {
        /// Its number in the batch, from 0.
        number: usize,
    },
}

impl fmt::Display for BatchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BufferTooShort { needed } => write!(f, "the datagrams need {needed} bytes"),
            Self::InvalidRange { number } => {
                write!(f, "range {number} is outside of the memory, or not behind the one before")
            }
        }
    }
}

impl core::error::Error for BatchError {}

/// Checks that ranges are within memory of this length, and ascend. Returns the sum of their lengths.
fn check_ranges<'r>(
    ranges: impl Iterator<Item = &'r Range<usize>>,
    len: usize,
) -> Result<usize, BatchError> {
    let (mut end, mut sum) = (0, 0usize);
    for (number, range) in ranges.enumerate() {
        if range.start < end || range.end < range.start || len < range.end {
            return Err(BatchError::InvalidRange { number });
        }
        end = range.end;
        sum = sum.saturating_add(range.len());
    }
    Ok(sum)
}

/// The packets of a batch, in the order of arrival, in the memory of their datagrams.
pub struct ReceivedPackets<'b, 'm> {
    received: slice::Iter<'b, (PeerId, Range<usize>)>,
    parts: Parts<'m>,
}

impl<'m> Iterator for ReceivedPackets<'_, 'm> {
    type Item = ReceivedPacket<'m>;

    fn next(&mut self) -> Option<ReceivedPacket<'m>> {
        let (peer, bytes) = self.received.next()?;
        Some(ReceivedPacket { peer: *peer, packet: self.parts.take(bytes.clone())? })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.received.size_hint()
    }
}

impl ExactSizeIterator for ReceivedPackets<'_, '_> {}

impl Device {
    // ------------------------------------------------------------ out

    /// Sends a packet from the TUN side: datagrams come out of [`Self::poll_transmit`], now or when a
    /// handshake has completed.
    ///
    /// # Errors
    /// Why the packet is dropped, which is counted.
    pub fn encapsulate(&mut self, packet: &[u8], now: Now) -> Result<(), DropCause> {
        let outcome = self.reserve(packet, now).and_then(|()| {
            let is_staged = self.outbound.is_empty();
            let sealed = self.send(packet);
            if is_staged || sealed > 0 { Ok(()) } else { Err(DropCause::TooLong) }
        });
        self.send_pending(now);
        outcome
    }

    /// Sends a packet from the TUN side, sealed into `datagram`, which has [`MAX_OVERHEAD`] more bytes than the packet.
    /// The result is `None` while the packet waits for a handshake; its datagram comes out of [`Self::poll_transmit`]
    /// then. Anything else that is to be sent does, too.
    ///
    /// # Errors
    /// [`EncapsulateError::Dropped`] if the packet is dropped, which is counted;
    /// [`EncapsulateError::BufferTooShort`] if `datagram` is too short.
    pub fn encapsulate_into<'d>(
        &mut self,
        packet: &[u8],
        datagram: &'d mut [u8],
        now: Now,
    ) -> Result<Option<Transmit<'d>>, EncapsulateError> {
        let needed = packet.len().saturating_add(MAX_OVERHEAD);
        if datagram.len() < needed {
            return Err(EncapsulateError::BufferTooShort { needed });
        }
        let outcome = self.reserve(packet, now).and_then(|()| {
            let waits = self.outbound.is_empty() || self.outbound.has_staged();
            self.seal_into(packet, datagram);
            if waits || !self.sealed.is_empty() { Ok(()) } else { Err(DropCause::TooLong) }
        });
        self.send_pending(now);
        outcome?;
        Ok(Transmits::new(&self.sealed, datagram).next())
    }

    /// Sends a batch of packets from the TUN side, which lie in `memory` at the ranges `packets`, in ascending order. They are
    /// sealed into `datagrams`, which has [`MAX_OVERHEAD`] more bytes for each packet, one behind the other. What waits
    /// for a handshake comes out of [`Self::poll_transmit`] then; what is dropped is counted.
    ///
    /// # Errors
    /// [`BatchError`] if a range or the memory for datagrams does not fit; nothing was done then.
    pub fn encapsulate_batch<'d>(
        &mut self,
        memory: &[u8],
        packets: &[Range<usize>],
        datagrams: &'d mut [u8],
        now: Now,
    ) -> Result<Transmits<'_, 'd>, BatchError> {
        let overheads = packets.len().saturating_mul(MAX_OVERHEAD);
        let needed = check_ranges(packets.iter(), memory.len())?.saturating_add(overheads);
        if datagrams.len() < needed {
            return Err(BatchError::BufferTooShort { needed });
        }
        let Self { control, allowed_ips, outbound, datagrams: scratch, .. } = self;
        let data_path = control.data_path();
        allowed_ips.refresh(&data_path.allowed_ips);
        for bytes in packets {
            let (packet, start) = (part(memory, bytes.clone()), bytes.start);
            let table = allowed_ips.value();
            let _counted = outbound.route_packet(data_path, table, packet, start, Whole::new);
        }
        outbound.reserve_nonces(data_path, memory, scratch, now.instant);
        self.seal_into(memory, datagrams);
        self.send_pending(now);
        Ok(Transmits::new(&self.sealed, datagrams))
    }

    /// Finds the peer of a packet and reserves its nonce, or stages it.
    fn reserve(&mut self, packet: &[u8], now: Now) -> Result<(), DropCause> {
        let Self { control, allowed_ips, outbound, datagrams, .. } = self;
        let data_path = control.data_path();
        allowed_ips.refresh(&data_path.allowed_ips);
        outbound.route_packet(data_path, allowed_ips.value(), packet, 0, Whole::new)?;
        outbound.reserve_nonces(data_path, packet, datagrams, now.instant);
        Ok(())
    }

    /// Seals what nonces are reserved for, and queues it. Returns the number of datagrams.
    pub(super) fn send(&mut self, memory: &[u8]) -> usize {
        let Self { control, outbound, datagrams, transmits, .. } = self;
        let mut count = 0;
        while outbound.seal(control.data_path(), memory, datagrams) {
            for queued in sealed(outbound) {
                transmits.push_from(datagrams, queued);
                count += 1;
            }
        }
        outbound.recycle();
        count
    }

    /// Seals what nonces are reserved for into the caller's memory, unless packets that waited go before it, for which
    /// there may be no space: then all are queued.
    fn seal_into(&mut self, memory: &[u8], datagrams: &mut [u8]) {
        self.sealed.clear();
        if self.outbound.has_staged() {
            self.send(memory);
            return;
        }
        let Self { control, outbound, sealed: list, .. } = self;
        if outbound.seal(control.data_path(), memory, datagrams) {
            list.extend(sealed(outbound));
        }
        outbound.recycle();
    }

    // ------------------------------------------------------------ in

    /// Takes a datagram from the network, decrypting in place; returns the packet for the TUN side and who sent it. The
    /// result is `None` for a keepalive and for a handshake message, whose answer comes out of [`Self::poll_transmit`].
    ///
    /// # Errors
    /// Why the datagram is dropped, which is counted.
    pub fn decapsulate<'d>(
        &mut self,
        source: Endpoint,
        ecn: Ecn,
        datagram: &'d mut [u8],
        now: Now,
    ) -> Result<Option<ReceivedPacket<'d>>, DropCause> {
        let Self { control, allowed_ips, inbound, backlog, .. } = self;
        allowed_ips.refresh(&control.data_path().allowed_ips);
        inbound.forget_released(&control.data_path().index_table);
        let outcome = match inbound.parse_one(control.data_path(), datagram, source, ecn) {
            Ok(Parsed::Transport) => {
                inbound.open(control.data_path(), datagram, now.instant);
                let table = allowed_ips.value();
                inbound.accept(control.data_path(), table, datagram, now.instant);
                inbound.dropped().map_or(Ok(()), Err)
            }
            Ok(Parsed::Handshake) => control.receive_handshake(source, datagram, *backlog, now),
            Err(cause) => Err(cause),
        };
        inbound.moved().for_each(|(peer, to)| control.log_endpoint(peer, to));
        let accepted = inbound.accepted_from().next();
        inbound.clear_messages();
        self.send_pending(now);
        outcome?;
        Ok(accepted.and_then(|(peer, bytes)| {
            Some(ReceivedPacket { peer, packet: datagram.get_mut(bytes)? })
        }))
    }

    /// Takes a batch of datagrams from the network, which lie in `memory` at ascending ranges, decrypting in place; returns the
    /// packets for the TUN side and who sent them. Answers to handshake messages come out of [`Self::poll_transmit`];
    /// what is dropped is counted.
    ///
    /// # Errors
    /// [`BatchError::InvalidRange`] if a range does not fit; nothing was done then.
    pub fn decapsulate_batch<'m>(
        &mut self,
        memory: &'m mut [u8],
        datagrams: &[Receive],
        now: Now,
    ) -> Result<ReceivedPackets<'_, 'm>, BatchError> {
        check_ranges(datagrams.iter().map(|receive| &receive.bytes), memory.len())?;
        let Self { control, allowed_ips, inbound, backlog, received, .. } = self;
        let data_path = Arc::clone(control.data_path());
        allowed_ips.refresh(&data_path.allowed_ips);
        inbound.forget_released(&data_path.index_table);
        inbound.parse(&data_path, memory, datagrams, |source, message| {
            let _counted = control.receive_handshake(source, message, *backlog, now);
        });
        inbound.open(&data_path, memory, now.instant);
        inbound.accept(&data_path, allowed_ips.value(), memory, now.instant);
        inbound.moved().for_each(|(peer, to)| control.log_endpoint(peer, to));
        received.clear();
        received.extend(inbound.accepted_from());
        inbound.clear_messages();
        self.send_pending(now);
        Ok(ReceivedPackets { received: self.received.iter(), parts: Parts::new(memory) })
    }
}
