//! A virtual machine that was cloned or restored: `Device::vm_notification`, by the virtual clock.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use wgsep_proto::path::data_path::GenerationCounter;
use wgsep_proto::session::keypair::REJECT_AFTER_TIME;
use wgsep_proto::session::timers::REKEY_TIMEOUT;
use wgsep_proto::{DropCause, Event};
use wgsep_simulation::host::HostId;
use wgsep_simulation::link::{Datagram, Kind};
use wgsep_simulation::simulation::Simulation;

const SECOND: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);

/// A pair that has shaken hands and is past the interval in which a peer takes no second initiation.
fn connected(seed: u64) -> (Simulation, HostId, HostId) {
    let (mut simulation, a, b) = Simulation::pair(seed);
    assert!(simulation.reaches(a, b));
    simulation.run_for(SECOND);
    (simulation, a, b)
}

fn is_data(datagram: &Datagram) -> bool {
    matches!(datagram.kind(), Kind::Data | Kind::Keepalive)
}

/// The index that data of a host carries: it identifies the keypair.
fn data_indices(simulation: &Simulation, host: HostId, from: usize) -> BTreeSet<u32> {
    let sent = simulation.sent_by(host).skip(from).filter(|datagram| is_data(datagram));
    sent.map(|datagram| datagram.word(4)).collect()
}

#[test]
fn no_packet_is_sealed_with_an_old_key_and_the_peer_is_reached_at_once() {
    let (mut simulation, a, b) = connected(1);
    let before = data_indices(&simulation, a, 0);
    let sent = simulation.sent_by(a).count();
    simulation.clone_virtual_machine(a, 2);
    assert!(simulation.reaches(a, b));
    assert!(simulation.reaches(b, a));
    let after = data_indices(&simulation, a, sent);
    assert!(!after.is_empty() && before.is_disjoint(&after), "{before:?} and {after:?}");
    assert_eq!(simulation.count(a, Kind::Initiation), 2);
}

/// The peer sends with a keypair that this side does not have any more, and must learn of the new one
/// without a packet from here.
#[test]
fn a_peer_with_a_keypair_is_initiated_to_without_traffic() {
    for cloned_initiated in [true, false] {
        let (mut simulation, a, b) = connected(3);
        let cloned = if cloned_initiated { a } else { b };
        let other = if cloned_initiated { b } else { a };
        simulation.clone_virtual_machine(cloned, 4);
        simulation.run_for(SECOND);
        assert!(simulation.reaches(other, cloned), "the initiator was cloned: {cloned_initiated}");
        assert_eq!(simulation.host(cloned).drops(DropCause::UnknownIndex), 0);
    }
}

/// Two runs of the same seed are a machine and its copy: the same keys, the same counters.
#[test]
fn copies_of_a_machine_never_use_a_nonce_of_a_key_twice() {
    let sealed = |reseeded: Option<u64>| {
        let (mut simulation, a, b) = connected(5);
        let sent = simulation.sent_by(a).count();
        if let Some(seed) = reseeded {
            simulation.clone_virtual_machine(a, seed);
        }
        for _ in 0..20 {
            let _tag = simulation.ping(a, b);
            simulation.run_for(MILLISECOND * 100);
        }
        let (mut data, mut initiations) = (BTreeSet::new(), BTreeSet::new());
        for datagram in simulation.sent_by(a).skip(sent) {
            let set = if is_data(datagram) { &mut data } else { &mut initiations };
            assert!(set.insert(datagram.payload.clone()), "the same datagram twice");
        }
        (data, initiations)
    };
    let unnoticed = sealed(None);
    assert_eq!(unnoticed, sealed(None), "the copies are not the same, so this shows nothing");
    let (one, other) = (sealed(Some(6)), sealed(Some(7)));
    for (left, right) in [(&one, &other), (&one, &unnoticed), (&other, &unnoticed)] {
        assert!(left.0.is_disjoint(&right.0), "the same plaintext was sealed to the same bytes");
        assert!(left.1.is_disjoint(&right.1), "the same ephemeral key was used twice");
    }
    assert!(one.0.len() >= 20 && one.1.len() == 1);
}

/// The replay window is that of the snapshot.
#[test]
fn what_came_between_the_snapshot_and_the_copy_is_not_replayed_to_it() {
    let (mut simulation, a, b) = connected(8);
    let _tag = simulation.ping(b, a);
    let recorded = simulation.last(b, Kind::Data);
    // The snapshot is from before it arrived.
    simulation.lose(&[Kind::Data]);
    simulation.clone_virtual_machine(a, 9);
    let received = simulation.host(a).received.len();
    simulation.inject(recorded.from, a, &recorded.payload);
    assert_eq!(simulation.host(a).received.len(), received);
}

#[test]
fn a_handshake_under_way_begins_anew_with_another_ephemeral_key() {
    let (mut simulation, a, b) = Simulation::pair(10);
    simulation.lose(&[Kind::Initiation]);
    let tag = simulation.ping(a, b);
    simulation.run_for(SECOND);
    let before = simulation.last(a, Kind::Initiation);
    simulation.heal();
    simulation.clone_virtual_machine(a, 11);
    let after = simulation.last(a, Kind::Initiation);
    assert_ne!(before.payload[8..40], after.payload[8..40], "the ephemeral key");
    assert_eq!(after.at, simulation.now().instant, "it goes at once");
    simulation.run_for(SECOND);
    assert!(simulation.host(a).replies().contains(&tag), "the packet that waited got through");
    // The response to the first would have opened a keypair that a copy could have too.
    assert_eq!(simulation.host(a).indices(), 1);
}

#[test]
fn a_response_to_an_initiation_from_before_is_not_taken() {
    let (mut simulation, a, b) = Simulation::pair(12);
    simulation.lose(&[Kind::Response]);
    let _tag = simulation.ping(a, b);
    simulation.run_for(SECOND);
    let response = simulation.last(b, Kind::Response);
    simulation.clone_virtual_machine(a, 13);
    simulation.inject(response.from, a, &response.payload);
    assert_eq!(simulation.host(a).drops(DropCause::UnknownIndex), 1);
}

#[test]
fn an_initiation_that_gets_lost_is_repeated() {
    let (mut simulation, a, b) = connected(14);
    simulation.lose(&[Kind::Initiation]);
    simulation.clone_virtual_machine(a, 15);
    simulation.run_for(SECOND);
    simulation.heal();
    simulation.run_for(REKEY_TIMEOUT);
    assert_eq!(simulation.count(a, Kind::Initiation), 3);
    assert!(simulation.reaches(b, a));
}

#[test]
fn a_peer_without_a_keypair_and_without_packets_is_left_alone() {
    let (mut simulation, a, b) = Simulation::pair(16);
    simulation.clone_virtual_machine(a, 17);
    simulation.run_for(REKEY_TIMEOUT * 2);
    assert_eq!(simulation.sent.len(), 0);
    assert!(simulation.reaches(a, b));

    // A keypair that is too old to send with is none.
    simulation.run_for(REJECT_AFTER_TIME * 2);
    let sent = simulation.sent.len();
    simulation.clone_virtual_machine(a, 18);
    simulation.run_for(REKEY_TIMEOUT * 2);
    assert_eq!(simulation.sent.len(), sent);
}

#[test]
fn an_interface_that_is_down_stays_silent() {
    let (mut simulation, a, b) = connected(19);
    simulation.set_up(a, false);
    let sent = simulation.sent_by(a).count();
    simulation.clone_virtual_machine(a, 20);
    simulation.run_for(REKEY_TIMEOUT * 2);
    assert_eq!(simulation.sent_by(a).count(), sent);
    simulation.set_up(a, true);
    assert!(simulation.reaches(a, b));
}

/// A number that the host of a virtual machine writes.
#[derive(Clone, Default)]
struct Counter(Arc<AtomicU64>);

impl GenerationCounter for Counter {
    fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// No event has come yet: the packet itself finds that this is a copy.
#[test]
fn the_first_packet_in_a_copy_is_not_sealed_with_an_old_key() {
    let (mut simulation, a, b) = connected(24);
    let counter = Counter::default();
    simulation.host(a).device.data_path().watch_generation(Box::new(counter.clone()));
    assert!(simulation.reaches(a, b), "the number has not changed");
    let before = data_indices(&simulation, a, 0);
    let (sent, initiations) =
        (simulation.sent_by(a).count(), simulation.count(a, Kind::Initiation));

    counter.0.store(7, Ordering::Relaxed);
    let tag = simulation.ping(a, b);
    simulation.run_for(SECOND);
    assert!(simulation.host(a).replies().contains(&tag), "the packet waited for the new key");
    let after = data_indices(&simulation, a, sent);
    assert!(!after.is_empty() && before.is_disjoint(&after), "{before:?} and {after:?}");
    assert_eq!(simulation.count(a, Kind::Initiation), initiations + 1);
    assert_eq!(simulation.host(a).count_events(|event| *event == Event::NewGeneration), 1);
}

/// Packets that found no key before stay in their order.
#[test]
fn packets_that_were_staged_when_the_copy_was_made_go_first() {
    let (mut simulation, a, b) = Simulation::pair(25);
    let counter = Counter::default();
    simulation.host(a).device.data_path().watch_generation(Box::new(counter.clone()));
    simulation.lose(&[Kind::Initiation]);
    let first = simulation.ping(a, b);
    simulation.heal();
    counter.0.store(1, Ordering::Relaxed);
    let second = simulation.ping(a, b);
    simulation.run_for(REKEY_TIMEOUT * 2);
    assert_eq!(simulation.host(b).requests(), [first, second]);
}

/// Both ends in copies at once, as when a whole laboratory is restored.
#[test]
fn both_ends_may_be_restored_at_once() {
    let (mut simulation, a, b) = connected(21);
    simulation.clone_virtual_machine(a, 22);
    simulation.clone_virtual_machine(b, 23);
    simulation.run_for(REKEY_TIMEOUT * 2);
    assert!(simulation.reaches(a, b) && simulation.reaches(b, a));
}
