//! From the network to the TUN device, by the stages of [`packets`](crate::packets).

use crate::drops::Drops;
use crate::packets::memory;
use crate::packets::offload::{Coalescer, VNET_HDR_LEN};
use crate::packets::tun::{Tun, WriteError};
use crate::packets::udp::MAX_SEGMENTS;
use crate::sys::{self, Datagram};
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use wgsep_proto::invariant::part;
use wgsep_proto::path::data_path::{AllowedIpTable, DataPath};
use wgsep_proto::path::inbound::{self, Parsed};
use wgsep_proto::{DropCause, Ecn, Endpoint, Instant};

/// Most times that a worker reads a socket at once.
const MAX_RECEIVES: usize = 64;
/// Length of the longest datagram, or of as many as the kernel coalesces.
const MAX_RECEIVE_LEN: usize = 65_536;
/// Bytes that a worker reads from a socket at once: twice what the kernel coalesces, and some small
/// datagrams between. Four times is no faster, and makes a small packet among large ones wait longer.
const RECEIVED_LEN: usize = 2 * MAX_RECEIVE_LEN + 4096;

/// Received datagrams, in memory that is allocated once.
pub(crate) struct UdpBatch {
    messages: inbound::InboundBatch,
    /// What each read of the socket gave, end to end in `memory`.
    receives: Vec<Receive>,
    memory: Box<[u8]>,
    used: usize,
    /// Reads so far, including those whose datagram was not kept, so that a flood of malformed datagrams
    /// does not hold the source lock for ever.
    reads: usize,
}

/// The result of one read of a socket: one datagram, or several that the kernel coalesced.
struct Receive {
    bytes: Range<usize>,
    /// Length of each but the last.
    segment_len: usize,
    endpoint: Endpoint,
    ecn: Ecn,
}

/// Another program has had the kernel destroy a socket (SOCK_DESTROY, as `ss -K` does).
#[derive(Debug)]
pub(crate) struct SocketDestroyed;

impl UdpBatch {
    /// An empty batch.
    pub(crate) fn new() -> Self {
        Self {
            messages: inbound::InboundBatch::with_capacity(
                MAX_RECEIVES,
                MAX_RECEIVES * MAX_SEGMENTS,
            ),
            receives: Vec::with_capacity(MAX_RECEIVES),
            memory: memory(RECEIVED_LEN),
            used: 0,
            reads: 0,
        }
    }

    /// True if nothing was received.
    pub(crate) fn is_empty(&self) -> bool {
        self.receives.is_empty()
    }

    /// True if no other datagram fits.
    pub(crate) fn is_full(&mut self) -> bool {
        self.spare_capacity().is_none()
    }

    /// Stage 1: reads until the socket is empty or the batch is full.
    ///
    /// # Errors
    /// If another program has had the kernel destroy the socket.
    pub(crate) fn read(
        &mut self,
        socket: BorrowedFd<'_>,
        data_path: &DataPath,
    ) -> Result<(), SocketDestroyed> {
        while let Some(buffer) = self.spare_capacity() {
            match sys::receive(socket, buffer) {
                Ok(datagram) => self.keep(&datagram),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    data_path.drops.add(DropCause::InboundMalformed, 1);
                    self.discard();
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {
                    return Err(SocketDestroyed);
                }
                // The queue is empty, or the socket reported a pending error, once.
                Err(_) => return Ok(()),
            }
        }
        Ok(())
    }

    /// The buffer for the next read; `None` when the batch is full.
    fn spare_capacity(&mut self) -> Option<&mut [u8]> {
        if self.reads >= MAX_RECEIVES {
            return None;
        }
        self.memory.get_mut(self.used..).filter(|spare| spare.len() >= MAX_RECEIVE_LEN)
    }

    /// Counts a read whose datagram is not kept.
    const fn discard(&mut self) {
        self.reads += 1;
    }

    /// Keeps what was read into [`Self::spare_capacity`].
    fn keep(&mut self, datagram: &Datagram) {
        self.reads += 1;
        let end = self.used + datagram.len;
        self.receives.push(Receive {
            bytes: self.used..end,
            segment_len: datagram.segment_len.max(1),
            endpoint: datagram.endpoint,
            ecn: Ecn::of_traffic_class(datagram.traffic_class),
        });
        self.used = end;
    }

    /// Stage 2: keeps the transport messages, and calls `queue_handshake` with each handshake message.
    pub(crate) fn parse(
        &mut self,
        data_path: &DataPath,
        mut queue_handshake: impl FnMut(Endpoint, &[u8]),
    ) {
        let Self { messages, receives, memory, .. } = self;
        for Receive { bytes, segment_len, endpoint, ecn } in receives {
            messages.begin_read(*endpoint, *ecn);
            let mut start = bytes.start;
            while start < bytes.end {
                let end = bytes.end.min(start + *segment_len);
                if messages.parse(data_path, memory, start..end) == Parsed::Handshake {
                    queue_handshake(*endpoint, part(memory, start..end));
                }
                start = end;
            }
        }
    }

    /// Stage 3.
    pub(crate) fn open(&mut self, data_path: &DataPath, now: Instant) {
        self.messages.open(data_path, &mut self.memory, now);
    }

    /// Stages 4 and 5: accepts what opened, and writes it to the TUN device.
    pub(crate) fn deliver(
        &mut self,
        data_path: &DataPath,
        drops: Drops<'_>,
        allowed_ips: &AllowedIpTable,
        coalescer: &mut Coalescer,
        tun: &Tun,
        now: Instant,
    ) {
        let Self { messages, memory, .. } = self;
        let write = |frame: &mut [u8], packets: u16| {
            if let Err(WriteError { cause, packets }) = tun.write_packets(frame, packets, now) {
                drops.add(cause, packets);
            }
        };
        for number in 0..messages.len() {
            let Some(packet) = messages.accept(number, data_path, allowed_ips, memory, now) else {
                continue;
            };
            // The TUN device's header overwrites the transport header, which is longer.
            let start = packet.start.saturating_sub(VNET_HDR_LEN);
            let Some(frame) = memory.get_mut(start..packet.end) else { continue };
            coalescer.push(frame, write);
        }
        coalescer.flush(write);
    }

    /// Empties the batch.
    pub(crate) fn clear(&mut self) {
        (self.used, self.reads) = (0, 0);
        self.messages.clear();
        self.receives.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packets::udp::MAX_SEND;

    #[test]
    fn small_datagrams_between_do_not_keep_out_the_second_of_the_longest() {
        let mut batch = UdpBatch::new();
        let endpoint = Endpoint::new(([192, 0, 2, 1], 7).into());
        let mut keep = |len| {
            let fits = batch.spare_capacity().is_some();
            if fits {
                batch.keep(&Datagram { len, segment_len: len, endpoint, traffic_class: 0 });
            }
            fits
        };
        assert!([148, 148, MAX_SEND, 148, 1452, MAX_SEND].into_iter().all(&mut keep));
        assert!(!keep(148), "no more than two of them");
    }

    #[test]
    fn datagrams_that_are_not_kept_fill_a_batch_as_well() {
        let mut batch = UdpBatch::new();
        let mut reads = 0;
        while batch.spare_capacity().is_some() && reads < 10_000 {
            batch.discard();
            reads += 1;
        }
        assert_eq!((reads, batch.is_empty()), (MAX_RECEIVES, true));
        batch.clear();
        assert!(batch.spare_capacity().is_some());
    }
}
