//! The Internet checksum (RFC 1071), on words as they lie in memory.

/// The sum of `bytes` and `initial`; an odd last byte counts as if a zero followed it.
pub(super) fn sum(bytes: &[u8], initial: u64) -> u64 {
    let mut lanes = [0_u64; 16];
    let (blocks, rest) = bytes.as_chunks::<64>();
    for block in blocks {
        let (words, _) = block.as_chunks::<4>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane += u64::from(u32::from_ne_bytes(*word));
        }
    }
    let tail = rest.chunks(2).map(|pair| {
        u64::from(u16::from_ne_bytes([pair[0], pair.get(1).copied().unwrap_or_default()]))
    });
    lanes.into_iter().sum::<u64>() + tail.sum::<u64>() + initial
}

/// A sum as the 16 bits that are stored.
pub(super) const fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let [low, high, ..] = sum.to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// The sum of the pseudo-header of an IPv4 packet, for a transport part of `len` bytes.
pub(super) fn pseudo(ip: &[u8], len: usize) -> u64 {
    let protocol = u16::from(ip[9]).to_be();
    sum(&ip[12..20], u64::from(protocol) + u64::from((len as u16).to_be()))
}

/// Completes the header of an IPv4 packet for this length and identification.
pub(super) fn complete_ipv4(ip: &mut [u8], header_len: usize, len: usize, id: u16) {
    ip[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    ip[4..6].copy_from_slice(&id.to_be_bytes());
    ip[10..12].fill(0);
    let checksum = !fold(sum(&ip[..header_len], 0));
    ip[10..12].copy_from_slice(&checksum.to_ne_bytes());
}
