//! The header that IFF_VNET_HDR puts before every packet (struct virtio_net_hdr of
//! linux/virtio_net.h), in the machine's byte order.

/// Its length, in bytes.
pub const VNET_HDR_LEN: usize = 10;

const F_NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// With any type: the first segment carries TCP's CWR.
const GSO_ECN: u8 = 0x80;

/// The type of the segments of a super-packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GsoType {
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
    /// UDP, whichever IP.
    Udp,
}

/// The offloaded work on a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// Its checksum must be completed: the offset at which the sum starts, and the offset from there at which
    /// it is stored.
    pub checksum: Option<(u16, u16)>,
    /// It must be split: the type of the segments, and the bytes of payload of each but the last.
    pub gso: Option<(GsoType, u16)>,
    /// Length of all headers; a hint, and 0 if nothing is split.
    pub header_len: u16,
}

impl VnetHeader {
    /// Parses the header. `None` for a type of super-packet that was never enabled.
    #[must_use]
    pub const fn parse(bytes: &[u8; VNET_HDR_LEN]) -> Option<Self> {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1] = *bytes;
        let gso_type = match gso_type & !GSO_ECN {
            GSO_NONE => None,
            GSO_TCPV4 => Some(GsoType::TcpV4),
            GSO_TCPV6 => Some(GsoType::TcpV6),
            GSO_UDP_L4 => Some(GsoType::Udp),
            _ => return None,
        };
        let gso = match gso_type {
            Some(kind) => Some((kind, u16::from_ne_bytes([g0, g1]))),
            None => None,
        };
        let checksum = if flags & F_NEEDS_CSUM == 0 {
            None
        } else {
            Some((u16::from_ne_bytes([s0, s1]), u16::from_ne_bytes([o0, o1])))
        };
        Some(Self { checksum, gso, header_len: u16::from_ne_bytes([h0, h1]) })
    }

    /// The bytes that the kernel reads.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; VNET_HDR_LEN] {
        let (gso_type, gso_size) = match self.gso {
            None => (GSO_NONE, 0),
            Some((GsoType::TcpV4, size)) => (GSO_TCPV4, size),
            Some((GsoType::TcpV6, size)) => (GSO_TCPV6, size),
            Some((GsoType::Udp, size)) => (GSO_UDP_L4, size),
        };
        let (flags, (start, offset)) = match self.checksum {
            None => (0, (0, 0)),
            Some(checksum) => (F_NEEDS_CSUM, checksum),
        };
        let [h0, h1] = self.header_len.to_ne_bytes();
        let [g0, g1] = gso_size.to_ne_bytes();
        let [s0, s1] = start.to_ne_bytes();
        let [o0, o1] = offset.to_ne_bytes();
        [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_header_reads_back_as_it_was_written() {
        for gso in [None, Some(GsoType::TcpV4), Some(GsoType::TcpV6), Some(GsoType::Udp)] {
            for checksum in [None, Some((20, 16)), Some((40, 6))] {
                let header = VnetHeader {
                    checksum,
                    gso: gso.map(|kind| (kind, 1368)),
                    header_len: if gso.is_some() { 52 } else { 0 },
                };
                assert_eq!(VnetHeader::parse(&header.to_bytes()), Some(header));
            }
        }
        assert_eq!(VnetHeader::default().to_bytes(), [0; VNET_HDR_LEN]);
    }

    #[test]
    fn congestion_is_no_kind_of_its_own_and_unknown_kinds_are_refused() {
        let parse = |kind| VnetHeader::parse(&[0, kind, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(parse(0x81), parse(1));
        assert_eq!(parse(3), None);
        assert_eq!(parse(0x7f), None);
    }
}
