//! Splitting and putting together are each other's inverse, whatever comes.

use super::checksum::{fold, sum};
use super::{Coalesce, Coalescer, GsoType, Segments, VNET_HDR_LEN, VnetHeader};
use std::collections::BTreeMap;
use wgsep_proto::path::outbound::Segmentation as _;

const BOTH: Coalesce = Coalesce { tcp_v4: true, tcp_v6: true, udp: true };
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;

/// Numbers that look random and are the same in every run (xorshift64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % below
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.roll(256) as u8).collect()
    }
}

/// One packet of a flow.
#[derive(Clone, Debug)]
struct Packet {
    v6: bool,
    tcp: bool,
    flow: u8,
    id: u16,
    dont_fragment: bool,
    class: u8,
    sequence: u32,
    flags: u8,
    options: Vec<u8>,
    payload: Vec<u8>,
}

impl Packet {
    fn new(v6: bool, tcp: bool, payload: Vec<u8>) -> Self {
        let options = if tcp { vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2] } else { Vec::new() };
        let (id, sequence) = (0xfffe, 0xffff_f000);
        let (dont_fragment, class) = (true, 2);
        Self { v6, tcp, flow: 1, id, dont_fragment, class, sequence, flags: ACK, options, payload }
    }

    const fn ip_len(&self) -> usize {
        if self.v6 { 40 } else { 20 }
    }

    fn header_len(&self) -> usize {
        self.ip_len() + if self.tcp { 20 + self.options.len() } else { 8 }
    }

    fn checksum_field(&self) -> usize {
        self.ip_len() + if self.tcp { 16 } else { 6 }
    }

    /// Everything but the transport's checksum.
    fn unchecked(&self) -> Vec<u8> {
        let protocol = if self.tcp { 6 } else { 17 };
        let l4_len = (self.header_len() - self.ip_len() + self.payload.len()) as u16;
        let mut packet = Vec::new();
        if self.v6 {
            packet.extend([0x60, self.class << 4, 0, 9]);
            packet.extend(l4_len.to_be_bytes());
            packet.extend([protocol, 64]);
            for end in [1, 2] {
                packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, self.flow / 2, end]);
            }
        } else {
            packet.extend([0x45, self.class]);
            packet.extend((l4_len + 20).to_be_bytes());
            packet.extend(self.id.to_be_bytes());
            packet.extend([u8::from(self.dont_fragment) << 6, 0, 64, protocol, 0, 0]);
            packet.extend([10, 0, self.flow / 2, 1, 10, 0, self.flow / 2, 2]);
            let checksum = !fold(sum(&packet, 0));
            packet[10..12].copy_from_slice(&checksum.to_ne_bytes());
        }
        packet.extend([0x80, self.flow, 0, 80]);
        if self.tcp {
            packet.extend(self.sequence.to_be_bytes());
            packet.extend(77u32.to_be_bytes());
            packet.extend([((20 + self.options.len()) << 2) as u8, self.flags]);
            packet.extend([0x20, 0, 0, 0, 0, 0]);
            packet.extend(&self.options);
        } else {
            packet.extend(l4_len.to_be_bytes());
            packet.extend([0, 0]);
        }
        packet.extend(&self.payload);
        packet
    }

    /// The sum of the pseudo-header, word by word.
    fn pseudo_header(&self, packet: &[u8]) -> u16 {
        let addresses = if self.v6 { &packet[8..40] } else { &packet[12..20] };
        let mut pseudo = addresses.to_vec();
        pseudo.extend(((packet.len() - self.ip_len()) as u16).to_be_bytes());
        pseudo.extend([0, if self.tcp { 6 } else { 17 }]);
        fold(sum(&pseudo, 0))
    }

    /// As it goes over a network.
    fn build(&self) -> Vec<u8> {
        let mut packet = self.unchecked();
        let pseudo = self.pseudo_header(&packet);
        let checksum = !fold(sum(&packet[self.ip_len()..], u64::from(pseudo)));
        let checksum = if checksum == 0 && !self.tcp { !0 } else { checksum };
        let field = self.checksum_field();
        packet[field..field + 2].copy_from_slice(&checksum.to_ne_bytes());
        packet
    }

    /// As the kernel hands it over to be split into payloads of `size`.
    fn build_super(&self, size: u16) -> (VnetHeader, Vec<u8>) {
        let mut packet = self.unchecked();
        let pseudo = self.pseudo_header(&packet);
        let field = self.checksum_field();
        packet[field..field + 2].copy_from_slice(&pseudo.to_ne_bytes());
        let kind = match (self.tcp, self.v6) {
            (true, false) => GsoType::TcpV4,
            (true, true) => GsoType::TcpV6,
            (false, _) => GsoType::Udp,
        };
        let header = VnetHeader {
            checksum: Some((self.ip_len() as u16, (field - self.ip_len()) as u16)),
            gso: Some((kind, size)),
            header_len: self.header_len() as u16,
        };
        (header, packet)
    }

    fn next(&self, payload: Vec<u8>) -> Self {
        let sequence = self.sequence.wrapping_add(self.payload.len() as u32);
        Self { id: self.id.wrapping_add(1), sequence, payload, ..self.clone() }
    }
}

fn split(header: &VnetHeader, packet: &[u8]) -> Vec<Vec<u8>> {
    let segments = Segments::new(header, packet).unwrap();
    let write = |number| {
        let mut segment = vec![0; segments.len_of(number)];
        segments.write(packet, number, &mut segment).unwrap();
        segment
    };
    (0..segments.count()).map(write).collect()
}

/// What comes out for these packets, in order.
fn coalesce(coalesce: Coalesce, packets: &[Vec<u8>]) -> Vec<(VnetHeader, Vec<u8>, u16)> {
    let mut coalescer = Coalescer::new(coalesce);
    let mut out = Vec::new();
    let mut write = |frame: &mut [u8], packets: u16| {
        let (header, packet) = frame.split_first_chunk().unwrap();
        out.push((VnetHeader::parse(header).unwrap(), packet.to_vec(), packets));
    };
    for packet in packets {
        let mut frame = vec![0xaa; VNET_HDR_LEN];
        frame.extend(packet);
        coalescer.push(&mut frame, &mut write);
    }
    coalescer.flush(&mut write);
    out
}

fn flavours() -> impl Iterator<Item = (bool, bool)> {
    [(false, false), (false, true), (true, false), (true, true)].into_iter()
}

#[test]
fn a_super_packet_splits_into_what_becomes_the_same_super_packet() {
    let mut dice = Dice(1);
    for (v6, tcp) in flavours() {
        for (size, len) in [(1368, 61_560), (1368, 61_561), (1400, 2801), (536, 5000), (100, 101)] {
            let mut whole = Packet::new(v6, tcp, dice.bytes(len));
            whole.flags = if len % 2 == 0 { ACK | PSH } else { ACK };
            let (header, packet) = whole.build_super(size);
            let segments = split(&header, &packet);
            assert_eq!(segments.len(), len.div_ceil(usize::from(size)));
            let out = coalesce(BOTH, &segments);
            assert_eq!(out, [(header, packet, segments.len() as u16)]);
        }
    }
}

#[test]
fn segments_are_the_packets_that_would_have_been_sent_singly() {
    let mut dice = Dice(2);
    for (v6, tcp) in flavours() {
        let whole = Packet { flags: ACK | PSH, ..Packet::new(v6, tcp, dice.bytes(3500)) };
        let (header, packet) = whole.build_super(1000);
        let mut single = Packet { payload: Vec::new(), ..whole.clone() };
        let mut singles = Vec::new();
        for payload in whole.payload.chunks(1000) {
            single = single.next(payload.to_vec());
            single.flags = if payload.len() == 500 { ACK | PSH } else { ACK };
            let id = single.id.wrapping_sub(1);
            singles.push(Packet { id, ..single.clone() }.build());
        }
        assert_eq!(split(&header, &packet), singles);
    }
}

#[test]
fn a_lone_packet_only_has_its_checksum_completed() {
    for (v6, tcp) in flavours() {
        let lone = Packet::new(v6, tcp, vec![7; 333]);
        let (header, packet) = lone.build_super(1000);
        let header = VnetHeader { gso: None, ..header };
        assert_eq!(split(&header, &packet), [lone.build()]);
        assert_eq!(split(&VnetHeader::default(), &packet), [packet]);
    }
}

#[test]
fn cwr_stays_on_the_first_segment_and_fin_goes_with_the_last() {
    let mut whole = Packet::new(false, true, vec![1; 30]);
    whole.flags = 0x80 | PSH | ACK | 1;
    let (header, packet) = whole.build_super(10);
    let flags: Vec<_> = split(&header, &packet).iter().map(|segment| segment[33]).collect();
    assert_eq!(flags, [0x80 | ACK, ACK, PSH | ACK | 1]);
}

/// True if the second of two packets is merged with the first.
fn merges(first: &Packet, second: &Packet) -> bool {
    coalesce(BOTH, &[first.build(), second.build()]).len() == 1
}

#[test]
fn only_the_next_packet_of_a_flow_is_merged() {
    for (v6, tcp) in flavours() {
        let first = Packet::new(v6, tcp, vec![1; 100]);
        let next = first.next(vec![2; 100]);
        assert!(merges(&first, &next));
        assert!(merges(&first, &Packet { payload: vec![2; 7], ..next.clone() }));
        assert!(!merges(&first, &Packet { payload: vec![2; 101], ..next.clone() }));
        assert!(!merges(&first, &Packet { payload: vec![], ..next.clone() }));
        assert!(!merges(&first, &Packet { class: 3, ..next.clone() }));
        assert!(!merges(&first, &Packet { flow: 3, ..next.clone() }));
        let other = Packet { tcp: !tcp, options: vec![], ..next.clone() };
        assert!(!merges(&first, &other));
        if !v6 {
            assert!(merges(&first, &Packet { id: first.id, ..next.clone() }));
            assert!(!merges(&first, &Packet { id: first.id.wrapping_add(2), ..next.clone() }));
            assert!(!merges(&first, &Packet { dont_fragment: false, ..next.clone() }));
            let first = Packet { dont_fragment: false, ..first.clone() };
            assert!(!merges(&first, &Packet { id: first.id, ..first.next(vec![2; 100]) }));
            assert!(merges(&first, &first.next(vec![2; 100])));
        }
        if tcp {
            assert!(!merges(&first, &Packet { sequence: next.sequence + 1, ..next.clone() }));
            assert!(!merges(&Packet { flags: ACK | PSH, ..first.clone() }, &next));
            assert!(merges(&first, &Packet { flags: ACK | PSH, ..next.clone() }));
            for flags in [0x11, 0x12, 0x14, 0x30, 0x50, 0x90, 0] {
                assert!(!merges(&first, &Packet { flags, ..next.clone() }), "{flags:#x}");
            }
            let mut later = next.clone();
            later.options[7] += 1;
            assert!(!merges(&first, &later));
            later.options.truncate(4);
            assert!(!merges(&first, &later));
        }
    }
}

#[test]
fn a_udp_packet_without_a_checksum_is_not_merged() {
    let first = Packet::new(false, false, vec![1; 100]);
    let next = first.next(vec![2; 100]);
    let mut unchecked = next.build();
    unchecked[26..28].fill(0);
    assert_eq!(coalesce(BOTH, &[first.build(), unchecked]).len(), 2);
}

#[test]
fn a_damaged_packet_is_written_unchanged() {
    let mut dice = Dice(3);
    for (v6, tcp) in flavours() {
        let first = Packet::new(v6, tcp, dice.bytes(64));
        let second = first.next(dice.bytes(64));
        let third = second.next(dice.bytes(64));
        let intact = second.build();
        for bit in 0..intact.len() * 8 {
            let mut damaged = intact.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let packets = [first.build(), damaged.clone(), third.build()];
            let out = coalesce(BOTH, &packets);
            // IPv6 has no checksum for what its pseudo-header leaves out.
            let unprotected = v6 && matches!(bit / 8, 0..4 | 7);
            let alone = out
                .iter()
                .any(|(header, packet, _)| *header == VnetHeader::default() && *packet == damaged);
            assert!(alone || unprotected, "bit {bit} of {}", packets[1].len());
            assert_eq!(out.iter().map(|(_, _, packets)| packets).sum::<u16>(), 3);
        }
    }
}

#[test]
fn what_the_kernel_does_not_accept_is_not_merged() {
    for (v6, tcp) in flavours() {
        let first = Packet::new(v6, tcp, vec![1; 100]);
        let packets = [first.build(), first.next(vec![2; 100]).build()];
        let own = Coalesce { tcp_v4: tcp && !v6, tcp_v6: tcp && v6, udp: !tcp };
        let others = Coalesce { tcp_v4: !own.tcp_v4, tcp_v6: !own.tcp_v6, udp: !own.udp };
        assert_eq!(coalesce(others, &packets).len(), 2);
        assert_eq!(coalesce(own, &packets).len(), 1);
    }
}

/// The flow of a packet: protocol, addresses and ports, or the bytes at their offsets.
fn flow(packet: &[u8]) -> Vec<u8> {
    let (protocol, rest) =
        if packet[0] >> 4 == 6 { (packet[6], &packet[8..]) } else { (packet[9], &packet[12..]) };
    let len = if packet[0] >> 4 == 6 { 36 } else { 12 };
    [&[protocol], &rest[..len.min(rest.len())]].concat()
}

/// A packet without the identification that means nothing on one that is never fragmented.
fn meaning(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

/// Each flow's packets, in order.
fn by_flow(packets: &[Vec<u8>]) -> BTreeMap<Vec<u8>, Vec<Vec<u8>>> {
    let mut flows = BTreeMap::<_, Vec<_>>::new();
    for packet in packets {
        flows.entry(flow(packet)).or_default().push(meaning(packet.clone()));
    }
    flows
}

#[test]
fn whatever_comes_nothing_is_lost_changed_or_overtaken() {
    let mut dice = Dice(4);
    let (mut joined, mut total) = (0, 0);
    for _ in 0..100 {
        let mut flows: Vec<Packet> = (0..1 + dice.roll(12))
            .map(|flow| {
                let (v6, tcp) = (dice.roll(2) == 0, dice.roll(3) > 0);
                Packet { flow: flow as u8, ..Packet::new(v6, tcp, vec![1; 40 + dice.roll(1300)]) }
            })
            .collect();
        let mut packets = Vec::new();
        for _ in 0..200 {
            let index = dice.roll(flows.len());
            let flow = &mut flows[index];
            let usual = flow.payload.len();
            let len = if dice.roll(12) == 0 { dice.roll(1400) } else { usual };
            let payload = vec![dice.roll(256) as u8; len];
            packets.push({
                let mut packet = flow.next(payload);
                match dice.roll(40) {
                    0 => packet.flags |= PSH,
                    1 => packet.flags |= 1 << dice.roll(8),
                    2 => packet.sequence ^= 1 << dice.roll(32),
                    3 => packet.id ^= 1 << dice.roll(16),
                    4 => packet.class ^= 1,
                    5 => packet.dont_fragment ^= true,
                    _ => {}
                }
                let mut bytes = packet.build();
                match dice.roll(60) {
                    0 => {
                        let at = dice.roll(bytes.len());
                        bytes[at] ^= 1 << dice.roll(8);
                    }
                    1 => bytes.truncate(dice.roll(bytes.len()).max(40)),
                    2 if !packet.v6 => bytes[7] = 9,
                    _ => {}
                }
                *flow = Packet { payload: vec![0; usual], ..packet };
                bytes
            });
        }
        let out = coalesce(BOTH, &packets);
        let singles: Vec<_> =
            out.iter().flat_map(|(header, packet, _)| split(header, packet)).collect();
        (joined, total) = (joined + packets.len() - out.len(), total + packets.len());
        assert_eq!(singles.len(), packets.len());
        assert!(by_flow(&singles) == by_flow(&packets));
    }
    assert!(joined > total / 10, "only {joined} of {total} were joined: the test tests nothing");
}

#[test]
fn no_bytes_make_it_panic() {
    let mut dice = Dice(5);
    let mut coalescer = Coalescer::new(BOTH);
    for round in 0..60_000 {
        let (v6, tcp) = (dice.roll(2) == 0, dice.roll(2) == 0);
        let (header, mut packet) = Packet::new(v6, tcp, vec![0; 50]).build_super(10);
        if round % 3 == 0 {
            let len = dice.roll(120);
            packet = dice.bytes(len);
        }
        for _ in 0..dice.roll(4) {
            let at = dice.roll(packet.len().clamp(1, 60));
            if let Some(byte) = packet.get_mut(at) {
                *byte = dice.roll(256) as u8;
            }
        }
        packet.truncate(dice.roll(packet.len() + 1));
        let mut header = header.to_bytes();
        for _ in 0..dice.roll(3) {
            header[dice.roll(VNET_HDR_LEN)] = dice.roll(256) as u8;
        }
        let segments =
            VnetHeader::parse(&header).and_then(|header| Segments::new(&header, &packet));
        if let Some(segments) = segments {
            for number in 0..segments.count() + 1 {
                let mut destination = vec![0; segments.len_of(number)];
                let _either = segments.write(&packet, number, &mut destination);
            }
        }
        let mut frame = header.to_vec();
        frame.extend(packet);
        let mut frames = 0;
        coalescer.push(&mut frame, |_, packets| frames += packets);
        assert!(frames <= 10);
    }
}
