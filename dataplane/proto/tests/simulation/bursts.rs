//! Thousands of peers that are due at once: the work of a call is bounded, and all are served in turn.

use std::time::Duration;
use wgsep_proto::device::control_plane::PEERS_PER_ROUND;
use wgsep_proto::{
    AllowedIp, AllowedIpChange, Configuration, Device, Instant, Now, PeerConfiguration, PublicKey,
};
use wgsep_simulation::dice::Dice;
use wgsep_simulation::host::{Host, inner_v4};
use wgsep_simulation::packet::request;

const PEERS: u32 = 20_000;
const BATCHES: u32 = 10;
/// More than the jitter, and all batches come before the first initiation is repeated.
const BETWEEN_BATCHES: Duration = Duration::from_millis(400);

/// A device with a key, up, and the time.
fn device() -> (Device, Now) {
    let now = Now { instant: Instant::from_nanos(1_000_000_000), wall: Duration::from_secs(1) };
    (Host::new(0, ([192, 0, 2, 1], 51820).into(), &mut Dice::new(1), now).device, now)
}

/// A peer that does not answer, at 10.1.0.0 + `number`, as its allowed IP is.
fn peer(number: u32) -> PeerConfiguration {
    let mut key = [3; 32];
    key[..4].copy_from_slice(&number.to_le_bytes());
    let address = (0x0a01_0000 + number).to_be_bytes();
    let mut peer = PeerConfiguration::new(PublicKey::from_bytes(key));
    peer.endpoint = Some((address, 51820).into());
    peer.persistent_keepalive_interval = Some(3600);
    let allowed_ip = AllowedIp::new(address.into(), 32).unwrap();
    peer.allowed_ips = vec![AllowedIpChange { allowed_ip, remove: false }];
    peer
}

fn peers(numbers: std::ops::Range<u32>) -> Configuration {
    Configuration { peers: numbers.map(peer).collect(), ..Configuration::default() }
}

/// The numbers of the peers to which something is to be sent.
fn sent(device: &mut Device) -> Vec<u32> {
    let mut sent = Vec::new();
    while let Some(transmit) = device.poll_transmit() {
        let std::net::IpAddr::V4(to) = transmit.endpoint.destination.ip() else { panic!("IPv6") };
        sent.push(u32::from(to) - 0x0a01_0000);
    }
    sent
}

type Change<'a> = &'a dyn Fn(&mut Device);

fn is_due(device: &Device, now: Now) -> bool {
    device.next_timeout().is_some_and(|at| at <= now.instant)
}

/// Calls `handle_timeout` until nothing is due; what was sent, in rounds.
fn handle_all(device: &mut Device, now: Now) -> Vec<Vec<u32>> {
    let mut rounds = Vec::new();
    while is_due(device, now) {
        device.handle_timeout(now);
        rounds.push(sent(device));
    }
    rounds
}

fn after(now: Now, duration: Duration) -> Now {
    Now { instant: now.instant.after(duration), wall: now.wall + duration }
}

#[test]
fn twenty_thousand_timers_expire_in_rounds_and_in_the_order_of_their_deadlines() {
    let (mut device, mut now) = device();
    let in_batch = PEERS / BATCHES;
    for batch in 0..BATCHES {
        device.configure(peers(batch * in_batch..(batch + 1) * in_batch), now);
        let mut rounds = vec![sent(&mut device)];
        rounds.extend(handle_all(&mut device, now));
        assert!(rounds.iter().all(|round| round.len() <= PEERS_PER_ROUND));
        let expected: Vec<_> = (batch * in_batch..(batch + 1) * in_batch).collect();
        assert_eq!(rounds.concat(), expected, "in the order of configuration");
        now = after(now, BETWEEN_BATCHES);
    }
    now = after(now, Duration::from_secs(10));
    let rounds = handle_all(&mut device, now);
    assert!(rounds.iter().all(|round| round.len() <= PEERS_PER_ROUND));
    let mut sent = rounds.concat();
    let batches: Vec<_> = sent.iter().map(|number| number / in_batch).collect();
    assert!(batches.is_sorted(), "the earliest first");
    sent.sort_unstable();
    assert_eq!(sent, (0..PEERS).collect::<Vec<_>>(), "each once");
}

/// Without the packet's own way past them, its initiation would come after those of all others.
#[test]
fn a_packet_does_not_wait_for_the_thousands_to_which_a_change_has_something_sent() {
    let (mut device, now) = device();
    device.set_up(false, now);
    let mut all = peers(0..PEERS);
    all.peers[PEERS as usize - 1].persistent_keepalive_interval = None;
    device.configure(all, now);
    let key = device.status().private_key;
    let private_key = |key| Configuration { private_key: Some(key), ..Configuration::default() };
    let changes: [(&str, Change<'_>); 3] = [
        ("link up", &|device| device.set_up(true, now)),
        ("private key", &|device| {
            device.configure(private_key(None), now);
            device.configure(private_key(key.clone()), now);
        }),
        ("copy of the machine", &|device| device.vm_notification(now)),
    ];
    for (name, change) in changes {
        change(&mut device);
        assert!((1..=2 * PEERS_PER_ROUND).contains(&sent(&mut device).len()), "{name}");
        assert!(is_due(&device, now), "{name}: there is more");
        let to = std::net::IpAddr::from((0x0a01_0000 + PEERS - 1).to_be_bytes());
        device.encapsulate(&request(inner_v4(0), to, 84, 0, 1), now).unwrap();
        let sent = sent(&mut device);
        assert_eq!(sent.first(), Some(&(PEERS - 1)), "{name}");
        assert!(sent.len() <= PEERS_PER_ROUND + 1, "{name}");
    }
    device.set_up(false, now);
    assert_eq!(device.next_timeout(), None, "the rest is forgotten");
    assert!(sent(&mut device).is_empty());
}

#[test]
fn peers_that_were_removed_do_not_accumulate() {
    let (mut device, now) = device();
    for first in (0..10).map(|round| round * 100) {
        device.configure(peers(first..first + 100), now);
        device.configure(Configuration { replace_peers: true, ..Configuration::default() }, now);
        assert!(!is_due(&device, now));
    }
}
