//! The IP packets that simulated hosts exchange: echo requests and replies that carry a tag.

use std::net::IpAddr;

const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
const IPV4_HEADER_LEN: usize = 20;
const IPV6_HEADER_LEN: usize = 40;
/// Type, code and checksum of an echo message; its tag follows.
const ECHO_HEADER_LEN: usize = 4;

/// The shortest packet that holds a tag, for either family.
pub const MIN_LEN: usize = IPV6_HEADER_LEN + ECHO_HEADER_LEN + 8;
/// Length of what ping(8) sends over IPv4.
pub const PING_LEN: usize = 84;

/// An echo request of `len` bytes in all; `class` is its traffic class, ECN included.
///
/// # Panics
/// If the families of the addresses differ, or `len` is not in [`MIN_LEN`]..=65535.
#[must_use]
pub fn request(source: IpAddr, destination: IpAddr, len: usize, class: u8, tag: u64) -> Vec<u8> {
    assert!((MIN_LEN..=65_535).contains(&len), "a packet of {len} bytes");
    let mut packet = vec![0; len];
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            packet[0] = 0x45;
            packet[1] = class;
            packet[2..4].copy_from_slice(&u16::try_from(len).unwrap_or(0).to_be_bytes());
            packet[8] = 64;
            packet[9] = 1;
            packet[12..16].copy_from_slice(&source.octets());
            packet[16..20].copy_from_slice(&destination.octets());
            let sum = header_checksum(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet[0] = 0x60 | class >> 4;
            packet[1] = class << 4;
            let payload = u16::try_from(len - IPV6_HEADER_LEN).unwrap_or(0);
            packet[4..6].copy_from_slice(&payload.to_be_bytes());
            packet[6] = 58;
            packet[7] = 64;
            packet[8..24].copy_from_slice(&source.octets());
            packet[24..40].copy_from_slice(&destination.octets());
        }
        _ => panic!("{source} and {destination} are of different families"),
    }
    let at = header_len(&packet);
    packet[at] = ECHO_REQUEST;
    packet[at + ECHO_HEADER_LEN..at + ECHO_HEADER_LEN + 8].copy_from_slice(&tag.to_le_bytes());
    packet
}

/// The reply to a request; `None` if the packet is none.
#[must_use]
pub fn reply(packet: &[u8]) -> Option<Vec<u8>> {
    let at = header_len(packet);
    if packet.get(at) != Some(&ECHO_REQUEST) {
        return None;
    }
    let mut answer = packet.to_vec();
    let (start, len) = if is_v4(packet) { (12, 4) } else { (8, 16) };
    answer[start..start + len].copy_from_slice(&packet[start + len..start + 2 * len]);
    answer[start + len..start + 2 * len].copy_from_slice(&packet[start..start + len]);
    answer[at] = ECHO_REPLY;
    Some(answer)
}

/// True for an echo reply.
#[must_use]
pub fn is_reply(packet: &[u8]) -> bool {
    packet.get(header_len(packet)) == Some(&ECHO_REPLY)
}

/// The tag of a packet made here.
#[must_use]
pub fn tag(packet: &[u8]) -> Option<u64> {
    let at = header_len(packet) + ECHO_HEADER_LEN;
    packet.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}

/// The traffic class of a packet, ECN included.
#[must_use]
pub fn traffic_class(packet: &[u8]) -> u8 {
    if is_v4(packet) { packet[1] } else { packet[0] << 4 | packet[1] >> 4 }
}

/// The ones' complement sum over an IPv4 header: what belongs into the checksum field while that
/// is zero, and zero once it is right.
#[must_use]
pub fn header_checksum(packet: &[u8]) -> u16 {
    let words = packet[..IPV4_HEADER_LEN].chunks_exact(2);
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(0)
}

fn is_v4(packet: &[u8]) -> bool {
    packet.first().is_some_and(|first| first >> 4 == 4)
}

fn header_len(packet: &[u8]) -> usize {
    if is_v4(packet) { IPV4_HEADER_LEN } else { IPV6_HEADER_LEN }
}
