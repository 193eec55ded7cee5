//! Cookies and rate limits of simulated devices under load.

use std::net::SocketAddr;
use std::time::Duration;
use wgsep_proto::device::control_plane::{
    UNDER_LOAD_REFUSALS, UNDER_LOAD_THRESHOLD, UNDER_LOAD_TIME,
};
use wgsep_proto::noise::cookie::{COOKIE_SECRET_LATENCY, COOKIE_SECRET_MAX_AGE};
use wgsep_proto::noise::ratelimiter::PACKETS_BURSTABLE;
use wgsep_proto::noise::tai64n::Tai64n;
use wgsep_proto::session::timers::REKEY_TIMEOUT;
use wgsep_proto::{DropCause, Event};
use wgsep_simulation::dice::Dice;
use wgsep_simulation::host::HostId;
use wgsep_simulation::link::Kind;
use wgsep_simulation::oracle::Oracle;
use wgsep_simulation::simulation::Simulation;

const SECOND: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);
/// Time until a repeated initiation has been sent and answered.
const REPEATED: Duration = Duration::from_secs(6);

fn mac2(payload: &[u8]) -> &[u8] {
    &payload[payload.len() - 16..]
}

fn set_load(simulation: &mut Simulation, host: HostId, waiting: usize) {
    simulation.host_mut(host).waiting = waiting;
}

#[test]
fn a_responder_under_load_requires_a_cookie_and_then_answers() {
    let (mut simulation, a, b) = Simulation::pair(1);
    set_load(&mut simulation, b, UNDER_LOAD_THRESHOLD);
    let tag = simulation.ping(a, b);
    simulation.run_for(SECOND);
    assert_eq!(simulation.count(b, Kind::CookieReply), 1);
    assert_eq!(simulation.count(b, Kind::Response), 0);
    assert_eq!(mac2(&simulation.last(a, Kind::Initiation).payload), [0; 16]);
    assert_eq!(simulation.last(b, Kind::CookieReply).traffic_class, 0);

    simulation.run_for(REPEATED);
    assert_eq!(simulation.count(a, Kind::Initiation), 2);
    assert_ne!(mac2(&simulation.last(a, Kind::Initiation).payload), [0; 16]);
    assert_eq!(simulation.count(b, Kind::CookieReply), 1);
    assert_eq!(simulation.host(a).replies(), [tag]);
    let under_load = |event: &Event| matches!(event, Event::UnderLoad);
    assert_eq!(simulation.host(b).count_events(under_load), 1);
}

#[test]
fn an_initiator_under_load_requires_a_cookie_with_the_response() {
    let (mut simulation, a, b) = Simulation::pair(2);
    set_load(&mut simulation, a, UNDER_LOAD_THRESHOLD);
    let tag = simulation.ping(a, b);
    simulation.run_for(SECOND);
    assert_eq!(simulation.count(a, Kind::CookieReply), 1);
    assert_eq!(simulation.count(a, Kind::Data), 0);
    simulation.run_for(REPEATED);
    assert_ne!(mac2(&simulation.last(b, Kind::Response).payload), [0; 16]);
    assert_eq!(simulation.host(a).replies(), [tag]);
}

#[test]
fn load_begins_at_an_eighth_of_the_queue_and_lasts_a_second() {
    let (mut simulation, a, b) = Simulation::pair(3);
    set_load(&mut simulation, b, UNDER_LOAD_THRESHOLD - 1);
    assert!(simulation.reaches(a, b));
    assert_eq!(simulation.count(b, Kind::CookieReply), 0);

    let (mut simulation, a, b) = Simulation::pair(4);
    let mut dice = Dice::new(99);
    let key = *simulation.host(b).public_key.as_bytes();
    let oracle = Oracle::new(&mut dice, key, [0; 32]);
    let stranger = oracle.initiate([0; 12], 1).datagram;
    let from = simulation.host(a).address;
    for (waiting, wait, replies) in [
        (UNDER_LOAD_THRESHOLD, Duration::ZERO, 1),
        (0, UNDER_LOAD_TIME - MILLISECOND, 2),
        (0, MILLISECOND, 2),
    ] {
        simulation.run_for(wait);
        set_load(&mut simulation, b, waiting);
        simulation.inject(from, b, &stranger);
        assert_eq!(simulation.count(b, Kind::CookieReply), replies);
    }
}

/// A flood that the device can just keep up with never fills its queue.
#[test]
fn rejected_initiations_are_load_too_and_a_peer_gets_through() {
    let (mut simulation, a, b) = Simulation::pair(16);
    let mut dice = Dice::new(98);
    let key = *simulation.host(b).public_key.as_bytes();
    let stranger = Oracle::new(&mut dice, key, [0; 32]).initiate([0; 12], 1).datagram;
    let from: SocketAddr = "203.0.113.5:5".parse().unwrap();
    for _ in 0..UNDER_LOAD_REFUSALS {
        simulation.inject(from, b, &stranger);
    }
    let refused = simulation.host(b).drops(DropCause::UnknownPeer);
    assert_eq!(refused, u64::from(UNDER_LOAD_REFUSALS));
    assert_eq!(simulation.count(b, Kind::CookieReply), 0);
    for replies in 1..=100 {
        simulation.inject(from, b, &stranger);
        assert_eq!(simulation.count(b, Kind::CookieReply), replies);
    }
    assert_eq!(simulation.host(b).drops(DropCause::UnknownPeer), refused, "no more was computed");
    // A flood that continues keeps up the load.
    for _ in 0..5 {
        simulation.run_for(SECOND * 9 / 10);
        for _ in 0..UNDER_LOAD_REFUSALS {
            simulation.inject(from, b, &stranger);
        }
    }
    assert_eq!(simulation.host(b).drops(DropCause::UnknownPeer), refused, "none was computed");
    // A peer is asked for a cookie, and shows it with its next initiation.
    simulation.ping(a, b);
    simulation.run_for(SECOND / 2);
    assert_eq!(simulation.count(b, Kind::Response), 0);
    simulation.run_for(REPEATED);
    assert_eq!(simulation.count(b, Kind::Response), 1);
}

#[test]
fn a_cookie_reply_moves_neither_endpoint_nor_timers() {
    let (mut simulation, a, b) = Simulation::pair(5);
    set_load(&mut simulation, b, UNDER_LOAD_THRESHOLD);
    simulation.lose(&[Kind::CookieReply]);
    simulation.ping(a, b);
    simulation.run_for(SECOND);
    let reply = simulation.last(b, Kind::CookieReply);
    let before = simulation.host(a).device.next_timeout();
    let elsewhere: SocketAddr = "203.0.113.5:5".parse().unwrap();
    simulation.inject(elsewhere, a, &reply.payload);
    assert_eq!(simulation.host(a).device.next_timeout(), before);
    assert_eq!(simulation.peer(a, b).endpoint, Some(simulation.host(b).address));
    assert_eq!(simulation.peer(a, b).rx_bytes, 0);
    // But it was taken to heart.
    simulation.run_for(REPEATED);
    assert_ne!(mac2(&simulation.last(a, Kind::Initiation).payload), [0; 16]);
}

#[test]
fn a_forged_or_repeated_cookie_reply_is_refused() {
    let (mut simulation, a, b) = Simulation::pair(6);
    set_load(&mut simulation, b, UNDER_LOAD_THRESHOLD);
    simulation.lose(&[Kind::CookieReply]);
    simulation.ping(a, b);
    simulation.run_for(SECOND);
    let reply = simulation.last(b, Kind::CookieReply);
    let refused = |simulation: &Simulation| {
        let host = simulation.host(a);
        host.drops(DropCause::InvalidCookie) + host.drops(DropCause::UnknownIndex)
    };
    let genuine = reply.payload.clone();
    for (count, at) in (1..).zip([4, 8, 31, 32, 47, 48, 63]) {
        let mut forged = genuine.clone();
        forged[at] ^= 1;
        simulation.inject(reply.from, a, &forged);
        assert_eq!(refused(&simulation), count);
    }
    simulation.inject(reply.from, a, &genuine);
    assert_eq!(refused(&simulation), 7);
    simulation.inject(reply.from, a, &genuine);
    assert_eq!(refused(&simulation), 8, "once for each mac1 sent");
}

#[test]
fn a_cookie_is_bound_to_the_address_and_port_it_was_given_to() {
    let (mut simulation, a, b) = Simulation::pair(7);
    set_load(&mut simulation, b, UNDER_LOAD_THRESHOLD);
    simulation.ping(a, b);
    simulation.run_for(SECOND);
    let mut moved = simulation.host(a).address;
    moved.set_port(1);
    simulation.rebind(a, moved);
    simulation.run_for(REPEATED);
    assert_eq!(simulation.count(b, Kind::Response), 0);
    assert_eq!(simulation.count(b, Kind::CookieReply), 2, "a new one, for the new port");
    simulation.run_for(REPEATED);
    assert_eq!(simulation.count(b, Kind::Response), 1);
}

#[test]
fn a_peer_stops_using_a_cookie_after_115_seconds() {
    let (mut simulation, a, b) = Simulation::pair(8);
    set_load(&mut simulation, b, UNDER_LOAD_THRESHOLD);
    simulation.ping(a, b);
    simulation.run_for(SECOND);
    set_load(&mut simulation, b, 0);
    let given = simulation.times(b, Kind::CookieReply)[0].after(simulation.link.latency);
    simulation.set_filter(|_| false);
    let mut with = Vec::new();
    let mut without = Vec::new();
    for _ in 0..130 {
        simulation.ping(a, b);
        simulation.run_for(SECOND);
    }
    for initiation in simulation.sent_by(a).filter(|d| d.at > given) {
        let age = initiation.at.since(given);
        if mac2(&initiation.payload) == [0; 16] { without.push(age) } else { with.push(age) }
    }
    let lifetime = COOKIE_SECRET_MAX_AGE - COOKIE_SECRET_LATENCY;
    assert!(*with.last().unwrap() < lifetime && without[0] >= lifetime);
    assert!(without[0].checked_sub(*with.last().unwrap()).unwrap() < 2 * REKEY_TIMEOUT);
}

#[test]
fn a_source_may_send_five_handshakes_at_once_and_twenty_a_second() {
    let (mut simulation, a, b) = Simulation::pair(9);
    set_load(&mut simulation, b, UNDER_LOAD_THRESHOLD);
    simulation.ping(a, b);
    simulation.run_for(SECOND);
    simulation.lose(&[Kind::Response, Kind::Initiation]);
    simulation.run_for(REPEATED);
    // With a valid mac2, the same initiation again and again: refused as a replay, or as too many.
    let initiation = simulation.last(a, Kind::Initiation);
    simulation.inject(initiation.from, b, &initiation.payload);
    simulation.run_for(SECOND);
    let drops = |simulation: &Simulation, cause| simulation.host(b).drops(cause);
    let replays = drops(&simulation, DropCause::OldTimestamp);
    for _ in 0..20 {
        simulation.inject(initiation.from, b, &initiation.payload);
    }
    assert_eq!(drops(&simulation, DropCause::OldTimestamp) - replays, PACKETS_BURSTABLE);
    assert_eq!(drops(&simulation, DropCause::RateLimited), 20 - PACKETS_BURSTABLE);
    let replays = drops(&simulation, DropCause::OldTimestamp);
    for _ in 0..100 {
        simulation.run_for(10 * MILLISECOND);
        simulation.inject(initiation.from, b, &initiation.payload);
    }
    assert_eq!(drops(&simulation, DropCause::OldTimestamp) - replays, 20);
}

#[test]
fn a_flood_of_strangers_leaves_no_trace_and_the_peer_gets_through() {
    let (mut simulation, a, b) = Simulation::pair(10);
    set_load(&mut simulation, b, UNDER_LOAD_THRESHOLD);
    let mut dice = Dice::new(98);
    let key = *simulation.host(b).public_key.as_bytes();
    let oracle = Oracle::new(&mut dice, key, [0; 32]);
    let stamp = *Tai64n::from_wall(simulation.now().wall).as_bytes();
    let stranger = oracle.initiate(stamp, 1).datagram;
    simulation.ping(a, b);
    for number in 0..2000u32 {
        let from = SocketAddr::from(((0x0a64_0000 + number).to_be_bytes(), 1000));
        simulation.inject(from, b, &stranger);
        simulation.run_for(10 * MILLISECOND);
    }
    assert_eq!(simulation.host(b).replies().len(), 0);
    assert_eq!(simulation.host(a).replies().len(), 1);
    assert_eq!(simulation.host(b).indices(), 1);
    assert!(simulation.host(b).events.len() < 10, "a flood is hardly logged");
}

#[test]
fn a_wrong_mac1_costs_no_answer() {
    let (mut simulation, a, b) = Simulation::pair(11);
    simulation.lose(&[Kind::Initiation]);
    simulation.ping(a, b);
    let initiation = simulation.last(a, Kind::Initiation);
    for waiting in [0, UNDER_LOAD_THRESHOLD] {
        set_load(&mut simulation, b, waiting);
        let mut forged = initiation.payload.clone();
        forged[120] ^= 1;
        simulation.inject(initiation.from, b, &forged);
    }
    assert_eq!(simulation.host(b).drops(DropCause::InvalidMac), 2);
    assert_eq!(simulation.sent_by(b).count(), 0);
}
