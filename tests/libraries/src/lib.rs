//! Both ends of a tunnel in one thread, by each library: the handshake is done, and packets are carried from one end to the
//! other.
//!
//! Each library is used as its documentation shows, with the fewest copies that its interface allows:
//!
//! | | sealed | opened |
//! |---|---|---|
//! | wgsep-proto | from the packet into the caller's datagram | in place |
//! | boringtun | from the packet into the caller's datagram | from the datagram into the caller's packet |
//! | gotatun | from a packet of its pool, which is filled, into memory that it allocates | in place |

use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

/// The two ends of a tunnel.
pub trait Ends {
    /// The name and version of the library.
    const NAME: &'static str;

    /// Ends that have completed a handshake, for packets up to this length and so many at once.
    fn establish(len: usize, batch: usize) -> Self;

    /// Seals all packets of `plain`, each of this length, at one end, and opens them at the other. Returns the bytes of packets
    /// that came out.
    fn carry(&mut self, plain: &[u8], len: usize) -> usize;
}

/// An IPv4 packet of this length in bytes, at least 20.
#[must_use]
pub fn packet(len: usize) -> Vec<u8> {
    let mut packet = vec![0x5a; len];
    packet[..20].fill(0);
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes());
    packet[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
    packet
}

const PRIVATE_KEYS: [[u8; 32]; 2] = [[0x41; 32], [0x42; 32]];

/// wgsep-proto.
pub struct Wgsep {
    ends: [wgsep_proto::Tunnel; 2],
    datagrams: Vec<u8>,
    packets: Vec<Range<usize>>,
    receives: Vec<wgsep_proto::Receive>,
}

/// A generator for tests: SplitMix64.
struct Dice(u64);

impl wgsep_proto::Random for Dice {
    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            chunk.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes()[..chunk.len()]);
        }
    }
}

/// The time does not pass: an embedder reads its clock once in each round of its loop, and the others read none for a
/// packet.
const NOW: wgsep_proto::Now = wgsep_proto::Now {
    instant: wgsep_proto::Instant::from_nanos(1_000_000_000),
    wall: Duration::from_secs(1_800_000_000),
};

fn address(number: usize) -> SocketAddr {
    ([192, 0, 2, number as u8], 51820).into()
}

impl Wgsep {
    /// Ends without a handshake.
    #[must_use]
    pub fn unconnected() -> [wgsep_proto::Tunnel; 2] {
        let keys = PRIVATE_KEYS.map(|key| wgsep_proto::PrivateKey::from_bytes(key).unwrap());
        let publics = [keys[1].public_key(), keys[0].public_key()];
        let mut number = 0;
        keys.map(|key| {
            let (peer, random) = (publics[number], Box::new(Dice(number as u64)));
            number += 1;
            wgsep_proto::Tunnel::new(key, peer, None, Some(address(number % 2)), random).unwrap()
        })
    }

    /// Carries datagrams until none is left, and calls `packet` with what comes out.
    pub fn exchange(ends: &mut [wgsep_proto::Tunnel; 2], mut packet: impl FnMut(&[u8])) {
        loop {
            let mut sent = Vec::new();
            for (from, end) in ends.iter_mut().enumerate() {
                while let Some(transmit) = end.poll_transmit() {
                    sent.push((from, transmit.datagram.to_vec()));
                }
            }
            if sent.is_empty() {
                return;
            }
            for (from, mut datagram) in sent {
                let received = ends[1 - from].decapsulate(address(from), &mut datagram, NOW);
                if let Some(received) = received.unwrap() {
                    packet(received);
                }
            }
        }
    }

    /// The end that seals.
    pub const fn first(&mut self) -> &mut wgsep_proto::Tunnel {
        &mut self.ends[0]
    }
}

impl Ends for Wgsep {
    const NAME: &'static str = "wgsep-proto";

    fn establish(len: usize, batch: usize) -> Self {
        let mut ends = Self::unconnected();
        ends[0].start_handshake(NOW).unwrap();
        Self::exchange(&mut ends, |_| panic!("no packet was sent"));
        let datagrams = vec![0; batch * (len + wgsep_proto::MAX_OVERHEAD)];
        let packets = (0..batch).map(|number| number * len..(number + 1) * len).collect();
        Self { ends, datagrams, packets, receives: Vec::with_capacity(batch) }
    }

    fn carry(&mut self, plain: &[u8], len: usize) -> usize {
        let Self { ends: [a, b], datagrams, packets, receives } = self;
        if plain.len() == len {
            let transmit = a.encapsulate_into(plain, datagrams, NOW).unwrap().unwrap();
            return b.decapsulate(address(0), transmit.datagram, NOW).unwrap().unwrap().len();
        }
        receives.clear();
        let mut end = 0;
        for transmit in a.encapsulate_batch(plain, packets, datagrams, NOW).unwrap() {
            let start = end;
            end += transmit.datagram.len();
            receives.push(wgsep_proto::Receive::new(start..end, address(0)));
        }
        let received = b.decapsulate_batch(datagrams, receives, NOW).unwrap();
        received.map(|received| received.packet.len()).sum()
    }
}

/// boringtun's `Tunn`.
pub struct Boringtun {
    ends: [boringtun::noise::Tunn; 2],
    datagrams: Vec<Vec<u8>>,
    lens: Vec<usize>,
    packet: Vec<u8>,
}

impl Boringtun {
    /// Ends without a handshake.
    #[must_use]
    pub fn ends() -> [boringtun::noise::Tunn; 2] {
        use boringtun::x25519::{PublicKey, StaticSecret};
        let keys = PRIVATE_KEYS.map(StaticSecret::from);
        let publics = [PublicKey::from(&keys[1]), PublicKey::from(&keys[0])];
        let mut number = 0;
        keys.map(|key| {
            let peer = publics[number];
            number += 1;
            boringtun::noise::Tunn::new(key, peer, None, None, number as u32, None)
        })
    }

    /// Ends that have completed a handshake.
    #[must_use]
    pub fn established() -> [boringtun::noise::Tunn; 2] {
        use boringtun::noise::TunnResult::WriteToNetwork;
        let mut ends = Self::ends();
        let [a, b] = &mut ends;
        let (mut one, mut other) = (vec![0; 2048], vec![0; 2048]);
        let WriteToNetwork(initiation) = a.format_handshake_initiation(&mut one, false) else {
            panic!("no initiation")
        };
        let WriteToNetwork(response) = b.decapsulate(None, initiation, &mut other) else {
            panic!("no response")
        };
        let WriteToNetwork(keepalive) = a.decapsulate(None, response, &mut one) else {
            panic!("no keepalive")
        };
        b.decapsulate(None, keepalive, &mut other);
        ends
    }
}

impl Ends for Boringtun {
    const NAME: &'static str = "boringtun";

    fn establish(len: usize, batch: usize) -> Self {
        let ends = Self::established();
        let datagrams = vec![vec![0; (len + 32).max(148)]; batch];
        Self { ends, datagrams, lens: vec![0; batch], packet: vec![0; len + 16] }
    }

    fn carry(&mut self, plain: &[u8], len: usize) -> usize {
        use boringtun::noise::TunnResult::{WriteToNetwork, WriteToTunnelV4};
        let Self { ends: [a, b], datagrams, lens, packet } = self;
        let packets = plain.chunks_exact(len);
        for ((plain, datagram), len) in packets.zip(&mut *datagrams).zip(&mut *lens) {
            let WriteToNetwork(sealed) = a.encapsulate(plain, datagram) else {
                panic!("no datagram")
            };
            *len = sealed.len();
        }
        let mut arrived = 0;
        for (datagram, len) in datagrams.iter().zip(&*lens) {
            let WriteToTunnelV4(opened, _) = b.decapsulate(None, &datagram[..*len], packet) else {
                panic!("no packet")
            };
            arrived += opened.len();
        }
        arrived
    }
}

/// gotatun's `Tunn`.
pub struct Gotatun {
    ends: [gotatun::noise::Tunn; 2],
    pool: gotatun::packet::PacketBufPool<2048>,
    datagrams: Vec<gotatun::packet::WgKind>,
}

impl Gotatun {
    /// An end without a handshake.
    #[must_use]
    pub fn end(
        key: gotatun::x25519::StaticSecret,
        peer: gotatun::x25519::PublicKey,
    ) -> gotatun::noise::Tunn {
        use gotatun::noise::index_table::IndexTable;
        use gotatun::noise::rate_limiter::RateLimiter;
        use gotatun::x25519::PublicKey;
        let limiter = std::sync::Arc::new(RateLimiter::new(&PublicKey::from(&key), 1000));
        let table = IndexTable::from_os_rng();
        gotatun::noise::Tunn::new(key, peer, None, None, table, limiter)
    }

    /// Ends that have completed a handshake.
    #[must_use]
    pub fn established() -> [gotatun::noise::Tunn; 2] {
        use gotatun::noise::TunnResult::WriteToNetwork;
        use gotatun::x25519::{PublicKey, StaticSecret};
        let keys = PRIVATE_KEYS.map(StaticSecret::from);
        let publics = [PublicKey::from(&keys[1]), PublicKey::from(&keys[0])];
        let mut number = 0;
        let mut ends = keys.map(|key| {
            number += 1;
            Self::end(key, publics[number - 1])
        });
        let [a, b] = &mut ends;
        let Some(initiation) = a.format_handshake_initiation(false) else {
            panic!("no initiation")
        };
        let WriteToNetwork(response) = b.handle_incoming_packet(initiation.into()) else {
            panic!("no response")
        };
        let WriteToNetwork(keepalive) = a.handle_incoming_packet(response) else {
            panic!("no keepalive")
        };
        b.handle_incoming_packet(keepalive);
        ends
    }
}

impl Ends for Gotatun {
    const NAME: &'static str = "gotatun";

    fn establish(_: usize, batch: usize) -> Self {
        let ends = Self::established();
        let pool = gotatun::packet::PacketBufPool::new(2 * batch);
        Self { ends, pool, datagrams: Vec::with_capacity(batch) }
    }

    fn carry(&mut self, plain: &[u8], len: usize) -> usize {
        use gotatun::noise::TunnResult::WriteToTunnel;
        let Self { ends: [a, b], pool, datagrams } = self;
        for plain in plain.chunks_exact(len) {
            let mut packet = pool.get();
            packet.truncate(len);
            packet.buf_mut().copy_from_slice(plain);
            let Some(sealed) = a.handle_outgoing_packet(packet, None) else {
                panic!("no datagram")
            };
            datagrams.push(sealed);
        }
        let mut arrived = 0;
        for datagram in datagrams.drain(..) {
            let WriteToTunnel(packet) = b.handle_incoming_packet(datagram) else {
                panic!("no packet")
            };
            arrived += packet.len();
        }
        arrived
    }
}
