//! Stage 1 of the way in: datagrams are read from a UDP socket.

use crate::drops::Drops;
use crate::packets::memory;
use crate::packets::udp::MAX_SEGMENTS;
use crate::sys::{self, Datagram};
use std::io;
use std::os::fd::BorrowedFd;
use wgsep_proto::path::inbound::{InboundBatch, Receive};
use wgsep_proto::{DropCause, Ecn};

/// Most times that a worker reads a socket at once.
const MAX_RECEIVES: usize = 64;
/// Length of the longest datagram, or of as many as the kernel coalesces.
const MAX_RECEIVE_LEN: usize = 65_536;
/// Bytes that a worker reads from a socket at once: twice what the kernel coalesces, and some small
/// datagrams between. Four times is no faster, and makes a small packet among large ones wait longer.
const RECEIVED_LEN: usize = 2 * MAX_RECEIVE_LEN + 4096;

/// Datagrams on their way in, in memory that is allocated once.
pub(crate) struct UdpBatch {
    /// What stage 1 read.
    pub(crate) receives: Receives,
    /// The transport messages among it, by the stages 2 to 4.
    pub(crate) messages: InboundBatch,
}

impl UdpBatch {
    /// An empty batch.
    pub(crate) fn new() -> Self {
        Self {
            receives: Receives::new(),
            messages: InboundBatch::with_capacity(MAX_RECEIVES, MAX_RECEIVES * MAX_SEGMENTS),
        }
    }

    /// Empties the batch.
    pub(crate) fn clear(&mut self) {
        self.receives.clear();
        self.messages.clear();
    }
}

/// What each read of a socket returned, end to end.
pub(crate) struct Receives {
    pub(crate) memory: Box<[u8]>,
    used: usize,
    pub(crate) receives: Vec<Receive>,
    /// Reads so far, including those whose datagram was not kept, so that a flood of malformed datagrams
    /// does not hold the source lock for ever.
    reads: usize,
}

/// Another program has had the kernel destroy a socket (SOCK_DESTROY, as `ss -K` does).
#[derive(Debug)]
pub(crate) struct SocketDestroyed;

impl Receives {
    fn new() -> Self {
        let receives = Vec::with_capacity(MAX_RECEIVES);
        Self { memory: memory(RECEIVED_LEN), used: 0, receives, reads: 0 }
    }

    /// Stage 1: reads until the socket is empty or the batch is full.
    ///
    /// # Errors
    /// If another program has had the kernel destroy the socket.
    pub(crate) fn read(
        &mut self,
        socket: BorrowedFd<'_>,
        drops: Drops<'_>,
    ) -> Result<(), SocketDestroyed> {
        while let Some(buffer) = self.spare_capacity() {
            match sys::receive(socket, buffer) {
                Ok(datagram) => self.keep(&datagram),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    drops.add(DropCause::InboundMalformed, 1);
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
        if self.is_full() { None } else { self.memory.get_mut(self.used..) }
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
            segment_len: datagram.segment_len,
            endpoint: datagram.endpoint,
            ecn: Ecn::of_traffic_class(datagram.traffic_class),
        });
        self.used = end;
    }

    /// True if no other datagram fits.
    pub(crate) const fn is_full(&self) -> bool {
        self.reads >= MAX_RECEIVES || self.memory.len() - self.used < MAX_RECEIVE_LEN
    }

    /// True if nothing was received.
    pub(crate) const fn is_empty(&self) -> bool {
        self.receives.is_empty()
    }

    fn clear(&mut self) {
        (self.used, self.reads) = (0, 0);
        self.receives.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packets::udp::MAX_SEND;
    use wgsep_proto::Endpoint;

    #[test]
    fn small_datagrams_between_do_not_keep_out_the_second_of_the_longest() {
        let mut batch = Receives::new();
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
        let mut batch = Receives::new();
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
