//! A network that a string of bytes describes: each decides what happens to a datagram or to time. The
//! same bytes give the same run, so this is what a fuzzer calls; here, a few thousand seeds.
//!
//! Run with `cargo run --release -p wgsep-proto --example simulation`. Days pass in each run.
#![allow(clippy::print_stdout)]

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;
use wgsep_proto::{Instant, Now, PrivateKey, Random, Tunnel};

/// The SplitMix64 generator: reproducible, and nothing for keys of consequence.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

impl Random for Dice {
    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.roll().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// What happened in a run.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    datagrams: u64,
    lost: u64,
    sent: u64,
    delivered: u64,
}

fn at(seconds: u64) -> Now {
    Now {
        instant: Instant::from_nanos((1 + seconds) * 1_000_000_000),
        wall: Duration::from_secs(1_800_000_000 + seconds),
    }
}

/// Runs two peers through whatever `script` says; nothing in it may panic, or deliver a packet that
/// was not sent.
fn run(script: &[u8]) -> Outcome {
    let key = |byte| PrivateKey::from_bytes([byte; 32]).expect("not all zeros");
    let addresses = [1, 2].map(|host| SocketAddr::from(([192, 0, 2, host], 51820)));
    let end = |ours: u8, theirs: u8, endpoint| {
        let random = Box::new(Dice(u64::from(ours)));
        let theirs = key(theirs).public_key();
        Tunnel::new(key(ours), theirs, None, Some(endpoint), random).expect("two pairs of keys")
    };
    let mut ends = [end(1, 2, addresses[1]), end(2, 1, addresses[0])];
    let mut under_way: [VecDeque<Vec<u8>>; 2] = Default::default();
    let (mut seconds, mut outcome) = (0, Outcome::default());
    let mut packet = [0; 28];
    packet[..4].copy_from_slice(&[0x45, 0, 0, 28]);

    for &step in script {
        let (from, kind, argument) = (usize::from(step & 1), (step >> 1) & 7, u64::from(step >> 4));
        let now = at(seconds);
        match kind {
            // A packet into the tunnel.
            0 => {
                packet[20..].copy_from_slice(&outcome.sent.to_be_bytes());
                ends[from]
                    .encapsulate(&packet, now)
                    .expect("an IP packet, and there is an endpoint");
                outcome.sent += 1;
            }
            // The oldest datagram is lost, ...
            1 => outcome.lost += u64::from(under_way[from].pop_front().is_some()),
            // ... damaged, or delivered twice and late.
            2 => {
                if let Some(mut copy) = under_way[from].front().cloned() {
                    let middle = copy.len() / 2;
                    copy[middle] ^= u8::from(argument == 0);
                    under_way[from].push_back(copy);
                }
            }
            // Time passes: no time, seconds, or once in a while an hour.
            3 => {
                seconds += if argument == 15 { 3600 } else { argument / 4 };
                let now = at(seconds);
                for end in &mut ends {
                    if end.next_timeout().is_some_and(|at| at <= now.instant) {
                        end.handle_timeout(now);
                    }
                }
            }
            // It arrives.
            _ => {
                if let Some(mut datagram) = under_way[from].pop_front() {
                    let inner = ends[from].decapsulate(addresses[1 - from], &mut datagram, now);
                    if let Ok(Some(inner)) = inner {
                        assert_eq!((inner.len(), &inner[..4]), (28, &packet[..4]));
                        outcome.delivered += 1;
                    }
                }
            }
        }
        for (end, under_way) in ends.iter_mut().zip(under_way.iter_mut().rev()) {
            while let Some(transmit) = end.poll_transmit() {
                outcome.datagrams += 1;
                under_way.push_back(transmit.datagram.to_vec());
            }
        }
    }
    outcome
}

fn main() {
    let runs = std::env::args().nth(1).and_then(|runs| runs.parse().ok()).unwrap_or(1000);
    let mut total = Outcome::default();
    for seed in 0..runs {
        let mut script = vec![0; 4096];
        Dice(seed).fill(&mut script);
        let outcome = run(&script);
        assert_eq!(outcome, run(&script), "seed {seed} does not give the same run twice");
        assert!(outcome.delivered <= outcome.sent, "seed {seed}: a packet came twice");
        total.datagrams += outcome.datagrams;
        total.lost += outcome.lost;
        total.sent += outcome.sent;
        total.delivered += outcome.delivered;
    }
    assert!(total.delivered > 0, "no packet ever arrived");
    println!("{runs} runs: {total:?}");
}
