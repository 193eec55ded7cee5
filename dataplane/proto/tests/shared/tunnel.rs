//! Two tunnels through the interface that an embedder has, with buffers and ranges of any kind.

use super::Input;
use crate::dice::Dice;
use std::net::SocketAddr;
use std::time::Duration;
use wgsep_proto::{
    EncapsulateError, Instant, MAX_OVERHEAD, Now, PresharedKey, PrivateKey, Receive,
    TimerParameters, Tunnel,
};

/// Steps of one run.
const MAX_STEPS: usize = 64;
/// Staged packets that come out at once, and what may be with them.
const MAX_SENT_AT_ONCE: usize = 256;

/// Whatever is called with whatever arguments, nothing panics, each packet that comes out was put in, at most once, and what
/// was sealed into the caller's memory lies within it.
///
/// # Panics
/// If not.
pub fn tunnel(data: &[u8]) {
    let mut input = Input(data);
    let mut pair = Pair::new();
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        let from = usize::from(input.byte() & 1);
        pair.step(from, &mut input);
        pair.collect();
    }
}

struct Pair {
    ends: [Tunnel; 2],
    nanoseconds: u64,
    /// Datagrams that were sent to each end, and not delivered.
    under_way: [Vec<Vec<u8>>; 2],
    /// Numbers of the packets that were sent and have not arrived, by destination.
    expected: [Vec<u32>; 2],
    next: u32,
}

fn address(number: usize) -> SocketAddr {
    ([192, 0, 2, number as u8], 51820).into()
}

/// An IPv4 packet with a number, at least 24 bytes long.
fn packet(number: u32, len: usize) -> Vec<u8> {
    let mut packet = vec![0; len.max(24)];
    packet[0] = 0x45;
    let len = u16::try_from(packet.len()).unwrap_or(u16::MAX);
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    packet[20..24].copy_from_slice(&number.to_be_bytes());
    packet
}

impl Pair {
    fn new() -> Self {
        let key = |number: usize| {
            let Some(key) = PrivateKey::from_bytes([number as u8 + 1; 32]) else {
                panic!("not all zeros")
            };
            key
        };
        let end = |number: usize| {
            let (peer, random) = (key(1 - number).public_key(), Dice::new(number as u64));
            let endpoint = Some(address(1 - number));
            match Tunnel::new(key(number), peer, None, endpoint, Box::new(random)) {
                Ok(tunnel) => tunnel,
                Err(error) => panic!("{error}"),
            }
        };
        Self {
            ends: [end(0), end(1)],
            nanoseconds: 1_000_000_000,
            under_way: Default::default(),
            expected: Default::default(),
            next: 0,
        }
    }

    fn now(&self) -> Now {
        let since = Duration::from_nanos(self.nanoseconds);
        let wall = Duration::from_secs(1_800_000_000) + since;
        Now { instant: Instant::from_nanos(self.nanoseconds), wall }
    }

    fn new_packet(&mut self, from: usize, len: usize) -> Vec<u8> {
        let number = self.next;
        self.next += 1;
        self.expected[1 - from].push(number);
        packet(number, len)
    }

    fn step(&mut self, from: usize, input: &mut Input<'_>) {
        let now = self.now();
        match input.byte() % 12 {
            0 => {
                let packet = self.new_packet(from, usize::from(input.word()));
                let _sent = self.ends[from].encapsulate(&packet, now);
            }
            1 => {
                let garbage = input.bytes(100);
                let _sent = self.ends[from].encapsulate(garbage, now);
            }
            2 => self.seal_one(from, input),
            3 => self.seal_batch(from, input),
            4 | 5 => self.deliver_one(from, input),
            6 => self.deliver_batch(from, input),
            7 => {
                let mut garbage = input.bytes(200).to_vec();
                let received = self.ends[from].decapsulate(address(9), &mut garbage, now);
                assert!(!matches!(received, Ok(Some(_))), "garbage became a packet");
            }
            8 => {
                self.nanoseconds += u64::from(input.number()) * 200;
                let now = self.now();
                for end in &mut self.ends {
                    if end.next_timeout().is_some_and(|at| at <= now.instant) {
                        end.handle_timeout(now);
                    }
                }
            }
            9 => {
                let _started = self.ends[from].start_handshake(now);
            }
            10 => {
                let end = &mut self.ends[from];
                match input.byte() % 4 {
                    0 => end.set_persistent_keepalive(input.word(), now),
                    1 => end.set_endpoint(address(usize::from(input.byte())), now),
                    2 => end.set_mtu(u32::from(input.word())),
                    _ => {
                        end.set_preshared_key(
                            PresharedKey::from_bytes([input.byte() & 1; 32]),
                            now,
                        );
                    }
                }
            }
            _ => {
                let seconds = Duration::from_secs(u64::from(input.byte()));
                if let Ok(timers) = TimerParameters::default().with_rekey_timeout(seconds) {
                    self.ends[from].set_timers(timers);
                }
                while self.ends[from].poll_event().is_some() {}
            }
        }
    }

    /// Into a buffer of any length.
    fn seal_one(&mut self, from: usize, input: &mut Input<'_>) {
        let now = self.now();
        let (len, room) = (usize::from(input.word() % 2000), usize::from(input.word() % 2100));
        let packet = self.new_packet(from, len);
        let mut buffer = vec![0; room];
        match self.ends[from].encapsulate_into(&packet, &mut buffer, now) {
            Ok(Some(transmit)) => self.under_way[1 - from].push(transmit.datagram.to_vec()),
            Ok(None) => assert!(room >= packet.len() + MAX_OVERHEAD),
            Err(EncapsulateError::BufferTooShort { needed }) => {
                assert!(room < needed && needed == packet.len() + MAX_OVERHEAD);
                self.expected[1 - from].pop();
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// At ranges of any kind, some of which hold packets.
    fn seal_batch(&mut self, from: usize, input: &mut Input<'_>) {
        let now = self.now();
        let (mut memory, mut ranges) = (Vec::new(), Vec::new());
        for _ in 0..input.byte() % 40 {
            let start = memory.len();
            let packet = self.new_packet(from, usize::from(input.word() % 1500));
            memory.extend(packet);
            let off_by = usize::from(input.byte() == 0);
            ranges.push(start + off_by..memory.len() + off_by);
        }
        let mut datagrams = vec![0; usize::from(input.word())];
        let sealed = self.ends[from].encapsulate_batch(&memory, &ranges, &mut datagrams, now);
        match sealed {
            Ok(transmits) => {
                let datagrams = transmits.map(|transmit| transmit.datagram.to_vec());
                self.under_way[1 - from].extend(datagrams);
            }
            // Nothing was done.
            Err(_) => {
                let kept = self.expected[1 - from].len() - ranges.len();
                self.expected[1 - from].truncate(kept);
            }
        }
    }

    /// One that is under way, perhaps changed or for the second time.
    fn deliver_one(&mut self, to: usize, input: &mut Input<'_>) {
        let now = self.now();
        let Some(last) = self.under_way[to].len().checked_sub(1) else { return };
        let at = usize::from(input.byte()).min(last);
        let (change, keep) = (input.byte(), input.byte() & 1 == 0);
        let mut datagram = self.under_way[to][at].clone();
        if !keep {
            self.under_way[to].remove(at);
        }
        if change & 1 == 1 {
            let middle = usize::from(change) % datagram.len();
            datagram[middle] ^= change;
        }
        let received = self.ends[to].decapsulate(address(1 - to), &mut datagram, now);
        if let Ok(Some(packet)) = received {
            let number = number(packet);
            self.arrived(to, number);
        }
    }

    /// All that are under way, at ranges of any kind.
    fn deliver_batch(&mut self, to: usize, input: &mut Input<'_>) {
        let now = self.now();
        let (mut memory, mut receives) = (Vec::new(), Vec::new());
        for datagram in core::mem::take(&mut self.under_way[to]) {
            let start = memory.len();
            memory.extend(datagram);
            let off_by = usize::from(input.byte() == 1);
            receives.push(Receive::new(start + off_by..memory.len() + off_by, address(1 - to)));
        }
        if let Some(first) = receives.first_mut() {
            first.segment_len = first.segment_len.saturating_sub(usize::from(input.byte() & 1));
        }
        let received = self.ends[to].decapsulate_batch(&mut memory, &receives, now);
        let numbers: Vec<_> =
            received.into_iter().flatten().map(|received| number(received.packet)).collect();
        for number in numbers {
            self.arrived(to, number);
        }
    }

    fn arrived(&mut self, to: usize, number: u32) {
        let expected = &mut self.expected[to];
        let Some(at) = expected.iter().position(|one| *one == number) else {
            panic!("packet {number} arrived twice, or was never sent")
        };
        expected.swap_remove(at);
    }

    /// Puts what both ends have to send under way.
    fn collect(&mut self) {
        for from in [0, 1] {
            let mut sent = 0;
            while let Some(transmit) = self.ends[from].poll_transmit() {
                self.under_way[1 - from].push(transmit.datagram.to_vec());
                sent += 1;
            }
            assert!(sent < MAX_SENT_AT_ONCE, "{sent} datagrams at once");
            let excess = self.under_way[1 - from].len().saturating_sub(MAX_SENT_AT_ONCE);
            self.under_way[1 - from].drain(..excess);
        }
    }
}

fn number(packet: &[u8]) -> u32 {
    packet.get(20..24).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes)
}
