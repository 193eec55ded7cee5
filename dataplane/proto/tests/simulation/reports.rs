//! What is reported of peers: states, counters, and the round trip of a handshake.

use std::time::Duration;

use wgsep_proto::device::control_plane::{PeerReport, ReportItem, SessionState, StatusCursor};
use wgsep_proto::session::handshakes::HandshakeFailure;
use wgsep_proto::session::keypair::REJECT_AFTER_TIME;
use wgsep_proto::session::timers::REKEY_ATTEMPT_TIME;
use wgsep_proto::{AllowedIp, Configuration, PresharedKey};
use wgsep_simulation::host::HostId;
use wgsep_simulation::link::Kind;
use wgsep_simulation::simulation::Simulation;

const SECOND: Duration = Duration::from_secs(1);

/// The reports of all peers of a host, each with its allowed IPs.
fn reports(simulation: &Simulation, host: HostId) -> Vec<(PeerReport, Vec<AllowedIp>)> {
    let (control, now) = (simulation.host(host).device.control_plane(), simulation.now().instant);
    let mut reports: Vec<(PeerReport, Vec<AllowedIp>)> = Vec::new();
    let mut cursor = StatusCursor::default();
    while let Some(item) = control.next_report(&mut cursor, now) {
        match item {
            ReportItem::Peer(report) => reports.push((report, Vec::new())),
            ReportItem::AllowedIp(allowed_ip) => reports.last_mut().unwrap().1.push(allowed_ip),
        }
    }
    reports
}

/// The report of the only peer of a host.
fn report(simulation: &Simulation, host: HostId) -> PeerReport {
    let [(report, _)] = reports(simulation, host)[..] else { panic!() };
    report
}

fn failures(report: &PeerReport, of: HandshakeFailure) -> u64 {
    report.handshakes.failures().find(|(failure, _)| *failure == of).unwrap().1
}

#[test]
fn a_peer_is_idle_handshaking_established_and_expired_in_turn() {
    let (mut simulation, a, b) = Simulation::pair(1);
    let state = |simulation: &Simulation, host| report(simulation, host).state;
    assert_eq!(state(&simulation, a), SessionState::Idle);
    simulation.lose(&[Kind::Response]);
    simulation.ping(a, b);
    simulation.run_for(SECOND);
    assert_eq!(state(&simulation, a), SessionState::Handshaking);
    // Its keypair is not confirmed.
    assert_eq!(state(&simulation, b), SessionState::Handshaking);
    simulation.heal();
    simulation.run_for(10 * SECOND);
    assert!(simulation.reaches(a, b));
    for host in [a, b] {
        assert_eq!(state(&simulation, host), SessionState::Established);
    }
    simulation.run_for(REJECT_AFTER_TIME + SECOND);
    for host in [a, b] {
        assert_eq!(state(&simulation, host), SessionState::Expired);
    }
}

#[test]
fn both_sides_count_what_passes_and_measure_the_round_trip() {
    let (mut simulation, a, b) = Simulation::pair(2);
    simulation.link.latency = Duration::from_millis(40);
    assert!(simulation.reaches(a, b));
    assert!(simulation.reaches(a, b));
    simulation.run_for(SECOND);
    let (ours, theirs) = (report(&simulation, a), report(&simulation, b));
    for (report, initiations, responses) in [(ours, 1, 0), (theirs, 0, 1)] {
        let counters = report.handshakes;
        assert_eq!((counters.initiations, counters.responses), (initiations, responses));
        assert_eq!(counters.completed, 1);
        assert!(counters.failures().all(|(_, count)| count == 0));
        let round_trip = report.round_trip.unwrap();
        assert!(round_trip >= Duration::from_millis(80), "{round_trip:?}");
        assert!(round_trip < Duration::from_millis(90), "{round_trip:?}");
    }
    for (sent, received) in [(ours, theirs), (theirs, ours)] {
        assert_eq!(sent.tx_packets, received.rx_packets);
        assert_eq!(sent.tx_bytes, received.rx_bytes);
    }
    let sent = u64::try_from(simulation.sent_by(a).count()).unwrap();
    assert!(sent >= 3);
    assert_eq!(ours.tx_packets, sent);
    let status = simulation.peer(a, b);
    assert_eq!((ours.tx_bytes, ours.rx_bytes), (status.tx_bytes, status.rx_bytes));
    assert_eq!(ours.last_handshake, status.last_handshake);
    assert_eq!(ours.endpoint, status.endpoint);
}

#[test]
fn each_unanswered_initiation_is_counted_and_that_all_were_given_up() {
    let (mut simulation, a, b) = Simulation::pair(3);
    simulation.lose(&[Kind::Initiation]);
    simulation.ping(a, b);
    simulation.run_for(REKEY_ATTEMPT_TIME + 30 * SECOND);
    let report = report(&simulation, a);
    assert_eq!(report.handshakes.initiations, 20);
    assert_eq!(failures(&report, HandshakeFailure::Unanswered), 20);
    assert_eq!(failures(&report, HandshakeFailure::GivenUp), 1);
    assert_eq!((report.state, report.round_trip), (SessionState::Idle, None));
}

#[test]
fn different_preshared_keys_are_seen_on_both_sides() {
    let (mut simulation, a, b) = Simulation::pair(4);
    simulation.change_peer(a, b, |peer| {
        peer.preshared_key = Some(PresharedKey::from_bytes([7; 32]));
    });
    simulation.ping(a, b);
    simulation.run_for(20 * SECOND);
    let (ours, theirs) = (report(&simulation, a), report(&simulation, b));
    assert_eq!(failures(&ours, HandshakeFailure::BadResponse), ours.handshakes.initiations);
    assert_eq!(failures(&theirs, HandshakeFailure::Unconfirmed), theirs.handshakes.responses - 1);
    assert!(theirs.handshakes.responses >= 3 && theirs.handshakes.completed == 0);
}

#[test]
fn without_a_private_key_and_with_a_replayed_initiation_the_cause_is_counted() {
    let (mut simulation, a, b) = Simulation::pair(5);
    assert!(simulation.reaches(a, b));
    let initiation = simulation.last(a, Kind::Initiation);
    let from = simulation.host(a).address;
    simulation.inject(from, b, &initiation.payload);
    simulation.run_for(SECOND);
    assert_eq!(failures(&report(&simulation, b), HandshakeFailure::OldTimestamp), 1);
    let none = Configuration { private_key: Some(None), ..Configuration::default() };
    simulation.configure(a, none);
    simulation.ping(a, b);
    simulation.run_for(20 * SECOND);
    assert!(failures(&report(&simulation, a), HandshakeFailure::NoPrivateKey) >= 3);
    assert_eq!(failures(&report(&simulation, a), HandshakeFailure::Unanswered), 0);
}

#[test]
fn what_the_network_does_not_take_is_no_packet_sent() {
    let (mut simulation, a, b) = Simulation::pair(6);
    assert!(simulation.reaches(a, b));
    let before = report(&simulation, a);
    let control = simulation.host_mut(a).device.control_plane();
    let (id, _) = control.endpoints(None).next().unwrap();
    let records = simulation.save(a);
    let mut control = wgsep_proto::device::control_plane::ControlPlane::new(Box::new(
        simulation.host(a).dice.clone(),
    ));
    let mut restore = wgsep_proto::device::control_plane::Restore::new(&mut control);
    for record in &records {
        restore.add_record(wgsep_proto::saved::decode(record).unwrap()).unwrap();
    }
    control.transmit_failed(Some(id), 148);
    let mut cursor = StatusCursor::default();
    let now = simulation.now().instant;
    let Some(ReportItem::Peer(after)) = control.next_report(&mut cursor, now) else { panic!() };
    assert_eq!(after.tx_packets, before.tx_packets - 1);
    assert_eq!(after.tx_bytes, before.tx_bytes - 148);
    assert_eq!(failures(&after, HandshakeFailure::Unsent), 1);
}

#[test]
fn a_hand_over_keeps_the_counters_and_when_a_peer_was_last_received() {
    let (mut simulation, a, b) = Simulation::pair(7);
    assert!(simulation.reaches(a, b));
    let (before, allowed_ips) = reports(&simulation, a).remove(0);
    let key = before.public_key;
    let last = |simulation: &Simulation| {
        simulation.host(a).device.control_plane().last_received_from(&key).unwrap()
    };
    let received = last(&simulation);
    assert!(received.is_some() && allowed_ips.len() == 2);
    simulation.hand_over(a);
    let (after, allowed_ips_after) = reports(&simulation, a).remove(0);
    assert_eq!(format!("{before:?}"), format!("{after:?}"));
    assert_eq!((received, allowed_ips), (last(&simulation), allowed_ips_after));
}
