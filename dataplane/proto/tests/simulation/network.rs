//! Simulated devices over bad networks and long times: traffic always recovers, nothing leaks.

use std::net::SocketAddr;
use std::time::Duration;
use wgsep_proto::session::timers::{
    REKEY_TIMEOUT, REKEY_TIMEOUT_JITTER_MAX, ZERO_KEY_MATERIAL_TIME,
};
use wgsep_simulation::dice::Dice;
use wgsep_simulation::host::HostId;
use wgsep_simulation::link::{Kind, Link};
use wgsep_simulation::simulation::Simulation;

const SECOND: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_secs(3600);
/// A handshake's index and those of three keypairs.
const MAX_INDICES: usize = 4;

/// Pings from one host to the other until one is answered; how long that took.
fn time_to_recover(simulation: &mut Simulation, from: HostId, to: HostId) -> Duration {
    let start = simulation.now().instant;
    while !simulation.reaches(from, to) {
        let waited = simulation.now().instant.since(start);
        assert!(waited < 60 * SECOND, "no answer after {waited:?}");
    }
    simulation.now().instant.since(start)
}

fn forget_the_past(simulation: &mut Simulation, hosts: &[HostId]) {
    simulation.sent.clear();
    for host in hosts {
        simulation.host_mut(*host).received.clear();
        simulation.host_mut(*host).events.clear();
    }
}

#[test]
fn days_of_loss_reordering_and_duplication_lose_only_packets() {
    let (mut simulation, a, b) = Simulation::pair(1);
    let mut dice = Dice::new(101);
    let (mut sent, mut answered) = (0, 0);
    for _ in 0..2 * 24 {
        simulation.link = Link {
            latency: 20 * MILLISECOND,
            jitter: Duration::from_millis(dice.below(200)),
            loss: dice.below(300),
            duplication: dice.below(100),
        };
        for _ in 0..90 {
            let (from, to) = if dice.chance(500) { (a, b) } else { (b, a) };
            simulation.ping(from, to);
            sent += 1;
            simulation.run_for(Duration::from_millis(dice.below(80_000)));
            for host in [a, b] {
                assert!(simulation.host(host).indices() <= MAX_INDICES);
            }
        }
        answered += simulation.host(a).replies().len() + simulation.host(b).replies().len();
        forget_the_past(&mut simulation, &[a, b]);
    }
    // Each way loses 15 % on average; handshakes repeat until they are through.
    assert!(answered * 100 > sent * 60, "{answered} of {sent}");
    simulation.link = Link::default();
    for (from, to) in [(a, b), (b, a)] {
        time_to_recover(&mut simulation, from, to);
    }
    simulation.run_for(2 * ZERO_KEY_MATERIAL_TIME);
    for host in [a, b] {
        assert_eq!(simulation.host(host).indices(), 0);
        assert_eq!(simulation.host(host).device.next_timeout(), None);
    }
}

#[test]
fn a_total_loss_of_any_length_ends_with_the_loss() {
    for seconds in [3, 17, 60, 119, 121, 170, 200, 500, 600, 4000] {
        let (mut simulation, a, b) = Simulation::pair(seconds);
        assert!(simulation.reaches(a, b));
        simulation.set_filter(|_| false);
        for _ in 0..seconds {
            simulation.ping(a, b);
            simulation.ping(b, a);
            simulation.run_for(SECOND);
        }
        simulation.heal();
        let limit = 2 * (REKEY_TIMEOUT + REKEY_TIMEOUT_JITTER_MAX) + SECOND;
        assert!(time_to_recover(&mut simulation, a, b) <= limit, "{seconds} s");
        assert!(time_to_recover(&mut simulation, b, a) <= limit, "{seconds} s");
    }
}

#[test]
fn the_loss_of_any_one_datagram_delays_but_does_not_stop() {
    for lost in 0..8 {
        let (mut simulation, a, b) = Simulation::pair(lost);
        let mut number = 0;
        simulation.set_filter(move |_| {
            number += 1;
            number != lost + 1
        });
        for _ in 0..15 {
            simulation.ping(a, b);
            simulation.run_for(2 * SECOND);
        }
        assert!(simulation.host(a).replies().len() >= 12, "datagram {lost}");
    }
}

#[test]
fn one_side_that_restarts_is_reached_again() {
    let (mut simulation, a, b) = Simulation::pair(2);
    assert!(simulation.reaches(a, b));
    // The other has no keypair any more.
    simulation.set_up(b, false);
    simulation.set_up(b, true);
    // From b: a handshake at once. From a: once its data has gone unanswered for 15 s.
    assert!(time_to_recover(&mut simulation, b, a) <= 2 * SECOND);
    simulation.set_up(b, false);
    simulation.set_up(b, true);
    let recovery = time_to_recover(&mut simulation, a, b);
    assert!((15 * SECOND..=18 * SECOND).contains(&recovery), "{recovery:?}");
}

#[test]
fn a_nat_that_forgets_every_minute_is_held_open_or_opened_again() {
    let (mut simulation, a, b) = Simulation::pair(3);
    simulation.change_peer(a, b, |peer| peer.persistent_keepalive_interval = Some(25));
    simulation.run_for(SECOND);
    for minute in 1..120u16 {
        let rebound = SocketAddr::from(([198, 51, 100, 7], 1000 + minute));
        simulation.rebind(a, rebound);
        simulation.run_for(26 * SECOND);
        // b has learnt a's new endpoint from the keepalive.
        assert!(simulation.reaches(b, a), "minute {minute}");
        simulation.run_for(33 * SECOND);
        forget_the_past(&mut simulation, &[a, b]);
    }
}

#[test]
fn a_hub_serves_many_peers_and_keeps_them_apart() {
    let mut simulation = Simulation::new(4);
    let hub = simulation.add_host();
    let spokes: Vec<_> = (0..40).map(|_| simulation.add_host()).collect();
    for spoke in &spokes {
        simulation.introduce(hub, *spoke);
        simulation.introduce(*spoke, hub);
    }
    simulation.link.jitter = 50 * MILLISECOND;
    let mut tags = Vec::new();
    for (number, spoke) in spokes.iter().enumerate() {
        let outward = number % 2 == 0;
        let (from, to) = if outward { (hub, *spoke) } else { (*spoke, hub) };
        tags.push((from, simulation.ping(from, to)));
    }
    simulation.run_for(SECOND);
    for (from, tag) in tags {
        assert!(simulation.host(from).replies().contains(&tag));
    }
    assert_eq!(simulation.host(hub).indices(), spokes.len());
    for spoke in &spokes[..20] {
        simulation.change_peer(hub, *spoke, |peer| peer.remove = true);
    }
    assert_eq!(simulation.host(hub).indices(), spokes.len() - 20);
    assert!(!simulation.reaches(spokes[0], hub) && simulation.reaches(spokes[39], hub));
}

#[test]
fn suspends_of_every_length_are_survived_by_either_side() {
    for (seed, length) in
        (0..).zip([SECOND, 100 * SECOND, 170 * SECOND, 200 * SECOND, HOUR, 72 * HOUR])
    {
        let (mut simulation, a, b) = Simulation::pair(seed);
        simulation.change_peer(a, b, |peer| peer.persistent_keepalive_interval = Some(25));
        for _ in 0..5 {
            simulation.run_for(40 * SECOND);
            simulation.suspend(length);
            let limit = 2 * REKEY_TIMEOUT + 2 * SECOND;
            assert!(time_to_recover(&mut simulation, b, a) <= limit, "{length:?}");
            assert!(time_to_recover(&mut simulation, a, b) <= limit, "{length:?}");
        }
    }
}

#[test]
fn a_wall_clock_that_has_stopped_breaks_only_the_handshake_it_must() {
    // Two initiations with the same timestamp: the second is a replay, whatever its source.
    let (mut simulation, a, b) = Simulation::pair(5);
    simulation.ping(a, b);
    simulation.run_for(SECOND);
    let now = wgsep_proto::Now { wall: Duration::ZERO, ..simulation.now() };
    simulation.set_up(a, false);
    simulation.host_mut(a).device.set_up(true, now);
    let source = simulation.host(a).inner_v4();
    let to = simulation.host(b).inner_v4();
    let packet = wgsep_simulation::packet::request(source, to, 84, 0, 1);
    simulation.host_mut(a).device.encapsulate(&packet, now).unwrap();
    simulation.flush(a);
    simulation.run_for(SECOND);
    assert_eq!(simulation.count(b, Kind::Response), 1);
    // The repetition has the right time again.
    simulation.run_for(REKEY_TIMEOUT + SECOND);
    assert_eq!(simulation.count(b, Kind::Response), 2);
}
