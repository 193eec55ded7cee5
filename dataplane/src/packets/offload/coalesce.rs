//! Generic receive offload: merges consecutive packets of a flow into one super-packet for the TUN device.
//!
//! The rules are those of the kernel's own receive offload (tcp_offload.c, udp_offload.c, gro.c):
//! packets are merged only if segmentation restores them bit for bit. That means equal headers,
//! consecutive sequence numbers and identifications, payloads of equal length with at most the last one
//! shorter, and nothing after PSH. Because the kernel trusts the checksum of a super-packet, the
//! checksum of every packet is verified before it is merged; a packet with a wrong one is written
//! unchanged.
//!
//! Packets of a flow are always written in the order of arrival: a packet that cannot be merged first
//! flushes the held packets between the same two addresses.

use super::checksum::{fold, sum};
use super::header::{self, ACK, ECE, IPV4_LEN, IPV6_LEN, PSH, Transport};
use super::vnet::{GsoType, VNET_HDR_LEN, VnetHeader};
use core::ops::Range;
use wgsep_proto::invariant::{part, present};

/// Most flows that are held at once.
const FLOWS: usize = 8;
/// Most packets of one super-packet (the kernel's UDP_MAX_SEGMENTS before 6.7).
const MAX_PACKETS: u16 = 64;
/// Longest super-packet: the maximum of its length field.
const MAX_LEN: usize = 65_535;
const DONT_FRAGMENT: u8 = 0x40;

/// The kinds of super-packets that the kernel accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coalesce {
    /// Of TCP over IPv4.
    pub tcp_v4: bool,
    /// Of TCP over IPv6.
    pub tcp_v6: bool,
    /// Of UDP over either: the kernel has one name for both.
    pub udp: bool,
}

impl Coalesce {
    const fn accepts(self, kind: GsoType) -> bool {
        match kind {
            GsoType::TcpV4 => self.tcp_v4,
            GsoType::TcpV6 => self.tcp_v6,
            GsoType::Udp => self.udp,
        }
    }
}

/// Packets that are held until the next of their flow arrives.
pub struct Coalescer {
    /// Those in use first, oldest first; the others are empty.
    flows: Box<[HeldFlow]>,
    used: usize,
    coalesce: Coalesce,
}

/// The packets of one flow that are merged so far.
struct HeldFlow {
    /// The header for the kernel, then the packet.
    frame: Box<[u8]>,
    key: GroKey,
    /// Length of the packet so far.
    len: usize,
    packets: u16,
}

/// The properties of a packet that decide whether it can be merged with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct GroKey {
    transport: Transport,
    ip_len: usize,
    header_len: usize,
    payload_len: usize,
    /// PSH is set, so that no packet is merged after this one.
    last: bool,
}

impl GroKey {
    /// Parses a packet; `None` unless it could be part of a super-packet.
    fn of(packet: &[u8], coalesce: Coalesce) -> Option<Self> {
        let (ip_len, protocol) = match packet.first()? {
            // Neither IP options nor a fragment.
            0x45 if packet.get(6)? & !DONT_FRAGMENT == 0 && *packet.get(7)? == 0 => {
                (IPV4_LEN, *packet.get(9)?)
            }
            first if first >> 4 == 6 => (IPV6_LEN, *packet.get(6)?),
            _ => return None,
        };
        if header::ip_len(packet)? != packet.len() || packet.len() > MAX_LEN {
            return None;
        }
        let transport = Transport::of_protocol(protocol)?;
        let l4 = packet.get(ip_len..).filter(|_| coalesce.accepts(kind(transport, ip_len)))?;
        let header_len = ip_len.checked_add(transport.header_len(l4)?)?;
        let payload_len = packet.len().checked_sub(header_len).filter(|len| *len > 0)?;
        let last = match transport {
            Transport::Tcp => {
                let flags = *l4.get(13)?;
                if flags & !(PSH | ECE) != ACK {
                    return None;
                }
                flags & PSH != 0
            }
            Transport::Udp => {
                let len = u16::from_be_bytes(*l4.get(4..)?.first_chunk()?);
                if usize::from(len) != l4.len() || l4.get(6..8)? == [0, 0] {
                    return None;
                }
                false
            }
        };
        Some(Self { transport, ip_len, header_len, payload_len, last })
    }

    /// True if the checksums are right.
    fn is_intact(&self, packet: &[u8]) -> bool {
        let Some((ip, l4)) = packet.split_at_checked(self.ip_len) else { return false };
        if self.ip_len == IPV4_LEN && fold(sum(ip, 0)) != u16::MAX {
            return false;
        }
        let pseudo =
            u16::try_from(l4.len()).ok().and_then(|len| self.transport.pseudo_header(ip, len));
        pseudo.is_some_and(|pseudo| fold(sum(l4, pseudo)) == u16::MAX)
    }

    /// The bytes of the addresses in a packet.
    const fn addresses(&self) -> Range<usize> {
        if self.ip_len == IPV4_LEN { 12..20 } else { 8..40 }
    }

    const fn ports(&self) -> Range<usize> {
        self.ip_len..self.ip_len + 4
    }
}

/// How a packet relates to a held flow.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Relation {
    /// It is of another flow.
    NewFlow,
    /// It is of the same flow, but cannot be appended.
    NotMergeable,
    /// It is the next packet of the flow.
    Mergeable,
}

impl HeldFlow {
    fn new() -> Self {
        let key = GroKey {
            transport: Transport::Tcp,
            ip_len: 0,
            header_len: 0,
            payload_len: 0,
            last: true,
        };
        let frame = vec![0; VNET_HDR_LEN + MAX_LEN].into_boxed_slice();
        Self { frame, key, len: 0, packets: 0 }
    }

    fn packet(&self) -> &[u8] {
        part(&self.frame, VNET_HDR_LEN..VNET_HDR_LEN + self.len)
    }

    fn begin(&mut self, packet: &[u8], key: GroKey) {
        let end = VNET_HDR_LEN + packet.len();
        let destination = self.frame.get_mut(VNET_HDR_LEN..end);
        let Some(destination) = present(destination, "no packet is longer") else { return };
        destination.copy_from_slice(packet);
        self.key = key;
        self.len = packet.len();
        self.packets = 1;
    }

    fn relation(&self, packet: &[u8], key: &GroKey) -> Relation {
        let (ours, own) = (self.packet(), &self.key);
        let same = |range: Range<usize>| ours.get(range.clone()) == packet.get(range);
        if own.transport != key.transport
            || own.ip_len != key.ip_len
            || !same(key.ports())
            || !same(key.addresses())
        {
            return Relation::NewFlow;
        }
        // A complete flow has already been written: see `is_complete`.
        let is_mergeable = own.header_len == key.header_len
            && key.payload_len <= own.payload_len
            && self.is_next_ip(packet)
            && self.is_next_transport(packet);
        if is_mergeable { Relation::Mergeable } else { Relation::NotMergeable }
    }

    fn is_next_ip(&self, packet: &[u8]) -> bool {
        let ours = self.packet();
        let same = |range: Range<usize>| ours.get(range.clone()) == packet.get(range);
        if self.key.ip_len == IPV6_LEN {
            // Version, class and flow label; next header and hop limit.
            return same(0..4) && same(6..8);
        }
        let (Some(first), Some(next)) = (header::ipv4_id(ours), header::ipv4_id(packet)) else {
            return false;
        };
        // The identification means nothing on a packet that is never fragmented (RFC 6864).
        let atomic = ours.get(6).is_some_and(|flags| flags & DONT_FRAGMENT != 0);
        let numbered = next == first.wrapping_add(self.packets) || (atomic && next == first);
        numbered && same(0..2) && same(6..10)
    }

    fn is_next_transport(&self, packet: &[u8]) -> bool {
        let GroKey { transport, ip_len, header_len, .. } = self.key;
        if transport == Transport::Udp {
            return true;
        }
        let (Some(ours), Some(next)) =
            (self.packet().get(ip_len..header_len), packet.get(ip_len..header_len))
        else {
            return false;
        };
        let same = |range: Range<usize>| ours.get(range.clone()) == next.get(range);
        let payload = u32::try_from(self.len - header_len).unwrap_or(u32::MAX);
        let expected = header::sequence(ours).map(|first| first.wrapping_add(payload));
        let flags = |tcp: &[u8]| tcp.get(13).map(|flags| flags & !PSH);
        header::sequence(next) == expected
            // Acknowledgement and offset; flags; window; urgent pointer and options.
            && same(8..13)
            && flags(ours) == flags(next)
            && same(14..16)
            && same(18..ours.len())
    }

    /// Appends the payload of the next packet of the flow.
    fn append(&mut self, packet: &[u8], key: &GroKey) {
        let start = VNET_HDR_LEN + self.len;
        let (Some(payload), Some(destination)) =
            (packet.get(key.header_len..), self.frame.get_mut(start..start + key.payload_len))
        else {
            return;
        };
        destination.copy_from_slice(payload);
        self.len += key.payload_len;
        self.packets += 1;
        self.key.last = key.last;
    }

    /// True if no packet can be appended.
    const fn is_complete(&self) -> bool {
        let GroKey { header_len, payload_len, last, .. } = self.key;
        last || self.packets >= MAX_PACKETS
            || self.len < header_len + self.packets as usize * payload_len
            || self.len + payload_len > MAX_LEN
    }

    /// Completes the headers and writes the packets.
    fn flush(&mut self, write: &mut impl FnMut(&mut [u8], u16)) {
        let packets = self.packets;
        let header = if packets > 1 { self.finish() } else { Some(VnetHeader::default()) };
        let frame = self.frame.get_mut(..VNET_HDR_LEN + self.len);
        if let (Some(header), Some(frame)) = (header, frame) {
            if let Some(destination) = frame.first_chunk_mut() {
                *destination = header.to_bytes();
            }
            write(frame, packets);
        }
        self.packets = 0;
    }

    fn finish(&mut self) -> Option<VnetHeader> {
        let GroKey { transport, ip_len, header_len, payload_len, last } = self.key;
        let len = u16::try_from(self.len).ok()?;
        let packet = self.frame.get_mut(VNET_HDR_LEN..VNET_HDR_LEN + self.len)?;
        let (ip, l4) = packet.split_at_mut_checked(ip_len)?;
        header::set_ip_len(ip, len)?;
        let gso = kind(transport, ip_len);
        if ip_len == IPV4_LEN {
            header::set_ipv4_checksum(ip)?;
        }
        let l4_len = u16::try_from(l4.len()).ok()?;
        match transport {
            Transport::Tcp if last => *l4.get_mut(13)? |= PSH,
            Transport::Tcp => {}
            Transport::Udp => *l4.get_mut(4..)?.first_chunk_mut()? = l4_len.to_be_bytes(),
        }
        let offset = transport.checksum_offset();
        let pseudo = fold(transport.pseudo_header(ip, l4_len)?);
        *l4.get_mut(offset..)?.first_chunk_mut()? = pseudo.to_ne_bytes();
        Some(VnetHeader {
            checksum: Some((u16::try_from(ip_len).ok()?, u16::try_from(offset).ok()?)),
            gso: Some((gso, u16::try_from(payload_len).ok()?)),
            header_len: u16::try_from(header_len).ok()?,
        })
    }
}

impl Coalescer {
    /// Creates an empty coalescer. The kernel provides its memory as it is used.
    #[must_use]
    pub fn new(coalesce: Coalesce) -> Self {
        Self { flows: (0..FLOWS).map(|_| HeldFlow::new()).collect(), used: 0, coalesce }
    }

    /// Sets the kinds of super-packets that the kernel accepts from now on.
    pub const fn set(&mut self, coalesce: Coalesce) {
        self.coalesce = coalesce;
    }

    /// Adds the packets that lie at these ranges of `memory`, and writes all that are held. The bytes before each,
    /// [`VNET_HDR_LEN`] of them, are clobbered. `write` is called as by [`Self::push`].
    pub fn push_all(
        &mut self,
        memory: &mut [u8],
        packets: impl Iterator<Item = Range<usize>>,
        mut write: impl FnMut(&mut [u8], u16),
    ) {
        for packet in packets {
            let start = packet.start.checked_sub(VNET_HDR_LEN);
            let frame = start.and_then(|start| memory.get_mut(start..packet.end));
            if let Some(frame) = present(frame, "a transport header was before the packet") {
                self.push(frame, &mut write);
            }
        }
        self.flush(write);
    }

    /// Adds the packet behind the first [`VNET_HDR_LEN`] bytes of `frame`, which are clobbered.
    /// Calls `write` for each frame that is ready for the TUN device, header first, with the number of
    /// packets in it.
    pub fn push(&mut self, frame: &mut [u8], mut write: impl FnMut(&mut [u8], u16)) {
        let packet = part(frame, VNET_HDR_LEN..frame.len());
        let key = GroKey::of(packet, self.coalesce).filter(|key| key.is_intact(packet));
        let Some(key) = key else {
            self.flush_between(packet, &mut write);
            write_single(frame, write);
            return;
        };
        let related = self.active().iter().map(|flow| flow.relation(packet, &key));
        let related = related.enumerate().find(|(_, relation)| *relation != Relation::NewFlow);
        let (index, relation) = match related {
            Some(related) => related,
            // No packet can follow, so this one is not held.
            None if key.last => return write_single(frame, write),
            None => (self.allocate(&mut write), Relation::NewFlow),
        };
        let flow = self.flows.get_mut(index);
        let Some(flow) = present(flow, "indices are of flows") else { return };
        match relation {
            Relation::Mergeable => flow.append(packet, &key),
            Relation::NotMergeable => {
                flow.flush(&mut write);
                flow.begin(packet, key);
            }
            Relation::NewFlow => flow.begin(packet, key),
        }
        if flow.is_complete() {
            flow.flush(&mut write);
            self.release(index);
        }
    }

    /// Writes all held packets.
    pub fn flush(&mut self, mut write: impl FnMut(&mut [u8], u16)) {
        for flow in self.flows.iter_mut().take(self.used) {
            flow.flush(&mut write);
        }
        self.used = 0;
    }

    fn active(&self) -> &[HeldFlow] {
        part(&self.flows, 0..self.used)
    }

    /// Takes the index of a free flow; if none is free, the oldest is written first.
    fn allocate(&mut self, write: &mut impl FnMut(&mut [u8], u16)) -> usize {
        if self.used < self.flows.len() {
            self.used += 1;
        } else if let Some(flow) = self.flows.first_mut() {
            flow.flush(write);
            self.flows.rotate_left(1);
        }
        self.used - 1
    }

    /// Frees the flow at `index`, which has been written.
    fn release(&mut self, index: usize) {
        if let Some(active) = self.flows.get_mut(index..self.used) {
            active.rotate_left(1);
        }
        self.used -= 1;
    }

    /// Writes the held packets between the same two addresses as a packet that cannot be merged. Its ports
    /// do not count, because a fragment has none.
    fn flush_between(&mut self, packet: &[u8], write: &mut impl FnMut(&mut [u8], u16)) {
        let ip_len =
            if packet.first().is_some_and(|first| first >> 4 == 6) { IPV6_LEN } else { IPV4_LEN };
        let mut index = 0;
        while let Some(flow) = self.flows.get_mut(index).filter(|_| index < self.used) {
            let addresses = flow.key.addresses();
            if flow.key.ip_len == ip_len
                && flow.packet().get(addresses.clone()) == packet.get(addresses)
            {
                flow.flush(write);
                self.release(index);
            } else {
                index += 1;
            }
        }
    }
}

/// The kernel's type of a super-packet of such packets.
const fn kind(transport: Transport, ip_len: usize) -> GsoType {
    match (transport, ip_len) {
        (Transport::Udp, _) => GsoType::Udp,
        (Transport::Tcp, IPV4_LEN) => GsoType::TcpV4,
        (Transport::Tcp, _) => GsoType::TcpV6,
    }
}

fn write_single(frame: &mut [u8], mut write: impl FnMut(&mut [u8], u16)) {
    if let Some(header) = frame.first_chunk_mut() {
        *header = VnetHeader::default().to_bytes();
        write(frame, 1);
    }
}
