//! From the TUN device to the wire: super-packets split into datagrams that lie one after the other.

use wgsep_dataplane::offload::{GsoType, VnetHeader};

use super::checksum::{complete_ipv4, fold, pseudo, sum};

/// What WireGuard puts before each packet, in bytes.
pub(super) const HEADER_LEN: usize = 16;
/// And behind it.
pub(super) const TAG_LEN: usize = 16;
/// Datagrams that a socket sends at once, at most (the kernel's UDP_MAX_SEGMENTS before 6.7).
const MAX_AT_ONCE: usize = 64;
/// Bytes that a socket sends at once, at most.
const MAX_BYTES_AT_ONCE: usize = 65_000;
const FIN_AND_PSH: u8 = 0x09;

/// Datagrams to be sent, one after the other.
#[derive(Default)]
pub(super) struct Datagrams {
    bytes: Vec<u8>,
    lens: Vec<usize>,
}

impl Datagrams {
    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.lens.len()
    }

    /// Forgets all of them.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.lens.clear();
    }

    /// Adds what the device gave: a packet, or a super-packet that is split. What is not IPv4 is not
    /// forwarded; nor is what the kernel would never give.
    pub(super) fn add(&mut self, header: &VnetHeader, packet: &[u8]) {
        if packet.len() < 20 || packet[0] >> 4 != 4 {
            return;
        }
        match header.gso {
            None => {
                let place = self.place(packet.len());
                place.copy_from_slice(packet);
                if let Some((start, field)) = header.checksum {
                    let start = usize::from(start);
                    let field = start + usize::from(field);
                    let checksum = !fold(sum(&place[start..], 0));
                    place[field..field + 2].copy_from_slice(&checksum.to_ne_bytes());
                }
            }
            Some((kind, payload_len)) => self.split(packet, kind, usize::from(payload_len)),
        }
    }

    fn split(&mut self, packet: &[u8], kind: GsoType, payload_len: usize) {
        let ip_len = usize::from(packet[0] & 15) * 4;
        let is_tcp = kind != GsoType::Udp;
        let transport_len = if is_tcp { usize::from(packet[ip_len + 12] >> 4) * 4 } else { 8 };
        let headers = ip_len + transport_len;
        let field = ip_len + if is_tcp { 16 } else { 6 };
        let word = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
        let sequence = u32::from(word(ip_len + 4)) << 16 | u32::from(word(ip_len + 6));
        let (first_id, mut id) = (word(4), 0);
        let mut from = headers;
        while from < packet.len() {
            let to = packet.len().min(from + payload_len);
            let len = headers + to - from;
            let place = self.place(len);
            place[..headers].copy_from_slice(&packet[..headers]);
            place[headers..].copy_from_slice(&packet[from..to]);
            complete_ipv4(place, ip_len, len, first_id.wrapping_add(id));
            if is_tcp {
                let sequence = sequence.wrapping_add((from - headers) as u32);
                place[ip_len + 4..ip_len + 8].copy_from_slice(&sequence.to_be_bytes());
                if to < packet.len() {
                    place[ip_len + 13] &= !FIN_AND_PSH;
                }
            } else {
                let udp_len = (len - ip_len) as u16;
                place[ip_len + 4..ip_len + 6].copy_from_slice(&udp_len.to_be_bytes());
            }
            place[field..field + 2].fill(0);
            let checksum = !fold(sum(&place[ip_len..], pseudo(place, len - ip_len)));
            place[field..field + 2].copy_from_slice(&checksum.to_ne_bytes());
            (from, id) = (to, id.wrapping_add(1));
        }
    }

    /// Room for a packet of this length in the next datagram.
    fn place(&mut self, len: usize) -> &mut [u8] {
        let start = self.bytes.len() + HEADER_LEN;
        self.bytes.resize(start + len + TAG_LEN, 0);
        self.lens.push(HEADER_LEN + len + TAG_LEN);
        &mut self.bytes[start..start + len]
    }

    /// Calls `send` with datagrams of equal length, of which the last may be shorter, and that
    /// length; all of them, in order.
    pub(super) fn send(&self, mut send: impl FnMut(&[u8], usize)) {
        let (mut first, mut start) = (0, 0);
        while let Some(len) = self.lens.get(first).copied() {
            let (mut next, mut end) = (first, start);
            while let Some(more) = self.lens.get(next).filter(|more| **more <= len) {
                if next - first == MAX_AT_ONCE || end - start + more > MAX_BYTES_AT_ONCE {
                    break;
                }
                (next, end) = (next + 1, end + more);
                if *more < len {
                    break;
                }
            }
            send(&self.bytes[start..end], len);
            (first, start) = (next, end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(lens: &[usize]) -> Vec<(usize, usize)> {
        let bytes = vec![0; lens.iter().sum()];
        let datagrams = Datagrams { bytes, lens: lens.to_vec() };
        let mut groups = Vec::new();
        datagrams.send(|bytes, len| groups.push((bytes.len(), len)));
        groups
    }

    #[test]
    fn datagrams_of_one_length_go_together_and_a_shorter_one_ends_them() {
        assert_eq!(groups(&[96, 96, 50, 96, 100]), [(242, 96), (96, 96), (100, 100)]);
        assert_eq!(groups(&[96; 65]), [(64 * 96, 96), (96, 96)]);
        assert_eq!(groups(&[1452; 45]), [(44 * 1452, 1452), (1452, 1452)]);
        assert_eq!(groups(&[]), []);
    }
}
