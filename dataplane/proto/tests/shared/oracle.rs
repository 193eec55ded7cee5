//! WireGuard by other means: the handshake by `snow`, the macs by `blake2` itself, the framing by
//! hand from the whitepaper. Shares no code with what it judges.
//!
//! Functions here panic where the other side errs: they are the assertions of the tests.

use crate::dice::Dice;
use blake2::digest::{Digest, KeyInit, Mac, consts::U16};
use blake2::{Blake2s256, Blake2sMac};
use snow::params::DHChoice;
use snow::resolvers::{CryptoResolver, DefaultResolver};
use snow::{Builder, HandshakeState, StatelessTransportState};

const PATTERN: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
const MACS_LEN: usize = 32;

/// Where Noise's part of an initiation lies: after type and sender index.
const INITIATION_NOISE: core::ops::Range<usize> = 8..116;
/// Where Noise's part of a response lies: after type and both indices.
const RESPONSE_NOISE: core::ops::Range<usize> = 12..60;

/// One end of a tunnel.
pub struct Oracle {
    private: [u8; 32],
    public: [u8; 32],
    peer_public: [u8; 32],
    preshared_key: [u8; 32],
}

/// An initiation that waits for its response.
pub struct Pending {
    /// The message.
    pub datagram: Vec<u8>,
    state: HandshakeState,
    index: u32,
}

/// Transport keys.
pub struct Session {
    transport: StatelessTransportState,
    index: u32,
    peer_index: u32,
    counter: u64,
}

/// `HASH` of the whitepaper.
fn hash(parts: [&[u8]; 2]) -> [u8; 32] {
    parts.iter().fold(Blake2s256::new(), Digest::chain_update).finalize().into()
}

/// `MAC` of the whitepaper.
fn mac(key: &[u8], input: &[u8]) -> [u8; 16] {
    let Ok(mac) = <Blake2sMac<U16> as KeyInit>::new_from_slice(key) else { panic!("key length") };
    Mac::chain_update(mac, input).finalize().into_bytes().into()
}

/// mac1 of a message to `receiver`, over all of it that comes before.
#[must_use]
pub fn mac1(receiver: &[u8; 32], before: &[u8]) -> [u8; 16] {
    mac(&hash([b"mac1----", receiver]), before)
}

/// mac2 by a cookie, over all of a message that comes before, mac1 included.
#[must_use]
pub fn mac2(cookie: &[u8; 16], before: &[u8]) -> [u8; 16] {
    mac(cookie, before)
}

/// Puts mac1 right again on a message whose rest was changed, and a zero mac2.
///
/// # Panics
/// If it is shorter than both macs.
pub fn add_macs(receiver: &[u8; 32], datagram: &mut [u8]) {
    let (before, macs) = datagram.split_at_mut(datagram.len() - MACS_LEN);
    macs[..16].copy_from_slice(&mac1(receiver, before));
    macs[16..].fill(0);
}

/// The public key of a private one, by `snow`.
fn public_key(private: &[u8; 32]) -> [u8; 32] {
    let Some(mut dh) = DefaultResolver.resolve_dh(&DHChoice::Curve25519) else {
        panic!("snow has Curve25519")
    };
    dh.set(private);
    let Ok(public) = dh.pubkey().try_into() else { panic!("32 bytes") };
    public
}

fn word(datagram: &[u8], at: usize) -> u32 {
    let [a, b, c, d] = datagram[at..at + 4] else { panic!("four bytes") };
    u32::from_le_bytes([a, b, c, d])
}

impl Oracle {
    /// An end with a random key, talking to `peer_public`.
    #[must_use]
    pub fn new(dice: &mut Dice, peer_public: [u8; 32], preshared_key: [u8; 32]) -> Self {
        let private = dice.bytes();
        Self { private, public: public_key(&private), peer_public, preshared_key }
    }

    /// Its public key.
    #[must_use]
    pub const fn public_key(&self) -> &[u8; 32] {
        &self.public
    }

    fn builder(&self) -> Builder<'_> {
        let builder = PATTERN.parse().map(Builder::new);
        let built = builder
            .and_then(|b| b.prologue(PROLOGUE))
            .and_then(|b| b.local_private_key(&self.private))
            .and_then(|b| b.psk(2, &self.preshared_key));
        let Ok(builder) = built else { panic!("snow knows the pattern") };
        builder
    }

    /// Writes an initiation with this timestamp.
    #[must_use]
    pub fn initiate(&self, timestamp: [u8; 12], index: u32) -> Pending {
        let initiator =
            self.builder().remote_public_key(&self.peer_public).and_then(Builder::build_initiator);
        let Ok(mut state) = initiator else { panic!("snow initiates") };
        let mut datagram = vec![0; 148];
        datagram[0] = 1;
        datagram[4..8].copy_from_slice(&index.to_le_bytes());
        let written = state.write_message(&timestamp, &mut datagram[INITIATION_NOISE]);
        assert_eq!(written.ok(), Some(INITIATION_NOISE.len()));
        add_macs(&self.peer_public, &mut datagram);
        Pending { datagram, state, index }
    }

    /// Reads an initiation and writes the response; returns the timestamp too.
    #[must_use]
    pub fn respond(&self, initiation: &[u8], index: u32) -> (Vec<u8>, Session, [u8; 12]) {
        self.check_framing(initiation, 1, 148);
        let Ok(mut state) = self.builder().build_responder() else { panic!("snow responds") };
        let mut timestamp = [0; 12];
        let read = state.read_message(&initiation[INITIATION_NOISE], &mut timestamp);
        assert_eq!(read.ok(), Some(12), "snow refuses the initiation");
        assert_eq!(state.get_remote_static(), Some(&self.peer_public[..]));

        let peer_index = word(initiation, 4);
        let mut response = vec![0; 92];
        response[0] = 2;
        response[4..8].copy_from_slice(&index.to_le_bytes());
        response[8..12].copy_from_slice(&peer_index.to_le_bytes());
        let written = state.write_message(&[], &mut response[RESPONSE_NOISE]);
        assert_eq!(written.ok(), Some(RESPONSE_NOISE.len()));
        add_macs(&self.peer_public, &mut response);
        (response, Session::new(state, index, peer_index), timestamp)
    }

    /// Reads the response to an initiation.
    #[must_use]
    pub fn finish(&self, pending: Pending, response: &[u8]) -> Session {
        self.check_framing(response, 2, 92);
        let Pending { mut state, index, .. } = pending;
        assert_eq!(word(response, 8), index, "the response names our index");
        let read = state.read_message(&response[RESPONSE_NOISE], &mut []);
        assert_eq!(read.ok(), Some(0), "snow refuses the response");
        Session::new(state, index, word(response, 4))
    }

    /// A handshake message to us: exact length, zero reserved bytes, our mac1, no mac2.
    fn check_framing(&self, datagram: &[u8], message_type: u32, len: usize) {
        assert_eq!((word(datagram, 0), datagram.len()), (message_type, len));
        let (before, macs) = datagram.split_at(len - MACS_LEN);
        assert_eq!(macs[..16], mac1(&self.public, before), "mac1");
        assert_eq!(macs[16..], [0; 16], "mac2 without a cookie");
    }
}

impl Session {
    fn new(state: HandshakeState, index: u32, peer_index: u32) -> Self {
        let Ok(transport) = state.into_stateless_transport_mode() else { panic!("unfinished") };
        Self { transport, index, peer_index, counter: 0 }
    }

    /// Seals a packet into a datagram, padded to 16 bytes.
    #[must_use]
    pub fn seal(&mut self, packet: &[u8]) -> Vec<u8> {
        let mut padded = packet.to_vec();
        padded.resize(packet.len().next_multiple_of(16), 0);
        let mut datagram = vec![0; 16 + padded.len() + 16];
        datagram[0] = 4;
        datagram[4..8].copy_from_slice(&self.peer_index.to_le_bytes());
        datagram[8..16].copy_from_slice(&self.counter.to_le_bytes());
        let sealed = self.transport.write_message(self.counter, &padded, &mut datagram[16..]);
        assert_eq!(sealed.ok(), Some(padded.len() + 16));
        self.counter += 1;
        datagram
    }

    /// Opens a datagram; returns its counter and the padded packet.
    #[must_use]
    pub fn open(&self, datagram: &[u8]) -> (u64, Vec<u8>) {
        assert_eq!((word(datagram, 0), word(datagram, 4)), (4, self.index));
        let counter = u64::from(word(datagram, 8)) | u64::from(word(datagram, 12)) << 32;
        let mut packet = vec![0; datagram.len() - 16];
        let Ok(len) = self.transport.read_message(counter, &datagram[16..], &mut packet) else {
            panic!("snow refuses the datagram")
        };
        packet.truncate(len);
        (counter, packet)
    }
}
