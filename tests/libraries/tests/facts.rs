//! What the table in `dataplane/proto/README.md` says of the libraries, as far as it can be run. A fact that a library changes
//! fails here, and the cell is to be corrected.
#![allow(clippy::unwrap_used)]

#[path = "../../src/counting.rs"]
mod counting;

use counting::{Counting, allocations};
use gotatun::packet::{Packet as Whole, WgKind};
use gotatun::tun::MtuWatcher;
use snow::resolvers::{CryptoResolver, DefaultResolver};
use std::panic::{AssertUnwindSafe, catch_unwind};
use wgsep_libraries::{Boringtun, Ends, Gotatun, Wgsep, packet};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations for each packet, once all memory has grown.
fn allocations_of<E: Ends>(batch: usize) -> f64 {
    const LEN: usize = 1400;
    const ROUNDS: usize = 100;
    let (mut ends, plain) = (E::establish(LEN, batch), packet(LEN).repeat(batch));
    ends.carry(&plain, LEN);
    let counted = allocations(|| {
        for _ in 0..ROUNDS {
            assert_eq!(ends.carry(&plain, LEN), plain.len());
        }
    });
    counted as f64 / (ROUNDS * batch) as f64
}

#[test]
fn packets_cost_allocations_in_gotatun_alone() {
    for batch in [1, 32] {
        assert_eq!(allocations_of::<Wgsep>(batch), 0.0);
        assert_eq!(allocations_of::<Boringtun>(batch), 0.0);
        assert!(allocations_of::<Gotatun>(batch) >= 1.0);
    }
    let ([a, b], plain) = (snow_ends(), packet(1400));
    let (mut sealed, mut opened) = ([0; 1500], [0; 1500]);
    let counted = allocations(|| {
        let len = a.write_message(0, &plain, &mut sealed).unwrap();
        assert_eq!(b.read_message(0, &sealed[..len], &mut opened).unwrap(), plain.len());
    });
    assert_eq!(counted, 0);
}

#[test]
fn a_short_buffer_is_an_error_here_and_in_snow_and_a_panic_in_boringtun() {
    let plain = packet(100);
    let mut ours = wgsep_proto_end();
    let mut short = [0; 120];
    let refused = ours.encapsulate_into(&plain, &mut short, NOW);
    assert!(matches!(refused, Err(wgsep_proto::EncapsulateError::BufferTooShort { .. })));
    let [mut boringtun, _] = Boringtun::established();
    let sealed = catch_unwind(AssertUnwindSafe(|| {
        boringtun.encapsulate(&plain, &mut [0; 120]);
    }));
    assert!(sealed.is_err());
    // A function of this type has no buffer that could be too short.
    let _: fn(&mut gotatun::noise::Tunn, Whole, Option<&mut MtuWatcher>) -> Option<WgKind> =
        gotatun::noise::Tunn::handle_outgoing_packet;
    let mut initiator = snow_initiator([2; 32]);
    assert!(initiator.write_message(&[], &mut [0; 20]).is_err());
}

/// The handshake of WireGuard, as Noise names it.
fn snow_parameters() -> snow::params::NoiseParams {
    "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s".parse().unwrap()
}

/// The initiator of WireGuard's handshake.
fn snow_initiator(peer: [u8; 32]) -> snow::HandshakeState {
    initiate(snow::Builder::new(snow_parameters()), peer)
}

fn initiate(builder: snow::Builder<'_>, peer: [u8; 32]) -> snow::HandshakeState {
    let builder = builder.local_private_key(&[1; 32]).unwrap();
    let builder = builder.remote_public_key(&peer).unwrap().psk(2, &[0; 32]).unwrap();
    builder.build_initiator().unwrap()
}

/// Both ends after a handshake.
fn snow_ends() -> [snow::StatelessTransportState; 2] {
    let key = wgsep_proto::PrivateKey::from_bytes([2; 32]).unwrap();
    let mut initiator = snow_initiator(*key.public_key().as_bytes());
    let responder = snow::Builder::new(snow_parameters()).local_private_key(key.as_bytes());
    let mut responder = responder.unwrap().psk(2, &[0; 32]).unwrap().build_responder().unwrap();
    let (mut message, mut payload) = ([0; 256], [0; 256]);
    let len = initiator.write_message(&[], &mut message).unwrap();
    responder.read_message(&message[..len], &mut payload).unwrap();
    let len = responder.write_message(&[], &mut message).unwrap();
    initiator.read_message(&message[..len], &mut payload).unwrap();
    [initiator, responder].map(|end| end.into_stateless_transport_mode().unwrap())
}

/// Everything of the default, with a generator of the caller.
struct OwnRandom(DefaultResolver);

impl CryptoResolver for OwnRandom {
    fn resolve_rng(&self) -> Option<Box<dyn snow::types::Random>> {
        Some(Box::new(Sevens))
    }

    fn resolve_dh(&self, choice: &snow::params::DHChoice) -> Option<Box<dyn snow::types::Dh>> {
        self.0.resolve_dh(choice)
    }

    fn resolve_hash(
        &self,
        choice: &snow::params::HashChoice,
    ) -> Option<Box<dyn snow::types::Hash>> {
        self.0.resolve_hash(choice)
    }

    fn resolve_cipher(
        &self,
        choice: &snow::params::CipherChoice,
    ) -> Option<Box<dyn snow::types::Cipher>> {
        self.0.resolve_cipher(choice)
    }
}

impl snow::types::Random for Sevens {
    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), snow::Error> {
        bytes.fill(7);
        Ok(())
    }
}

/// The message of a handshake begins with a fresh ephemeral key.
#[test]
fn a_noise_library_takes_random_numbers_or_has_the_systems() {
    let ephemeral = |mut initiator: snow::HandshakeState| {
        let mut message = [0; 256];
        initiator.write_message(&[], &mut message).unwrap();
        message[..32].to_vec()
    };
    let [one, other] = [(); 2].map(|()| ephemeral(snow_initiator([2; 32])));
    assert_ne!(one, other);
    let own = || Box::new(OwnRandom(DefaultResolver));
    let [one, other] = [(); 2].map(|()| {
        ephemeral(initiate(snow::Builder::with_resolver(snow_parameters(), own()), [2; 32]))
    });
    assert_eq!(one, other);
}

const NOW: wgsep_proto::Now = wgsep_proto::Now {
    instant: wgsep_proto::Instant::from_nanos(1_000_000_000),
    wall: std::time::Duration::from_secs(1_800_000_000),
};

struct Sevens;

impl wgsep_proto::Random for Sevens {
    fn fill(&mut self, bytes: &mut [u8]) {
        bytes.fill(7);
    }
}

/// An end without a handshake.
fn wgsep_proto_end() -> wgsep_proto::Tunnel {
    let [ours, theirs] =
        [1, 2].map(|byte| wgsep_proto::PrivateKey::from_bytes([byte; 32]).unwrap());
    let endpoint = Some(([192, 0, 2, 1], 1).into());
    let random = Box::new(Sevens);
    wgsep_proto::Tunnel::new(ours, theirs.public_key(), None, endpoint, random).unwrap()
}

/// The whitepaper, section 5.4.6: the packet is padded to a multiple of 16 bytes.
#[test]
fn packets_are_padded_here_and_in_gotatun_if_it_is_asked_to() {
    use boringtun::noise::TunnResult::WriteToNetwork;
    let plain = packet(21);
    let (mut ours, mut buffer) = (Wgsep::establish(21, 1), [0; 256]);
    let sealed = ours.first().encapsulate_into(&plain, &mut buffer, NOW).unwrap().unwrap();
    assert_eq!(sealed.datagram.len(), 32 + 32);
    let [mut boringtun, _] = Boringtun::established();
    let WriteToNetwork(sealed) = boringtun.encapsulate(&plain, &mut buffer) else { panic!() };
    assert_eq!(sealed.len(), 21 + 32);
    let [mut gotatun, _] = Gotatun::established();
    for (mtu, padded) in [(None, 21), (Some(MtuWatcher::new(1420)), 32)] {
        let plain = Whole::copy_from(&plain[..]);
        let sealed = gotatun.handle_outgoing_packet(plain, mtu.as_ref().cloned().as_mut());
        assert_eq!(Whole::from(sealed.unwrap()).len(), padded + 32);
    }
}

/// A public key of all zeros, or of another point of low order, gives a secret that everybody knows.
#[test]
fn a_peer_whose_key_gives_no_secret_is_refused_here_alone() {
    let low_order = [0; 32];
    let ours = wgsep_proto::PrivateKey::from_bytes([1; 32]).unwrap();
    let peer = wgsep_proto::PublicKey::from_bytes(low_order);
    let endpoint = Some(([192, 0, 2, 1], 1).into());
    let mut tunnel =
        wgsep_proto::Tunnel::new(ours, peer, None, endpoint, Box::new(Sevens)).unwrap();
    tunnel.encapsulate(&packet(40), NOW).unwrap();
    assert!(tunnel.poll_transmit().is_none(), "an initiation");

    let mut tunnel =
        boringtun::noise::Tunn::new([1; 32].into(), low_order.into(), None, None, 1, None);
    let mut buffer = [0; 256];
    let initiation = tunnel.format_handshake_initiation(&mut buffer, false);
    assert!(matches!(initiation, boringtun::noise::TunnResult::WriteToNetwork(_)));

    let mut tunnel = Gotatun::end([1; 32].into(), low_order.into());
    assert!(tunnel.format_handshake_initiation(false).is_some());

    assert!(snow_initiator(low_order).write_message(&[], &mut buffer).is_ok());
}

/// Packets that wait for a handshake: which of 300 arrive.
#[test]
fn of_too_many_waiting_packets_the_newest_are_kept_here_and_the_oldest_by_the_others() {
    let numbered = |number: u16| {
        let mut packet = packet(40);
        packet[20..22].copy_from_slice(&number.to_be_bytes());
        packet
    };
    let number = |packet: &[u8]| u16::from_be_bytes([packet[20], packet[21]]);
    let first_and_count = |arrived: Vec<u16>| (arrived[0], arrived.len());

    let mut ends = Wgsep::unconnected();
    for of in 0..300 {
        ends[0].encapsulate(&numbered(of), NOW).unwrap();
    }
    let mut arrived = Vec::new();
    Wgsep::exchange(&mut ends, |packet| arrived.push(number(packet)));
    assert_eq!(first_and_count(arrived), (300 - 128, 128));

    use boringtun::noise::TunnResult::{Done, WriteToNetwork, WriteToTunnelV4};
    let [mut a, mut b] = Boringtun::ends();
    let (mut one, mut other, mut arrived) = ([0; 256], [0; 256], Vec::new());
    let mut initiation = Vec::new();
    for of in 0..300 {
        if let WriteToNetwork(sent) = a.encapsulate(&numbered(of), &mut one) {
            initiation = sent.to_vec();
        }
    }
    let WriteToNetwork(response) = b.decapsulate(None, &initiation, &mut other) else { panic!() };
    let mut next = a.decapsulate(None, response, &mut one);
    while let WriteToNetwork(datagram) = next {
        let mut opened = [0; 256];
        match b.decapsulate(None, datagram, &mut opened) {
            WriteToTunnelV4(packet, _) => arrived.push(number(packet)),
            Done => {}
            other => panic!("{other:?}"),
        }
        next = a.decapsulate(None, &[], &mut one);
    }
    assert_eq!(first_and_count(arrived), (0, 256));
}
