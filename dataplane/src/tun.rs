//! One queue of the TUN device: a packet a read, a packet a write.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Length of the header that IFF_VNET_HDR puts before every packet (struct virtio_net_hdr). The
/// device has no offload enabled, so it is all zero both ways.
pub(crate) const VNET_HDR_LEN: usize = 10;

/// A queue of the TUN device.
pub(crate) struct Tun {
    queue: OwnedFd,
    header_len: usize,
}

/// What a read of the device gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Read {
    /// A packet of this many bytes.
    Packet(usize),
    /// Nothing waits.
    Empty,
    /// The device is no more.
    Gone,
}

impl Tun {
    /// Takes a queue; `vnet_hdr` if it was opened with IFF_VNET_HDR.
    pub(crate) const fn new(queue: OwnedFd, vnet_hdr: bool) -> Self {
        Self { queue, header_len: if vnet_hdr { VNET_HDR_LEN } else { 0 } }
    }

    /// Reads a packet to `buffer[headroom..]`. The headroom, at least [`VNET_HDR_LEN`], is clobbered.
    pub(crate) fn read(&self, buffer: &mut [u8], headroom: usize) -> Read {
        let start = headroom.saturating_sub(self.header_len);
        let Some(place) = buffer.get_mut(start..) else { return Read::Empty };
        match nix::unistd::read(&self.queue, place) {
            Ok(len) => len.checked_sub(self.header_len).map_or(Read::Empty, Read::Packet),
            // EBADFD after deletion; EFAULT and EIO on its way there.
            Err(nix::Error::EBADFD | nix::Error::EFAULT | nix::Error::EIO | nix::Error::ENODEV) => {
                Read::Gone
            }
            Err(_) => Read::Empty,
        }
    }

    /// Writes the packet at `buffer[headroom..]`. The headroom, at least [`VNET_HDR_LEN`], is
    /// clobbered.
    ///
    /// # Errors
    /// As write(2); EIO while the interface is down.
    pub(crate) fn write(&self, buffer: &mut [u8], headroom: usize) -> io::Result<()> {
        let start = headroom.saturating_sub(self.header_len);
        let frame = buffer.get_mut(start..).ok_or(io::ErrorKind::InvalidInput)?;
        if let Some(header) = frame.get_mut(..self.header_len) {
            header.fill(0);
        }
        nix::unistd::write(&self.queue, frame)?;
        Ok(())
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
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
        (Tun::new(ours, vnet_hdr), kernels)
    }

    #[test]
    fn packets_land_behind_the_headroom_with_and_without_a_vnet_header() {
        for vnet_hdr in [false, true] {
            let (tun, kernel) = pair(vnet_hdr);
            let header = if vnet_hdr { VNET_HDR_LEN } else { 0 };
            let mut frame = vec![0; header];
            frame.extend_from_slice(b"packet");
            nix::unistd::write(&kernel, &frame).unwrap();
            let mut buffer = [0xee; 64];
            assert_eq!(tun.read(&mut buffer, 16), Read::Packet(6));
            assert_eq!(&buffer[16..22], b"packet");
            assert_eq!(tun.read(&mut buffer, 16), Read::Empty);
            buffer[6..16].fill(0xaa);
            tun.write(&mut buffer[..22], 16).unwrap();
            let mut written = [0xff; 64];
            let len = nix::unistd::read(&kernel, &mut written).unwrap();
            assert_eq!(&written[..len], frame);
        }
    }
}
