//! What a program may change of a tunnel while it runs.

use crate::network::{Pair, address, events, packet, sent};
use std::time::Duration;
use wgsep_proto::{Event, TimerParameters};

const INITIATION_LEN: usize = 148;
const KEEPALIVE_LEN: usize = 32;

#[test]
fn the_next_datagram_goes_to_an_endpoint_that_was_set() {
    let mut pair = Pair::established();
    pair.a.set_endpoint(address(7), pair.now());
    pair.a.encapsulate(&packet(40), pair.now()).unwrap();
    let (destination, mut datagram) = sent(&mut pair.a).pop_front().unwrap();
    assert_eq!(destination, address(7));
    pair.b.decapsulate(address(1), &mut datagram, pair.now()).unwrap().unwrap();
    // Until the peer proves that it is elsewhere.
    pair.b.encapsulate(&packet(40), pair.now()).unwrap();
    assert_eq!(pair.deliver().len(), 1);
    let peer = *pair.a.peer();
    assert_eq!(events(&mut pair.a), [Event::EndpointMoved(peer, address(2))]);
}

#[test]
fn a_packet_waits_for_an_endpoint_no_longer_once_one_is_set() {
    let mut pair = Pair::new();
    assert!(pair.b.encapsulate(&packet(40), pair.now()).is_err());
    pair.b.set_endpoint(address(1), pair.now());
    pair.b.encapsulate(&packet(40), pair.now()).unwrap();
    assert_eq!(pair.deliver(), [packet(40)]);
}

#[test]
fn a_preshared_key_counts_from_the_next_handshake() {
    let mut pair = Pair::established();
    let key = crate::network::preshared_key(5);
    pair.a.set_preshared_key(key.clone(), pair.now());
    pair.b.encapsulate(&packet(40), pair.now()).unwrap();
    assert_eq!(pair.deliver(), [packet(40)], "the keypair stays in use");
    pair.time += 5_000;
    pair.a.start_handshake(pair.now()).unwrap();
    assert_eq!(pair.deliver_all().1.len(), 1, "the keys differ");
    pair.b.set_preshared_key(key, pair.now());
    pair.time += 5_000;
    pair.a.start_handshake(pair.now()).unwrap();
    pair.deliver();
    assert_eq!(pair.a.report(pair.now().instant).handshakes.completed, 2);
}

#[test]
fn persistent_keepalives_are_sent_in_the_interval_that_is_set() {
    let mut pair = Pair::answered();
    pair.a.set_persistent_keepalive(25, pair.now());
    let at = |time| (time, KEEPALIVE_LEN);
    assert_eq!(pair.wait_alone(99_000), [10_000, 35_000, 60_000, 85_000].map(at));
    pair.a.set_persistent_keepalive(0, pair.now());
    assert_eq!(pair.wait_alone(20_000), []);
}

/// When initiations are sent while nothing answers, in milliseconds.
fn initiations(parameters: TimerParameters) -> Vec<u64> {
    let mut pair = Pair::new();
    pair.a.set_timers(parameters);
    pair.a.encapsulate(&packet(40), pair.now()).unwrap();
    let sent = pair.wait_alone(600_000);
    sent.iter().filter(|(_, len)| *len == INITIATION_LEN).map(|(time, _)| *time).collect()
}

#[test]
fn a_longer_rekey_timeout_repeats_initiations_less_often_and_gives_up_in_the_same_time() {
    let default = TimerParameters::default();
    let usual = initiations(default);
    assert_eq!(usual.len(), 20);
    assert!(usual.windows(2).all(|pair| (5_000..=5_334).contains(&(pair[1] - pair[0]))));
    let slow = initiations(default.with_rekey_timeout(Duration::from_secs(30)).unwrap());
    assert_eq!(slow.len(), 5);
    assert!(slow.windows(2).all(|pair| (30_000..=30_334).contains(&(pair[1] - pair[0]))));
    let impatient = default.with_rekey_attempt_time(Duration::from_secs(5)).unwrap();
    assert_eq!(initiations(impatient).len(), 3);
}

#[test]
fn a_later_rekey_replaces_the_keypair_later_and_before_it_expires() {
    let rekeyed_at = |parameters: Option<TimerParameters>| {
        let mut pair = Pair::new();
        if let Some(parameters) = parameters {
            pair.a.set_timers(parameters);
        }
        pair.a.start_handshake(pair.now()).unwrap();
        pair.deliver();
        loop {
            pair.time += 1_000;
            pair.a.encapsulate(&packet(40), pair.now()).unwrap();
            let first = sent(&mut pair.a);
            let is_rekey = |(_, datagram): &(_, Vec<u8>)| datagram.len() == INITIATION_LEN;
            if first.iter().any(is_rekey) {
                return pair.time;
            }
            for (_, mut datagram) in first {
                pair.b.decapsulate(address(1), &mut datagram, pair.now()).unwrap();
            }
            // The peer answers, so that the handshake has no other reason.
            pair.b.encapsulate(&packet(40), pair.now()).unwrap();
            pair.deliver();
        }
    };
    assert_eq!(rekeyed_at(None), 120_000);
    let later = TimerParameters::default().with_rekey_after_time(Duration::from_secs(160));
    assert_eq!(rekeyed_at(Some(later.unwrap())), 160_000);
}

#[test]
fn a_later_keepalive_is_still_in_time_for_the_peer() {
    let mut pair = Pair::established();
    let timers = TimerParameters::default();
    pair.a.set_timers(timers.with_keepalive_timeout(Duration::from_secs(14)).unwrap());
    pair.b.encapsulate(&packet(40), pair.now()).unwrap();
    assert_eq!(pair.deliver(), [packet(40)]);
    pair.time = 13_999;
    pair.a.handle_timeout(pair.now());
    assert!(sent(&mut pair.a).is_empty());
    pair.time = 14_000;
    pair.a.handle_timeout(pair.now());
    let (_, mut keepalive) = sent(&mut pair.a).pop_front().unwrap();
    assert_eq!(keepalive.len(), KEEPALIVE_LEN);
    // Without it the peer would begin a handshake at 15 s.
    pair.time = 14_999;
    pair.b.handle_timeout(pair.now());
    assert!(sent(&mut pair.b).is_empty());
    pair.b.decapsulate(address(1), &mut keepalive, pair.now()).unwrap();
    pair.time = 20_000;
    pair.b.handle_timeout(pair.now());
    assert!(sent(&mut pair.b).is_empty());
}
