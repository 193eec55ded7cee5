//! Handshake messages: sending them, and what follows from those received (kernel send.c and
//! receive.c).

use super::job::{CryptoJob, Inline, JobRunner};
use super::load::Change;
use super::{ControlPlane, Event, HandshakeTransmit, MANY_UNANSWERED, PEER_EXISTS};
use crate::invariant::present;
use crate::noise::cookie::MacState;
use crate::noise::handshake::{InitiationError, ResponseDraft};
use crate::noise::symmetric::Unauthentic;
use crate::noise::tai64n::Tai64n;
use crate::path::data_path::DropCause;
use crate::secret::Secret;
use crate::session::handshakes::HandshakeFailure;
use crate::session::index_table::Entry;
use crate::session::keypair::Keypair;
use crate::session::peer::{Endpoint, Peer, PeerId};
use crate::time::{Instant, Now};
use crate::wire::messages::{CookieReply, Message, Response, SenderIndex};
use std::sync::Arc;

/// Traffic class of initiations and responses: AF41, so that they get through before the data.
pub const HANDSHAKE_TRAFFIC_CLASS: u8 = 0x88;

/// Why there is a private key when a message is processed further.
const ADMITTED: &str = "without a private key no message is admitted";

/// A received handshake message or cookie reply.
#[derive(Clone, Copy, Debug)]
pub struct HandshakeDatagram<'a> {
    /// The sender, and the address of ours that it was sent to.
    pub endpoint: Endpoint,
    /// UDP payload.
    pub datagram: &'a [u8],
    /// Number of messages that are queued behind it: from [`super::UNDER_LOAD_THRESHOLD`] on, or after
    /// [`super::UNDER_LOAD_REFUSALS`] refusals, senders must prove their address with a cookie.
    pub waiting: usize,
}

/// Why a handshake that a program asked for is not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "internals"), non_exhaustive)]
pub enum StartHandshakeError {
    /// No peer has this public key.
    UnknownPeer,
    /// The link is down.
    LinkDown,
    /// There is no private key.
    NoPrivateKey,
    /// The peer has no endpoint.
    NoEndpoint,
    /// A handshake message was sent to the peer less than REKEY_TIMEOUT (5 s) ago.
    TooSoon,
}

impl core::fmt::Display for StartHandshakeError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::UnknownPeer => "no peer has this public key",
            Self::LinkDown => "the link is down",
            Self::NoPrivateKey => "there is no private key",
            Self::NoEndpoint => "the peer has no endpoint",
            Self::TooSoon => "the last handshake message to the peer is too recent",
        })
    }
}

impl core::error::Error for StartHandshakeError {}

/// The origin and length of an initiation whose static key is being opened.
struct InitiationOrigin {
    endpoint: Endpoint,
    len: usize,
}

impl ControlPlane {
    // ------------------------------------------------------------ out

    /// Sends an initiation for no packet's sake.
    ///
    /// # Errors
    /// Why none is sent. Nothing is sent later either.
    pub(crate) fn start_handshake(
        &mut self,
        id: PeerId,
        now: Now,
    ) -> Result<(), StartHandshakeError> {
        let entry = self.entry(id).ok_or(StartHandshakeError::UnknownPeer)?;
        if !self.up {
            return Err(StartHandshakeError::LinkDown);
        }
        if self.identity.is_none() {
            return Err(StartHandshakeError::NoPrivateKey);
        }
        if !entry.peer.has_endpoint() {
            return Err(StartHandshakeError::NoEndpoint);
        }
        if !entry.peer.timers.may_send_initiation(now.instant) {
            return Err(StartHandshakeError::TooSoon);
        }
        self.request_initiation(id, now);
        Ok(())
    }

    /// Sends an initiation for a new reason, which resets the count of repetitions.
    pub(super) fn request_initiation(&mut self, id: PeerId, now: Now) {
        let Some(entry) = present(self.entry(id), PEER_EXISTS) else { return };
        entry.peer.timers.reset_handshake_attempts();
        self.send_initiation(id, now);
    }

    /// Sends an initiation, at most one every `REKEY_TIMEOUT`.
    pub(super) fn send_initiation(&mut self, id: PeerId, now: Now) {
        if !self.up {
            return;
        }
        let Some(entry) = present(self.entry(id), PEER_EXISTS) else { return };
        let peer = Arc::clone(&entry.peer);
        let Some(endpoint) = peer.endpoint() else { return };
        if self.identity.is_none() {
            self.wait_for_private_key(&peer, now);
            return;
        }
        if !peer.timers.may_send_initiation(now.instant) {
            self.postpone_initiation(id, now);
            return;
        }
        peer.timers.record_handshake_sent(now.instant);
        self.clear_handshake(id);
        let index = self.allocate_index(id);
        let ephemeral = Secret::new(self.random_array());
        let jitter = u32::from_ne_bytes(self.random_array());
        let both = self.identity.as_ref().zip(self.peers.get_mut(&id));
        let Some((identity, entry)) = present(both, "both were there above") else { return };
        let timestamp = Tai64n::from_wall(now.wall);
        match entry.handshake.create_initiation(&identity.keys, &ephemeral, timestamp, index) {
            Ok(initiation) => {
                let mut datagram = initiation.to_bytes();
                entry.cookie.add_macs(&mut datagram, now.instant);
                peer.timers.set_jitter(jitter);
                let _rescheduled = peer.timers.handshake_initiated(now.instant);
                entry.unanswered = entry.unanswered.saturating_add(1);
                peer.handshakes().initiation_sent(now.instant);
                // The previous initiation went unanswered for five seconds.
                if entry.unanswered == MANY_UNANSWERED + 1 {
                    let event =
                        Event::HandshakeUnanswered(*peer.public_key(), endpoint.destination);
                    self.log(event);
                }
                self.send_handshake_message(&peer, endpoint, datagram.to_vec(), now.instant);
            }
            Err(_) => self.data_path.index_table.release(index),
        }
        self.reschedule(id);
    }

    /// Schedules an initiation that was requested too soon after the last handshake message, if nothing can be
    /// sent without it. (The kernel drops the request until the next packet, which after simultaneous
    /// initiations can leave both sides waiting for the other.)
    fn postpone_initiation(&mut self, id: PeerId, now: Now) {
        let Some(entry) = present(self.entry(id), PEER_EXISTS) else { return };
        let can_send = {
            let state = entry.peer.state();
            state.keypairs.current.as_ref().is_some_and(|keypair| keypair.can_send(now.instant))
        };
        if !can_send {
            let _rescheduled = entry.peer.timers.handshake_postponed();
            self.reschedule(id);
        }
    }

    /// Lets the timer of an initiation that cannot be created run as if it was sent, so that packets wait for a
    /// private key as long as for a response. (In the kernel they wait without limit.)
    fn wait_for_private_key(&mut self, peer: &Peer, now: Now) {
        if peer.state().staged.is_empty() {
            return;
        }
        if !core::mem::replace(&mut self.no_private_key_logged, true) {
            self.log(Event::NoPrivateKey);
        }
        let _rescheduled = peer.timers.handshake_initiated(now.instant);
        self.reschedule(peer.id());
    }

    /// Creates the job that writes a response, with a new index of ours.
    fn write_response(&mut self, id: PeerId, draft: ResponseDraft) -> (SenderIndex, CryptoJob) {
        let ephemeral = Secret::new(self.random_array());
        let index = self.allocate_index(id);
        (index, CryptoJob::write(draft, ephemeral, index))
    }

    fn send_response(
        &mut self,
        id: PeerId,
        written: Option<CryptoJob>,
        now: Instant,
    ) -> Result<(), Unauthentic> {
        let written =
            present(written, "the runner returns all jobs").ok_or(Unauthentic)?.written()?;
        let entry = present(self.entry_mut(id), PEER_EXISTS).ok_or(Unauthentic)?;
        let peer = Arc::clone(&entry.peer);
        let response = entry.handshake.commit_response(written)?;
        if entry.unconfirmed > 0 {
            peer.handshakes().fail(HandshakeFailure::Unconfirmed);
        }
        entry.unconfirmed = entry.unconfirmed.saturating_add(1);
        peer.handshakes().response_sent(now);
        let never_confirmed = entry.unconfirmed == MANY_UNANSWERED + 1;
        let mut datagram = response.to_bytes();
        entry.cookie.add_macs(&mut datagram, now);
        peer.timers.record_handshake_sent(now);
        if never_confirmed {
            self.log(Event::NeverConfirmed(*peer.public_key()));
        }
        if self.begin_session(id, now) {
            let _rescheduled = peer.timers.session_derived(now);
            if let Some(endpoint) = peer.endpoint() {
                self.send_handshake_message(&peer, endpoint, datagram.to_vec(), now);
            }
        }
        Ok(())
    }

    fn send_handshake_message(
        &mut self,
        peer: &Peer,
        endpoint: Endpoint,
        datagram: Vec<u8>,
        now: Instant,
    ) {
        let _rescheduled = peer.timers.any_authenticated_packet_traversal(now);
        peer.timers.any_authenticated_packet_sent();
        peer.add_tx(u64::try_from(datagram.len()).unwrap_or(0), 1);
        self.transmits.push_back(HandshakeTransmit {
            endpoint,
            traffic_class: HANDSHAKE_TRAFFIC_CLASS,
            datagram,
            peer: Some(peer.id()),
        });
    }

    fn allocate_index(&mut self, id: PeerId) -> SenderIndex {
        let Self { data_path, random, .. } = self;
        data_path.index_table.allocate(id, || {
            let mut bytes = [0; 4];
            random.fill(&mut bytes);
            u32::from_ne_bytes(bytes)
        })
    }

    /// Turns the finished handshake of a peer into a keypair.
    fn begin_session(&mut self, id: PeerId, now: Instant) -> bool {
        let Some(entry) = present(self.entry_mut(id), PEER_EXISTS) else { return false };
        let parts = present(entry.handshake.begin_session(), "it was just finished");
        let Some(parts) = parts else { return false };
        let peer = Arc::clone(&entry.peer);
        let rekey_after_time = peer.timers.rekey_after_time();
        let keypair = Arc::new(Keypair::with_rekey_after_time(&parts, rekey_after_time, now));
        let displaced = peer.state().keypairs.add(Arc::clone(&keypair));
        self.data_path.index_table.swap_handshake_for_keypair(peer, keypair);
        for keypair in displaced.iter().flatten() {
            self.data_path.index_table.release(keypair.sender_index());
        }
        true
    }

    // ------------------------------------------------------------ in

    /// Consumes a handshake message or cookie reply on the calling thread. A device that is down ignores it.
    ///
    /// # Errors
    /// Why it is dropped, which is counted.
    pub fn receive_handshake(
        &mut self,
        endpoint: Endpoint,
        datagram: &[u8],
        waiting: usize,
        now: Now,
    ) -> Result<(), DropCause> {
        let datagram = HandshakeDatagram { endpoint, datagram, waiting };
        self.receive_handshakes([datagram], &Inline, now).map_or(Ok(()), Err)
    }

    /// Consumes handshake messages and cookie replies in the order of arrival. `runner` runs the
    /// Diffie-Hellman operations of all initiations at once. A device that is down ignores the messages. Returns the
    /// cause of the latest that was dropped, if any was; all are counted.
    pub fn receive_handshakes<'a>(
        &mut self,
        datagrams: impl IntoIterator<Item = HandshakeDatagram<'a>>,
        runner: &impl JobRunner,
        now: Now,
    ) -> Option<DropCause> {
        let mut dropped = None;
        if !self.up {
            return dropped;
        }
        let datagrams = datagrams.into_iter();
        let (mut origins, mut opening) = (Vec::new(), Vec::with_capacity(datagrams.size_hint().0));
        for datagram in datagrams {
            match self.receive_message(&datagram, now) {
                Ok(Some(job)) => {
                    origins.push(InitiationOrigin {
                        endpoint: datagram.endpoint,
                        len: datagram.datagram.len(),
                    });
                    opening.push(job);
                }
                Ok(None) => {}
                Err(cause) => dropped = Some(cause),
            }
        }
        if opening.is_empty() {
            return dropped;
        }
        let mut answered = Vec::with_capacity(opening.len());
        let mut writing = Vec::with_capacity(opening.len());
        for (origin, job) in origins.iter().zip(runner.run(opening)) {
            match self.receive_initiation(origin, job, now) {
                Ok((id, draft)) => {
                    let (index, job) = self.write_response(id, draft);
                    answered.push((id, index));
                    writing.push(job);
                }
                Err(cause) => dropped = Some(cause),
            }
        }
        let mut written = runner.run(writing).into_iter();
        for (id, index) in answered {
            if self.send_response(id, written.next(), now.instant).is_err() {
                self.data_path.index_table.release(index);
            }
            self.reschedule(id);
        }
        dropped
    }

    /// Counts a dropped message.
    fn drop_message<T>(&self, cause: DropCause) -> Result<T, DropCause> {
        self.data_path.drops.add(cause, 1);
        Err(cause)
    }

    /// Consumes any message but an initiation. For an accepted initiation, returns the job that decrypts the
    /// static key.
    fn receive_message(
        &mut self,
        message: &HandshakeDatagram<'_>,
        now: Now,
    ) -> Result<Option<CryptoJob>, DropCause> {
        let &HandshakeDatagram { endpoint, datagram, waiting } = message;
        match Message::parse(datagram) {
            Some(Message::Initiation(message)) => {
                self.admit(endpoint, datagram, message.sender_index, waiting, now)?;
                let identity = present(self.identity.as_ref(), ADMITTED);
                return Ok(identity.map(|identity| CryptoJob::open(&identity.keys, message)));
            }
            Some(Message::Response(message)) => {
                self.admit(endpoint, datagram, message.sender_index, waiting, now)?;
                self.receive_response(endpoint, datagram.len(), &message, now)?;
            }
            Some(Message::CookieReply(message)) => self.receive_cookie_reply(&message, now)?,
            Some(Message::Transport(_)) | None => {
                return self.drop_message(DropCause::InboundMalformed);
            }
        }
        Ok(None)
    }

    /// Validates the macs; under load also the cookie and the sender's rate.
    fn admit(
        &mut self,
        endpoint: Endpoint,
        datagram: &[u8],
        sender_index: SenderIndex,
        waiting: usize,
        now: Now,
    ) -> Result<(), DropCause> {
        let under_load = self.record_message(waiting, now.instant);
        let Some(identity) = &self.identity else {
            return self.drop_message(DropCause::NoPrivateKey);
        };
        let from = endpoint.destination;
        let macs = identity.cookie_checker.validate_macs(datagram, from, under_load, now.instant);
        match macs {
            MacState::Invalid => {
                self.log(Event::InvalidMac(from));
                self.drop_message(DropCause::InvalidMac)
            }
            MacState::ValidMac1 if under_load => {
                self.send_cookie_reply(endpoint, datagram, sender_index, now.instant);
                self.refuse(DropCause::UnderLoad, now.instant)
            }
            MacState::ValidMac1 => Ok(()),
            MacState::ValidMac2 if self.rate_limiter.allow(from.ip(), now.instant) => Ok(()),
            MacState::ValidMac2 => self.drop_message(DropCause::RateLimited),
        }
    }

    /// True if senders must prove their address at present.
    #[must_use]
    pub fn is_under_load(&self, now: Instant) -> bool {
        self.load.is_high_at(now)
    }

    fn record_message(&mut self, waiting: usize, now: Instant) -> bool {
        let change = self.load.record(waiting, now);
        self.load_changed(change);
        self.load.is_high()
    }

    /// Refuses a message with a valid mac1: it cost a Diffie-Hellman, or would have if not for the load.
    fn refuse<T>(&mut self, cause: DropCause, now: Instant) -> Result<T, DropCause> {
        let change = self.load.refuse(now);
        self.load_changed(change);
        self.drop_message(cause)
    }

    fn load_changed(&mut self, change: Option<Change>) {
        match change {
            Some(Change::Begins) => self.log(Event::UnderLoad),
            Some(Change::Ends) => self.rate_limiter.clear(),
            None => {}
        }
    }

    /// Answers with a cookie reply to the sender's address, without a change to any peer.
    fn send_cookie_reply(
        &mut self,
        endpoint: Endpoint,
        datagram: &[u8],
        sender_index: SenderIndex,
        now: Instant,
    ) {
        let Self { identity, random, .. } = self;
        let Some(identity) = present(identity.as_mut(), ADMITTED) else { return };
        let (from, mut random) = (endpoint.destination, |bytes: &mut [u8]| random.fill(bytes));
        if let Some(reply) =
            identity.cookie_checker.create_reply(datagram, sender_index, from, &mut random, now)
        {
            let datagram = reply.to_bytes().to_vec();
            self.transmits.push_back(HandshakeTransmit {
                endpoint,
                traffic_class: 0,
                datagram,
                peer: None,
            });
        }
    }

    /// Consumes an initiation whose static key was decrypted. Returns the peer and the draft of the response.
    fn receive_initiation(
        &mut self,
        origin: &InitiationOrigin,
        opened: CryptoJob,
        now: Now,
    ) -> Result<(PeerId, ResponseDraft), DropCause> {
        let Ok(incoming) = opened.opened() else {
            return self.refuse(DropCause::InvalidInitiation, now.instant);
        };
        let public_key = incoming.remote_static;
        let Some(id) = self.by_key.get(&public_key).copied() else {
            let refused = self.refuse(DropCause::UnknownPeer, now.instant);
            self.log(Event::UnknownPeer(origin.endpoint.destination, public_key));
            return refused;
        };
        let both = present(self.identity.as_ref(), ADMITTED)
            .zip(present(self.peers.get_mut(&id), PEER_EXISTS));
        let Some((identity, entry)) = both else { return Err(DropCause::UnknownPeer) };
        let peer = Arc::clone(&entry.peer);
        match entry.handshake.consume_initiation(&identity.keys, incoming, now.instant) {
            Ok((draft, replaced)) => {
                if let Some(index) = replaced {
                    self.data_path.index_table.release(index);
                }
                self.received_from(&peer, origin.endpoint, origin.len, now.instant);
                Ok((id, draft))
            }
            Err(error) => {
                if let Some(failure) = HandshakeFailure::of_initiation(error) {
                    peer.handshakes().fail(failure);
                }
                let refused = self.refuse(error.into(), now.instant);
                if error == InitiationError::Replayed {
                    self.log(Event::InitiationReplayed(*peer.public_key()));
                }
                refused
            }
        }
    }

    fn receive_response(
        &mut self,
        endpoint: Endpoint,
        len: usize,
        message: &Response,
        now: Now,
    ) -> Result<(), DropCause> {
        let Some(Entry::Handshake(id)) = self.data_path.index_table.lookup(message.receiver_index)
        else {
            return self.drop_message(DropCause::UnknownIndex);
        };
        let both = present(self.identity.as_ref(), ADMITTED)
            .zip(present(self.peers.get_mut(&id), PEER_EXISTS));
        let Some((identity, entry)) = both else { return Err(DropCause::UnknownIndex) };
        let peer = Arc::clone(&entry.peer);
        if entry.handshake.consume_response(&identity.keys, message).is_err() {
            peer.handshakes().fail(HandshakeFailure::BadResponse);
            let refused = self.refuse(DropCause::InvalidResponse, now.instant);
            self.log(Event::ResponseRefused(*peer.public_key()));
            return refused;
        }
        self.received_from(&peer, endpoint, len, now.instant);
        if self.begin_session(id, now.instant) {
            let _rescheduled = peer.timers.session_derived(now.instant);
            peer.timers.handshake_complete();
            self.record_handshake(id, now);
            self.send_keepalive(id, now);
        }
        self.reschedule(id);
        Ok(())
    }

    /// Updates the peer's endpoint from an authentic handshake message.
    fn received_from(&mut self, peer: &Peer, endpoint: Endpoint, len: usize, now: Instant) {
        if peer.endpoint().is_some_and(|before| before.destination != endpoint.destination) {
            self.log(Event::EndpointMoved(*peer.public_key(), endpoint.destination));
        }
        peer.set_endpoint(endpoint);
        peer.state().received(now);
        if let Some(entry) = present(self.entry_mut(peer.id()), PEER_EXISTS) {
            entry.unanswered = 0;
        }
        peer.add_rx_bytes(u64::try_from(len).unwrap_or(0));
        peer.timers.any_authenticated_packet_received();
        let _rescheduled = peer.timers.any_authenticated_packet_traversal(now);
    }

    /// Records that a handshake with a peer is complete on both sides. The caller has updated the timers
    /// before: here the next handshake may already be in progress.
    pub(super) fn record_handshake(&mut self, id: PeerId, now: Now) {
        let Some(entry) = present(self.entry_mut(id), PEER_EXISTS) else { return };
        let (peer, first) = (*entry.peer.public_key(), entry.last_handshake.is_zero());
        entry.last_handshake = now.wall;
        entry.unconfirmed = 0;
        entry.peer.handshakes().completed(now.instant);
        self.log(Event::HandshakeComplete { peer, first });
    }

    /// Consumes a cookie reply. It changes neither endpoint nor timers, because it does not authenticate its
    /// sender.
    fn receive_cookie_reply(&mut self, message: &CookieReply, now: Now) -> Result<(), DropCause> {
        let id = match self.data_path.index_table.lookup(message.receiver_index) {
            Some(Entry::Handshake(id)) => id,
            Some(Entry::Keypair(peer, _)) => peer.id(),
            None => return self.drop_message(DropCause::UnknownIndex),
        };
        let entry = present(self.entry_mut(id), PEER_EXISTS).ok_or(DropCause::UnknownIndex)?;
        if entry.cookie.consume_reply(message, now.instant) {
            Ok(())
        } else {
            self.drop_message(DropCause::InvalidCookie)
        }
    }
}
