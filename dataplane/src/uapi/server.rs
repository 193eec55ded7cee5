//! The clients of the UAPI socket: bounded in number and in memory, and none ever waits for another.
//!
//! The caller owns the epoll instance and tells the server of its events; each client goes through
//! reading, waiting for its transaction and writing the reply, one transaction at a time.

use super::client::{Client, Input};
use super::inbox::MAX_TRANSACTION;
use super::parse::Refusal;
use super::secret_text::SecretText;
use super::{Operation, Scopes, UdpStatus, format};
use crate::clock;
use crate::line_limit::LineLimit;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{SockFlag, accept4};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use wgsep_proto::config::{DeviceStatus, PeerStatus};
use wgsep_proto::data_path::DropCounters;

/// Clients at a time. One more closes the one that is silent for longest, so that forgotten
/// connections never lock an operator out; if none is silent, it waits in the listener's queue.
pub(super) const MAX_CLIENTS: usize = 64;

/// What transactions of all clients may take together, in bytes, until they are answered: as much as one
/// alone.
const MAX_TOGETHER: usize = MAX_TRANSACTION;
/// What each of them may send whatever the others hold, in bytes, so that wg(8) can always ask.
const ALWAYS_TAKEN: usize = 64 * 1024;
/// What one that is being carried out takes at least, in bytes.
const LEAST_UNDER_WAY: usize = 1024;

/// A client, never mistaken for a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ClientId(u64);

/// All clients, and the socket they come by.
pub(crate) struct Server {
    listener: Option<OwnedFd>,
    /// There was no room for another client.
    paused: bool,
    first_token: u64,
    next: u64,
    /// Counts events, to tell who is silent for longest.
    now: u64,
    clients: BTreeMap<ClientId, Client>,
    /// As many as there are descriptors for, [`MAX_CLIENTS`] at most.
    max_clients: usize,
    /// Lengths of the transactions that are owed a reply, though their clients may be gone.
    under_way: BTreeMap<ClientId, usize>,
    /// [`MAX_TOGETHER`].
    max_together: usize,
    /// Clients that may have a whole transaction waiting.
    runnable: VecDeque<ClientId>,
    refusals: LineLimit,
}

impl Server {
    /// A server whose descriptors have epoll tokens from `first_token` on.
    ///
    /// It serves at most `max_clients` at a time, and never more than [`MAX_CLIENTS`].
    pub(crate) fn new(first_token: u64, max_clients: usize) -> Self {
        Self {
            max_clients: max_clients.min(MAX_CLIENTS),
            listener: None,
            paused: false,
            first_token,
            next: 0,
            now: 0,
            clients: BTreeMap::new(),
            under_way: BTreeMap::new(),
            max_together: MAX_TOGETHER,
            runnable: VecDeque::new(),
            refusals: LineLimit::default(),
        }
    }

    /// Starts to accept from a listening socket, which is non-blocking.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub(crate) fn listen(&mut self, listener: OwnedFd, epoll: &Epoll) -> nix::Result<()> {
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, self.first_token))?;
        self.listener = Some(listener);
        Ok(())
    }

    /// Handles an event of one of this server's descriptors.
    pub(crate) fn handle(&mut self, event: &EpollEvent, epoll: &Epoll) {
        self.now += 1;
        let Some(number) = event.data().checked_sub(self.first_token + 1) else {
            self.accept(epoll);
            return;
        };
        let (id, now) = (ClientId(number), self.now);
        let hung_up = event.events().intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
        self.progress(id, epoll, |client| client.advance(hung_up, now));
    }

    /// Whether [`Self::next_operation`] may have something.
    pub(crate) fn has_runnable(&self) -> bool {
        !self.runnable.is_empty()
    }

    /// The next whole transaction of any client; it is owed a reply. One that is malformed is
    /// refused here. Looking at a client takes one of `steps`, whatever comes of it; with none left,
    /// [`Self::is_runnable`] tells whether there is more to do.
    pub(crate) fn next_operation(
        &mut self,
        scopes: &dyn Scopes,
        epoll: &Epoll,
        steps: &mut usize,
    ) -> Option<(ClientId, Operation)> {
        while *steps > 0
            && let Some(id) = self.runnable.pop_front()
        {
            *steps -= 1;
            let room = self.room_for(id);
            let Some(client) = self.clients.get_mut(&id) else { continue };
            let before = client.held();
            match client.next_transaction(scopes, room) {
                Some(Ok(operation)) => {
                    let len = before - client.held();
                    self.under_way.insert(id, len.max(LEAST_UNDER_WAY));
                    self.watch(id, epoll);
                    return Some((id, operation));
                }
                Some(Err(refusal)) => {
                    let Refusal { errno, line, reason } = refusal;
                    self.refusals.write(clock::instant(), || {
                        tracing::warn!("UAPI line {line}: {reason}; nothing changed");
                    });
                    self.reply_errno(id, errno, epoll);
                }
                None if client.is_finished() => self.remove(id, epoll),
                None => {}
            }
        }
        None
    }

    /// Whether a client may have a whole transaction waiting.
    pub(crate) fn is_runnable(&self) -> bool {
        !self.runnable.is_empty()
    }

    /// How long a client's transaction may be, so that all of them together stay within bounds.
    fn room_for(&self, id: ClientId) -> usize {
        let others = self.clients.iter().filter(|(other, _)| **other != id);
        let held: usize = others.map(|(_, client)| client.held()).sum();
        let owed: usize = self.under_way.values().sum();
        let gone = self.under_way.iter().filter(|(id, _)| !self.clients.contains_key(id));
        let abandoned: usize = gone.map(|(_, len)| len).sum();
        // Clients are bounded in number, so what each may always send is; those that are gone are not.
        let always = if abandoned > self.max_together { 0 } else { ALWAYS_TAKEN };
        self.max_together.saturating_sub(held + owed).max(always)
    }

    /// Answers a `get`; nothing happens if the client is gone.
    pub(crate) fn reply_get(
        &mut self,
        id: ClientId,
        device: &DeviceStatus,
        drops: &DropCounters,
        peers: impl Iterator<Item = PeerStatus>,
        epoll: &Epoll,
    ) {
        if self.clients.contains_key(&id) {
            self.answer(id, format::format(device, drops, peers), epoll);
        } else {
            self.under_way.remove(&id);
        }
    }

    /// Answers a `get=statistics`; nothing happens if the client is gone.
    pub(crate) fn reply_statistics(
        &mut self,
        id: ClientId,
        drops: &DropCounters,
        udp: &UdpStatus,
        offloads: &[(&str, bool)],
        epoll: &Epoll,
    ) {
        self.answer(id, format::statistics(drops, udp, offloads), epoll);
    }

    /// Answers a `set`: 0, or a negative errno; nothing happens if the client is gone.
    pub(crate) fn reply_set(&mut self, id: ClientId, errno: i32, epoll: &Epoll) {
        self.reply_errno(id, errno, epoll);
    }

    fn reply_errno(&mut self, id: ClientId, errno: i32, epoll: &Epoll) {
        let mut text = SecretText::with_capacity(32);
        text.push(format!("errno={errno}\n\n").as_bytes());
        self.answer(id, text, epoll);
    }

    fn answer(&mut self, id: ClientId, text: SecretText, epoll: &Epoll) {
        self.under_way.remove(&id);
        self.progress(id, epoll, |client| client.reply(text));
    }

    /// Lets a client make a step, which may be its last.
    fn progress(
        &mut self,
        id: ClientId,
        epoll: &Epoll,
        step: impl FnOnce(&mut Client) -> nix::Result<()>,
    ) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if step(client).is_ok() {
            self.runnable.push_back(id);
            self.watch(id, epoll);
        } else {
            self.remove(id, epoll);
        }
    }

    /// Accepts the client that the listener's event is about; more of them cause more events.
    fn accept(&mut self, epoll: &Epoll) {
        if self.clients.len() >= self.max_clients && !self.close_the_idlest() {
            self.pause(true, epoll);
            return;
        }
        let Some(listener) = &self.listener else { return };
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        match accept4(listener.as_raw_fd(), flags) {
            Ok(raw) => {
                self.admit(crate::sys::own_accepted(raw), epoll);
                self.pause(false, epoll);
            }
            Err(Errno::EAGAIN | Errno::ECONNABORTED | Errno::EINTR) => {}
            // Out of descriptors or memory; the connection stays in the listener's queue.
            Err(error) => {
                if !self.close_the_idlest() {
                    tracing::warn!(
                        "cannot accept a UAPI client: {}; close other programs that talk to it",
                        error.desc()
                    );
                    self.pause(true, epoll);
                }
            }
        }
    }

    fn admit(&mut self, socket: OwnedFd, epoll: &Epoll) {
        let id = ClientId(self.next);
        self.next += 1;
        if epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, self.token(id))).is_ok() {
            self.clients.insert(id, Client::new(socket, self.now));
        }
    }

    /// Makes room: closes the client that is silent for longest, of those without part of a
    /// transaction if there are any. False if all of them are being served.
    fn close_the_idlest(&mut self) -> bool {
        let idle = |(id, client): (&ClientId, &Client)| Some((client.idleness()?, *id));
        let mut candidates: Vec<_> = self.clients.iter().filter_map(idle).collect();
        candidates.sort_unstable();
        for (_, id) in candidates {
            let Some(client) = self.clients.get_mut(&id) else { continue };
            // A request that has arrived, but was not read yet, is no silence.
            if client.read() == Ok(Input::Some) {
                self.runnable.push_back(id);
                continue;
            }
            self.clients.remove(&id);
            return true;
        }
        false
    }

    fn remove(&mut self, id: ClientId, epoll: &Epoll) {
        self.clients.remove(&id);
        self.pause(false, epoll);
    }

    /// Watches a client for what its state waits for.
    fn watch(&mut self, id: ClientId, epoll: &Epoll) {
        let Some(client) = self.clients.get(&id) else { return };
        let interest = client.interest();
        let mut event = EpollEvent::new(interest, self.token(id));
        let _cannot_fail = epoll.modify(client, &mut event);
        if interest == EpollFlags::EPOLLIN {
            // It may be silent from now on, and make room.
            self.pause(false, epoll);
        }
    }

    /// Stops or starts accepting. While paused, a new connection still causes one attempt: where
    /// descriptors were short, other processes may have made room, which nobody would tell us.
    fn pause(&mut self, paused: bool, epoll: &Epoll) {
        let Some(listener) = &self.listener else { return };
        if self.paused == paused {
            return;
        }
        self.paused = paused;
        let edge = if paused { EpollFlags::EPOLLET } else { EpollFlags::empty() };
        let mut event = EpollEvent::new(EpollFlags::EPOLLIN | edge, self.first_token);
        let _cannot_fail = epoll.modify(listener, &mut event);
    }

    /// Gives all clients together less, so that a test need not send so much.
    #[cfg(test)]
    pub(super) const fn limit_together(&mut self, bytes: usize) {
        self.max_together = bytes;
    }

    /// What all transactions take together.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        let read: usize = self.clients.values().map(Client::held).sum();
        read + self.under_way.values().sum::<usize>()
    }

    /// Whether nobody is connected.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.clients.is_empty()
    }

    const fn token(&self, id: ClientId) -> u64 {
        self.first_token + 1 + id.0
    }
}
