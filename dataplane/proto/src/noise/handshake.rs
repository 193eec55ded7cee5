//! The Noise_IKpsk2 handshake with one peer (whitepaper, section 5.4; kernel noise.c).
//!
//! Every `consume_` computes on locals and commits only what proved authentic; a message that fails
//! leaves the handshake as it was.
//!
//! Answering an initiation takes three Diffie-Hellmans, none of which needs the handshake itself:
//! [`IncomingInitiation::open_static`] and [`ResponseDraft::write`] can run on any thread.

use crate::keys::{PresharedKey, PrivateKey, PublicKey};
use crate::noise::symmetric::{SymmetricState, Unauthentic};
use crate::noise::tai64n::{TAI64N_LEN, Tai64n};
use crate::noise::x25519::{RemotePoint, public_key};
#[cfg(feature = "internals")]
use crate::saved;
use crate::secret::{Secret, in_ordinary_memory};
use crate::session::keypair::KeypairParts;
use crate::time::Instant;
use crate::wire::messages::{Initiation, ReceiverIndex, Response, SenderIndex, TAG_LEN};
use core::time::Duration;
use std::sync::Arc;

/// Initiations of one peer that are consumed a second.
pub const INITIATIONS_PER_SECOND: u32 = 50;
const INITIATION_INTERVAL: Duration = Duration::from_millis(1000 / INITIATIONS_PER_SECOND as u64);

/// Our static keys.
pub struct StaticIdentity {
    private: Secret,
    public: PublicKey,
}

impl StaticIdentity {
    /// The identity of a private key.
    #[must_use]
    pub fn new(private: &PrivateKey) -> Self {
        Self { private: Secret::new(*private.as_bytes()), public: private.public_key() }
    }

    /// Our public key.
    #[must_use]
    pub const fn public_key(&self) -> &PublicKey {
        &self.public
    }
}

/// The state of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandshakeState {
    /// There is no handshake.
    Zeroed,
    /// We sent an initiation.
    InitiationCreated,
    /// We accepted an initiation.
    InitiationConsumed,
    /// We sent a response.
    ResponseCreated,
    /// We accepted a response.
    ResponseConsumed,
}

/// The handshake with one peer, and the state that outlives it: the keys and the newest timestamp.
pub struct Handshake {
    state: HandshakeState,
    symmetric: SymmetricState,
    ephemeral: Option<Secret>,
    remote_static: PublicKey,
    /// Computed when a handshake first needs it: with many peers, all at once would take seconds.
    prepared: Option<Arc<Prepared>>,
    preshared_key: PresharedKey,
    sender_index: Option<SenderIndex>,
    receiver_index: ReceiverIndex,
    latest_timestamp: Tai64n,
    last_initiation_consumption: Option<Instant>,
}

/// Precomputed values of a peer's static key, which every handshake uses.
struct Prepared {
    /// A public key, and the largest part.
    remote_static: Box<RemotePoint>,
    /// The Diffie-Hellman of both static keys.
    static_static: Secret,
}

/// An initiation whose sender's static key is known, but not yet whether it is fresh.
pub struct IncomingInitiation {
    ephemeral: RemotePoint,
    sender_index: ReceiverIndex,
    sealed_timestamp: [u8; TAI64N_LEN + TAG_LEN],
    symmetric: SymmetricState,
    /// The claimed sender, which is unproven until the timestamp opens.
    pub remote_static: PublicKey,
}

/// The response to an initiation, except for our ephemeral key.
pub struct ResponseDraft {
    symmetric: SymmetricState,
    remote_ephemeral: RemotePoint,
    prepared: Arc<Prepared>,
    preshared_key: PresharedKey,
    receiver_index: ReceiverIndex,
}

/// A response, and the state of the handshake that goes with it.
pub struct WrittenResponse {
    symmetric: SymmetricState,
    message: Response,
}

/// Why an initiation was not consumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitiationError {
    /// A field does not open, or a key is of low order.
    Unauthentic,
    /// The timestamp is not newer than the newest seen: a replay, or the peer's clock went back.
    Replayed,
    /// More than 50 a second.
    Flooding,
}

impl From<Unauthentic> for InitiationError {
    fn from(_: Unauthentic) -> Self {
        Self::Unauthentic
    }
}

impl IncomingInitiation {
    /// Opens the static key: the first half of `consume_initiation`, before a peer is known.
    ///
    /// # Errors
    /// If it does not open.
    pub fn open_static(
        identity: &StaticIdentity,
        message: &Initiation,
    ) -> Result<Self, Unauthentic> {
        let ephemeral = RemotePoint::new(&message.ephemeral);
        let mut symmetric = SymmetricState::new(identity.public.as_bytes());
        symmetric.mix_hash(&message.ephemeral);
        symmetric.mix_key(&message.ephemeral);
        let key = symmetric.mix_dh(&*ephemeral.dh(&identity.private)?);
        let remote_static = symmetric.decrypt_and_hash(&key, &message.sealed_static)?;
        Ok(Self {
            ephemeral,
            sender_index: message.sender_index,
            sealed_timestamp: message.sealed_timestamp,
            symmetric,
            remote_static: PublicKey::from_bytes(remote_static),
        })
    }
}

impl ResponseDraft {
    /// Writes the response, its macs still zero.
    ///
    /// # Errors
    /// If a key is of low order.
    pub fn write(
        &self,
        ephemeral: &[u8; 32],
        sender_index: SenderIndex,
    ) -> Result<WrittenResponse, Unauthentic> {
        let mut symmetric = self.symmetric.clone();
        let ephemeral = Secret::new(*ephemeral);
        let public = public_key(&ephemeral);
        symmetric.mix_hash(&public);
        symmetric.mix_key(&public);
        let _no_payload = symmetric.mix_dh(&*self.remote_ephemeral.dh(&ephemeral)?);
        let _no_payload = symmetric.mix_dh(&*self.prepared.remote_static.dh(&ephemeral)?);
        let key = symmetric.mix_psk(self.preshared_key.as_bytes());
        let sealed_nothing = symmetric.encrypt_and_hash(&key, &[]);
        let receiver_index = self.receiver_index;
        let message = Response { sender_index, receiver_index, ephemeral: public, sealed_nothing };
        Ok(WrittenResponse { symmetric, message })
    }
}

impl Handshake {
    /// No handshake yet with the peer of this key.
    #[must_use]
    pub fn new(remote_static: PublicKey) -> Self {
        Self {
            state: HandshakeState::Zeroed,
            symmetric: SymmetricState::zeroed(),
            ephemeral: None,
            remote_static,
            prepared: None,
            preshared_key: PresharedKey::default(),
            sender_index: None,
            receiver_index: 0,
            latest_timestamp: Tai64n::default(),
            last_initiation_consumption: None,
        }
    }

    /// Its state.
    #[must_use]
    pub const fn state(&self) -> HandshakeState {
        self.state
    }

    /// Clears the values that were computed with our static key, after that changed.
    pub fn forget_prepared(&mut self) {
        self.prepared = None;
    }

    /// The peer's static key made ready, with the Diffie-Hellman of both static keys.
    ///
    /// # Errors
    /// If the peer's key is of low order.
    fn prepared(&mut self, identity: &StaticIdentity) -> Result<Arc<Prepared>, Unauthentic> {
        if let Some(prepared) = &self.prepared {
            return Ok(Arc::clone(prepared));
        }
        let remote_static =
            in_ordinary_memory(|| Box::new(RemotePoint::new(self.remote_static.as_bytes())));
        let static_static = remote_static.dh(&identity.private)?;
        let prepared = Arc::new(Prepared { remote_static, static_static });
        self.prepared = Some(Arc::clone(&prepared));
        Ok(prepared)
    }

    /// The key both sides mix in; it counts from the next handshake on.
    pub fn set_preshared_key(&mut self, preshared_key: PresharedKey) {
        self.preshared_key = preshared_key;
    }

    /// The key both sides mix in.
    #[must_use]
    pub const fn preshared_key(&self) -> &PresharedKey {
        &self.preshared_key
    }

    /// Our index in the present handshake.
    #[must_use]
    pub const fn sender_index(&self) -> Option<SenderIndex> {
        self.sender_index
    }

    /// The handshake for another process.
    #[cfg(feature = "internals")]
    pub(crate) fn save(&self) -> saved::Handshake {
        let is_initiated = self.state == HandshakeState::InitiationCreated;
        let parts = self.ephemeral.clone().zip(self.sender_index).filter(|_| is_initiated);
        let initiation = parts.map(|(ephemeral, sender_index)| {
            let [chaining_key, hash] = self.symmetric.save();
            saved::Initiation { chaining_key, hash, ephemeral, sender_index }
        });
        saved::Handshake {
            initiation,
            latest_timestamp: *self.latest_timestamp.as_bytes(),
            last_initiation_consumption: self.last_initiation_consumption.map(Instant::as_nanos),
        }
    }

    /// Continues the handshake that [`Self::save`] returned.
    #[cfg(feature = "internals")]
    pub(crate) fn restore(&mut self, saved: saved::Handshake) {
        self.latest_timestamp = Tai64n::from_bytes(saved.latest_timestamp);
        self.last_initiation_consumption =
            saved.last_initiation_consumption.map(Instant::from_nanos);
        let Some(initiation) = saved.initiation else { return };
        let saved::Initiation { chaining_key, hash, ephemeral, sender_index } = initiation;
        self.symmetric = SymmetricState::restore([chaining_key, hash]);
        self.ephemeral = Some(ephemeral);
        self.sender_index = Some(sender_index);
        self.state = HandshakeState::InitiationCreated;
    }

    /// Clears the present handshake; returns our index in it, which the caller releases.
    pub fn clear(&mut self) -> Option<SenderIndex> {
        self.state = HandshakeState::Zeroed;
        self.symmetric = SymmetricState::zeroed();
        self.ephemeral = None;
        self.receiver_index = 0;
        self.sender_index.take()
    }

    /// Creates an initiation, its macs still zero, which replaces the previous one: the caller releases that
    /// one's index, see [`Self::sender_index`].
    ///
    /// # Errors
    /// If the peer's key is of low order: no handshake with it can ever complete.
    pub fn create_initiation(
        &mut self,
        identity: &StaticIdentity,
        ephemeral: &[u8; 32],
        timestamp: Tai64n,
        sender_index: SenderIndex,
    ) -> Result<Initiation, Unauthentic> {
        let prepared = self.prepared(identity)?;
        let ephemeral = Secret::new(*ephemeral);
        let public = public_key(&ephemeral);
        let mut symmetric = SymmetricState::new(self.remote_static.as_bytes());
        symmetric.mix_hash(&public);
        symmetric.mix_key(&public);
        let key = symmetric.mix_dh(&*prepared.remote_static.dh(&ephemeral)?);
        let sealed_static = symmetric.encrypt_and_hash(&key, identity.public.as_bytes());
        let key = symmetric.mix_dh(&prepared.static_static);
        let sealed_timestamp = symmetric.encrypt_and_hash(&key, timestamp.as_bytes());

        self.symmetric = symmetric;
        self.ephemeral = Some(ephemeral);
        self.sender_index = Some(sender_index);
        self.state = HandshakeState::InitiationCreated;
        Ok(Initiation { sender_index, ephemeral: public, sealed_static, sealed_timestamp })
    }

    /// The second half of consuming an initiation, once its sender is known to be this peer. Returns
    /// what to answer, and our index in a handshake this replaces, to be released.
    ///
    /// # Errors
    /// [`InitiationError`]; the handshake is then unchanged.
    pub fn consume_initiation(
        &mut self,
        identity: &StaticIdentity,
        incoming: IncomingInitiation,
        now: Instant,
    ) -> Result<(ResponseDraft, Option<SenderIndex>), InitiationError> {
        let IncomingInitiation { ephemeral, sender_index, sealed_timestamp, mut symmetric, .. } =
            incoming;
        let prepared = self.prepared(identity)?;
        let key = symmetric.mix_dh(&prepared.static_static);
        let timestamp: [u8; TAI64N_LEN] = symmetric.decrypt_and_hash(&key, &sealed_timestamp)?;
        let timestamp = Tai64n::from_bytes(timestamp);
        if timestamp <= self.latest_timestamp {
            return Err(InitiationError::Replayed);
        }
        if self
            .last_initiation_consumption
            .is_some_and(|last| now.since(last) < INITIATION_INTERVAL)
        {
            return Err(InitiationError::Flooding);
        }

        let replaced = self.clear();
        self.receiver_index = sender_index;
        self.latest_timestamp = timestamp;
        self.last_initiation_consumption = Some(now);
        self.state = HandshakeState::InitiationConsumed;
        let draft = ResponseDraft {
            symmetric,
            remote_ephemeral: ephemeral,
            prepared,
            preshared_key: self.preshared_key.clone(),
            receiver_index: sender_index,
        };
        Ok((draft, replaced))
    }

    /// Commits the response to the last consumed initiation.
    ///
    /// # Errors
    /// If no initiation waits for one, or one with another index; the handshake is then unchanged.
    pub fn commit_response(&mut self, written: WrittenResponse) -> Result<Response, Unauthentic> {
        let WrittenResponse { symmetric, message } = written;
        if self.state != HandshakeState::InitiationConsumed
            || self.receiver_index != message.receiver_index
        {
            return Err(Unauthentic);
        }
        self.symmetric = symmetric;
        self.sender_index = Some(message.sender_index);
        self.state = HandshakeState::ResponseCreated;
        Ok(message)
    }

    /// Accepts the response to our initiation.
    ///
    /// # Errors
    /// If none is expected, or it is not authentic; the handshake is then unchanged.
    pub fn consume_response(
        &mut self,
        identity: &StaticIdentity,
        message: &Response,
    ) -> Result<(), Unauthentic> {
        if self.state != HandshakeState::InitiationCreated {
            return Err(Unauthentic);
        }
        let ephemeral = self.ephemeral.as_ref().ok_or(Unauthentic)?;
        let mut symmetric = self.symmetric.clone();
        symmetric.mix_hash(&message.ephemeral);
        symmetric.mix_key(&message.ephemeral);
        let remote_ephemeral = RemotePoint::new(&message.ephemeral);
        let _no_payload = symmetric.mix_dh(&*remote_ephemeral.dh(ephemeral)?);
        let _no_payload = symmetric.mix_dh(&*remote_ephemeral.dh(&identity.private)?);
        let key = symmetric.mix_psk(self.preshared_key.as_bytes());
        let _nothing: [u8; 0] = symmetric.decrypt_and_hash(&key, &message.sealed_nothing)?;

        self.symmetric = symmetric;
        self.receiver_index = message.sender_index;
        self.state = HandshakeState::ResponseConsumed;
        Ok(())
    }

    /// Turns a finished handshake into keys and forgets it; its index is the keypair's from now on.
    pub fn begin_session(&mut self) -> Option<KeypairParts> {
        let initiator = match self.state {
            HandshakeState::ResponseConsumed => true,
            HandshakeState::ResponseCreated => false,
            _ => return None,
        };
        let (first, second) = self.symmetric.split();
        let (sending, receiving) = if initiator { (first, second) } else { (second, first) };
        let receiver_index = self.receiver_index;
        let sender_index = self.clear()?;
        Some(KeypairParts { sending, receiving, sender_index, receiver_index, initiator })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(seed: u8) -> StaticIdentity {
        StaticIdentity::new(&PrivateKey::from_bytes([seed; 32]).unwrap())
    }

    fn pair(psk: [u8; 32]) -> [(StaticIdentity, Handshake); 2] {
        [(1, 2), (2, 1)].map(|(ours, theirs)| {
            let us = identity(ours);
            let mut handshake = Handshake::new(*identity(theirs).public_key());
            handshake.set_preshared_key(PresharedKey::from_bytes(psk));
            (us, handshake)
        })
    }

    fn stamp(seconds: u64) -> Tai64n {
        Tai64n::from_wall(Duration::from_secs(seconds))
    }

    fn consume(
        (us, handshake): &mut (StaticIdentity, Handshake),
        message: &Initiation,
        now: Instant,
    ) -> Result<ResponseDraft, InitiationError> {
        let incoming = IncomingInitiation::open_static(us, message)?;
        handshake.consume_initiation(us, incoming, now).map(|(draft, _)| draft)
    }

    fn respond(b: &mut (StaticIdentity, Handshake), message: &Initiation) -> Response {
        let draft = consume(b, message, NOW).unwrap();
        b.1.commit_response(draft.write(&[4; 32], 22).unwrap()).unwrap()
    }

    const NOW: Instant = Instant::from_nanos(1_000_000_000);

    #[test]
    fn both_sides_derive_the_same_keys() {
        let [mut a, mut b] = pair([9; 32]);
        let initiation = a.1.create_initiation(&a.0, &[3; 32], stamp(1), 11).unwrap();
        let response = respond(&mut b, &initiation);
        a.1.consume_response(&a.0, &response).unwrap();
        let (ours, theirs) = (a.1.begin_session().unwrap(), b.1.begin_session().unwrap());
        assert_eq!((*ours.sending, *ours.receiving), (*theirs.receiving, *theirs.sending));
        assert_ne!(*ours.sending, *ours.receiving);
        assert_eq!((ours.sender_index, ours.receiver_index), (11, 22));
        assert_eq!((theirs.sender_index, theirs.receiver_index), (22, 11));
        assert!(ours.initiator && !theirs.initiator);
        assert!(a.1.begin_session().is_none());
    }

    #[test]
    fn a_different_psk_fails_at_the_response_and_keeps_the_initiation_pending() {
        let [mut a, mut b] = pair([9; 32]);
        b.1.set_preshared_key(PresharedKey::from_bytes([8; 32]));
        let initiation = a.1.create_initiation(&a.0, &[3; 32], stamp(1), 11).unwrap();
        let response = respond(&mut b, &initiation);
        assert_eq!(a.1.consume_response(&a.0, &response), Err(Unauthentic));
        assert_eq!(a.1.state(), HandshakeState::InitiationCreated);
    }

    #[test]
    fn an_invalid_response_does_not_disturb_the_valid_one_after_it() {
        let [mut a, mut b] = pair([0; 32]);
        let initiation = a.1.create_initiation(&a.0, &[3; 32], stamp(1), 11).unwrap();
        let response = respond(&mut b, &initiation);
        for forge in [
            |r: &mut Response| r.ephemeral[5] ^= 1,
            |r: &mut Response| r.sealed_nothing[0] ^= 1,
            |r: &mut Response| r.ephemeral = [0; 32],
        ] {
            let mut forged = response.clone();
            forge(&mut forged);
            assert_eq!(a.1.consume_response(&a.0, &forged), Err(Unauthentic));
        }
        assert_eq!(a.1.consume_response(&a.0, &response), Ok(()));
    }

    #[test]
    fn replayed_and_older_initiations_are_refused() {
        let [mut a, mut b] = pair([0; 32]);
        let later = Instant::from_nanos(2_000_000_000);
        let first = a.1.create_initiation(&a.0, &[3; 32], stamp(5), 1).unwrap();
        let older = a.1.create_initiation(&a.0, &[4; 32], stamp(4), 2).unwrap();
        consume(&mut b, &first, NOW).unwrap();
        for replay in [&first, &older] {
            assert_eq!(consume(&mut b, replay, later).err(), Some(InitiationError::Replayed));
        }
    }

    #[test]
    fn a_response_to_another_initiation_than_the_last_is_none() {
        let [mut a, mut b] = pair([0; 32]);
        let written =
            |b: &mut (StaticIdentity, Handshake), initiation: &Initiation, seconds: u64| {
                let now = Instant::from_nanos(seconds * 1_000_000_000);
                consume(b, initiation, now).unwrap().write(&[4; 32], 22).unwrap()
            };
        let first = a.1.create_initiation(&a.0, &[3; 32], stamp(1), 11).unwrap();
        let second = a.1.create_initiation(&a.0, &[3; 32], stamp(2), 12).unwrap();
        let late = written(&mut b, &first, 1);
        let cleared = written(&mut b, &second, 2);
        assert_eq!(b.1.commit_response(late).err(), Some(Unauthentic));
        b.1.clear();
        assert_eq!(b.1.commit_response(cleared).err(), Some(Unauthentic));
        assert!(b.1.begin_session().is_none());
    }

    #[test]
    fn initiations_within_20_ms_are_a_flood() {
        let [mut a, mut b] = pair([0; 32]);
        let mut consume_at = |seconds, nanos| {
            let message = a.1.create_initiation(&a.0, &[3; 32], stamp(seconds), 1).unwrap();
            consume(&mut b, &message, Instant::from_nanos(nanos))
        };
        assert!(consume_at(1, 1_000_000_000).is_ok());
        assert_eq!(consume_at(2, 1_019_999_999).err(), Some(InitiationError::Flooding));
        assert!(consume_at(3, 1_020_000_000).is_ok());
    }

    #[test]
    fn low_order_keys_never_complete() {
        let us = identity(1);
        let mut low_order = [[0; 32], [0; 32]];
        low_order[1][0] = 1;
        for point in low_order {
            let mut handshake = Handshake::new(PublicKey::from_bytes(point));
            assert!(handshake.create_initiation(&us, &[3; 32], stamp(1), 1).is_err());
        }
        let [mut a, b] = pair([0; 32]);
        let mut message = a.1.create_initiation(&a.0, &[3; 32], stamp(1), 1).unwrap();
        message.ephemeral = [0; 32];
        assert!(IncomingInitiation::open_static(&b.0, &message).is_err());
    }

    #[test]
    fn every_bit_of_an_initiation_counts() {
        let [mut a, b] = pair([0; 32]);
        let message = a.1.create_initiation(&a.0, &[3; 32], stamp(1), 1).unwrap();
        for byte in 0..48 {
            let mut forged = message.clone();
            forged.sealed_static[byte] ^= 0x80;
            assert!(IncomingInitiation::open_static(&b.0, &forged).is_err());
        }
        for byte in 0..28 {
            let [_, mut b] = pair([0; 32]);
            let mut forged = message.clone();
            forged.sealed_timestamp[byte] ^= 0x80;
            assert_eq!(consume(&mut b, &forged, NOW).err(), Some(InitiationError::Unauthentic));
            assert_eq!(b.1.state(), HandshakeState::Zeroed);
        }
    }
}
