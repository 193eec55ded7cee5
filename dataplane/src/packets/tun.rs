//! The TUN device: each read and each write transfers one packet or super-packet.
//!
//! If the kernel supports it, the device has several queues, over which the kernel spreads the flows. A
//! flow that fills its queue, as TCP does until a packet is lost, does not delay those of other queues.

use crate::drops::{Drops, LocalCause};
use crate::line_limit::LineLimit;
use crate::packets::offload::{Coalesce, GsoType, Segments, VNET_HDR_LEN, VnetHeader};
use crate::refusal::{HOLDS, Refusal};
use nix::libc;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use wgsep_ipc::TunOffload;
use wgsep_proto::Instant;
use wgsep_proto::invariant::{part, present};
use wgsep_proto::path::outbound::Segmentation as _;
use wgsep_proto::wire::icmp::MAX_ERROR_LEN;

/// Longest frame that a read returns: header, and the longest IP packet.
pub(crate) const MAX_FRAME_LEN: usize = VNET_HDR_LEN + 40 + 65_535;

/// The TUN device.
pub(crate) struct Tun {
    writer: OwnedFd,
    /// Empty if the only queue is the one that is written to.
    readers: Vec<OwnedFd>,
    offload: TunOffload,
    refused: Refused,
}

/// The types of super-packets that the kernel refused. It may have refused one for its content, and trying
/// again costs one write.
#[derive(Default)]
struct Refused {
    tcp_v4: Refusal,
    tcp_v6: Refusal,
    udp: Refusal,
    lines: Mutex<LineLimit>,
}

impl Refused {
    const fn of(&self, kind: GsoType) -> (&Refusal, &'static str) {
        match kind {
            GsoType::TcpV4 => (&self.tcp_v4, "TCP over IPv4"),
            GsoType::TcpV6 => (&self.tcp_v6, "TCP over IPv6"),
            GsoType::Udp => (&self.udp, "UDP"),
        }
    }

    fn set(&self, kind: GsoType, now: Instant) {
        let (refusal, name) = self.of(kind);
        if refusal.set(now) {
            let minutes = HOLDS.as_secs() / 60;
            self.log(now, || {
                tracing::info!(
                    "the interface refuses super-packets of {name}; writing its packets one by one for {minutes} minutes"
                );
            });
        }
    }

    fn clear(&self, kind: GsoType, now: Instant) {
        let (refusal, name) = self.of(kind);
        if refusal.clear() {
            self.log(now, || tracing::info!("the interface takes super-packets of {name} again"));
        }
    }

    fn log(&self, now: Instant, write: impl FnOnce()) {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).write(now, write);
    }
}

/// The result of a read of the device.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Read {
    /// A packet of this length, and its offloaded work.
    Packet(VnetHeader, usize),
    /// A malformed frame.
    Malformed,
    /// The queue is empty.
    Empty,
    /// The device was deleted.
    Gone,
}

/// Packets that the device refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct WriteError {
    cause: LocalCause,
    packets: usize,
}

/// The drop cause of a failed write. EIO means that the interface is down (kernel tun.c).
fn cause_of(error: &io::Error) -> LocalCause {
    match error.raw_os_error() {
        Some(libc::EIO) => LocalCause::InterfaceDown,
        _ => LocalCause::WriteFailed,
    }
}

impl Tun {
    /// Takes the queues, which were opened with `offload`: the one to write to, and those to read if that one
    /// is not read.
    pub(crate) fn new(writer: OwnedFd, readers: Vec<OwnedFd>, offload: TunOffload) -> Self {
        Self { writer, readers, offload, refused: Refused::default() }
    }

    /// The queues to read. All packets of a flow are in the same queue.
    pub(crate) fn queues(&self) -> &[OwnedFd] {
        if self.readers.is_empty() { core::slice::from_ref(&self.writer) } else { &self.readers }
    }

    /// The queue by which the link state is polled. The queue that is only written to does not serve: the
    /// kernel wakes only those that wait for the other queues (tun.c, tun_device_event).
    pub(crate) fn probed(&self) -> BorrowedFd<'_> {
        self.queues().first().map_or(self.writer.as_fd(), AsFd::as_fd)
    }

    /// The types of super-packets that may be written now.
    pub(crate) fn coalesce(&self, now: Instant) -> Coalesce {
        let Refused { tcp_v4, tcp_v6, udp, .. } = &self.refused;
        Coalesce {
            tcp_v4: self.offload.tso && !tcp_v4.holds(now),
            tcp_v6: self.offload.tso && !tcp_v6.holds(now),
            udp: self.offload.uso && !udp.holds(now),
        }
    }

    /// True if packets have a header, without which there are no super-packets.
    pub(crate) const fn has_header(&self) -> bool {
        self.offload.vnet_hdr
    }

    /// Length of the header if the kernel neither reads nor writes it, 0 otherwise.
    const fn without_header(&self) -> usize {
        if self.offload.vnet_hdr { 0 } else { VNET_HDR_LEN }
    }

    /// Reads a packet of a queue to `frame[VNET_HDR_LEN..]`; the bytes before it are overwritten.
    pub(crate) fn read(&self, queue: usize, frame: &mut [u8]) -> Read {
        let skipped = self.without_header();
        let (Some(queue), Some(buffer)) = (self.queues().get(queue), frame.get_mut(skipped..))
        else {
            return Read::Empty;
        };
        let len = match nix::unistd::read(queue, buffer) {
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

    /// Writes a frame: [`VNET_HDR_LEN`] bytes of header, which is skipped if the device has none, and a packet.
    ///
    /// # Errors
    /// As write(2); EIO while the interface is down.
    fn write(&self, frame: &[u8]) -> io::Result<()> {
        let frame = frame.get(self.without_header()..).ok_or(io::ErrorKind::InvalidInput)?;
        nix::unistd::write(&self.writer, frame)?;
        Ok(())
    }

    /// Writes an ICMP error for the sender of a packet.
    pub(crate) fn answer(&self, error: &[u8], drops: Drops<'_>) {
        let mut frame = [0; VNET_HDR_LEN + MAX_ERROR_LEN];
        let end = VNET_HDR_LEN + error.len();
        let Some(packet) = present(frame.get_mut(VNET_HDR_LEN..end), "no error is longer") else {
            return;
        };
        packet.copy_from_slice(error);
        if let Err(error) = self.write(part(&frame, 0..end)) {
            drops.add(cause_of(&error), 1);
        }
    }

    /// Stage 5 of the way in: writes a frame of `packets` packets, one by one if the kernel refuses super-packets of this
    /// type. Counts those that were refused.
    pub(crate) fn write_packets(&self, frame: &[u8], packets: u16, drops: Drops<'_>, now: Instant) {
        let written = self.write_packets_with(frame, packets, now, |frame| self.write(frame));
        if let Err(WriteError { cause, packets }) = written {
            drops.add(cause, packets);
        }
    }

    /// # Errors
    /// The number of packets that were refused, and the cause.
    fn write_packets_with(
        &self,
        frame: &[u8],
        packets: u16,
        now: Instant,
        write: impl Fn(&[u8]) -> io::Result<()>,
    ) -> Result<(), WriteError> {
        let Err(error) = write(frame) else {
            if packets > 1
                && let Some((kind, ..)) = super_packet(frame)
            {
                self.refused.clear(kind, now);
            }
            return Ok(());
        };
        let lost = WriteError { cause: cause_of(&error), packets: usize::from(packets) };
        if packets > 1 && error.raw_os_error() == Some(libc::EINVAL) {
            self.write_one_by_one(frame, now, write).unwrap_or(Err(lost))
        } else {
            Err(lost)
        }
    }

    /// Splits a super-packet that the kernel refused. If it accepts any of the packets, it refused the type,
    /// and no super-packet of this type is written for a while.
    fn write_one_by_one(
        &self,
        frame: &[u8],
        now: Instant,
        write: impl Fn(&[u8]) -> io::Result<()>,
    ) -> Option<Result<(), WriteError>> {
        let (kind, header, packet) = super_packet(frame)?;
        let segments = Segments::new(&header, packet)?;
        let mut single = vec![0; VNET_HDR_LEN + segments.len_of(0)];
        let mut lost = Ok(());
        let mut packets = 0;
        for number in 0..segments.count() {
            let end = VNET_HDR_LEN + segments.len_of(number);
            segments.write(packet, number, single.get_mut(VNET_HDR_LEN..end)?)?;
            if let Err(error) = write(single.get(..end)?) {
                packets += 1;
                lost = Err(WriteError { cause: cause_of(&error), packets });
            }
        }
        if packets < segments.count() {
            self.refused.set(kind, now);
        }
        Some(lost)
    }
}

/// The kind, header and packet of a super-packet's frame.
fn super_packet(frame: &[u8]) -> Option<(GsoType, VnetHeader, &[u8])> {
    let (header, packet) = frame.split_first_chunk()?;
    let header = VnetHeader::parse(header)?;
    Some((header.gso?.0, header, packet))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    /// A pair of packet sockets behaves as a TUN queue does: whole packets, or EAGAIN.
    pub(crate) fn pair(vnet_hdr: bool) -> (Tun, OwnedFd) {
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

    /// A super-packet of UDP over IPv4, of two packets of 100 bytes of payload, as the coalescer makes it.
    fn two_packets() -> Vec<u8> {
        let mut frame = vec![0; VNET_HDR_LEN + 28 + 200];
        let gso = Some((GsoType::Udp, 100));
        let header = VnetHeader { checksum: Some((20, 6)), gso, header_len: 28 };
        frame[..VNET_HDR_LEN].copy_from_slice(&header.to_bytes());
        let packet = &mut frame[VNET_HDR_LEN..];
        (packet[0], packet[3], packet[9], packet[25]) = (0x45, 228, 17, 208);
        frame
    }

    #[test]
    fn a_kind_of_super_packet_that_is_refused_is_tried_again_after_a_while_and_no_other_is_left_out()
     {
        let (mut tun, _kernel) = pair(true);
        tun.offload = TunOffload { tso: true, uso: true, ..tun.offload };
        let all = Coalesce { tcp_v4: true, tcp_v6: true, udp: true };
        let start = Instant::from_nanos(1);
        let single_len = VNET_HDR_LEN + 28 + 100;
        let written = std::cell::RefCell::new(Vec::new());
        let write_if = |takes: fn(usize) -> bool, now| {
            let write = |frame: &[u8]| {
                written.borrow_mut().push(frame.len());
                if takes(frame.len()) {
                    Ok(())
                } else {
                    Err(io::Error::from_raw_os_error(libc::EINVAL))
                }
            };
            tun.write_packets_with(&two_packets(), 2, now, write)
        };
        let nothing = write_if(|_| false, start);
        assert_eq!(nothing, Err(WriteError { cause: LocalCause::WriteFailed, packets: 2 }));
        assert_eq!(tun.coalesce(start), all, "the refusal does not concern super-packets");
        written.borrow_mut().clear();

        assert_eq!(write_if(|len| len < 200, start), Ok(()));
        assert_eq!(*written.borrow(), [VNET_HDR_LEN + 228, single_len, single_len]);
        assert_eq!(tun.coalesce(start), Coalesce { udp: false, ..all });
        assert_eq!(tun.coalesce(start.after(HOLDS)), all);
        assert_eq!(write_if(|len| len < 200, start.after(HOLDS)), Ok(()));
        assert_eq!(tun.coalesce(start.after(HOLDS)), Coalesce { udp: false, ..all });
        assert_eq!(write_if(|_| true, start.after(HOLDS)), Ok(()));
        assert_eq!(tun.coalesce(start.after(HOLDS)), all);
    }
}
