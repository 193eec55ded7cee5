//! From the wire to the TUN device: consecutive packets of a flow joined into a super-packet, which
//! is written from where its parts lie.

use std::io::IoSlice;
use std::ops::Range;

use wgsep_dataplane::offload::{GsoType, VNET_HDR_LEN, VnetHeader};

use super::checksum::{complete_ipv4, fold, pseudo, sum};

/// Most packets of a super-packet.
const MAX_PACKETS: usize = 64;
const MAX_LEN: usize = 65_000;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;

/// What is known of a packet that can be joined with others.
#[derive(Clone, Copy)]
struct Shape {
    is_tcp: bool,
    ip_len: usize,
    headers: usize,
    payload: usize,
    sequence: u32,
}

impl Shape {
    /// `None` unless it is plain TCP or UDP data over IPv4 with a right checksum.
    fn of(packet: &[u8]) -> Option<Self> {
        if packet.len() < 28 || packet[0] != 0x45 || !matches!(packet[9], TCP | UDP) {
            return None;
        }
        let (ip_len, is_tcp) = (20, packet[9] == TCP);
        let mut headers = ip_len + 8;
        if is_tcp {
            headers = ip_len + usize::from(packet.get(ip_len + 12)? >> 4) * 4;
            if packet.get(ip_len + 13)? & !PSH != ACK {
                return None;
            }
        }
        let payload = packet.len().checked_sub(headers).filter(|payload| *payload > 0)?;
        let transport = &packet[ip_len..];
        let right = fold(sum(transport, pseudo(packet, transport.len()))) == 0xffff;
        let sequence = u32::from_be_bytes(*transport[4..].first_chunk()?);
        right.then_some(Self { is_tcp, ip_len, headers, payload, sequence })
    }
}

/// The packets of a flow that wait to be written: places in the caller's buffer.
#[derive(Default)]
pub(super) struct Joiner {
    run: Option<Run>,
}

struct Run {
    shape: Shape,
    /// The first packet as a whole, and the payload of each that follows.
    parts: Vec<Range<usize>>,
    len: usize,
    /// Payload of the last; shorter than the first one's only if nothing may follow.
    last: usize,
}

impl Joiner {
    /// Takes the packet that lies at `place`; what cannot wait for more is written first.
    pub(super) fn push(
        &mut self,
        buffer: &mut [u8],
        place: Range<usize>,
        write: &mut impl FnMut(&[IoSlice<'_>]),
    ) {
        let shape = Shape::of(&buffer[place.clone()]);
        if let (Some(run), Some(shape)) = (&mut self.run, shape)
            && run.is_continued_by(buffer, place.start, &shape)
        {
            let first = run.parts[0].start;
            if shape.is_tcp {
                // A push belongs to the super-packet that ends with it.
                let flags = shape.ip_len + 13;
                buffer[first + flags] |= buffer[place.start + flags] & PSH;
            }
            run.len += shape.payload;
            run.last = shape.payload;
            run.parts.push(place.start + shape.headers..place.end);
            return;
        }
        self.flush(buffer, write);
        match shape {
            Some(shape) => {
                let (len, last) = (place.len(), shape.payload);
                self.run = Some(Run { shape, parts: vec![place], len, last });
            }
            None => write(&[IoSlice::new(&[0; VNET_HDR_LEN]), IoSlice::new(&buffer[place])]),
        }
    }

    /// Writes what waits.
    pub(super) fn flush(&mut self, buffer: &mut [u8], write: &mut impl FnMut(&[IoSlice<'_>])) {
        let Some(run) = self.run.take() else { return };
        let header = run.complete(&mut buffer[run.parts[0].clone()]).to_bytes();
        let mut slices = [IoSlice::new(&[]); MAX_PACKETS + 1];
        slices[0] = IoSlice::new(&header);
        for (slice, part) in slices[1..].iter_mut().zip(&run.parts) {
            *slice = IoSlice::new(&buffer[part.clone()]);
        }
        write(&slices[..=run.parts.len()]);
    }
}

impl Run {
    fn is_continued_by(&self, buffer: &[u8], start: usize, next: &Shape) -> bool {
        let Shape { is_tcp, ip_len, headers, payload, sequence } = self.shape;
        if (next.is_tcp, next.headers) != (is_tcp, headers)
            || self.last != payload
            || next.payload > payload
            || self.parts.len() == MAX_PACKETS
            || self.len + next.payload > MAX_LEN
        {
            return false;
        }
        let first = &buffer[self.parts[0].start..][..headers];
        let packet = &buffer[start..][..headers];
        let same = |range: Range<usize>| first[range.clone()] == packet[range];
        // Type of service; time to live and protocol; addresses and ports.
        if !(same(1..2) && same(8..10) && same(12..ip_len + 4)) {
            return false;
        }
        if !is_tcp {
            return true;
        }
        let sent = (self.len - headers) as u32;
        let pushed = first[ip_len + 13] & PSH != 0;
        // Acknowledgement; window; options.
        let alike = same(ip_len + 8..ip_len + 12)
            && same(ip_len + 14..ip_len + 16)
            && same(ip_len + 20..headers);
        !pushed && alike && next.sequence == sequence.wrapping_add(sent)
    }

    /// Makes the first packet's headers those of the whole, and says what the kernel has to know.
    fn complete(&self, first: &mut [u8]) -> VnetHeader {
        if self.parts.len() == 1 {
            return VnetHeader::default();
        }
        let Shape { is_tcp, ip_len, headers, payload, .. } = self.shape;
        let id = u16::from_be_bytes([first[4], first[5]]);
        complete_ipv4(first, ip_len, self.len, id);
        let transport_len = self.len - ip_len;
        let (gso, offset) = if is_tcp { (GsoType::TcpV4, 16) } else { (GsoType::Udp, 6) };
        if !is_tcp {
            let bytes = (transport_len as u16).to_be_bytes();
            first[ip_len + 4..ip_len + 6].copy_from_slice(&bytes);
        }
        let checksum = fold(pseudo(first, transport_len));
        first[ip_len + offset..ip_len + offset + 2].copy_from_slice(&checksum.to_ne_bytes());
        VnetHeader {
            checksum: Some((ip_len as u16, offset as u16)),
            gso: Some((gso, payload as u16)),
            header_len: headers as u16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::split::{Datagrams, HEADER_LEN, TAG_LEN};
    use super::*;

    const PAYLOAD: u16 = 1000;

    /// A super-packet of UDP as the kernel gives it, but with the whole checksum.
    fn super_packet(count: u16) -> (VnetHeader, Vec<u8>) {
        let len = 28 + count * PAYLOAD;
        let mut packet =
            vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, UDP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet.extend([0, 1, 0, 2, 0, 0, 0, 0]);
        packet.extend((28..len).map(|place| (place % 251) as u8));
        complete_ipv4(&mut packet, 20, usize::from(len), 7);
        packet[24..26].copy_from_slice(&(len - 20).to_be_bytes());
        let checksum = fold(pseudo(&packet, usize::from(len - 20)));
        packet[26..28].copy_from_slice(&checksum.to_ne_bytes());
        let gso = Some((GsoType::Udp, PAYLOAD));
        (VnetHeader { checksum: Some((20, 6)), gso, header_len: 28 }, packet)
    }

    /// What is written of datagrams, and how many there were.
    fn split_and_joined(
        header: &VnetHeader,
        packet: &[u8],
        spoil: impl Fn(&mut [u8]),
    ) -> (Vec<Vec<u8>>, usize) {
        let (mut datagrams, mut wire, mut places) = (Datagrams::default(), Vec::new(), Vec::new());
        datagrams.add(header, packet);
        datagrams.send(|bytes, len| {
            for datagram in bytes.chunks(len) {
                let start = wire.len() + HEADER_LEN;
                wire.extend_from_slice(datagram);
                places.push(start..wire.len() - TAG_LEN);
            }
        });
        spoil(&mut wire);
        let (mut joiner, mut written) = (Joiner::default(), Vec::new());
        let mut write = |parts: &[IoSlice<'_>]| {
            written.push(parts.iter().flat_map(|part| part.to_vec()).collect());
        };
        for place in &places {
            joiner.push(&mut wire, place.clone(), &mut write);
        }
        joiner.flush(&mut wire, &mut write);
        (written, places.len())
    }

    #[test]
    fn a_super_packet_is_the_same_after_the_wire() {
        let (header, packet) = super_packet(40);
        let (written, datagrams) = split_and_joined(&header, &packet, |_wire| {});
        let expected = [&header.to_bytes()[..], &packet].concat();
        assert_eq!((written, datagrams), (vec![expected], 40));
    }

    #[test]
    fn a_packet_with_a_wrong_checksum_is_passed_on_alone() {
        let (header, packet) = super_packet(3);
        let second = HEADER_LEN + TAG_LEN + 28 + usize::from(PAYLOAD);
        let (written, _) = split_and_joined(&header, &packet, |wire| wire[second + 200] ^= 1);
        let alone = VNET_HDR_LEN + 28 + usize::from(PAYLOAD);
        assert_eq!(written.iter().map(Vec::len).collect::<Vec<_>>(), [alone; 3]);
    }
}
