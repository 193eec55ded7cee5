//! The state of a device that another process takes over: nothing is lost, and what is not a state is refused.

use std::collections::BTreeMap;
use std::time::Duration;

use wgsep_proto::device::control_plane::{ControlPlane, Restore, UNDER_LOAD_THRESHOLD};
use wgsep_proto::saved::{self, MAX_RECORD_LEN, Record, Refused};
use wgsep_proto::{Configuration, DropCause, PresharedKey, PrivateKey};
use wgsep_simulation::dice::{Dice, SharedDice};
use wgsep_simulation::host::HostId;
use wgsep_simulation::link::{Datagram, Kind};
use wgsep_simulation::packet;
use wgsep_simulation::simulation::Simulation;

/// Hosts of a run, each the peer of all others.
const HOSTS: usize = 3;
const STEPS: usize = 60;

/// Everything that a run shows: what was sent and received, and the state at its end.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    sent: Vec<Datagram>,
    received: Vec<Vec<u8>>,
    events: Vec<String>,
    states: Vec<String>,
}

/// Hosts to which random things happen.
struct Run {
    simulation: Simulation,
    hosts: Vec<HostId>,
    dice: Dice,
    /// Private keys that were removed.
    removed: BTreeMap<HostId, PrivateKey>,
}

/// A run that its seed determines; after each step, each host hands its state over if `hand_over` says so.
fn run(seed: u64, mut hand_over: impl FnMut() -> bool) -> Outcome {
    let mut simulation = Simulation::new(seed);
    let hosts: Vec<HostId> = (0..HOSTS).map(|_| simulation.add_host()).collect();
    for host in &hosts {
        for peer in hosts.iter().filter(|peer| *peer != host) {
            simulation.introduce(*host, *peer);
        }
    }
    let mut run = Run { simulation, hosts, dice: Dice::new(!seed), removed: BTreeMap::new() };
    for _ in 0..STEPS {
        run.step();
        for host in &run.hosts {
            run.simulation.flush(*host);
            if hand_over() {
                run.simulation.hand_over(*host);
            }
        }
    }
    run.outcome()
}

impl Run {
    fn any_host(&mut self) -> HostId {
        self.hosts[usize::try_from(self.dice.below(HOSTS as u64)).unwrap()]
    }

    fn step(&mut self) {
        let (host, peer) = (self.any_host(), self.any_host());
        let Self { simulation, dice, removed, .. } = self;
        match dice.below(16) {
            0 => simulation.lose(&[Kind::Response]),
            1 => simulation.lose(&[Kind::Initiation]),
            2 => simulation.lose(&[Kind::Data, Kind::Keepalive]),
            3 | 4 => simulation.heal(),
            5 if host != peer => {
                let preshared_key = PresharedKey::from_bytes(dice.bytes());
                let seconds = u16::try_from(dice.below(30)).unwrap();
                for (host, peer) in [(host, peer), (peer, host)] {
                    simulation.change_peer(host, peer, |change| {
                        change.preshared_key = Some(preshared_key.clone());
                        change.persistent_keepalive_interval = Some(seconds);
                    });
                }
            }
            6 => simulation.set_up(host, dice.chance(600)),
            7 => simulation.run_for(Duration::from_secs(dice.below(200))),
            8 | 9 => {
                // Under load, each handshake message needs a cookie.
                let waiting = if dice.chance(700) { UNDER_LOAD_THRESHOLD } else { 0 };
                simulation.host_mut(host).waiting = waiting;
            }
            10 => {
                let key = removed.remove(&host);
                if key.is_none() {
                    let key = simulation.host(host).device.status().private_key;
                    removed.insert(host, key.unwrap());
                }
                let private_key = Some(key);
                simulation.configure(host, Configuration { private_key, ..Default::default() });
            }
            _ if host != peer => {
                for _ in 0..=dice.below(5) {
                    simulation.ping(host, peer);
                }
            }
            _ => {}
        }
        simulation.run_for(Duration::from_millis(dice.below(3000)));
    }

    fn outcome(self) -> Outcome {
        let Self { simulation, hosts, .. } = self;
        let states = hosts.iter().map(|host| state(&simulation, *host)).collect();
        let all = || hosts.iter().map(|host| simulation.host(*host));
        let events = all().flat_map(|host| &host.events).map(|event| format!("{event:?}"));
        let received = all().flat_map(|host| &host.received).map(|(_, packet)| packet.clone());
        Outcome {
            received: received.collect(),
            events: events.collect(),
            states,
            sent: simulation.sent,
        }
    }
}

fn state(simulation: &Simulation, host: HostId) -> String {
    let device = &simulation.host(host).device;
    let peers = device.peers().map(|peer| {
        format!(
            "{} {:?} {:?} {} {} {} {:?} {:?}\n",
            peer.public_key,
            peer.endpoint,
            peer.last_handshake,
            peer.rx_bytes,
            peer.tx_bytes,
            peer.persistent_keepalive_interval,
            peer.allowed_ips,
            peer.preshared_key.as_bytes(),
        )
    });
    let drops = DropCause::ALL.map(|cause| device.drops().count(cause));
    format!("{}{drops:?} {:?}", peers.collect::<String>(), device.next_timeout())
}

#[test]
fn a_run_in_which_devices_are_handed_over_at_any_time_is_the_same_to_the_byte() {
    let mut kinds = Vec::new();
    for seed in 0..30 {
        let without = run(seed, || false);
        let mut dice = Dice::new(seed);
        for per_mille in [100, 1000] {
            let with = run(seed, || dice.chance(per_mille));
            assert!(with == without, "seed {seed}, {per_mille} of 1000 steps");
        }
        kinds.extend(without.sent.iter().map(Datagram::kind));
    }
    // The runs have shown something.
    for kind in [Kind::Initiation, Kind::Response, Kind::CookieReply, Kind::Keepalive, Kind::Data] {
        assert!(kinds.iter().filter(|one| **one == kind).count() > 30, "{kind:?}");
    }
}

/// The encoded records of a device with three peers: a keypair, a handshake in progress with packets that wait, and
/// nothing but many allowed IPs.
fn records() -> Vec<Vec<u8>> {
    let mut simulation = Simulation::new(7);
    let hosts: Vec<_> = (0..4).map(|_| simulation.add_host()).collect();
    for peer in &hosts[1..] {
        simulation.introduce(hosts[0], *peer);
        simulation.introduce(*peer, hosts[0]);
    }
    simulation.change_peer(hosts[0], hosts[3], |change| {
        change.allowed_ips = (0..1000_u16)
            .map(|number| {
                let [high, low] = number.to_be_bytes();
                wgsep_simulation::host::allow([10, 9, high, low].into(), 32)
            })
            .collect();
    });
    assert!(simulation.reaches(hosts[0], hosts[1]));
    simulation.lose(&[Kind::Response]);
    simulation.ping(hosts[0], hosts[2]);
    simulation.save(hosts[0])
}

/// Restores records; whether they were a whole device.
fn restore<'r>(records: impl IntoIterator<Item = &'r [u8]>) -> Result<bool, Refused> {
    let mut control = ControlPlane::new(Box::new(SharedDice::new(1)));
    let mut restore = Restore::new(&mut control);
    for record in records {
        if restore.add_record(saved::decode(record)?)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn slices(records: &[Vec<u8>]) -> impl Iterator<Item = &[u8]> {
    records.iter().map(Vec::as_slice)
}

#[test]
fn a_state_that_ends_early_is_no_device() {
    let records = records();
    assert_eq!(restore(slices(&records)), Ok(true));
    assert!(records.len() > 8, "{}", records.len());
    for end in 0..records.len() {
        assert_eq!(restore(slices(&records[..end])), Ok(false), "{end}");
        let record = &records[end];
        for cut in 0..record.len() {
            assert!(saved::decode(&record[..cut]).is_err(), "{cut} bytes of record {end}");
        }
        assert!(saved::decode(&[&record[..], &[0]].concat()).is_err());
    }
}

#[test]
fn records_that_are_left_out_repeated_or_out_of_order_are_refused() {
    let records = records();
    for at in 0..records.len() - 1 {
        let without = slices(&records[..at]).chain(slices(&records[at + 1..]));
        assert!(restore(without).is_err(), "without record {at}");
        let twice = slices(&records[..=at]).chain(slices(&records[at..]));
        assert!(restore(twice).is_err(), "with record {at} twice");
        let mut swapped = records.clone();
        swapped.swap(at, at + 1);
        // Whatever it is then, it does not panic; two records of one peer may be swapped.
        let _either = restore(slices(&swapped));
    }
}

#[test]
fn any_changed_byte_gives_another_state_or_none_and_no_panic() {
    let records = records();
    let mut dice = Dice::new(3);
    for _ in 0..2000 {
        let mut changed = records.clone();
        for _ in 0..=dice.below(3) {
            let at = usize::try_from(dice.below(changed.len() as u64)).unwrap();
            let record = &mut changed[at];
            let byte = usize::try_from(dice.below(record.len().min(700) as u64)).unwrap();
            record[byte] = dice.bytes::<1>()[0];
        }
        let _either = restore(slices(&changed));
    }
}

#[test]
fn what_no_device_has_is_refused() {
    let small = |record: Record| {
        let mut buffer = vec![0; MAX_RECORD_LEN];
        let len = saved::encode(&record, &mut buffer).unwrap();
        buffer.truncate(len);
        buffer
    };
    let records = records();
    let ended = |extra: Vec<u8>| {
        let before = records.len() - 1;
        restore(slices(&records[..before]).chain([&extra[..]]))
    };
    assert_eq!(ended(small(Record::Staged(vec![0; 1400]))), Ok(false));
    for (record, why) in [
        (Record::AllowedIps(vec![([10, 0, 0, 1].into(), 33)]), "an allowed IP is no prefix"),
        (Record::AllowedIps(vec![([10, 0, 0, 1].into(), 8)]), "an allowed IP is no prefix"),
        (Record::End { records: 2 }, "records are missing"),
    ] {
        assert_eq!(ended(small(record)), Err(Refused(why)));
    }
    let waiting = small(Record::Staged(packet::request(
        [10, 0, 0, 1].into(),
        [10, 0, 0, 2].into(),
        100,
        0,
        1,
    )));
    let many = vec![waiting; 130];
    let all = slices(&records[..records.len() - 1]).chain(slices(&many));
    assert_eq!(restore(all), Err(Refused("more waits than may")));
}
