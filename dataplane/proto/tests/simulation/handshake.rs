//! Handshakes between simulated devices: keypairs, rekeying, replays, simultaneous initiation.

use std::time::Duration;
use wgsep_proto::session::keypair::{REJECT_AFTER_TIME, REKEY_AFTER_TIME};
use wgsep_proto::session::timers::{RECEIVE_REKEY_AGE, REKEY_TIMEOUT};
use wgsep_proto::{Configuration, DropCause, Event, PresharedKey, PrivateKey, PublicKey};
use wgsep_simulation::host::HostId;
use wgsep_simulation::link::{Datagram, Kind};
use wgsep_simulation::simulation::Simulation;

const SECOND: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);

/// A pair that has just shaken hands, `a` being the initiator.
fn connected(seed: u64) -> (Simulation, HostId, HostId) {
    let (mut simulation, a, b) = Simulation::pair(seed);
    assert!(simulation.reaches(a, b));
    (simulation, a, b)
}

fn set_psk(simulation: &mut Simulation, host: HostId, peer: HostId, psk: [u8; 32]) {
    simulation.change_peer(host, peer, |peer| {
        peer.preshared_key = Some(PresharedKey::from_bytes(psk));
    });
}

#[test]
fn a_ping_shakes_hands_and_is_answered() {
    let (simulation, a, b) = connected(1);
    let kinds: Vec<_> = simulation.sent.iter().map(Datagram::kind).collect();
    assert_eq!(kinds, [Kind::Initiation, Kind::Response, Kind::Data, Kind::Data]);
    for (host, peer) in [(a, b), (b, a)] {
        let status = simulation.peer(host, peer);
        let age = simulation.now().wall.checked_sub(status.last_handshake).unwrap();
        assert!(age < SECOND, "{age:?}");
    }
}

#[test]
fn handshakes_travel_at_af41_and_data_at_the_default() {
    let (simulation, ..) = connected(2);
    for datagram in &simulation.sent {
        let expected = if datagram.kind() == Kind::Data { 0 } else { 0x88 };
        assert_eq!(datagram.traffic_class, expected, "{:?}", datagram.kind());
    }
}

#[test]
fn the_handshake_s_index_becomes_the_keypair_s() {
    let (simulation, a, b) = connected(3);
    let (initiation, response) =
        (simulation.last(a, Kind::Initiation), simulation.last(b, Kind::Response));
    assert_eq!(response.word(8), initiation.word(4));
    assert_eq!(simulation.last(a, Kind::Data).word(4), response.word(4));
    assert_eq!(simulation.last(b, Kind::Data).word(4), initiation.word(4));
    assert_eq!((simulation.host(a).indices(), simulation.host(b).indices()), (1, 1));
}

#[test]
fn without_staged_packets_the_initiator_confirms_with_a_keepalive() {
    let (mut simulation, a, b) = Simulation::pair(4);
    simulation.change_peer(a, b, |peer| peer.persistent_keepalive_interval = Some(25));
    simulation.run_for(SECOND);
    let kinds: Vec<_> = simulation.sent.iter().map(Datagram::kind).collect();
    assert_eq!(kinds, [Kind::Initiation, Kind::Response, Kind::Keepalive]);
}

#[test]
fn an_initiator_with_nothing_staged_still_confirms() {
    let (mut simulation, a, b) = connected(5);
    simulation.run_for(REKEY_AFTER_TIME);
    let keepalives = simulation.count(a, Kind::Keepalive);
    assert!(simulation.reaches(a, b));
    // The old keypair carried the ping, which asked for the new one.
    assert_eq!(simulation.count(a, Kind::Initiation), 2);
    assert_eq!(simulation.count(a, Kind::Keepalive), keepalives + 1);
}

#[test]
fn equal_preshared_keys_connect_and_different_ones_do_not() {
    let (mut simulation, a, b) = Simulation::pair(6);
    set_psk(&mut simulation, a, b, [7; 32]);
    assert!(!simulation.reaches(a, b));
    let refused = |event: &Event| matches!(event, Event::ResponseRefused(_));
    assert_eq!(simulation.host(a).count_events(refused), 1);
    set_psk(&mut simulation, b, a, [7; 32]);
    simulation.run_for(REKEY_TIMEOUT + SECOND);
    assert!(simulation.reaches(a, b));
}

/// The initiator sees at once that keys differ; the responder only that nothing ever follows.
#[test]
fn both_sides_report_different_preshared_keys_once() {
    let (mut simulation, a, b) = Simulation::pair(6);
    set_psk(&mut simulation, a, b, [7; 32]);
    simulation.ping(a, b);
    let never = |event: &Event| matches!(event, Event::NeverConfirmed(_));
    simulation.run_for(3 * REKEY_TIMEOUT);
    assert_eq!(simulation.host(b).count_events(never), 0, "it may yet come");
    simulation.run_for(10 * REKEY_TIMEOUT);
    assert_eq!(simulation.host(b).count_events(never), 1);
    let refused = |event: &Event| matches!(event, Event::ResponseRefused(_));
    assert!(simulation.host(a).count_events(refused) > 3);
    assert!(simulation.host(a).drops(DropCause::InvalidResponse) > 3);
    let unanswered = |event: &Event| matches!(event, Event::HandshakeUnanswered(..));
    assert_eq!(simulation.host(a).count_events(unanswered), 1);
}

#[test]
fn sessions_renewed_for_an_hour_cause_no_complaint() {
    let (mut simulation, a, b) = connected(6);
    for _ in 0..60 {
        simulation.run_for(60 * SECOND);
        simulation.ping(a, b);
    }
    let complaint = |event: &Event| !matches!(event, Event::HandshakeComplete { .. });
    assert!(simulation.count(a, Kind::Initiation) > 10);
    for host in [a, b] {
        assert_eq!(simulation.host(host).count_events(complaint), 0);
    }
}

#[test]
fn a_message_for_another_key_is_reported_with_its_sender() {
    let (mut simulation, a, b) = connected(7);
    let mut initiation = simulation.last(a, Kind::Initiation).payload;
    initiation[120] ^= 1;
    let from = "203.0.113.9:9".parse().unwrap();
    simulation.inject(from, b, &initiation);
    let is_reported = |event: &Event| *event == Event::InvalidMac(from);
    assert_eq!(simulation.host(b).count_events(is_reported), 1);
    assert_eq!(simulation.host(b).drops(DropCause::InvalidMac), 1);
}

#[test]
fn a_preshared_key_changed_in_mid_session_counts_from_the_next_handshake() {
    let (mut simulation, a, b) = connected(7);
    set_psk(&mut simulation, a, b, [1; 32]);
    assert!(simulation.reaches(a, b), "the session is kept");
    assert_eq!(simulation.count(a, Kind::Initiation), 1);
    simulation.run_for(REJECT_AFTER_TIME);
    assert!(!simulation.reaches(a, b));
    set_psk(&mut simulation, b, a, [1; 32]);
    simulation.run_for(REKEY_TIMEOUT + SECOND);
    assert!(simulation.reaches(a, b));
}

/// As the kernel's: the key is mixed in with the response, by whichever is set then.
#[test]
fn a_preshared_key_changed_while_a_handshake_is_under_way_counts_for_its_response() {
    for (changed, expected) in [([1; 32], true), ([2; 32], false)] {
        let (mut simulation, a, b) = Simulation::pair(7);
        simulation.link.latency = 100 * MILLISECOND;
        set_psk(&mut simulation, b, a, [1; 32]);
        simulation.ping(a, b);
        simulation.run_for(150 * MILLISECOND);
        assert_eq!(simulation.count(b, Kind::Response), 1);
        set_psk(&mut simulation, a, b, changed);
        simulation.run_for(SECOND);
        assert_eq!(!simulation.host(a).replies().is_empty(), expected);
        assert_eq!(simulation.count(a, Kind::Initiation), 1);
        // The next one succeeds with the key that both have.
        set_psk(&mut simulation, b, a, changed);
        simulation.run_for(REKEY_TIMEOUT + SECOND);
        assert!(simulation.reaches(a, b));
    }
}

#[test]
fn the_initiator_alone_rekeys_after_120_seconds_of_sending() {
    let (mut simulation, a, b) = connected(8);
    let born = simulation.times(a, Kind::Initiation)[0];
    for _ in 0..700 {
        simulation.ping(b, a);
        simulation.run_for(SECOND);
    }
    let times = simulation.times(a, Kind::Initiation);
    assert_eq!(simulation.count(b, Kind::Initiation), 0);
    assert_eq!(times.len(), 6);
    let mut last = born;
    for at in &times[1..] {
        let period = at.since(last);
        assert!(period >= REKEY_AFTER_TIME && period < REKEY_AFTER_TIME + 2 * SECOND, "{period:?}");
        last = *at;
    }
    assert_eq!(simulation.host(b).replies().len(), 700, "no packet was lost on the way");
}

#[test]
fn a_receiver_s_last_minute_rekey_comes_at_165_seconds() {
    let (mut simulation, a, b) = connected(10);
    let start = simulation.now().instant;
    // Silent until 165 s have passed: nothing was sent after 120 s that would have rekeyed.
    simulation.run_for(RECEIVE_REKEY_AGE - 10 * SECOND);
    assert_eq!(simulation.count(a, Kind::Initiation), 1);
    simulation.lose(&[Kind::Initiation]);
    simulation.host_mut(a).answers = false;
    let mut hurried = None;
    for _ in 0..18 {
        simulation.ping(b, a);
        simulation.run_for(SECOND);
        if simulation.count(a, Kind::Initiation) == 2 && hurried.is_none() {
            hurried = Some(simulation.now().instant.since(start));
        }
    }
    // a's keepalive, 10 s after it first received, would rekey no sooner than this.
    let hurried = hurried.unwrap();
    assert!(hurried + SECOND >= RECEIVE_REKEY_AGE && hurried < RECEIVE_REKEY_AGE + 2 * SECOND);
}

#[test]
fn a_receiver_hurries_anew_with_every_keypair() {
    let (mut simulation, a, b) = connected(28);
    simulation.host_mut(a).answers = false;
    for rekeys in 1..=3 {
        // a owes a keepalive for this, but with the keypair too young to be replaced.
        simulation.run_for(RECEIVE_REKEY_AGE);
        assert_eq!(simulation.count(a, Kind::Initiation), rekeys);
        simulation.ping(b, a);
        simulation.run_for(SECOND);
        assert_eq!(simulation.count(a, Kind::Initiation), rekeys + 1);
    }
}

#[test]
fn the_responder_does_not_use_the_new_keypair_before_the_initiator_did() {
    let (mut simulation, a, b) = connected(11);
    let old = simulation.last(b, Kind::Data).word(4);
    simulation.run_for(REKEY_AFTER_TIME);
    // The rekey goes through but for its confirmation.
    let a_address = simulation.host(a).address;
    simulation.set_filter(move |datagram| {
        datagram.from != a_address || datagram.kind() == Kind::Initiation
    });
    simulation.ping(a, b);
    simulation.run_for(100 * MILLISECOND);
    assert_eq!(simulation.count(b, Kind::Response), 2);
    simulation.ping(b, a);
    assert_eq!(simulation.last(b, Kind::Data).word(4), old);
    simulation.heal();
    assert!(simulation.reaches(a, b));
    assert_ne!(simulation.last(b, Kind::Data).word(4), old);
}

#[test]
fn packets_under_way_with_the_previous_keypair_still_arrive() {
    let (mut simulation, a, b) = connected(12);
    simulation.run_for(REKEY_AFTER_TIME);
    simulation.lose(&[Kind::Data]);
    simulation.ping(a, b);
    let late = simulation.last(a, Kind::Data);
    simulation.run_for(SECOND);
    simulation.heal();
    assert!(simulation.reaches(a, b));
    let before = simulation.host(b).requests().len();
    simulation.inject(late.from, b, &late.payload);
    assert_eq!(simulation.host(b).requests().len(), before + 1);
}

#[test]
fn nothing_is_accepted_or_sent_with_a_keypair_of_180_seconds() {
    let (mut simulation, a, b) = connected(13);
    let start = simulation.times(a, Kind::Initiation)[0];
    simulation.lose(&[Kind::Data]);
    simulation.ping(a, b);
    let old = simulation.last(a, Kind::Data);
    simulation.heal();
    // An answer, or a would find the session dead and make a new one.
    assert!(simulation.reaches(a, b));
    let elapsed = simulation.now().instant.since(start);
    // Each side's keypair was born at its own time.
    simulation.run_for(REJECT_AFTER_TIME + SECOND - elapsed);
    simulation.lose(&[Kind::Initiation]);
    let refused = simulation.host(b).drops(DropCause::KeypairExpired);
    simulation.inject(old.from, b, &old.payload);
    assert_eq!(simulation.host(b).drops(DropCause::KeypairExpired), refused + 1);
    let sent = simulation.count(a, Kind::Data);
    simulation.ping(a, b);
    assert_eq!(simulation.count(a, Kind::Data), sent);
    assert!(simulation.count(a, Kind::Initiation) > 1);
}

#[test]
fn simultaneous_initiation_converges_and_traffic_flows_both_ways() {
    for seed in 0..150 {
        let (mut simulation, a, b) = Simulation::pair(seed);
        let (from_a, from_b) = (simulation.ping(a, b), simulation.ping(b, a));
        // Chance parts the two at the first repetition, or one of the next.
        simulation.run_for(4 * REKEY_TIMEOUT);
        assert!(simulation.host(a).replies().contains(&from_a), "seed {seed}");
        assert!(simulation.host(b).replies().contains(&from_b), "seed {seed}");
        for host in [a, b] {
            assert!(simulation.host(host).indices() <= 4, "seed {seed}");
        }
    }
}

/// Each packet may cause an initiation. With a jitter of a third of a second and a millisecond for a message,
/// one retry in some hundred crosses; without it, all would.
#[test]
fn simultaneous_initiation_under_steady_traffic_of_both_ends_converges_with_the_first_retry() {
    let (mut retries, seeds) = (0, 100);
    for seed in 0..seeds {
        let (mut simulation, a, b) = Simulation::pair(seed);
        let limit = simulation.now().instant.after(4 * REKEY_TIMEOUT);
        loop {
            simulation.ping(a, b);
            simulation.ping(b, a);
            simulation.run_for(2 * MILLISECOND);
            if !simulation.host(a).replies().is_empty() && !simulation.host(b).replies().is_empty()
            {
                break;
            }
            assert!(simulation.now().instant < limit, "seed {seed}");
        }
        let initiations =
            simulation.count(a, Kind::Initiation).max(simulation.count(b, Kind::Initiation));
        retries += initiations - 1;
    }
    assert!(retries <= seeds as usize * 11 / 10, "{retries} retries in {seeds} cases");
}

#[test]
fn a_response_may_take_almost_until_the_next_attempt() {
    let (mut simulation, a, b) = Simulation::pair(14);
    simulation.link.latency = Duration::from_millis(2400);
    let tag = simulation.ping(a, b);
    simulation.run_for(10 * SECOND);
    assert_eq!(simulation.host(b).requests(), [tag]);
    assert_eq!(simulation.count(a, Kind::Initiation), 1);
}

#[test]
fn a_replayed_initiation_is_refused_and_reported() {
    let (mut simulation, a, b) = connected(15);
    let initiation = simulation.last(a, Kind::Initiation);
    let responses = simulation.count(b, Kind::Response);
    simulation.run_for(SECOND);
    simulation.inject("203.0.113.9:9".parse().unwrap(), b, &initiation.payload);
    assert_eq!(simulation.count(b, Kind::Response), responses);
    let replayed = |event: &Event| matches!(event, Event::InitiationReplayed(_));
    assert_eq!(simulation.host(b).count_events(replayed), 1);
    assert_eq!(simulation.peer(b, a).endpoint, Some(simulation.host(a).address));
    assert!(simulation.reaches(a, b));
}

#[test]
fn a_replayed_response_finds_no_handshake() {
    let (mut simulation, a, b) = connected(16);
    let response = simulation.last(b, Kind::Response);
    let (unknown, indices) =
        (simulation.host(a).drops(DropCause::UnknownIndex), simulation.host(a).indices());
    simulation.inject("203.0.113.9:9".parse().unwrap(), a, &response.payload);
    assert_eq!(simulation.host(a).drops(DropCause::UnknownIndex), unknown + 1);
    assert_eq!(simulation.host(a).indices(), indices);
    assert_eq!(simulation.peer(a, b).endpoint, Some(simulation.host(b).address));
}

#[test]
fn an_invalid_response_leaves_the_handshake_pending_for_the_valid_one() {
    let (mut simulation, a, b) = Simulation::pair(17);
    simulation.lose(&[Kind::Response]);
    let tag = simulation.ping(a, b);
    simulation.run_for(100 * MILLISECOND);
    simulation.heal();
    let response = simulation.last(b, Kind::Response);
    let public_key = *simulation.host(a).public_key.as_bytes();
    for at in [13, 50] {
        let mut forged = response.payload.clone();
        forged[at] ^= 1;
        wgsep_simulation::oracle::add_macs(&public_key, &mut forged);
        simulation.inject(response.from, a, &forged);
    }
    let refused = |event: &Event| matches!(event, Event::ResponseRefused(_));
    assert_eq!(simulation.host(a).count_events(refused), 2);
    simulation.inject(response.from, a, &response.payload);
    simulation.run_for(SECOND);
    assert_eq!(simulation.host(a).replies(), [tag]);
}

#[test]
fn initiations_within_20_ms_are_answered_once() {
    let (mut simulation, a, b) = Simulation::pair(18);
    simulation.lose(&[Kind::Initiation]);
    for _ in 0..2 {
        simulation.ping(a, b);
        simulation.run_for(REKEY_TIMEOUT);
    }
    let initiations: Vec<_> =
        simulation.sent_by(a).filter(|d| d.kind() == Kind::Initiation).cloned().collect();
    assert_eq!(initiations.len(), 2);
    simulation.inject(initiations[0].from, b, &initiations[0].payload);
    simulation.inject(initiations[1].from, b, &initiations[1].payload);
    assert_eq!(simulation.count(b, Kind::Response), 1);
    simulation.run_for(20 * MILLISECOND);
    simulation.inject(initiations[1].from, b, &initiations[1].payload);
    assert_eq!(simulation.count(b, Kind::Response), 2, "it was refused without effect");
}

#[test]
fn low_order_public_keys_may_be_configured_and_never_complete() {
    let (mut simulation, a, _) = Simulation::pair(19);
    let mut one = [0; 32];
    one[0] = 1;
    for point in [[0; 32], one] {
        let mut peer = wgsep_proto::PeerConfiguration::new(PublicKey::from_bytes(point));
        peer.endpoint = Some("192.0.2.9:9".parse().unwrap());
        peer.persistent_keepalive_interval = Some(1);
        simulation.configure_peer(a, peer);
    }
    simulation.run_for(60 * SECOND);
    assert_eq!(simulation.host(a).device.peers().count(), 3);
    assert_eq!(simulation.sent_by(a).count(), 0);
    assert_eq!(simulation.host(a).indices(), 0);
}

#[test]
fn a_stranger_with_our_public_key_gets_no_answer() {
    let mut simulation = Simulation::new(20);
    let (a, b) = (simulation.add_host(), simulation.add_host());
    simulation.introduce(a, b);
    assert!(!simulation.reaches(a, b));
    assert_eq!(simulation.sent_by(b).count(), 0);
    let key = simulation.host(a).public_key;
    let unknown = |event: &Event| matches!(event, Event::UnknownPeer(_, of) if *of == key);
    assert_eq!(simulation.host(b).count_events(unknown), 1);
    assert_eq!(simulation.host(b).drops(DropCause::UnknownPeer), 1);
    assert_eq!(simulation.host(b).indices(), 0);
}

#[test]
fn a_device_without_a_key_is_deaf_and_dumb() {
    let (mut simulation, a, b) = connected(21);
    simulation.configure(b, Configuration { private_key: Some(None), ..Configuration::default() });
    let before = simulation.sent_by(b).count();
    simulation.run_for(REJECT_AFTER_TIME);
    assert!(!simulation.reaches(a, b) && !simulation.reaches(b, a));
    assert_eq!(simulation.sent_by(b).count(), before);
}

#[test]
fn a_private_key_is_returned_clamped_and_the_same_key_changes_nothing() {
    let (mut simulation, a, b) = connected(22);
    let key = simulation.host(a).device.status().private_key.unwrap();
    let mut unclamped = *key.as_bytes();
    unclamped[0] |= 7;
    unclamped[31] |= 128;
    let same = PrivateKey::from_bytes(unclamped);
    simulation.configure(a, Configuration { private_key: Some(same), ..Default::default() });
    assert_eq!(simulation.host(a).device.status().private_key.unwrap().as_bytes(), key.as_bytes());
    assert!(simulation.reaches(a, b));
    assert_eq!(simulation.count(a, Kind::Initiation), 1, "the session was kept");
}

#[test]
fn a_new_private_key_allows_an_initiation_at_once_and_only_receives_with_the_old_keypair() {
    let (mut simulation, a, b) = connected(23);
    let private_key = PrivateKey::from_bytes([0x42; 32]).unwrap();
    let public_key = private_key.public_key();
    simulation
        .configure(a, Configuration { private_key: Some(Some(private_key)), ..Default::default() });
    // b does not know the key yet, but the old keypair still opens what it sends.
    simulation.ping(b, a);
    simulation.run_for(100 * MILLISECOND);
    assert_eq!(simulation.host(a).requests().len(), 1);
    assert_eq!(simulation.host(b).replies().len(), 0);
    // The reply it wanted to send is an initiation, although the last is a second old.
    assert_eq!(simulation.count(a, Kind::Initiation), 2);

    simulation.host_mut(a).public_key = public_key;
    simulation.introduce(b, a);
    simulation.run_for(REKEY_TIMEOUT + SECOND);
    assert!(simulation.reaches(a, b));
}

#[test]
fn our_own_key_is_no_peer_and_one_that_becomes_ours_goes() {
    let (mut simulation, a, b) = connected(24);
    let own = simulation.host(a).as_peer();
    simulation.configure_peer(a, own);
    assert_eq!(simulation.host(a).device.peers().count(), 1);
    let theirs = simulation.host(b).device.status().private_key;
    simulation.configure(a, Configuration { private_key: Some(theirs), ..Default::default() });
    assert_eq!(simulation.host(a).device.peers().count(), 0);
    assert_eq!(simulation.host(a).indices(), 0);
}

#[test]
fn removal_in_mid_handshake_frees_the_index_at_once() {
    let (mut simulation, a, b) = Simulation::pair(25);
    simulation.lose(&[Kind::Response]);
    simulation.ping(a, b);
    simulation.run_for(100 * MILLISECOND);
    assert_eq!((simulation.host(a).indices(), simulation.host(b).indices()), (1, 1));
    let response = simulation.last(b, Kind::Response);
    for (host, peer) in [(a, b), (b, a)] {
        simulation.change_peer(host, peer, |peer| peer.remove = true);
        assert_eq!(simulation.host(host).indices(), 0);
        assert_eq!(simulation.host(host).device.next_timeout(), None);
    }
    simulation.inject(response.from, a, &response.payload);
    assert_eq!(simulation.host(a).indices(), 0);
}

#[test]
fn a_removed_peer_s_datagrams_are_refused_and_its_return_needs_a_handshake() {
    let (mut simulation, a, b) = connected(26);
    simulation.change_peer(b, a, |peer| peer.remove = true);
    assert!(!simulation.reaches(a, b));
    simulation.introduce(b, a);
    simulation.run_for(20 * SECOND);
    assert!(simulation.reaches(a, b));
    assert!(simulation.count(a, Kind::Initiation) >= 2);
}

#[test]
fn a_host_that_only_receives_keeps_the_tunnel_alive() {
    let (mut simulation, a, b) = connected(27);
    simulation.host_mut(a).answers = false;
    for _ in 0..1000 {
        simulation.ping(b, a);
        simulation.run_for(SECOND);
    }
    assert_eq!(simulation.host(a).requests().len(), 1000);
    assert_eq!(simulation.count(b, Kind::Initiation), 0);
}
