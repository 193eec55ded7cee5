//! What the fuzzers in `dataplane/proto/fuzz` call with their bytes, and the replay of their corpora too. Each function
//! asserts what must hold whatever the bytes are.

mod aead;
#[path = "../../../tests/shared/input.rs"]
mod input;
mod saved;
#[path = "../../../tests/shared/tunnel.rs"]
mod tunnel;

pub use self::aead::aead;
pub use self::input::Input;
pub use self::saved::saved;
pub use self::tunnel::tunnel;
use crate::dice::Dice;
use crate::host::{Host, HostId};
use crate::link::{Kind, Link};
use crate::oracle;
use crate::packet;
use crate::simulation::Simulation;
use std::time::Duration;
use wgsep_proto::device::control_plane::UNDER_LOAD_THRESHOLD;
use wgsep_proto::wire::ip::{InnerPacket, padding, propagate_ecn};
use wgsep_proto::wire::messages::Message;
use wgsep_proto::{Configuration, Ecn, Endpoint, PeerConfiguration, PresharedKey, PrivateKey};

/// Length of both macs, which a parsed message leaves to the cookie code.
const MACS_LEN: usize = 32;
/// Indices that one peer may hold: a handshake's and those of three keypairs.
const MAX_INDICES_PER_PEER: usize = 4;

/// What may happen to the devices in one run. Most of it costs handshakes, of half a millisecond each,
/// and a fuzzer finds more in many short runs than in few long ones.
const MAX_DISTURBANCES: usize = 24;

/// A target: its name, which is also that of its corpus, and what to call.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 7] = [
    ("message_parse", message_parse),
    ("handshake_consume", handshake_consume),
    ("device", device),
    ("ip_inner", ip_inner),
    ("aead", aead),
    ("saved", saved),
    ("tunnel", tunnel),
];

/// Whatever parses has the exact form, and writing it again gives the same bytes.
///
/// # Panics
/// If not.
pub fn message_parse(data: &[u8]) {
    let (written, rest): (Vec<u8>, usize) = match Message::parse(data) {
        Some(Message::Initiation(message)) => (message.to_bytes().to_vec(), MACS_LEN),
        Some(Message::Response(message)) => (message.to_bytes().to_vec(), MACS_LEN),
        Some(Message::CookieReply(message)) => (message.to_bytes().to_vec(), 0),
        Some(Message::Transport(header)) => {
            assert!(data.len() >= 32);
            assert_eq!(data[..16], header.to_bytes());
            return;
        }
        None => return,
    };
    assert_eq!(data.len(), written.len());
    let fields = data.len() - rest;
    assert_eq!(data[..fields], written[..fields]);
    assert!(written[fields..].iter().all(|byte| *byte == 0));
}

/// An inner packet is never longer than its buffer, marking congestion changes the two bits and the
/// checksum alone, and padding stays below 16 and within the MTU.
///
/// # Panics
/// If not.
pub fn ip_inner(data: &[u8]) {
    let mut input = Input(data);
    let (mtu, outer) = (usize::from(input.word()), Ecn::of_traffic_class(input.byte()));
    let before = input.0.to_vec();
    let zeros = padding(before.len(), mtu);
    assert!(zeros < 16);
    assert!(mtu == 0 || before.len() > mtu || before.len() + zeros <= mtu);

    let Some(inner) = InnerPacket::parse(&before) else { return };
    assert!((20..=before.len()).contains(&inner.len));
    let mut after = before.clone();
    propagate_ecn(&mut after, outer);
    let Some(marked) = InnerPacket::parse(&after) else { panic!("marking broke the packet") };
    assert_eq!(InnerPacket { ecn: inner.ecn, ..marked }, inner);
    assert_eq!(inner.ecn == Ecn::NOT_CAPABLE, marked.ecn == Ecn::NOT_CAPABLE);
    if before[0] >> 4 == 4 {
        // A header that was right stays right; one that was wrong is not repaired.
        let right = |packet: &[u8]| packet::header_checksum(packet) == 0;
        assert_eq!(right(&before), right(&after));
    }
}

/// A genuine handshake message with some bytes changed: accepted only if none was.
///
/// # Panics
/// If not.
pub fn handshake_consume(data: &[u8]) {
    let mut input = Input(data);
    let (mut simulation, a, b) = Simulation::pair(7);
    let choice = input.byte();
    let kind = [Kind::Initiation, Kind::Response, Kind::CookieReply][usize::from(choice % 3)];
    let with_right_mac1 = choice & 0x80 == 0;
    let (genuine, receiver) = capture(&mut simulation, kind, a, b);
    let mut forged = genuine.clone();
    while !input.is_empty() {
        let (at, change) = (usize::from(input.byte()) % forged.len(), input.byte());
        forged[at] ^= change;
    }
    if with_right_mac1 && kind != Kind::CookieReply {
        let public_key = *simulation.host(receiver).public_key.as_bytes();
        oracle::add_macs(&public_key, &mut forged);
    }
    // mac2 counts only under load. Of a handshake message, mac1 alone covers the sender index, so
    // an attacker who knows the receiver's public key can change both.
    let end = genuine.len() - if kind == Kind::CookieReply { 0 } else { MACS_LEN };
    let same = |from: usize, to: usize| forged[from..to] == genuine[from..to];
    let unchanged = match kind {
        Kind::CookieReply => same(0, end),
        _ if with_right_mac1 => same(0, 4) && same(8, end),
        _ => same(0, end + 16),
    };
    let sender = if receiver == a { b } else { a };
    let from = simulation.host(sender).address;
    let before = (simulation.sent.len(), simulation.host(receiver).indices());
    simulation.inject(from, receiver, &forged);
    check_bounds(simulation.host(receiver));
    let after = (simulation.sent.len(), simulation.host(receiver).indices());
    match kind {
        // Accepted means answered: with a response, or with the keepalive that confirms.
        Kind::Initiation | Kind::Response => assert_eq!(unchanged, after != before, "{kind:?}"),
        _ => assert_eq!(after, before, "a cookie reply causes nothing by itself"),
    }
}

/// A message of this kind that was not delivered, and who waits for it.
fn capture(simulation: &mut Simulation, kind: Kind, a: HostId, b: HostId) -> (Vec<u8>, HostId) {
    let (sender, receiver) = if kind == Kind::Initiation { (a, b) } else { (b, a) };
    if kind == Kind::CookieReply {
        simulation.host_mut(b).waiting = UNDER_LOAD_THRESHOLD;
    }
    simulation.set_filter(move |datagram| datagram.kind() != kind);
    simulation.ping(a, b);
    simulation.run_for(Duration::from_millis(100));
    (simulation.last(sender, kind).payload, receiver)
}

/// Two devices to which anything happens: their tables stay bounded, and when it is over and both
/// are configured as before, traffic flows.
///
/// # Panics
/// If not.
pub fn device(data: &[u8]) {
    let mut input = Input(data);
    let (mut simulation, a, b) = Simulation::pair(11);
    for _ in 0..MAX_DISTURBANCES {
        if input.is_empty() {
            break;
        }
        let host = if input.byte() & 1 == 0 { a } else { b };
        disturb(&mut simulation, host, if host == a { b } else { a }, &mut input);
        for id in [a, b] {
            check_bounds(simulation.host(id));
        }
    }
    restore(&mut simulation, a, b);
    assert!(simulation.reaches(a, b) && simulation.reaches(b, a), "traffic does not recover");
}

/// One of the many things that may happen to a device.
fn disturb(simulation: &mut Simulation, host: HostId, other: HostId, input: &mut Input<'_>) {
    let now = simulation.now();
    match input.byte() % 14 {
        0 => {
            simulation.ping(host, other);
        }
        1 => simulation.run_for(Duration::from_millis(u64::from(input.word()))),
        2 => simulation.run_for(Duration::from_secs(u64::from(input.byte()))),
        3 => simulation.suspend(Duration::from_secs(u64::from(input.word()))),
        4 => {
            simulation.link.loss = u64::from(input.byte()) * 4;
            simulation.link.jitter = Duration::from_millis(u64::from(input.byte()));
            simulation.link.duplication = u64::from(input.byte()) * 4;
        }
        5 => {
            let garbage = input.bytes(200);
            let from = simulation.host(other).address;
            simulation.inject(from, host, garbage);
        }
        6 => replay(simulation, host, input),
        7 => {
            let port = input.word();
            let mut address = simulation.host(host).address;
            address.set_port(port.max(1));
            simulation.rebind(host, address);
        }
        8 => {
            let up = !simulation.host(host).device.is_up();
            simulation.set_up(host, up);
        }
        9 => simulation.host_mut(host).waiting = usize::from(input.word()),
        10 => {
            let seconds = u16::from(input.byte());
            simulation.change_peer(host, other, |peer| {
                peer.persistent_keepalive_interval = Some(seconds);
            });
        }
        11 => {
            let (remove, psk) = (input.byte() & 1 == 1, [input.byte(); 32]);
            simulation.change_peer(host, other, |peer| {
                peer.remove = remove;
                peer.preshared_key = Some(PresharedKey::from_bytes(psk));
            });
        }
        12 => {
            let private_key = Some(PrivateKey::from_bytes([input.byte(); 32]));
            simulation.configure(host, Configuration { private_key, ..Default::default() });
        }
        _ => {
            let packet = input.bytes(100).to_vec();
            let mut datagram = packet.clone();
            let device = &mut simulation.host_mut(host).device;
            let _sent = device.encapsulate(&packet, now);
            let source = Endpoint::new(([192, 0, 2, 77], 9).into());
            let _received = device.decapsulate(source, Ecn::CONGESTION, &mut datagram, now);
            simulation.flush(host);
        }
    }
}

/// Delivers, once more and perhaps changed, something that was sent before.
fn replay(simulation: &mut Simulation, host: HostId, input: &mut Input<'_>) {
    let choice = usize::from(input.word());
    let Some(index) = choice.checked_rem(simulation.sent.len()) else { return };
    let mut datagram = simulation.sent[index].clone();
    let (at, change) = (usize::from(input.word()), input.byte());
    if let Some(byte) = datagram.payload.get_mut(at) {
        *byte ^= change;
    }
    simulation.inject(datagram.from, host, &datagram.payload);
}

/// Ends all disturbance and configures both hosts as at the start, with new keys.
fn restore(simulation: &mut Simulation, a: HostId, b: HostId) {
    simulation.link = Link::default();
    let mut dice = Dice::new(13);
    for id in [a, b] {
        simulation.host_mut(id).waiting = 0;
        simulation.set_up(id, true);
        let Some(private_key) = PrivateKey::from_bytes(dice.bytes()) else { return };
        simulation.host_mut(id).public_key = private_key.public_key();
        let replaced = Configuration {
            private_key: Some(Some(private_key)),
            replace_peers: true,
            peers: Vec::<PeerConfiguration>::new(),
            ..Configuration::default()
        };
        simulation.configure(id, replaced);
    }
    simulation.introduce(a, b);
    simulation.introduce(b, a);
    // Past the second for which a device stays under load.
    simulation.run_for(Duration::from_secs(2));
}

fn check_bounds(host: &Host) {
    let peers = host.device.peers().count();
    assert!(host.indices() <= peers * MAX_INDICES_PER_PEER, "indices leak");
}
