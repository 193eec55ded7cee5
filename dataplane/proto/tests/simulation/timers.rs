//! The five timers of a peer, to the nanosecond where no chance is in it.

use std::time::Duration;
use wgsep_proto::session::keypair::{REJECT_AFTER_TIME, REKEY_AFTER_TIME};
use wgsep_proto::session::peer::MAX_STAGED_PACKETS;
use wgsep_proto::session::timers::{
    KEEPALIVE_TIMEOUT, MAX_HANDSHAKE_RETRIES, RECEIVE_REKEY_AGE, REKEY_TIMEOUT,
    REKEY_TIMEOUT_JITTER_MAX, ZERO_KEY_MATERIAL_TIME,
};
use wgsep_proto::{DropCause, Event, Instant};
use wgsep_simulation::host::HostId;
use wgsep_simulation::link::Kind;
use wgsep_simulation::simulation::Simulation;

const SECOND: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);
const LATENCY: Duration = Duration::from_millis(10);
const ATTEMPTS: usize = MAX_HANDSHAKE_RETRIES as usize + 1;
/// By now the last of 20 initiations is out, and its repetition would have been due.
const GIVEN_UP: Duration = Duration::from_secs(110);

/// A pair that completed a handshake at the start of the clock; no datagram is answered from here on.
fn silent_pair(seed: u64) -> (Simulation, HostId, HostId) {
    let (mut simulation, a, b) = Simulation::pair(seed);
    assert!(simulation.reaches(a, b));
    for host in [a, b] {
        simulation.host_mut(host).answers = false;
    }
    (simulation, a, b)
}

fn set_keepalive(simulation: &mut Simulation, host: HostId, peer: HostId, seconds: u16) {
    simulation.change_peer(host, peer, |peer| {
        peer.persistent_keepalive_interval = Some(seconds);
    });
}

fn gaps(times: &[Instant]) -> Vec<Duration> {
    times.windows(2).map(|pair| pair[1].since(pair[0])).collect()
}

// ---------------------------------------------------------------- retransmit handshake

#[test]
fn twenty_initiations_then_the_staged_packets_go_and_a_new_one_starts_again() {
    let (mut simulation, a, b) = Simulation::pair(1);
    simulation.lose(&[Kind::Initiation]);
    let lost = simulation.ping(a, b);
    simulation.run_for(GIVEN_UP);
    assert_eq!(simulation.count(a, Kind::Initiation), ATTEMPTS);
    let times = simulation.times(a, Kind::Initiation);
    let attempt = times[ATTEMPTS - 1].since(times[0]);
    assert!(attempt >= 19 * REKEY_TIMEOUT, "{attempt:?}");
    assert!(attempt <= 19 * (REKEY_TIMEOUT + REKEY_TIMEOUT_JITTER_MAX), "{attempt:?}");
    let given_up = |event: &Event| matches!(event, Event::HandshakeGivenUp(_));
    assert_eq!(simulation.host(a).count_events(given_up), 1);
    let (name, to) = (simulation.host(b).public_key, simulation.host(b).address);
    let unanswered = |event: &Event| *event == Event::HandshakeUnanswered(name, to);
    assert_eq!(simulation.host(a).count_events(unanswered), 1);
    assert_eq!(simulation.host(a).drops(DropCause::StagedExpired), 1);

    simulation.heal();
    let kept = simulation.ping(a, b);
    simulation.run_for(SECOND);
    assert_eq!(simulation.host(b).requests(), [kept], "{lost} was purged");
    assert_eq!(simulation.count(a, Kind::Initiation), ATTEMPTS + 1);
}

#[test]
fn a_handshake_given_up_leaves_no_residue_after_540_seconds() {
    let (mut simulation, a, b) = Simulation::pair(2);
    simulation.lose(&[Kind::Initiation]);
    simulation.ping(a, b);
    simulation.run_for(GIVEN_UP);
    assert_eq!(simulation.host(a).indices(), 1);
    simulation.run_for(ZERO_KEY_MATERIAL_TIME);
    assert_eq!(simulation.host(a).indices(), 0);
    assert_eq!(simulation.host(a).device.next_timeout(), None);
}

#[test]
fn repetitions_are_5_seconds_and_up_to_333_ms_apart() {
    let mut extras = Vec::new();
    for seed in 0..20 {
        let (mut simulation, a, b) = Simulation::pair(seed);
        simulation.lose(&[Kind::Initiation]);
        simulation.ping(a, b);
        simulation.run_for(GIVEN_UP);
        let gaps = gaps(&simulation.times(a, Kind::Initiation));
        extras.extend(gaps.iter().map(|gap| gap.checked_sub(REKEY_TIMEOUT).unwrap()));
    }
    assert!(extras.iter().all(|extra| *extra <= REKEY_TIMEOUT_JITTER_MAX));
    // 380 throws of the dice come near both ends.
    assert!(*extras.iter().min().unwrap() < 10 * MILLISECOND);
    assert!(*extras.iter().max().unwrap() > REKEY_TIMEOUT_JITTER_MAX - 10 * MILLISECOND);
}

#[test]
fn a_stream_of_packets_asks_for_no_more_than_an_initiation_in_5_seconds() {
    let (mut simulation, a, b) = Simulation::pair(3);
    simulation.lose(&[Kind::Initiation]);
    for _ in 0..3000 {
        simulation.ping(a, b);
        simulation.run_for(100 * MILLISECOND);
    }
    let gaps = gaps(&simulation.times(a, Kind::Initiation));
    assert!(gaps.iter().all(|gap| *gap >= REKEY_TIMEOUT), "{gaps:?}");
    // Further packets reset the count of repetitions, so it does not give up after 20.
    assert!(gaps.len() >= 55, "{}", gaps.len());
}

#[test]
fn sending_a_response_counts_as_sending_an_initiation() {
    let (mut simulation, a, b) = Simulation::pair(4);
    simulation.lose(&[Kind::Response]);
    simulation.ping(a, b);
    simulation.run_for(SECOND);
    assert_eq!(simulation.count(b, Kind::Response), 1);
    let responded = simulation.times(b, Kind::Response)[0];
    simulation.lose(&[Kind::Response, Kind::Initiation]);
    simulation.ping(b, a);
    simulation.run_for(REKEY_TIMEOUT + REKEY_TIMEOUT_JITTER_MAX);
    let initiated = simulation.times(b, Kind::Initiation);
    assert_eq!(initiated.len(), 1, "what had to wait goes by itself");
    assert!(initiated[0].since(responded) >= REKEY_TIMEOUT);
}

#[test]
fn a_confirmed_handshake_stops_the_repetition_of_our_own_initiation() {
    for seed in 0..5 {
        let (mut simulation, a, b) = Simulation::pair(seed);
        let from_b = simulation.host(b).address;
        simulation.set_filter(move |datagram| {
            datagram.from != from_b || datagram.kind() != Kind::Initiation
        });
        // At once, so that the response to a is 5 s old when the repetition would be due.
        simulation.ping(b, a);
        assert!(simulation.reaches(a, b));
        simulation.run_for(60 * SECOND);
        assert_eq!(simulation.count(b, Kind::Initiation), 1, "seed {seed}");
    }
}

// ---------------------------------------------------------------- staged packets

#[test]
fn the_newest_128_packets_wait_and_arrive_in_order() {
    let (mut simulation, a, b) = Simulation::pair(5);
    let tags: Vec<_> = (0..MAX_STAGED_PACKETS + 7).map(|_| simulation.ping(a, b)).collect();
    simulation.run_for(SECOND);
    assert_eq!(simulation.host(b).requests(), tags[7..]);
    assert_eq!(simulation.host(a).drops(DropCause::StagedOverflow), 7);
    assert_eq!(simulation.count(a, Kind::Keepalive), 0, "the packets themselves confirm");
}

#[test]
fn the_responder_s_staged_packets_go_when_the_initiator_confirms() {
    let (mut simulation, a, b) = Simulation::pair(6);
    simulation.link.latency = 100 * MILLISECOND;
    // An answer would take the staged packets along.
    simulation.host_mut(b).answers = false;
    simulation.ping(a, b);
    simulation.run_for(150 * MILLISECOND);
    assert_eq!(simulation.count(b, Kind::Response), 1);
    let tags: Vec<_> = (0..3).map(|_| simulation.ping(b, a)).collect();
    assert_eq!(simulation.count(b, Kind::Data), 0);
    simulation.run_for(SECOND);
    assert_eq!(simulation.host(a).requests(), tags);
    assert_eq!(simulation.count(b, Kind::Initiation), 0);
}

// ---------------------------------------------------------------- send keepalive

#[test]
fn a_keepalive_follows_received_data_after_exactly_10_seconds() {
    let (mut simulation, a, b) = silent_pair(7);
    simulation.ping(a, b);
    let received = simulation.now().instant.after(LATENCY);
    simulation.run_for(60 * SECOND);
    assert_eq!(simulation.times(b, Kind::Keepalive), [received.after(KEEPALIVE_TIMEOUT)]);
}

#[test]
fn keepalives_are_not_answered_with_keepalives() {
    let (mut simulation, a, b) = silent_pair(8);
    simulation.ping(a, b);
    simulation.run_for(RECEIVE_REKEY_AGE - 10 * SECOND);
    // a received data in the first second, and so owed one.
    assert_eq!(simulation.count(a, Kind::Keepalive), 0);
    assert_eq!(simulation.count(b, Kind::Keepalive), 1);
}

#[test]
fn anything_sent_makes_the_keepalive_superfluous() {
    let (mut simulation, a, b) = silent_pair(9);
    simulation.ping(a, b);
    simulation.run_for(KEEPALIVE_TIMEOUT - SECOND);
    simulation.ping(b, a);
    simulation.run_for(5 * SECOND);
    assert_eq!(simulation.count(b, Kind::Keepalive), 0);
}

#[test]
fn one_keepalive_answers_all_data_received_before_it() {
    let (mut simulation, a, b) = silent_pair(10);
    simulation.ping(a, b);
    let received = simulation.now().instant.after(LATENCY);
    simulation.run_for(4 * SECOND);
    simulation.ping(a, b);
    simulation.ping(a, b);
    simulation.run_for(60 * SECOND);
    // Another is owed when it expires, and settled by the very one it sends, as in the kernel.
    assert_eq!(simulation.times(b, Kind::Keepalive), [received.after(KEEPALIVE_TIMEOUT)]);
}

#[test]
fn sending_staged_packets_of_which_there_are_none_leaves_the_owed_keepalive_alone() {
    let (mut simulation, a, b) = silent_pair(11);
    simulation.ping(a, b);
    simulation.run_for(SECOND);
    let now = simulation.now().instant;
    let data_path = simulation.host(b).device.data_path();
    let allowed_ips = data_path.allowed_ips.reader();
    let peer = &allowed_ips.value().lookup(simulation.host(a).inner_v4()).unwrap().peer;
    assert!(data_path.reserve_nonces(peer, 0, now, |_| 0).is_none());
    simulation.run_for(KEEPALIVE_TIMEOUT);
    assert_eq!(simulation.count(b, Kind::Keepalive), 1);
}

// ---------------------------------------------------------------- new handshake

#[test]
fn data_without_an_answer_makes_a_new_handshake_after_15_seconds_and_jitter() {
    let mut extras = Vec::new();
    for seed in 0..40 {
        let (mut simulation, a, b) = silent_pair(seed);
        simulation.lose(&[Kind::Keepalive, Kind::Initiation]);
        simulation.ping(a, b);
        let sent = simulation.now().instant;
        simulation.run_for(18 * SECOND);
        let initiated = simulation.times(a, Kind::Initiation)[1];
        let base = KEEPALIVE_TIMEOUT + REKEY_TIMEOUT;
        extras.push(initiated.since(sent).checked_sub(base).unwrap());
    }
    assert!(extras.iter().all(|extra| *extra <= REKEY_TIMEOUT_JITTER_MAX), "{extras:?}");
    assert!(extras.iter().max().unwrap() > extras.iter().min().unwrap());
}

#[test]
fn a_keepalive_in_time_keeps_the_session() {
    let (mut simulation, a, b) = silent_pair(12);
    for _ in 0..7 {
        simulation.ping(a, b);
        simulation.run_for(16 * SECOND);
    }
    assert_eq!(simulation.count(a, Kind::Initiation), 1);
}

#[test]
fn the_new_handshake_timer_runs_from_the_first_unanswered_packet() {
    let (mut simulation, a, b) = silent_pair(13);
    let from_b = simulation.host(b).address;
    simulation.set_filter(move |datagram| datagram.from != from_b);
    let sent = simulation.now().instant;
    for _ in 0..17 {
        simulation.ping(a, b);
        simulation.run_for(SECOND);
    }
    let after = simulation.times(a, Kind::Initiation)[1].since(sent);
    assert!(after < 16 * SECOND, "{after:?}");
}

// ---------------------------------------------------------------- zero key material

#[test]
fn keys_are_erased_540_seconds_after_the_session_began_and_then_all_is_quiet() {
    let (mut simulation, a, b) = silent_pair(14);
    let began = simulation.times(b, Kind::Response)[0];
    simulation.run_for(ZERO_KEY_MATERIAL_TIME - 2 * SECOND);
    assert_eq!((simulation.host(a).indices(), simulation.host(b).indices()), (1, 1));
    for (host, at) in [(a, began.after(LATENCY)), (b, began)] {
        let due = simulation.host(host).device.next_timeout();
        assert_eq!(due, Some(at.after(ZERO_KEY_MATERIAL_TIME)));
    }
    simulation.run_for(2 * SECOND);
    for host in [a, b] {
        assert_eq!(simulation.host(host).indices(), 0);
        assert_eq!(simulation.host(host).device.next_timeout(), None, "an idle device sleeps");
    }
}

#[test]
fn a_device_with_nothing_to_do_never_wakes() {
    let (simulation, a, b) = Simulation::pair(15);
    assert_eq!(simulation.host(a).device.next_timeout(), None);
    assert_eq!(simulation.host(b).device.next_timeout(), None);
}

// ---------------------------------------------------------------- persistent keepalive

#[test]
fn persistent_keepalives_come_once_an_interval_from_when_they_are_set() {
    let (mut simulation, a, b) = silent_pair(16);
    let start = simulation.now().instant;
    set_keepalive(&mut simulation, a, b, 20);
    simulation.run_for(99 * SECOND);
    let expected: Vec<_> = (0..5).map(|n| start.after(n * 20 * SECOND)).collect();
    assert_eq!(simulation.times(a, Kind::Keepalive), expected);
    set_keepalive(&mut simulation, a, b, 0);
    simulation.run_for(60 * SECOND);
    assert_eq!(simulation.count(a, Kind::Keepalive), 5);
}

#[test]
fn traffic_either_way_postpones_the_persistent_keepalive() {
    let (mut simulation, a, b) = silent_pair(17);
    set_keepalive(&mut simulation, a, b, 9);
    let before = simulation.count(a, Kind::Keepalive);
    for _ in 0..10 {
        simulation.run_for(5 * SECOND);
        simulation.ping(b, a);
        simulation.run_for(5 * SECOND);
        simulation.ping(a, b);
    }
    assert_eq!(simulation.count(a, Kind::Keepalive), before);
}

#[test]
fn switching_the_persistent_keepalive_on_sends_one_at_once_but_changing_it_does_not() {
    let (mut simulation, a, b) = Simulation::pair(18);
    set_keepalive(&mut simulation, a, b, 25);
    assert_eq!(simulation.count(a, Kind::Initiation), 1);
    simulation.run_for(SECOND);
    assert_eq!(simulation.count(a, Kind::Keepalive), 1);
    set_keepalive(&mut simulation, a, b, 10);
    assert_eq!(simulation.count(a, Kind::Keepalive), 1);
}

#[test]
fn link_up_sends_persistent_keepalives_and_link_down_forgets_everything() {
    let (mut simulation, a, b) = silent_pair(19);
    set_keepalive(&mut simulation, a, b, 25);
    simulation.lose(&[Kind::Data]);
    simulation.ping(a, b);
    simulation.set_up(a, false);
    assert_eq!(simulation.host(a).indices(), 0);
    assert_eq!(simulation.host(a).device.next_timeout(), None);
    let sent = simulation.sent_by(a).count();
    simulation.run_for(100 * SECOND);
    assert_eq!(simulation.sent_by(a).count(), sent);
    simulation.set_up(a, true);
    simulation.run_for(SECOND);
    assert_eq!(simulation.count(a, Kind::Initiation), 2, "however recent the last was");
    assert_eq!(
        simulation.last(a, Kind::Keepalive).at,
        simulation.last(b, Kind::Response).at.after(LATENCY)
    );
}

#[test]
fn staged_packets_that_link_down_or_the_removal_of_the_peer_gives_up_are_counted() {
    for removes_peer in [false, true] {
        let (mut simulation, a, b) = Simulation::pair(21);
        simulation.lose(&[Kind::Initiation]);
        simulation.ping(a, b);
        simulation.ping(a, b);
        simulation.run_for(SECOND);
        assert_eq!(simulation.host(a).drops(DropCause::StagedExpired), 0);
        if removes_peer {
            simulation.change_peer(a, b, |peer| peer.remove = true);
        } else {
            simulation.set_up(a, false);
        }
        assert_eq!(simulation.host(a).drops(DropCause::StagedExpired), 2, "{removes_peer}");
    }
}

#[test]
fn a_device_that_is_down_takes_no_notice_of_initiations() {
    let (mut simulation, a, b) = Simulation::pair(20);
    simulation.set_up(b, false);
    simulation.ping(a, b);
    simulation.run_for(SECOND);
    assert_eq!(simulation.sent_by(b).count(), 0);
    assert_eq!(simulation.host(b).indices(), 0);
    set_keepalive(&mut simulation, b, a, 25);
    assert_eq!(simulation.sent_by(b).count(), 0);
    simulation.set_up(b, true);
    simulation.run_for(REKEY_TIMEOUT + SECOND);
    assert!(simulation.reaches(b, a));
}

#[test]
fn the_persistent_keepalive_revives_a_handshake_that_was_given_up() {
    let (mut simulation, a, b) = Simulation::pair(21);
    simulation.lose(&[Kind::Initiation]);
    set_keepalive(&mut simulation, a, b, 30);
    simulation.run_for(GIVEN_UP);
    let given_up = |event: &Event| matches!(event, Event::HandshakeGivenUp(_));
    assert_eq!(simulation.host(a).count_events(given_up), 1);
    assert_eq!(simulation.count(a, Kind::Initiation), ATTEMPTS);
    simulation.heal();
    simulation.run_for(30 * SECOND);
    assert_eq!(simulation.count(a, Kind::Initiation), ATTEMPTS + 1);
    assert_eq!(simulation.count(a, Kind::Keepalive), 1);
}

#[test]
fn a_persistent_keepalive_shorter_than_the_rekey_timeout_never_falls_silent() {
    let (mut simulation, a, b) = Simulation::pair(22);
    // b answers an initiation, the answer is lost, and a sends nothing more.
    set_keepalive(&mut simulation, b, a, 2);
    simulation.run_for(SECOND);
    simulation.run_for(REJECT_AFTER_TIME);
    simulation.lose(&[Kind::Response]);
    simulation.set_up(a, false);
    simulation.run_for(ZERO_KEY_MATERIAL_TIME * 2);
    let last = simulation.times(b, Kind::Initiation).pop().unwrap();
    assert!(simulation.now().instant.since(last) <= 6 * SECOND);
}

// ---------------------------------------------------------------- suspend

#[test]
fn sessions_die_in_suspend_and_the_next_packet_shakes_hands() {
    let (mut simulation, a, b) = silent_pair(23);
    simulation.run_for(30 * SECOND);
    simulation.suspend(Duration::from_secs(6 * 3600));
    assert_eq!((simulation.host(a).indices(), simulation.host(b).indices()), (0, 0));
    simulation.host_mut(b).answers = true;
    assert!(simulation.reaches(a, b));
    assert_eq!(simulation.count(a, Kind::Initiation), 2);
}

#[test]
fn what_was_due_in_suspend_does_not_undo_the_handshake_it_starts() {
    let (mut simulation, a, b) = silent_pair(24);
    simulation.run_for(30 * SECOND);
    let keepalives = simulation.count(a, Kind::Keepalive);
    // The new-handshake timer is pending, and the keys are due to be erased as well on resume.
    simulation.lose(&[Kind::Data]);
    simulation.ping(a, b);
    simulation.suspend(Duration::from_secs(3600));
    simulation.heal();
    simulation.run_for(SECOND);
    assert_eq!(simulation.count(a, Kind::Initiation), 2);
    assert_eq!(simulation.count(a, Kind::Keepalive), keepalives + 1, "the response was accepted");
}

// ---------------------------------------------------------------- rekeying and old keypairs

#[test]
fn data_that_comes_late_with_the_previous_keypair_rekeys_nothing() {
    let (mut simulation, a, b) = silent_pair(25);
    simulation.run_for(REKEY_AFTER_TIME + 20 * SECOND);
    simulation.lose(&[Kind::Data]);
    simulation.ping(b, a);
    let late = simulation.last(b, Kind::Data);
    simulation.heal();
    // Sending rekeys: from here on that datagram's keypair is the previous one.
    simulation.ping(a, b);
    simulation.run_for(RECEIVE_REKEY_AGE - REKEY_AFTER_TIME - 10 * SECOND);
    let initiations = simulation.count(a, Kind::Initiation);
    assert_eq!(initiations, 2);
    simulation.inject(late.from, a, &late.payload);
    assert_eq!(simulation.host(a).requests().len(), 1, "it is accepted");
    simulation.run_for(SECOND);
    assert_eq!(simulation.count(a, Kind::Initiation), initiations);
}
