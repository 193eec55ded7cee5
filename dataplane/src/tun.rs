//! The TUN device: a packet or super-packet a read, and one a write.
//!
//! Where the kernel has it so, it spreads the machine's flows over several queues. A flow that fills
//! its own, as TCP does until something is lost, does not keep those of the other queues waiting.

use crate::offload::{Coalesce, Segments, VNET_HDR_LEN, VnetHeader};
use nix::libc;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use wgsep_ipc::TunOffload;
use wgsep_proto::data_path::DropCause;

/// Longest frame that a read gives: header, and as much as an IP length can say.
pub(crate) const MAX_FRAME_LEN: usize = VNET_HDR_LEN + 40 + 65_535;

/// The TUN device.
pub(crate) struct Tun {
    writer: OwnedFd,
    /// None if the only queue is the one that is written to.
    readers: Vec<OwnedFd>,
    offload: TunOffload,
    /// The kernel refused a super-packet of UDP, of TCP.
    refused: [AtomicBool; 2],
}

/// What a read of the device gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Read {
    /// A packet of this many bytes, and what has yet to be done to it.
    Packet(VnetHeader, usize),
    /// A frame that makes no sense.
    Malformed,
    /// Nothing waits.
    Empty,
    /// The device is no more.
    Gone,
}

/// Packets that the device did not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lost {
    pub(crate) cause: DropCause,
    pub(crate) packets: usize,
}

/// What a failed write is counted as. EIO means that the interface is down (kernel tun.c).
pub(crate) fn cause_of(error: &io::Error) -> DropCause {
    match error.raw_os_error() {
        Some(libc::EIO) => DropCause::InterfaceDown,
        _ => DropCause::WriteFailed,
    }
}

impl Tun {
    /// Takes its queues, opened and set up as `offload` says: the one to write to, and those to read
    /// if that is not it.
    pub(crate) const fn new(writer: OwnedFd, readers: Vec<OwnedFd>, offload: TunOffload) -> Self {
        let refused = [AtomicBool::new(false), AtomicBool::new(false)];
        Self { writer, readers, offload, refused }
    }

    /// The queues to read. Packets of a flow are all in one of them.
    pub(crate) fn queues(&self) -> &[OwnedFd] {
        if self.readers.is_empty() { core::slice::from_ref(&self.writer) } else { &self.readers }
    }

    /// The queue that tells whether the device is up. The one that is only written to does not: the
    /// kernel wakes those who wait for its other queues alone (tun.c, tun_device_event).
    pub(crate) fn probed(&self) -> BorrowedFd<'_> {
        self.queues().first().map_or(self.writer.as_fd(), AsFd::as_fd)
    }

    /// What may be written as super-packets.
    pub(crate) fn coalesce(&self) -> Coalesce {
        let [udp, tcp] = &self.refused;
        Coalesce {
            tcp: self.offload.tso && !tcp.load(Ordering::Relaxed),
            udp: self.offload.uso && !udp.load(Ordering::Relaxed),
        }
    }

    /// Whether packets come with a header, without which there are no super-packets.
    pub(crate) const fn has_header(&self) -> bool {
        self.offload.vnet_hdr
    }

    /// Bytes before a packet that the kernel neither reads nor writes.
    const fn without_header(&self) -> usize {
        if self.offload.vnet_hdr { 0 } else { VNET_HDR_LEN }
    }

    /// Reads a packet of a queue to `frame[VNET_HDR_LEN..]`; what is before it is clobbered.
    pub(crate) fn read(&self, queue: usize, frame: &mut [u8]) -> Read {
        let skipped = self.without_header();
        let (Some(queue), Some(place)) = (self.queues().get(queue), frame.get_mut(skipped..))
        else {
            return Read::Empty;
        };
        let len = match nix::unistd::read(queue, place) {
            Ok(len) => skipped + len,
            // EBADFD after deletion; EFAULT and EIO on its way there.
            Err(nix::Error::EBADFD | nix::Error::EFAULT | nix::Error::EIO | nix::Error::ENODEV) => {
                return Read::Gone;
            }
            Err(_) => return Read::Empty,
        };
        let header = match frame.first_chunk() {
            Some(header) if skipped == 0 => VnetHeader::parse(header),
            _ => Some(VnetHeader::default()),
        };
        match (header, len.checked_sub(VNET_HDR_LEN)) {
            (Some(header), Some(len)) => Read::Packet(header, len),
            _ => Read::Malformed,
        }
    }

    /// Writes a frame: [`VNET_HDR_LEN`] bytes of header, which the kernel may never see, and a packet.
    ///
    /// # Errors
    /// As write(2); EIO while the interface is down.
    pub(crate) fn write(&self, frame: &[u8]) -> io::Result<()> {
        let frame = frame.get(self.without_header()..).ok_or(io::ErrorKind::InvalidInput)?;
        nix::unistd::write(&self.writer, frame)?;
        Ok(())
    }

    /// Writes a frame of as many packets, singly if the kernel does not take super-packets of this
    /// kind.
    ///
    /// # Errors
    /// How many packets it did not take, and why.
    pub(crate) fn write_packets(&self, frame: &[u8], packets: u16) -> Result<(), Lost> {
        let Err(error) = self.write(frame) else { return Ok(()) };
        let lost = Lost { cause: cause_of(&error), packets: usize::from(packets) };
        if packets > 1 && error.raw_os_error() == Some(libc::EINVAL) {
            self.write_singly(frame).unwrap_or(Err(lost))
        } else {
            Err(lost)
        }
    }

    /// Splits a super-packet that the kernel refused, which it will not be given again.
    fn write_singly(&self, frame: &[u8]) -> Option<Result<(), Lost>> {
        let (header, packet) = frame.split_first_chunk()?;
        let header = VnetHeader::parse(header)?;
        let segments = Segments::new(&header, packet)?;
        self.refuse(header.is_tcp());
        let mut single = vec![0; VNET_HDR_LEN + segments.len_of(0)];
        let mut lost = Ok(());
        let mut packets = 0;
        for number in 0..segments.count() {
            let end = VNET_HDR_LEN + segments.len_of(number);
            segments.write(packet, number, single.get_mut(VNET_HDR_LEN..end)?)?;
            if let Err(error) = self.write(single.get(..end)?) {
                packets += 1;
                lost = Err(Lost { cause: cause_of(&error), packets });
            }
        }
        Some(lost)
    }

    fn refuse(&self, is_tcp: bool) {
        let [udp, tcp] = &self.refused;
        let (refused, name) = if is_tcp { (tcp, "TCP") } else { (udp, "UDP") };
        if !refused.swap(true, Ordering::Relaxed) {
            tracing::info!(
                "the interface refuses {name} super-packets; writing its packets one by one"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    /// A pair of packet sockets behaves as a TUN queue does: whole packets, or EAGAIN.
    fn pair(vnet_hdr: bool) -> (Tun, OwnedFd) {
        let (ours, kernels) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        (Tun::new(ours, Vec::new(), TunOffload { vnet_hdr, ..TunOffload::default() }), kernels)
    }

    #[test]
    fn packets_land_behind_the_header_with_and_without_one() {
        let header = VnetHeader { checksum: Some((20, 16)), ..VnetHeader::default() };
        for vnet_hdr in [false, true] {
            let (tun, kernel) = pair(vnet_hdr);
            let mut frame = if vnet_hdr { header.to_bytes().to_vec() } else { Vec::new() };
            frame.extend_from_slice(b"packet");
            nix::unistd::write(&kernel, &frame).unwrap();
            let mut buffer = [0xee; 64];
            let expected = if vnet_hdr { header } else { VnetHeader::default() };
            assert_eq!(tun.read(0, &mut buffer), Read::Packet(expected, 6));
            assert_eq!(&buffer[VNET_HDR_LEN..][..6], b"packet");
            assert_eq!(tun.read(0, &mut buffer), Read::Empty);
            tun.write(&buffer[..VNET_HDR_LEN + 6]).unwrap();
            let mut written = [0xff; 64];
            let len = nix::unistd::read(&kernel, &mut written).unwrap();
            assert_eq!(&written[..len], frame);
        }
    }

    #[test]
    fn a_frame_shorter_than_its_header_is_malformed() {
        let (tun, kernel) = pair(true);
        nix::unistd::write(&kernel, &[0; VNET_HDR_LEN - 1]).unwrap();
        assert_eq!(tun.read(0, &mut [0; 64]), Read::Malformed);
    }
}
