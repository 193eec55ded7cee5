//! The server of the UAPI socket. Its clients are bounded in number and in memory, and none blocks another.
//!
//! The caller owns the epoll instance and passes events to the server. Each client reads a transaction,
//! waits for it to be executed and writes the reply, one transaction at a time.

use super::answer::{Answer, PART_LEN};
use super::client::{Client, Input};
use super::inbox::MAX_TRANSACTION;
use super::parse::Refusal;
use super::secret_text::SecretText;
use super::{Access, Operation, Scopes, format};
use crate::clock;
use crate::drops::Drops;
use crate::line_limit::LineLimit;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{SockFlag, accept4};
use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;
use wgsep_policy::{described, remedy};
use wgsep_proto::Instant;
use wgsep_proto::device::control_plane::ControlPlane;
use wgsep_proto::invariant::present;
use wgsep_status::{Counters, Listener};

/// Most clients at a time. One more closes the client that has been idle longest, so that forgotten
/// connections never lock an operator out; if none is idle, it waits in the listener's queue until one is, or has read
/// nothing of its answer for [`PATIENCE`].
pub(super) const MAX_CLIENTS: usize = 64;

/// Flags of a client's socket.
const ACCEPTED: SockFlag = SockFlag::SOCK_NONBLOCK.union(SockFlag::SOCK_CLOEXEC);
/// No descriptor.
const NONE: RawFd = -1;

/// How long a client may read nothing of its answer while another waits for its place.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same on the socket for preshared keys, where no answer is long.
const LITTLE_PATIENCE: Duration = Duration::from_secs(1);

/// Most bytes of all clients' transactions together, until they are answered: as many as one may have.
const MAX_TOGETHER: usize = MAX_TRANSACTION;
/// Bytes that each client may send whatever the others hold, so that wg(8) always works.
const GUARANTEED: usize = 64 * 1024;
/// Bytes that a transaction counts for at least while it is executed.
const LEAST_IN_PROGRESS: usize = 1024;

/// Most parts of all clients' answers that are formatted because the configuration changes, unless one answer alone has
/// more: 16 MiB, the answers of 45,000 peers.
const MAX_PARTS: usize = (16 << 20) / PART_LEN;

/// Number of a client, which is never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ClientId(u64);

/// All clients, and the listening socket.
pub(crate) struct Server {
    /// What its clients may do.
    access: Access,
    listener: Listener,
    next: u64,
    /// Number of events, by which the client that is idle longest is found.
    now: u64,
    clients: BTreeMap<ClientId, Client>,
    /// Most clients: as many as there are descriptors for, at most [`MAX_CLIENTS`].
    max_clients: usize,
    /// Lengths of the transactions that have no reply yet; their clients may have disconnected.
    in_progress: BTreeMap<ClientId, usize>,
    /// [`MAX_TOGETHER`].
    max_together: usize,
    /// [`MAX_PARTS`].
    max_parts: usize,
    /// [`PATIENCE`], or [`LITTLE_PATIENCE`].
    patience: Duration,
    /// Clients that may have a complete transaction.
    runnable: VecDeque<ClientId>,
    refusals: LineLimit,
}

/// Calls accept4(2) without a listener.
///
/// # Errors
/// If a filter refuses the call.
pub(crate) fn probe_accept() -> nix::Result<()> {
    match accept4(NONE, ACCEPTED) {
        Err(Errno::EBADF) => Ok(()),
        refused => refused.map(drop),
    }
}

/// Accepts a client, whose socket never waits.
///
/// # Errors
/// As accept4(2).
pub(crate) fn accept(listener: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    accept4(listener.as_raw_fd(), ACCEPTED).map(crate::sys::own_accepted)
}

impl Server {
    /// Creates a server whose descriptors have epoll tokens from `first_token` on.
    ///
    /// It serves at most `max_clients` at a time, and never more than [`MAX_CLIENTS`].
    pub(crate) fn new(access: Access, first_token: u64, max_clients: usize) -> Self {
        Self {
            access,
            max_clients: max_clients.min(MAX_CLIENTS),
            listener: Listener::new(first_token),
            next: 0,
            now: 0,
            clients: BTreeMap::new(),
            in_progress: BTreeMap::new(),
            max_together: MAX_TOGETHER,
            max_parts: MAX_PARTS,
            patience: match access {
                Access::Everything => PATIENCE,
                Access::PresharedKeys => LITTLE_PATIENCE,
            },
            runnable: VecDeque::new(),
            refusals: LineLimit::default(),
        }
    }

    /// Starts accepting from a listening socket, which is non-blocking.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub(crate) fn listen(&mut self, listener: OwnedFd, epoll: &Epoll) -> nix::Result<()> {
        self.listener.listen(listener, epoll)
    }

    /// Handles an event of one of this server's descriptors. Answers go on with what `device` has.
    pub(crate) fn handle(&mut self, event: &EpollEvent, device: &ControlPlane, epoll: &Epoll) {
        self.now += 1;
        let Some(number) = self.listener.client_of(event) else {
            self.accept(epoll);
            return;
        };
        let (id, now) = (ClientId(number), self.now);
        let hung_up = event.events().intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
        self.progress(id, epoll, |client| client.advance(hung_up, now, device));
    }

    /// When a client that does not read makes room for one that waits, if one does.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        let stalled = self.clients.values().filter_map(Client::stalled_since).min()?;
        self.listener.is_paused().then(|| stalled.after(self.patience))
    }

    /// Closes a client that does not read for one that waits, if that is due.
    pub(crate) fn handle_timeout(&mut self, epoll: &Epoll) {
        if self.next_timeout().is_some_and(|due| due <= clock::instant()) {
            self.accept(epoll);
        }
    }

    /// True if [`Self::next_operation`] may return an operation.
    pub(crate) fn has_runnable(&self) -> bool {
        !self.runnable.is_empty()
    }

    /// Takes the next complete transaction of any client, which the caller must answer. A malformed one is
    /// refused here. Checking a client takes one of `steps`; if none is left, [`Self::is_runnable`] returns
    /// whether there is more to do.
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
            let limit = self.limit_for(id);
            let Some(client) = self.clients.get_mut(&id) else { continue };
            let before = client.held();
            match client.next_transaction(scopes, limit) {
                Some(Ok(operation)) => {
                    let len = before - client.held();
                    self.in_progress.insert(id, len.max(LEAST_IN_PROGRESS));
                    self.watch(id, epoll);
                    return Some((id, operation));
                }
                Some(Err(refusal)) => {
                    let Refusal { errno, line, reason } = refusal;
                    self.refusals.write(clock::instant(), || {
                        let socket = self.access.socket();
                        tracing::warn!("{socket} line {line}: {reason}; nothing changed");
                    });
                    self.reply_errno(id, errno, epoll);
                }
                None if client.is_finished() => self.remove(id, epoll),
                None => {}
            }
        }
        None
    }

    /// True if a client may have a complete transaction.
    pub(crate) fn is_runnable(&self) -> bool {
        !self.runnable.is_empty()
    }

    /// Most bytes of a client's transaction, so that all of them together stay within bounds.
    fn limit_for(&self, id: ClientId) -> usize {
        let others = self.clients.iter().filter(|(other, _)| **other != id);
        let held: usize = others.map(|(_, client)| client.held()).sum();
        let unanswered: usize = self.in_progress.values().sum();
        let gone = self.in_progress.iter().filter(|(id, _)| !self.clients.contains_key(id));
        let abandoned: usize = gone.map(|(_, len)| len).sum();
        // The number of clients is bounded, and with it the sum of what each is guaranteed. The number of
        // disconnected ones is not.
        let always = if abandoned > self.max_together { 0 } else { GUARANTEED };
        self.max_together.saturating_sub(held + unanswered).max(always)
    }

    /// Answers a `get`; nothing happens if the client is gone.
    pub(crate) fn reply_get(
        &mut self,
        id: ClientId,
        device: &ControlPlane,
        drops: Drops<'_>,
        epoll: &Epoll,
    ) {
        if self.clients.contains_key(&id) {
            self.answer(id, Answer::get(device, drops), epoll);
        } else {
            self.in_progress.remove(&id);
        }
    }

    /// Formats the rest of each answer to a `get`, so that none shows two configurations. It is called before the
    /// configuration changes. Of too many answers, those whose clients have not read for longest end with EINTR; the
    /// one that was read last never does.
    pub(crate) fn complete_answers(&mut self, device: &ControlPlane) {
        let mut clients: Vec<_> =
            self.clients.values_mut().filter(|one| one.is_writing()).collect();
        clients.sort_unstable_by_key(|client| Reverse(client.last_active()));
        let mut left = self.max_parts;
        let mut most = usize::MAX;
        for client in clients {
            left = left.saturating_sub(client.complete_answer(device, most));
            most = left;
        }
    }

    /// Answers a `get=statistics`; nothing happens if the client is gone.
    pub(crate) fn reply_statistics(&mut self, id: ClientId, counters: &Counters, epoll: &Epoll) {
        self.answer(id, format::statistics(counters).into(), epoll);
    }

    /// Answers a `set`: 0, or a negative errno; nothing happens if the client is gone.
    pub(crate) fn reply_set(&mut self, id: ClientId, errno: i32, epoll: &Epoll) {
        self.reply_errno(id, errno, epoll);
    }

    fn reply_errno(&mut self, id: ClientId, errno: i32, epoll: &Epoll) {
        let mut text = SecretText::with_capacity(32);
        format::end(&mut text, errno);
        self.answer(id, text.into(), epoll);
    }

    fn answer(&mut self, id: ClientId, answer: Answer, epoll: &Epoll) {
        self.in_progress.remove(&id);
        self.progress(id, epoll, |client| client.reply(answer));
    }

    /// Runs a step of a client, and removes it on an error.
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

    /// Accepts one client. Further ones cause further events.
    fn accept(&mut self, epoll: &Epoll) {
        if self.clients.len() >= self.max_clients && !self.close_the_idlest() {
            self.listener.pause(true, epoll);
            return;
        }
        let listener = present(self.listener.socket(), "the event is of the listener");
        let Some(listener) = listener else { return };
        match accept(listener) {
            Ok(client) => {
                self.admit(client, epoll);
                self.listener.pause(false, epoll);
            }
            Err(Errno::EAGAIN | Errno::ECONNABORTED | Errno::EINTR) => {
                self.listener.pause(false, epoll);
            }
            // Out of descriptors or memory; the connection stays in the listener's queue.
            Err(error) => {
                if self.close_the_idlest() {
                    self.listener.pause(false, epoll);
                } else {
                    tracing::warn!(
                        "cannot accept a {} client (accept4): {}; {}",
                        self.access.socket(),
                        described(error),
                        accept_advice(error)
                    );
                    self.listener.pause(true, epoll);
                }
            }
        }
    }

    fn admit(&mut self, socket: OwnedFd, epoll: &Epoll) {
        let id = ClientId(self.next);
        self.next += 1;
        if epoll
            .add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, self.listener.token(id.0)))
            .is_ok()
        {
            self.clients.insert(id, Client::new(socket, self.access, self.now));
        }
    }

    /// Closes the client that has been idle longest, preferably one without part of a transaction. False if
    /// all of them are being served, and read their answers.
    fn close_the_idlest(&mut self) -> bool {
        let (now, patience) = (clock::instant(), self.patience);
        let idle = |(id, client): (&ClientId, &Client)| {
            let stalled = client.stalled_since().filter(|since| now.since(*since) >= patience);
            let stalled = stalled.map(|_| (true, client.last_active()));
            Some((client.idleness().or(stalled)?, *id))
        };
        let mut candidates: Vec<_> = self.clients.iter().filter_map(idle).collect();
        candidates.sort_unstable();
        for (_, id) in candidates {
            let client =
                present(self.clients.get_mut(&id), "no client is removed before the idlest");
            let Some(client) = client else { continue };
            // A client whose request has arrived but was not read yet is not idle.
            if !client.is_writing() && client.read() == Ok(Input::Some) {
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
        self.listener.pause(false, epoll);
    }

    /// Watches a client's socket for the events that its state waits for.
    fn watch(&mut self, id: ClientId, epoll: &Epoll) {
        let client = present(self.clients.get(&id), "the caller has just used it");
        let Some(client) = client else { return };
        let interest = client.interest();
        let mut event = EpollEvent::new(interest, self.listener.token(id.0));
        let _cannot_fail = epoll.modify(client, &mut event);
        if interest == EpollFlags::EPOLLIN {
            // It may become idle, so that it can be closed for another.
            self.listener.pause(false, epoll);
        }
    }

    /// Lowers the limit for all clients together, for tests.
    #[cfg(test)]
    pub(super) const fn limit_together(&mut self, bytes: usize) {
        self.max_together = bytes;
    }

    /// Lowers the limit for all answers together, for tests.
    #[cfg(test)]
    pub(super) const fn limit_parts(&mut self, parts: usize) {
        self.max_parts = parts;
    }

    /// Has clients that do not read make room at once, for tests.
    #[cfg(test)]
    pub(super) const fn lose_patience(&mut self) {
        self.patience = Duration::ZERO;
    }

    /// Parts of all answers together.
    #[cfg(test)]
    pub(super) fn parts(&self) -> usize {
        self.clients.values().map(Client::parts).sum()
    }

    /// Bytes of all transactions together.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        let read: usize = self.clients.values().map(Client::held).sum();
        read + self.in_progress.values().sum::<usize>()
    }

    /// True if no client is connected.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.clients.is_empty()
    }
}

/// What to do about a client that cannot be accepted.
const fn accept_advice(error: Errno) -> &'static str {
    match error {
        Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS => {
            "close other programs that talk to it"
        }
        _ => remedy(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_a_filter_keeps_out_is_not_blamed_on_the_others() {
        for (error, advice) in [
            (Errno::EMFILE, "close other programs"),
            (Errno::EPERM, "allow it in the container or unit that refuses it"),
            (Errno::ENOSYS, "allow it in the filter of the container or unit"),
        ] {
            let given = accept_advice(error);
            assert!(given.contains(advice), "{error}: {given}");
        }
    }
}
