//! The few fields of an inner IP packet that a tunnel reads (RFC 791, RFC 8200), and ECN (RFC 6040).
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use crate::invariant::present;
use crate::wire::messages::Message;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const IPV4_HEADER_LEN: usize = 20;
const IPV6_HEADER_LEN: usize = 40;
const UDP_HEADER_LEN: usize = 8;
const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

/// How many extension headers are skipped in search of an ICMPv6 header.
const MAX_EXTENSIONS: usize = 8;

/// An inner packet whose header is whole and whose length is that of its header's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InnerPacket {
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: IpAddr,
    /// Its length by its own header, at most that of the buffer.
    pub len: usize,
    /// Its congestion notification bits.
    pub ecn: Ecn,
}

/// The two ECN bits of a traffic class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ecn(u8);

impl Ecn {
    /// Not capable of congestion notification.
    pub const NOT_CAPABLE: Self = Self(0);
    /// Capable, the first code point.
    pub const CAPABLE: Self = Self(2);
    /// Congestion was experienced.
    pub const CONGESTION: Self = Self(3);

    /// The ECN bits of a type of service or traffic class.
    #[must_use]
    pub const fn of_traffic_class(class: u8) -> Self {
        Self(class & 3)
    }

    /// As a traffic class with no other bit.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// What the outer header of a packet with these inner bits carries: congestion met before the
    /// tunnel stays inside (RFC 6040, section 4.1, as the kernel has it).
    #[must_use]
    pub const fn encapsulated(self) -> Self {
        if self.0 == Self::CONGESTION.0 { Self::CAPABLE } else { self }
    }

    /// What these inner bits become under an outer header that arrived with `outer`: congestion met
    /// on the way counts, and so does the second code point, but not for a packet that is not
    /// capable (RFC 6040, section 4.2; as the kernel has it, such a packet is not dropped either).
    #[must_use]
    pub const fn decapsulated(self, outer: Self) -> Self {
        match (self.0, outer.0) {
            (1 | 2, 3) => Self::CONGESTION,
            (2, 1) => outer,
            _ => self,
        }
    }
}

impl InnerPacket {
    /// Reads the header. `None` if it is not IP, is cut short, or says it is longer than `packet`.
    #[must_use]
    pub fn parse(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => Self::parse_v4(packet),
            6 => Self::parse_v6(packet),
            _ => None,
        }
    }

    fn parse_v4(packet: &[u8]) -> Option<Self> {
        let header = packet.first_chunk::<IPV4_HEADER_LEN>()?;
        let [_, class, high, low, .., s0, s1, s2, s3, d0, d1, d2, d3] = *header;
        let len = usize::from(u16::from_be_bytes([high, low]));
        (IPV4_HEADER_LEN..=packet.len()).contains(&len).then_some(Self {
            source: Ipv4Addr::new(s0, s1, s2, s3).into(),
            destination: Ipv4Addr::new(d0, d1, d2, d3).into(),
            len,
            ecn: Ecn::of_traffic_class(class),
        })
    }

    fn parse_v6(packet: &[u8]) -> Option<Self> {
        let (start, rest) = packet.split_first_chunk::<8>()?;
        let (source, rest) = rest.split_first_chunk::<16>()?;
        let (destination, _) = rest.split_first_chunk::<16>()?;
        let [_, class_low, _, _, high, low, _, _] = *start;
        let len = usize::from(u16::from_be_bytes([high, low])).checked_add(IPV6_HEADER_LEN)?;
        (len <= packet.len()).then_some(Self {
            source: Ipv6Addr::from(*source).into(),
            destination: Ipv6Addr::from(*destination).into(),
            len,
            ecn: Ecn::of_traffic_class(class_low >> 4),
        })
    }
}

/// What an IPv6 packet carries behind its extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UpperLayer {
    /// An ICMPv6 message of this type.
    Icmpv6(u8),
    /// Anything else.
    Other,
    /// A fragment other than the first.
    LaterFragment,
    /// The headers are cut short, or there are too many of them.
    Unreadable,
}

impl UpperLayer {
    /// Walks over the extension headers of an IPv6 packet (RFC 8200, section 4).
    pub(crate) fn of_v6(packet: &[u8]) -> Self {
        Self::walk(packet).unwrap_or(Self::Unreadable)
    }

    fn walk(packet: &[u8]) -> Option<Self> {
        let mut next_header = *packet.get(6)?;
        let mut payload = packet.get(IPV6_HEADER_LEN..)?;
        for _ in 0..MAX_EXTENSIONS {
            let len = match next_header {
                ICMPV6 => return Some(Self::Icmpv6(*payload.first()?)),
                HOP_BY_HOP | ROUTING | DESTINATION => {
                    usize::from(*payload.get(1)?).saturating_add(1).saturating_mul(8)
                }
                AUTHENTICATION => usize::from(*payload.get(1)?).saturating_add(2).saturating_mul(4),
                FRAGMENT => {
                    let offset = u16::from_be_bytes([*payload.get(2)?, *payload.get(3)?]);
                    if offset & !7 != 0 {
                        return Some(Self::LaterFragment);
                    }
                    8
                }
                _ => return Some(Self::Other),
            };
            next_header = *payload.first()?;
            payload = payload.get(len..)?;
        }
        None
    }
}

/// The message that a packet carries in UDP, whole or in its first fragment.
#[must_use]
pub fn nested_message(packet: &[u8]) -> Option<Message> {
    let datagram = match packet.first()? >> 4 {
        4 => udp_over_v4(packet),
        6 => udp_over_v6(packet),
        _ => None,
    }?;
    Message::parse(datagram.get(UDP_HEADER_LEN..)?)
}

fn udp_over_v4(packet: &[u8]) -> Option<&[u8]> {
    let header = packet.first_chunk::<IPV4_HEADER_LEN>()?;
    let [first, _, _, _, _, _, high, low, _, protocol, ..] = *header;
    let is_first = u16::from_be_bytes([high, low]) & 0x1fff == 0;
    let header_len = usize::from(first & 0xf).checked_mul(4)?;
    (protocol == UDP && is_first).then(|| packet.get(header_len..)).flatten()
}

fn udp_over_v6(packet: &[u8]) -> Option<&[u8]> {
    let payload = packet.get(IPV6_HEADER_LEN..)?;
    match *packet.get(6)? {
        UDP => Some(payload),
        FRAGMENT => {
            let ([next, _, high, low, ..], rest) = payload.split_first_chunk::<8>()?;
            let is_first = u16::from_be_bytes([*high, *low]) >> 3 == 0;
            (*next == UDP && is_first).then_some(rest)
        }
        _ => None,
    }
}

/// Brings to an inner packet what happened to the ECN bits of its outer header.
pub fn propagate_ecn(packet: &mut [u8], outer: Ecn) {
    match packet {
        [first, class, ..] if *first >> 4 == 4 => {
            let before = *class;
            let after = (before & !3) | Ecn::of_traffic_class(before).decapsulated(outer).bits();
            *class = after;
            update_checksum(packet, u16::from(before), u16::from(after));
        }
        [first, second, ..] if *first >> 4 == 6 => {
            let inner = Ecn::of_traffic_class(*second >> 4);
            *second = (*second & !0x30) | (inner.decapsulated(outer).bits() << 4);
        }
        _ => {}
    }
}

/// Corrects an IPv4 header checksum for one changed word (RFC 1624, equation 3).
fn update_checksum(packet: &mut [u8], before: u16, after: u16) {
    if before == after {
        return;
    }
    let checksum = present(packet.get_mut(10..12), "the header was parsed");
    let Some([high, low]) = checksum else { return };
    let checksum = u16::from_be_bytes([*high, *low]);
    let sum = u32::from(!checksum).wrapping_add(u32::from(!before)).wrapping_add(u32::from(after));
    let folded = (sum & 0xffff).wrapping_add(sum >> 16);
    let folded = (folded & 0xffff).wrapping_add(folded >> 16);
    [*high, *low] = (!u16::try_from(folded & 0xffff).unwrap_or(0)).to_be_bytes();
}

/// Most zeros that follow a packet.
pub const MAX_PADDING: usize = 15;

/// Length of the zeros that follow a packet of `len` bytes: up to a multiple of 16, but never past
/// the MTU; beyond the MTU the remainder counts (kernel send.c, calculate_skb_padding).
#[must_use]
pub const fn padding(len: usize, mtu: usize) -> usize {
    let Some(last) = len.checked_rem(mtu) else {
        return len.next_multiple_of(16).saturating_sub(len);
    };
    // A packet of exactly the MTU is full, not empty.
    let last = if last == 0 && len != 0 { mtu } else { last };
    let padded = last.next_multiple_of(16);
    let padded = if padded > mtu { mtu } else { padded };
    padded.saturating_sub(last)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests {
    use super::*;

    fn receiver_of_nested_transport(packet: &[u8]) -> Option<u32> {
        match nested_message(packet)? {
            Message::Transport(header) => Some(header.receiver_index),
            _ => None,
        }
    }

    /// The last header before a transport message for 0x01020304: UDP, with the bytes that say so.
    fn nested(before_udp: &[u8]) -> Vec<u8> {
        let message = [4, 0, 0, 0, 4, 3, 2, 1].into_iter().chain([0; 24]);
        before_udp.iter().copied().chain([0; UDP_HEADER_LEN]).chain(message).collect()
    }

    #[test]
    fn a_transport_message_in_a_packet_is_found_with_options_and_in_a_first_fragment() {
        let v4 = |words: u8, fragment: [u8; 2], protocol: u8| {
            let mut header = vec![0; usize::from(words) * 4];
            header[0] = 0x40 | words;
            header[6..8].copy_from_slice(&fragment);
            header[9] = protocol;
            receiver_of_nested_transport(&nested(&header))
        };
        let v6 = |headers: &[u8], next: u8| {
            let mut header = vec![0; IPV6_HEADER_LEN];
            (header[0], header[6]) = (0x60, next);
            header.extend(headers);
            receiver_of_nested_transport(&nested(&header))
        };
        for found in [
            v4(5, [0, 0], UDP),
            v4(6, [0x40, 0], UDP),
            v4(5, [0x20, 0], UDP),
            v6(&[], UDP),
            v6(&[UDP, 0, 0, 1, 0, 0, 0, 9], FRAGMENT),
        ] {
            assert_eq!(found, Some(0x0102_0304));
        }
        for other in [
            v4(5, [0, 1], UDP),
            v4(5, [0, 0], 6),
            v6(&[], 6),
            v6(&[UDP, 0, 0, 8, 0, 0, 0, 9], FRAGMENT),
            v6(&[6, 0, 0, 1, 0, 0, 0, 9], FRAGMENT),
        ] {
            assert_eq!(other, None);
        }
        let whole = nested(&[&[0x45, 0, 0, 0, 0, 0, 0, 0, 0, UDP], [0; 10].as_slice()].concat());
        assert!(receiver_of_nested_transport(&whole).is_some());
        for len in 0..whole.len() {
            assert_eq!(receiver_of_nested_transport(&whole[..len]), None, "{len} bytes");
        }
    }

    fn v4(len: u16, class: u8) -> Vec<u8> {
        let mut packet = vec![0; usize::from(len)];
        packet[0] = 0x45;
        packet[1] = class;
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        packet[12..20].copy_from_slice(&[192, 0, 2, 1, 198, 51, 100, 2]);
        let sum = checksum(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet
    }

    fn checksum(header: &[u8]) -> u16 {
        let mut sum: u32 =
            header.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    #[test]
    fn ipv4_length_is_20_to_the_buffers() {
        let parsed = InnerPacket::parse(&v4(28, 0)).unwrap();
        assert_eq!(parsed.len, 28);
        assert_eq!(parsed.source, Ipv4Addr::new(192, 0, 2, 1));
        assert_eq!(parsed.destination, Ipv4Addr::new(198, 51, 100, 2));
        let mut short = v4(28, 0);
        short[3] = 19;
        assert!(InnerPacket::parse(&short).is_none());
        short[3] = 29;
        assert!(InnerPacket::parse(&short).is_none());
        assert!(InnerPacket::parse(&v4(28, 0)[..19]).is_none());
    }

    #[test]
    fn ipv6_length_is_payload_and_40() {
        let mut packet = vec![0; 60];
        packet[0] = 0x6c;
        packet[1] = 0x30;
        packet[5] = 8;
        let parsed = InnerPacket::parse(&packet).unwrap();
        assert_eq!((parsed.len, parsed.ecn), (48, Ecn::CONGESTION));
        packet[5] = 21;
        assert!(InnerPacket::parse(&packet).is_none());
        assert!(InnerPacket::parse(&packet[..39]).is_none());
    }

    #[test]
    fn nothing_else_is_ip() {
        assert!(InnerPacket::parse(&[]).is_none());
        assert!(InnerPacket::parse(&[0; 60]).is_none());
        assert!(InnerPacket::parse(&[0x55; 60]).is_none());
    }

    #[test]
    fn the_outer_ecn_reaches_capable_packets_and_the_checksum_stays_right() {
        // Rows: inner not capable, ECT(1), ECT(0), CE; columns: outer the same (RFC 6040, figure 4).
        let expected = [[0, 0, 0, 0], [1, 1, 1, 3], [2, 1, 2, 3], [3, 3, 3, 3]];
        for (inner, row) in (0u8..).zip(expected) {
            for (outer, after) in (0u8..).zip(row) {
                let outer = Ecn::of_traffic_class(outer);
                let mut packet = v4(20, 0xb8 | inner);
                propagate_ecn(&mut packet, outer);
                assert_eq!(packet[1], 0xb8 | after);
                assert_eq!(checksum(&packet[..20]), 0);
                let mut packet = vec![0x6b, 0x8f | inner << 4];
                propagate_ecn(&mut packet, outer);
                assert_eq!(packet, [0x6b, 0x8f | after << 4]);
            }
        }
        assert_eq!(Ecn::CONGESTION.encapsulated(), Ecn::CAPABLE);
        assert_eq!(Ecn::of_traffic_class(0xb9).encapsulated().bits(), 1);
    }

    #[test]
    fn padding_is_to_16_but_never_past_the_mtu() {
        for (len, mtu, expected) in [
            (0, 1420, 0),
            (1, 1420, 15),
            (16, 1420, 0),
            (1409, 1420, 11),
            (1420, 1420, 0),
            (1421, 1420, 15),
            (2840, 1420, 0),
            (17, 0, 15),
        ] {
            assert_eq!(padding(len, mtu), expected, "{len} in {mtu}");
        }
    }
}
