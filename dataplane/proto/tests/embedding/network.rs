//! Two tunnels, and a network between them that a test decides on.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;
use wgsep_proto::{DropCause, Event, Instant, Now, PresharedKey, PrivateKey, Random, Tunnel};

/// Reproducible random numbers, which no key of consequence may come from.
pub struct Dice(pub u64);

impl Random for Dice {
    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            *byte = (self.0 >> 56) as u8;
        }
    }
}

/// A point in time, a day after the clocks began.
pub fn at(milliseconds: u64) -> Now {
    let since = Duration::from_secs(86_400) + Duration::from_millis(milliseconds);
    Now {
        instant: Instant::from_nanos(since.as_nanos() as u64),
        wall: Duration::from_secs(1_800_000_000) + since,
    }
}

pub fn address(number: u8) -> SocketAddr {
    ([192, 0, 2, number], 51820).into()
}

pub fn private_key(number: u8) -> PrivateKey {
    PrivateKey::from_bytes([number; 32]).unwrap()
}

/// An IPv4 packet of this length in bytes, at least 20.
pub fn packet(len: usize) -> Vec<u8> {
    let mut packet = vec![0x5a; len];
    packet[..20].fill(0);
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    packet
}

/// The tunnel of one end, with the key of this number, to the other.
pub fn tunnel(ours: u8, theirs: u8, endpoint: Option<SocketAddr>) -> Tunnel {
    let peer = private_key(theirs).public_key();
    Tunnel::new(private_key(ours), peer, None, endpoint, Box::new(Dice(ours.into()))).unwrap()
}

/// Both ends. `a` knows where `b` is, and not the other way round.
pub struct Pair {
    pub a: Tunnel,
    pub b: Tunnel,
    /// Since the start, in milliseconds.
    pub time: u64,
}

impl Pair {
    pub fn new() -> Self {
        Self { a: tunnel(1, 2, Some(address(2))), b: tunnel(2, 1, None), time: 0 }
    }

    /// A pair with a complete handshake, and no event left.
    pub fn established() -> Self {
        let mut pair = Self::new();
        pair.a.encapsulate(&packet(40), pair.now()).unwrap();
        assert_eq!(pair.deliver().len(), 1);
        while pair.a.poll_event().or_else(|| pair.b.poll_event()).is_some() {}
        pair
    }

    /// An established pair, of which neither end waits for an answer.
    pub fn answered() -> Self {
        let mut pair = Self::established();
        pair.b.encapsulate(&packet(40), pair.now()).unwrap();
        assert_eq!(pair.deliver().len(), 1);
        pair.time += 10_000;
        // The keepalive that the end owes whose answer was the last.
        pair.a.handle_timeout(pair.now());
        pair.deliver();
        pair
    }

    pub fn now(&self) -> Now {
        at(self.time)
    }

    /// Carries datagrams until none is left; returns the packets that came out.
    pub fn deliver(&mut self) -> Vec<Vec<u8>> {
        let (packets, errors) = self.deliver_all();
        assert_eq!(errors, []);
        packets
    }

    /// As [`Self::deliver`], with the causes for which datagrams were dropped.
    pub fn deliver_all(&mut self) -> (Vec<Vec<u8>>, Vec<DropCause>) {
        let (now, mut packets, mut errors) = (self.now(), Vec::new(), Vec::new());
        loop {
            let (out, back) = (sent(&mut self.a), sent(&mut self.b));
            if out.is_empty() && back.is_empty() {
                return (packets, errors);
            }
            let ends = [(&mut self.b, address(1), out), (&mut self.a, address(2), back)];
            for (end, source, datagrams) in ends {
                for (_, mut datagram) in datagrams {
                    match end.decapsulate(source, &mut datagram, now) {
                        Ok(packet) => packets.extend(packet.map(|packet| packet.to_vec())),
                        Err(cause) => errors.push(cause),
                    }
                }
            }
        }
    }

    /// Lets time pass, in which the datagrams of `a` get lost and `b` sleeps. Returns when `a` sent, in milliseconds, and the
    /// lengths.
    pub fn wait_alone(&mut self, milliseconds: u64) -> Vec<(u64, usize)> {
        let (end, mut all) = (self.time + milliseconds, Vec::new());
        loop {
            all.extend(sent(&mut self.a).iter().map(|(_, datagram)| (self.time, datagram.len())));
            let due = self.a.next_timeout().map(|at| at.since(at_start()).as_nanos());
            let due = due.map(|nanoseconds| nanoseconds.div_ceil(1_000_000) as u64);
            let Some(due) = due.filter(|due| *due <= end) else { break };
            self.time = self.time.max(due);
            self.a.handle_timeout(self.now());
        }
        self.time = end;
        all
    }
}

fn at_start() -> Instant {
    at(0).instant
}

/// What a tunnel has to send, and where to.
pub fn sent(tunnel: &mut Tunnel) -> VecDeque<(SocketAddr, Vec<u8>)> {
    let mut sent = VecDeque::new();
    while let Some(transmit) = tunnel.poll_transmit() {
        sent.push_back((transmit.endpoint.destination, transmit.datagram.to_vec()));
    }
    sent
}

pub fn events(tunnel: &mut Tunnel) -> Vec<Event> {
    std::iter::from_fn(|| tunnel.poll_event()).collect()
}

pub fn preshared_key(number: u8) -> PresharedKey {
    PresharedKey::from_bytes([number; 32])
}
