//! Consecutive packets of a flow, put together into one super-packet for the TUN device.
//!
//! The rules are those of the kernel's own receive offload (tcp_offload.c, udp_offload.c,
//! gro.c): only what splitting would give back bit for bit is put together. That means equal
//! headers, consecutive sequence numbers and identifications, payloads of equal length with at most
//! the last one shorter, and nothing after PSH. Because the kernel trusts the checksum of a
//! super-packet, that of every packet is verified before it becomes part of one; a packet with a
//! wrong one is passed on as it came.
//!
//! Packets of a flow leave in the order in which they came, whatever they are: one that cannot be
//! part of a super-packet first sends out those that wait between the same two addresses.

use super::checksum::{fold, sum};
use super::header::{self, ACK, ECE, IPV4_LEN, IPV6_LEN, PSH, Transport};
use super::vnet::{GsoType, VNET_HDR_LEN, VnetHeader};
use core::ops::Range;

/// Flows that are put together at once.
const RUNS: usize = 8;
/// Most packets of one super-packet (the kernel's UDP_MAX_SEGMENTS before 6.7).
const MAX_PACKETS: u16 = 64;
/// Longest super-packet: what its length field can say.
const MAX_LEN: usize = 65_535;
const DONT_FRAGMENT: u8 = 0x40;

/// Which kinds of super-packets the kernel takes.
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
    const fn takes(self, kind: GsoType) -> bool {
        match kind {
            GsoType::TcpV4 => self.tcp_v4,
            GsoType::TcpV6 => self.tcp_v6,
            GsoType::Udp => self.udp,
        }
    }
}

/// Packets that wait for the next of their flow.
pub struct Coalescer {
    /// In use first, the others empty; the order among them is nobody's.
    runs: Box<[Run]>,
    used: usize,
    coalesce: Coalesce,
}

/// What one flow has so far.
struct Run {
    /// Header for the kernel, then the packet.
    frame: Box<[u8]>,
    shape: Shape,
    /// Length of the packet so far.
    len: usize,
    packets: u16,
}

/// What has to be known of a packet to put it together with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    transport: Transport,
    ip_len: usize,
    header_len: usize,
    payload_len: usize,
    /// PSH: nothing comes after it.
    last: bool,
}

impl Shape {
    /// `None` unless the packet could be part of a super-packet.
    fn of(packet: &[u8], coalesce: Coalesce) -> Option<Self> {
        let (ip_len, protocol) = match packet.first()? {
            // No options; not a fragment.
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
        let l4 = packet.get(ip_len..).filter(|_| coalesce.takes(kind(transport, ip_len)))?;
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

    /// True if nothing was damaged on the way.
    fn is_intact(&self, packet: &[u8]) -> bool {
        let Some((ip, l4)) = packet.split_at_checked(self.ip_len) else { return false };
        if self.ip_len == IPV4_LEN && fold(sum(ip, 0)) != u16::MAX {
            return false;
        }
        let pseudo =
            u16::try_from(l4.len()).ok().and_then(|len| self.transport.pseudo_header(ip, len));
        pseudo.is_some_and(|pseudo| fold(sum(l4, pseudo)) == u16::MAX)
    }

    /// Where in a packet its addresses are.
    const fn addresses(&self) -> Range<usize> {
        if self.ip_len == IPV4_LEN { 12..20 } else { 8..40 }
    }

    const fn ports(&self) -> Range<usize> {
        self.ip_len..self.ip_len + 4
    }
}

/// How a packet relates to a run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Relation {
    Stranger,
    /// The same flow, but not its next packet.
    Breaks,
    Continues,
}

impl Run {
    fn new() -> Self {
        let shape = Shape {
            transport: Transport::Tcp,
            ip_len: 0,
            header_len: 0,
            payload_len: 0,
            last: true,
        };
        let frame = vec![0; VNET_HDR_LEN + MAX_LEN].into_boxed_slice();
        Self { frame, shape, len: 0, packets: 0 }
    }

    fn packet(&self) -> &[u8] {
        self.frame.get(VNET_HDR_LEN..VNET_HDR_LEN + self.len).unwrap_or_default()
    }

    fn begin(&mut self, packet: &[u8], shape: Shape) {
        let end = VNET_HDR_LEN + packet.len();
        let Some(place) = self.frame.get_mut(VNET_HDR_LEN..end) else { return };
        place.copy_from_slice(packet);
        self.shape = shape;
        self.len = packet.len();
        self.packets = 1;
    }

    fn relation(&self, packet: &[u8], shape: &Shape) -> Relation {
        let (ours, own) = (self.packet(), &self.shape);
        let same = |range: Range<usize>| ours.get(range.clone()) == packet.get(range);
        if own.transport != shape.transport
            || own.ip_len != shape.ip_len
            || !same(shape.ports())
            || !same(shape.addresses())
        {
            return Relation::Stranger;
        }
        // A run that could take no more was given away at once: see `is_complete`.
        let continues = own.header_len == shape.header_len
            && shape.payload_len <= own.payload_len
            && self.continues_ip(packet)
            && self.continues_transport(packet);
        if continues { Relation::Continues } else { Relation::Breaks }
    }

    fn continues_ip(&self, packet: &[u8]) -> bool {
        let ours = self.packet();
        let same = |range: Range<usize>| ours.get(range.clone()) == packet.get(range);
        if self.shape.ip_len == IPV6_LEN {
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

    fn continues_transport(&self, packet: &[u8]) -> bool {
        let Shape { transport, ip_len, header_len, .. } = self.shape;
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

    /// Adds the payload of a packet that continues the run.
    fn append(&mut self, packet: &[u8], shape: &Shape) {
        let start = VNET_HDR_LEN + self.len;
        let (Some(payload), Some(place)) =
            (packet.get(shape.header_len..), self.frame.get_mut(start..start + shape.payload_len))
        else {
            return;
        };
        place.copy_from_slice(payload);
        self.len += shape.payload_len;
        self.packets += 1;
        self.shape.last = shape.last;
    }

    /// True if no packet can follow.
    const fn is_complete(&self) -> bool {
        let Shape { header_len, payload_len, last, .. } = self.shape;
        last || self.packets >= MAX_PACKETS
            || self.len < header_len + self.packets as usize * payload_len
            || self.len + payload_len > MAX_LEN
    }

    /// Completes the headers and gives the run away.
    fn emit(&mut self, write: &mut impl FnMut(&mut [u8], u16)) {
        let packets = self.packets;
        let header = if packets > 1 { self.finish() } else { Some(VnetHeader::default()) };
        let frame = self.frame.get_mut(..VNET_HDR_LEN + self.len);
        if let (Some(header), Some(frame)) = (header, frame) {
            if let Some(place) = frame.first_chunk_mut() {
                *place = header.to_bytes();
            }
            write(frame, packets);
        }
        self.packets = 0;
    }

    fn finish(&mut self) -> Option<VnetHeader> {
        let Shape { transport, ip_len, header_len, payload_len, last } = self.shape;
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
    /// Nothing waits. Its memory is taken from the kernel as it is used.
    #[must_use]
    pub fn new(coalesce: Coalesce) -> Self {
        Self { runs: (0..RUNS).map(|_| Run::new()).collect(), used: 0, coalesce }
    }

    /// The kernel takes only these as super-packets, from now on.
    pub const fn set(&mut self, coalesce: Coalesce) {
        self.coalesce = coalesce;
    }

    /// Takes the packet behind the first [`VNET_HDR_LEN`] bytes of `frame`, which are clobbered.
    /// Calls `write` for each frame that is ready for the TUN device, header first, with how many
    /// packets it holds.
    pub fn push(&mut self, frame: &mut [u8], mut write: impl FnMut(&mut [u8], u16)) {
        let packet = frame.get(VNET_HDR_LEN..).unwrap_or_default();
        let shape = Shape::of(packet, self.coalesce).filter(|shape| shape.is_intact(packet));
        let Some(shape) = shape else {
            self.flush_between(packet, &mut write);
            write_single(frame, write);
            return;
        };
        let related = self.active().iter().map(|run| run.relation(packet, &shape));
        let related = related.enumerate().find(|(_, relation)| *relation != Relation::Stranger);
        let (place, relation) = match related {
            Some(related) => related,
            // A packet that ends before it begins has no need to wait.
            None if shape.last => return write_single(frame, write),
            None => (self.vacate(&mut write), Relation::Stranger),
        };
        let Some(run) = self.runs.get_mut(place) else { return };
        match relation {
            Relation::Continues => run.append(packet, &shape),
            Relation::Breaks => {
                run.emit(&mut write);
                run.begin(packet, shape);
            }
            Relation::Stranger => run.begin(packet, shape),
        }
        if run.is_complete() {
            run.emit(&mut write);
            self.release(place);
        }
    }

    /// Gives away whatever waits.
    pub fn flush(&mut self, mut write: impl FnMut(&mut [u8], u16)) {
        for run in self.runs.iter_mut().take(self.used) {
            run.emit(&mut write);
        }
        self.used = 0;
    }

    fn active(&self) -> &[Run] {
        self.runs.get(..self.used).unwrap_or_default()
    }

    /// Takes a place for another run; if there is none, that of whichever came first.
    fn vacate(&mut self, write: &mut impl FnMut(&mut [u8], u16)) -> usize {
        if self.used < self.runs.len() {
            self.used += 1;
        } else if let Some(run) = self.runs.first_mut() {
            run.emit(write);
            self.runs.rotate_left(1);
        }
        self.used - 1
    }

    /// A run was given away; the last one takes its place.
    fn release(&mut self, place: usize) {
        if let Some(active) = self.runs.get_mut(place..self.used) {
            active.rotate_left(1);
        }
        self.used -= 1;
    }

    /// Gives away what waits between the same two addresses as those of a packet that cannot: a
    /// fragment, say, has no ports to tell its flow by.
    fn flush_between(&mut self, packet: &[u8], write: &mut impl FnMut(&mut [u8], u16)) {
        let ip_len =
            if packet.first().is_some_and(|first| first >> 4 == 6) { IPV6_LEN } else { IPV4_LEN };
        let mut place = 0;
        while let Some(run) = self.runs.get_mut(place).filter(|_| place < self.used) {
            let addresses = run.shape.addresses();
            if run.shape.ip_len == ip_len
                && run.packet().get(addresses.clone()) == packet.get(addresses)
            {
                run.emit(write);
                self.release(place);
            } else {
                place += 1;
            }
        }
    }
}

/// What a super-packet of such packets is to the kernel.
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
