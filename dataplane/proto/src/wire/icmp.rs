//! ICMP errors for packets without a destination, so that the sender learns at once that the host is
//! unreachable, instead of waiting (RFC 792, RFC 1122 section 3.2.2, RFC 4443 sections 2.4 and 3.1).
//!
//! The source of an error is the destination of the packet, the only address that the kernel always
//! accepts from the TUN device: it refuses a source that is its own, and with reverse path filtering one
//! that it would not route to the interface. The kernel also finds the connection of the quoted packet,
//! so that a sender behind NAT receives the error, too.
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use crate::time::Instant;
use crate::wire::ip::{ICMPV6, UpperLayer};
use crate::wire::ndisc::ICMPV6_REDIRECT;
use core::net::{Ipv4Addr, Ipv6Addr};
use core::sync::atomic::{AtomicU64, Ordering};

/// The longest error in bytes: an ICMPv6 error fits into the least MTU.
pub const MAX_ERROR_LEN: usize = 1280;
/// An ICMPv4 error is what every host can reassemble (RFC 1812, section 4.3.2.3).
const MAX_V4_ERROR_LEN: usize = 576;

const IPV4_HEADER_LEN: usize = 20;
const IPV6_HEADER_LEN: usize = 40;
const ICMP_HEADER_LEN: usize = 8;
const HOP_LIMIT: u8 = 64;
/// Precedence "internetwork control", as routers send errors (RFC 1812, section 4.3.2.5).
const TRAFFIC_CLASS: u8 = 0xc0;

const ICMP: u8 = 1;
const ICMP_DEST_UNREACH: u8 = 3;
const ICMP_HOST_UNREACH: u8 = 1;
/// The highest type that is assigned to a query; what is above may be anything.
const ICMP_LAST_TYPE: u8 = 18;

const ICMPV6_DEST_UNREACH: u8 = 1;
const ICMPV6_ADDR_UNREACH: u8 = 3;
const ICMPV6_FIRST_QUERY: u8 = 128;

/// Writes to `buffer` the error for a complete IP packet that cannot be delivered; returns its length.
/// `None` for packets that no error may answer, and if `buffer` is too short, which [`MAX_ERROR_LEN`]
/// bytes never are.
#[must_use]
pub fn host_unreachable(packet: &[u8], buffer: &mut [u8]) -> Option<usize> {
    match packet.first()? >> 4 {
        4 => write_v4(packet, buffer),
        6 => write_v6(packet, buffer),
        _ => None,
    }
}

/// Whether an error may answer a packet: never another error, a multicast or broadcast, what has no
/// single sender, or a fragment other than the first.
#[must_use]
pub fn may_answer(packet: &[u8]) -> bool {
    match packet.first().map(|first| first >> 4) {
        Some(4) => may_answer_v4(packet) == Some(true),
        Some(6) => may_answer_v6(packet) == Some(true),
        _ => false,
    }
}

fn may_answer_v4(packet: &[u8]) -> Option<bool> {
    let header = packet.first_chunk::<IPV4_HEADER_LEN>()?;
    let [first, _, _, _, _, _, fragment, offset, _, protocol, _, _, s0, s1, s2, s3, d0, d1, d2, d3] =
        *header;
    let source = Ipv4Addr::new(s0, s1, s2, s3);
    let destination = Ipv4Addr::new(d0, d1, d2, d3);
    let one_sender = !source.is_unspecified()
        && !source.is_loopback()
        && !source.is_multicast()
        && !source.is_broadcast();
    let one_receiver = !destination.is_multicast() && !destination.is_broadcast();
    let first_fragment = (fragment & 0x1f) == 0 && offset == 0;
    if !(one_sender && one_receiver && first_fragment) {
        return Some(false);
    }
    if protocol != ICMP {
        return Some(true);
    }
    let kind = *packet.get(usize::from(first & 0x0f).saturating_mul(4))?;
    Some(kind <= ICMP_LAST_TYPE && !matches!(kind, 3 | 4 | 5 | 11 | 12))
}

fn may_answer_v6(packet: &[u8]) -> Option<bool> {
    let header = packet.first_chunk::<IPV6_HEADER_LEN>()?;
    let addresses = header.get(8..)?;
    let (source, destination) = addresses.split_first_chunk::<16>()?;
    let source = Ipv6Addr::from(*source);
    let one_sender = !source.is_unspecified() && !source.is_loopback() && !source.is_multicast();
    if !one_sender || destination.first() == Some(&0xff) {
        return Some(false);
    }
    Some(match UpperLayer::of_v6(packet) {
        UpperLayer::Icmpv6(kind) => kind >= ICMPV6_FIRST_QUERY && kind != ICMPV6_REDIRECT,
        UpperLayer::Other => true,
        UpperLayer::LaterFragment | UpperLayer::Unreadable => false,
    })
}

fn write_v4(packet: &[u8], buffer: &mut [u8]) -> Option<usize> {
    const QUOTED: usize = MAX_V4_ERROR_LEN - IPV4_HEADER_LEN - ICMP_HEADER_LEN;
    let quoted = packet.get(..packet.len().min(QUOTED))?;
    let source = *packet.get(12..16)?.first_chunk::<4>()?;
    let destination = *packet.get(16..20)?.first_chunk::<4>()?;
    let len = quoted.len().checked_add(IPV4_HEADER_LEN)?.checked_add(ICMP_HEADER_LEN)?;
    let (header, message) = buffer.get_mut(..len)?.split_first_chunk_mut::<IPV4_HEADER_LEN>()?;

    let [len_high, len_low] = u16::try_from(len).ok()?.to_be_bytes();
    let [d0, d1, d2, d3] = destination;
    let [s0, s1, s2, s3] = source;
    #[rustfmt::skip]
    let written = [
        0x45, TRAFFIC_CLASS, len_high, len_low,
        0, 0, 0x40, 0, // never fragmented
        HOP_LIMIT, ICMP, 0, 0,
        d0, d1, d2, d3,
        s0, s1, s2, s3,
    ];
    *header = written;
    let sum = checksum(&[header]);
    header.get_mut(10..12)?.copy_from_slice(&sum);
    write_message(message, ICMP_DEST_UNREACH, ICMP_HOST_UNREACH, quoted)?;
    let sum = checksum(&[message]);
    message.get_mut(2..4)?.copy_from_slice(&sum);
    Some(len)
}

fn write_v6(packet: &[u8], buffer: &mut [u8]) -> Option<usize> {
    const QUOTED: usize = MAX_ERROR_LEN - IPV6_HEADER_LEN - ICMP_HEADER_LEN;
    let quoted = packet.get(..packet.len().min(QUOTED))?;
    let (source, destination) = (packet.get(8..24)?, packet.get(24..40)?);
    let payload_len = quoted.len().checked_add(ICMP_HEADER_LEN)?;
    let len = payload_len.checked_add(IPV6_HEADER_LEN)?;
    let (header, message) = buffer.get_mut(..len)?.split_first_chunk_mut::<IPV6_HEADER_LEN>()?;

    let payload_len = u16::try_from(payload_len).ok()?.to_be_bytes();
    header.fill(0);
    let (start, addresses) = header.split_first_chunk_mut::<8>()?;
    let [len_high, len_low] = payload_len;
    *start =
        [0x60 | TRAFFIC_CLASS >> 4, TRAFFIC_CLASS << 4, 0, 0, len_high, len_low, ICMPV6, HOP_LIMIT];
    let (ours, theirs) = addresses.split_first_chunk_mut::<16>()?;
    ours.copy_from_slice(destination);
    theirs.copy_from_slice(source);
    write_message(message, ICMPV6_DEST_UNREACH, ICMPV6_ADDR_UNREACH, quoted)?;
    let pseudo_header_end = [0, 0, len_high, len_low, 0, 0, 0, ICMPV6];
    let sum = checksum(&[addresses, &pseudo_header_end, message]);
    message.get_mut(2..4)?.copy_from_slice(&sum);
    Some(len)
}

fn write_message(message: &mut [u8], kind: u8, code: u8, quoted: &[u8]) -> Option<()> {
    let (header, rest) = message.split_first_chunk_mut::<ICMP_HEADER_LEN>()?;
    *header = [kind, code, 0, 0, 0, 0, 0, 0];
    rest.copy_from_slice(quoted);
    Some(())
}

/// The Internet checksum (RFC 1071) of parts laid end to end, each but the last of even length.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let mut sum = 0u64;
    for word in parts.iter().flat_map(|part| part.chunks(2)) {
        let word = [word.first(), word.get(1)].map(|byte| byte.copied().unwrap_or(0));
        sum = sum.wrapping_add(u64::from(u16::from_be_bytes(word)));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff).wrapping_add(sum >> 16);
    }
    (!u16::try_from(sum).unwrap_or(0)).to_be_bytes()
}

/// A rate limit on errors, shared by all threads: 1,000 a second, 50 at once (the defaults of
/// Linux's icmp_msgs_per_sec and icmp_msgs_burst).
#[derive(Default)]
pub struct ErrorLimiter {
    /// When the bucket is full again, in nanoseconds since boot.
    full_at: AtomicU64,
}

impl ErrorLimiter {
    const INTERVAL: u64 = 1_000_000;
    const BURST: u64 = 50;

    /// True if one more may be sent now.
    pub fn allow(&self, now: Instant) -> bool {
        let now = now.as_nanos();
        let latest = now.saturating_add(Self::INTERVAL.saturating_mul(Self::BURST));
        self.full_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
                let full_at = full_at.max(now).saturating_add(Self::INTERVAL);
                (full_at <= latest).then_some(full_at)
            })
            .is_ok()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests {
    use super::*;
    use crate::wire::ip::InnerPacket;
    use core::time::Duration;

    fn v4(protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 7, 0, 0, 64, protocol, 0, 0];
        packet.extend_from_slice(&[192, 0, 2, 1, 198, 51, 100, 2]);
        packet.extend_from_slice(payload);
        let len = u16::try_from(packet.len()).unwrap();
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        packet
    }

    fn v6(next_header: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, next_header, 64];
        packet[4..6].copy_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
        for last in [1, 2] {
            let mut address = [0; 16];
            address[..2].copy_from_slice(&[0xfd, 0]);
            address[15] = last;
            packet.extend_from_slice(&address);
        }
        packet.extend_from_slice(payload);
        packet
    }

    fn error(packet: &[u8]) -> Vec<u8> {
        let mut buffer = [0; MAX_ERROR_LEN];
        let len = host_unreachable(packet, &mut buffer).unwrap();
        buffer[..len].to_vec()
    }

    #[test]
    fn an_ipv4_error_comes_from_the_destination_and_quotes_the_packet() {
        let packet = v4(17, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        let error = error(&packet);
        let (sent, read) =
            (InnerPacket::parse(&packet).unwrap(), InnerPacket::parse(&error).unwrap());
        assert_eq!((read.source, read.destination), (sent.destination, sent.source));
        assert_eq!((read.len, error[9], &error[20..22]), (error.len(), 1, &[3, 1][..]));
        assert_eq!(&error[28..], &packet);
        assert_eq!(checksum(&[&error[..20]]), [0, 0]);
        assert_eq!(checksum(&[&error[20..]]), [0, 0]);
    }

    #[test]
    fn an_ipv6_error_comes_from_the_destination_and_quotes_the_packet() {
        let packet = v6(17, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        let error = error(&packet);
        let (sent, read) =
            (InnerPacket::parse(&packet).unwrap(), InnerPacket::parse(&error).unwrap());
        assert_eq!((read.source, read.destination), (sent.destination, sent.source));
        assert_eq!((read.len, error[6], &error[40..42]), (error.len(), 58, &[1, 3][..]));
        assert_eq!(&error[48..], &packet);
        let pseudo = [&[0, 0][..], &error[4..6], &[0, 0, 0, 58]].concat();
        assert_eq!(checksum(&[&error[8..40], &pseudo, &error[40..]]), [0, 0]);
    }

    #[test]
    fn a_long_packet_is_quoted_in_part() {
        assert_eq!(error(&v4(17, &[0; 3000])).len(), 576);
        assert_eq!(error(&v6(17, &[0; 3000])).len(), 1280);
        assert_eq!(host_unreachable(&v4(17, &[0; 3000]), &mut [0; 575]), None);
    }

    #[test]
    fn errors_are_not_answered_and_queries_are() {
        for (kind, answered) in
            [(0, true), (3, false), (4, false), (5, false), (8, true), (11, false), (12, false)]
        {
            assert_eq!(may_answer(&v4(1, &[kind, 0, 0, 0])), answered, "ICMP type {kind}");
        }
        assert!(!may_answer(&v4(1, &[19])) && !may_answer(&v4(1, &[])));
        for (kind, answered) in [
            (1, false),
            (2, false),
            (3, false),
            (4, false),
            (127, false),
            (128, true),
            (137, false),
        ] {
            assert_eq!(may_answer(&v6(58, &[kind, 0, 0, 0])), answered, "ICMPv6 type {kind}");
            let mut behind_options = vec![58, 1];
            behind_options.resize(16, 0);
            behind_options.push(kind);
            assert_eq!(may_answer(&v6(60, &behind_options)), answered, "ICMPv6 type {kind}");
        }
        assert!(!may_answer(&v6(58, &[])) && !may_answer(&v6(0, &[58, 200])));
    }

    #[test]
    fn only_first_fragments_are_answered() {
        for (fragment, answered) in [
            ([0x00, 0], true),
            ([0x20, 0], true),
            ([0x40, 0], true),
            ([0x20, 1], false),
            ([0x01, 0], false),
        ] {
            let mut packet = v4(17, &[0; 8]);
            packet[6..8].copy_from_slice(&fragment);
            assert_eq!(may_answer(&packet), answered, "{fragment:?}");
        }
        for (offset, answered) in [([0, 0], true), ([0, 1], true), ([0, 8], false), ([1, 0], false)]
        {
            let header = [17, 0, offset[0], offset[1], 0, 0, 0, 0, 9, 9];
            assert_eq!(may_answer(&v6(44, &header)), answered, "{offset:?}");
        }
    }

    #[test]
    fn only_one_sender_and_one_receiver_are_answered() {
        for address in [[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 1], [255, 255, 255, 255]] {
            let mut packet = v4(17, &[0; 8]);
            packet[12..16].copy_from_slice(&address);
            assert!(!may_answer(&packet), "from {address:?}");
        }
        for address in [[224, 0, 0, 251], [239, 1, 1, 1], [255, 255, 255, 255]] {
            let mut packet = v4(17, &[0; 8]);
            packet[16..20].copy_from_slice(&address);
            assert!(!may_answer(&packet), "to {address:?}");
        }
        for (first, at) in [(0, 8), (0xff, 8), (0xff, 24)] {
            let mut packet = v6(17, &[0; 8]);
            packet[at..at + 16].fill(0);
            packet[at] = first;
            assert!(!may_answer(&packet), "{first} at {at}");
        }
    }

    #[test]
    fn cut_and_odd_packets_do_no_harm() {
        for whole in [v4(1, &[8; 12]), v6(60, &[58, 0, 0, 0, 0, 0, 0, 0, 128]), v6(0, &[0; 200])] {
            for len in 0..whole.len() {
                let mut buffer = [0; MAX_ERROR_LEN];
                let _either =
                    (may_answer(&whole[..len]), host_unreachable(&whole[..len], &mut buffer));
            }
        }
        assert!(!may_answer(&[]) && !may_answer(&[0x55; 60]));
    }

    #[test]
    fn fifty_errors_at_once_then_one_a_millisecond() {
        let limiter = ErrorLimiter::default();
        let start = Instant::from_nanos(1_000_000_000);
        assert_eq!((0..100).filter(|_| limiter.allow(start)).count(), 50);
        let later = start.after(Duration::from_millis(3));
        assert_eq!((0..100).filter(|_| limiter.allow(later)).count(), 3);
        let much_later = start.after(Duration::from_secs(3600));
        assert_eq!((0..100).filter(|_| limiter.allow(much_later)).count(), 50);
    }
}
