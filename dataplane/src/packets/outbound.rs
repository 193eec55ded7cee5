//! Stage 1 of the way out: frames are read from the TUN device.

use crate::drops::Drops;
use crate::packets::flow_queues::{Quantum, ReadyQueues};
use crate::packets::memory;
use crate::packets::offload::{Segments, VNET_HDR_LEN, VnetHeader};
use crate::packets::tun::{MAX_FRAME_LEN, Read, Tun};
use std::ops::Range;
use wgsep_proto::DropCause;
use wgsep_proto::path::outbound::OutboundBatch;

/// Most reads under one source lock, including those of an empty queue and of a malformed frame.
const MAX_READS: usize = 256;
/// Bytes of frames after which a worker stops reading the TUN device: less than the longest
/// super-packet, so that one of those fills a batch and small packets wait for one at most.
const ENOUGH_LEN: usize = 49_152;
/// Capacity of a batch for frames from the TUN device, in bytes.
const FRAMES_LEN: usize = ENOUGH_LEN + MAX_FRAME_LEN;
/// Most frames of one batch, each with a packet or a super-packet.
const MAX_FRAMES: usize = 128;
/// Bytes that one batch sends at once: two of the longest sends.
const DATAGRAMS_LEN: usize = 2 * 65_536;
/// Most datagrams that one batch sends at once; more would have to be shorter than a handshake.
const MAX_DATAGRAMS: usize = 1024;

/// Packets on their way out, in memory that is allocated once.
pub(crate) struct TunBatch {
    /// What stage 1 read.
    pub(crate) frames: Frames,
    /// Those of the frames that have a peer, by the stages 2 to 4.
    pub(crate) packets: OutboundBatch<Segments>,
    /// What stage 4 sealed, end to end.
    pub(crate) datagrams: Box<[u8]>,
}

impl TunBatch {
    /// An empty batch.
    pub(crate) fn new() -> Self {
        Self {
            frames: Frames::new(),
            packets: OutboundBatch::with_capacity(MAX_FRAMES, MAX_DATAGRAMS),
            datagrams: memory(DATAGRAMS_LEN),
        }
    }

    /// Empties the batch.
    pub(crate) fn clear(&mut self) {
        self.frames.clear();
        self.packets.clear();
    }
}

/// Frames of the TUN device, end to end.
///
/// A packet that has no peer takes as much of the capacity as any other, which bounds the work that a flood of such
/// packets causes under one source lock.
pub(crate) struct Frames {
    memory: Box<[u8]>,
    used: usize,
    /// Where the packet of each frame lies, and the header before it.
    packets: Vec<(Range<usize>, VnetHeader)>,
}

/// The TUN device was deleted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct DeviceGone;

impl Frames {
    fn new() -> Self {
        Self { memory: memory(FRAMES_LEN), used: 0, packets: Vec::with_capacity(MAX_FRAMES) }
    }

    /// Stage 1: reads until no queue has a packet left or the batch is full, from `next_queue` on.
    ///
    /// # Errors
    /// If the device was deleted. What was read before is kept.
    pub(crate) fn read(
        &mut self,
        tun: &Tun,
        mut ready: ReadyQueues,
        next_queue: &mut usize,
        drops: Drops<'_>,
    ) -> Result<(), DeviceGone> {
        let mut reads = 0;
        while let Some(queue) = ready.next_from(*next_queue) {
            *next_queue = queue + 1;
            let mut quantum = Quantum::new();
            while !quantum.is_spent() {
                let Some(buffer) = self.spare_capacity().filter(|_| reads < MAX_READS) else {
                    return Ok(());
                };
                reads += 1;
                match tun.read(queue, buffer) {
                    Read::Packet(header, len) => {
                        quantum.consume(len);
                        self.keep(header, len);
                    }
                    Read::Malformed => drops.add(DropCause::OutboundMalformed, 1),
                    Read::Empty => {
                        ready.remove(queue);
                        break;
                    }
                    Read::Gone => return Err(DeviceGone),
                }
            }
        }
        Ok(())
    }

    /// The buffer for the next frame; `None` when the batch is full.
    fn spare_capacity(&mut self) -> Option<&mut [u8]> {
        if self.is_full() { None } else { self.memory.get_mut(self.used..) }
    }

    /// Keeps the packet of `len` bytes that was read into [`Self::spare_capacity`].
    fn keep(&mut self, header: VnetHeader, len: usize) {
        let start = self.used + VNET_HDR_LEN;
        self.used = start + len;
        self.packets.push((start..self.used, header));
    }

    /// True if no other frame fits.
    pub(crate) const fn is_full(&self) -> bool {
        self.packets.len() >= MAX_FRAMES || self.memory.len() - self.used < MAX_FRAME_LEN
    }

    /// The memory in which the packets lie.
    pub(crate) const fn memory(&self) -> &[u8] {
        &self.memory
    }

    /// Each packet: where it lies, and what parses how it is split.
    pub(crate) fn packets(
        &self,
    ) -> impl Iterator<Item = (Range<usize>, impl FnOnce(&[u8]) -> Option<Segments>)> {
        let segments = |header| move |packet: &[u8]| Segments::new(header, packet);
        self.packets.iter().map(move |(bytes, header)| (bytes.clone(), segments(header)))
    }

    fn clear(&mut self) {
        self.used = 0;
        self.packets.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drops::of_protocol;
    use crate::packets::tun::tests::pair;
    use std::os::fd::OwnedFd;
    use wgsep_proto::DropCounters;

    /// Reads the only queue of a device once. Returns how many frames are kept.
    fn read(frames: &mut Frames, tun: &Tun, drops: &DropCounters) -> usize {
        let mut ready = ReadyQueues::default();
        ready.insert(0);
        assert_eq!(frames.read(tun, ready, &mut 0, of_protocol(drops)), Ok(()));
        frames.packets().count()
    }

    fn write(kernel: &OwnedFd, frame: &[u8], times: usize) {
        for _ in 0..times {
            nix::unistd::write(kernel, frame).unwrap();
        }
    }

    #[test]
    fn a_flood_of_short_packets_leaves_the_source_lock_after_128() {
        let (tun, kernel) = pair(true);
        let (mut frames, drops) = (Frames::new(), DropCounters::default());
        write(&kernel, &[0; VNET_HDR_LEN + 20], MAX_FRAMES + 7);
        assert_eq!(read(&mut frames, &tun, &drops), MAX_FRAMES);
        assert!(frames.is_full());
        frames.clear();
        assert_eq!(read(&mut frames, &tun, &drops), 7);
        assert!(!frames.is_full());
    }

    #[test]
    fn frames_that_are_not_kept_leave_it_after_256() {
        let (tun, kernel) = pair(true);
        let (mut frames, drops) = (Frames::new(), DropCounters::default());
        write(&kernel, &[0; VNET_HDR_LEN - 1], MAX_READS + 7);
        for counted in [MAX_READS, MAX_READS + 7] {
            assert_eq!(read(&mut frames, &tun, &drops), 0);
            assert_eq!(drops.count(DropCause::OutboundMalformed), counted as u64);
        }
    }

    #[test]
    fn a_batch_takes_one_of_the_longest_packets_and_small_ones_wait_for_one_at_most() {
        let mut frames = Frames::new();
        let longest = MAX_FRAME_LEN - VNET_HDR_LEN;
        frames.keep(VnetHeader::default(), ENOUGH_LEN - VNET_HDR_LEN);
        assert!(!frames.is_full());
        frames.keep(VnetHeader::default(), longest);
        assert!(frames.is_full());
        frames.clear();
        frames.keep(VnetHeader::default(), longest);
        assert!(frames.is_full());
    }
}
