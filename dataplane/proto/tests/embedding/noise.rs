//! Tunnels against `snow`, which shares no code with this crate: handshakes and data in both roles, with and without a preshared
//! key, over random keys.

use crate::dice::Dice;
use crate::network::{address, at, packet, sent};
use crate::oracle::{Oracle, Session};
use std::time::Duration;
use wgsep_proto::{Now, PresharedKey, PrivateKey, PublicKey, Tunnel};

/// Sets of keys for each of the two roles.
const KEY_SETS: u64 = 100;

/// A tunnel to the oracle, at a random time.
fn encounter(seed: u64) -> (Tunnel, Oracle, Dice, Now) {
    let mut dice = Dice::new(!seed);
    let ours = PrivateKey::generate(&mut dice);
    let preshared_key = if seed.is_multiple_of(3) { [0; 32] } else { dice.bytes() };
    let oracle = Oracle::new(&mut dice, *ours.public_key().as_bytes(), preshared_key);
    let peer = PublicKey::from_bytes(*oracle.public_key());
    let (psk, random) = (PresharedKey::from_bytes(preshared_key), Box::new(dice.clone()));
    let tunnel = Tunnel::new(ours, peer, Some(psk), Some(address(2)), random).unwrap();
    let now = at(dice.below(1 << 40));
    (tunnel, oracle, dice, now)
}

/// The label of a timestamp at this time of day (whitepaper, section 5.1): 2^62 and 10 s more, the nanoseconds without
/// their low 24 bits.
fn timestamp(wall: Duration) -> [u8; 12] {
    let seconds = (1u64 << 62) + 10 + wall.as_secs();
    let nanoseconds = wall.subsec_nanos() >> 24 << 24;
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&seconds.to_be_bytes());
    bytes[8..].copy_from_slice(&nanoseconds.to_be_bytes());
    bytes
}

/// A packet of random length each way.
fn exchange(tunnel: &mut Tunnel, session: &mut Session, dice: &mut Dice, now: Now) {
    let len = 20 + usize::try_from(dice.below(1400)).unwrap();
    let mut datagram = session.seal(&packet(len));
    let received = tunnel.decapsulate(address(2), &mut datagram, now).unwrap().unwrap();
    assert_eq!(received, &packet(len));
    tunnel.encapsulate(&packet(len), now).unwrap();
    let (_, datagram) = sent(tunnel).pop_front().unwrap();
    let (_, opened) = session.open(&datagram);
    assert_eq!(opened.len(), len.next_multiple_of(16));
    assert_eq!(opened[..len], packet(len));
    assert!(opened[len..].iter().all(|padding| *padding == 0));
}

#[test]
fn a_tunnel_answers_what_snow_initiates() {
    for seed in 0..KEY_SETS {
        let (mut tunnel, oracle, mut dice, now) = encounter(seed);
        let index = u32::try_from(dice.below(1 << 32)).unwrap();
        let pending = oracle.initiate(timestamp(now.wall), index);
        let mut initiation = pending.datagram.clone();
        assert_eq!(tunnel.decapsulate(address(2), &mut initiation, now), Ok(None));
        let (_, response) = sent(&mut tunnel).pop_front().unwrap();
        let mut session = oracle.finish(pending, &response);
        for _ in 0..3 {
            exchange(&mut tunnel, &mut session, &mut dice, now);
        }
    }
}

#[test]
fn snow_answers_what_a_tunnel_initiates() {
    for seed in 0..KEY_SETS {
        let (mut tunnel, oracle, mut dice, now) = encounter(seed);
        tunnel.start_handshake(now).unwrap();
        let (_, initiation) = sent(&mut tunnel).pop_front().unwrap();
        let index = u32::try_from(dice.below(1 << 32)).unwrap();
        let (mut response, mut session, stamp) = oracle.respond(&initiation, index);
        assert_eq!(stamp, timestamp(now.wall));
        assert_eq!(tunnel.decapsulate(address(2), &mut response, now), Ok(None));
        let (_, keepalive) = sent(&mut tunnel).pop_front().unwrap();
        assert_eq!(session.open(&keepalive), (0, Vec::new()));
        for _ in 0..3 {
            exchange(&mut tunnel, &mut session, &mut dice, now);
        }
    }
}
