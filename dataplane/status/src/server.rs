//! The server of the status socket. It never waits for a client, and none of them costs another anything.
//!
//! The caller owns the epoll instance, passes events, and is the [`Source`] of what is reported.

use crate::client::{Client, STALLED};
use crate::event::Event;
use crate::format;
use crate::listener::Listener;
use crate::report::{Counters, Item};
use crate::request::{Refused, Request};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

/// Most clients at a time, where there are as many descriptors. One more closes the one that has been idle longest; if none is idle, it waits in the
/// listener's queue until one is, or has read nothing of its answer for a second.
pub const MAX_CLIENTS: usize = 16;

/// Where what is reported comes from.
pub trait Source<P> {
    /// The device's part of an answer.
    fn counters(&self) -> Counters;
    /// The item at a position, which moves to the next one.
    fn next(&self, position: &mut P) -> Option<Item>;
    /// Accepts a client, whose socket never waits.
    ///
    /// # Errors
    /// As accept4(2).
    fn accept(&self, listener: BorrowedFd<'_>) -> nix::Result<OwnedFd>;
}

/// All clients, and the listening socket. `P` is a position among what is reported.
pub struct Server<P> {
    listener: Listener,
    next: u64,
    clients: BTreeMap<u64, Client<P>>,
    max_clients: usize,
}

impl<P: Default> Server<P> {
    /// Creates a server whose descriptors have epoll tokens from `first_token` on.
    ///
    /// It serves at most `max_clients` at a time, and never more than [`MAX_CLIENTS`]. Half of them may watch, so that
    /// there is always room for a `get`: one more takes the place of one that reads nothing, or is refused with EBUSY.
    #[must_use]
    pub fn new(first_token: u64, max_clients: usize) -> Self {
        let max_clients = max_clients.min(MAX_CLIENTS);
        let (listener, clients) = (Listener::new(first_token), BTreeMap::new());
        Self { listener, next: 0, clients, max_clients }
    }

    /// Starts accepting from a listening socket, which is non-blocking.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn listen(&mut self, listener: OwnedFd, epoll: &Epoll) -> nix::Result<()> {
        self.listener.listen(listener, epoll)
    }

    /// Handles an event of one of this server's descriptors at `now`.
    pub fn handle(
        &mut self,
        event: &EpollEvent,
        source: &dyn Source<P>,
        epoll: &Epoll,
        now: Duration,
    ) {
        let Some(id) = self.listener.client_of(event) else {
            self.accept(source, epoll, now);
            return;
        };
        let hung_up = event.events().intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
        self.progress(id, epoll, |client| match client.interest() {
            EpollFlags::EPOLLIN => client.read().map(drop),
            _ if hung_up => Err(Errno::EPIPE),
            _ => client.write(now, |position| source.next(position)),
        });
        self.serve(id, source, epoll, now);
    }

    /// When a client is to be closed.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Duration> {
        self.clients.values().filter_map(|client| client.deadline(self.listener.is_paused())).min()
    }

    /// Closes the clients that send no request, or do not read their answer.
    pub fn handle_timeout(&mut self, epoll: &Epoll, now: Duration) {
        let others_wait = self.listener.is_paused();
        let is_due = |client: &Client<P>| client.deadline(others_wait).is_some_and(|at| at <= now);
        let due = self.clients.iter().filter(|(_, client)| is_due(client)).map(|(id, _)| *id);
        for id in due.collect::<Vec<_>>() {
            self.remove(id, epoll);
        }
    }

    /// Whether any client watches.
    #[must_use]
    pub fn is_watched(&self) -> bool {
        self.watchers() > 0
    }

    fn watchers(&self) -> usize {
        self.clients.values().filter(|client| client.is_watching()).count()
    }

    /// Sends the first event to the clients that have had none.
    pub fn greet(&mut self, event: &Event, epoll: &Epoll, now: Duration, wall: Duration) {
        let text = format::event(event, wall);
        self.send_to_watchers(epoll, now, |client| client.greet(&text, now));
    }

    /// Sends an event to all that watch.
    pub fn publish(&mut self, event: &Event, epoll: &Epoll, now: Duration, wall: Duration) {
        let text = format::event(event, wall);
        self.send_to_watchers(epoll, now, |client| client.publish(&text, now, wall));
    }

    fn send_to_watchers(&mut self, epoll: &Epoll, now: Duration, send: impl Fn(&mut Client<P>)) {
        let watchers = self.clients.iter().filter(|(_, client)| client.is_watching());
        for id in watchers.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.progress(id, epoll, |client| {
                send(client);
                client.write(now, |_| None)
            });
        }
    }

    /// Begins to answer the requests of a client that have arrived.
    fn serve(&mut self, id: u64, source: &dyn Source<P>, epoll: &Epoll, now: Duration) {
        while let Some(request) = self.clients.get_mut(&id).and_then(Client::next_request) {
            let is_refused = request == Err(Refused);
            let is_full = request == Ok(Request::Watch) && !self.has_room_to_watch(epoll, now);
            self.progress(id, epoll, |client| {
                match request {
                    Ok(Request::Get) => {
                        let counters = format::counters(&source.counters());
                        client.answer(&counters, Some(P::default()), now);
                    }
                    Ok(Request::Watch) if !is_full => client.watch(now),
                    Ok(Request::Watch) => client.answer(&errno(Errno::EBUSY), None, now),
                    Err(Refused) => client.answer(&errno(Errno::EPROTO), None, now),
                }
                client.write(now, |position| source.next(position))
            });
            if is_refused {
                self.remove(id, epoll);
            }
        }
    }

    /// Whether one more may watch, after the one that has read nothing for longest was closed if necessary.
    fn has_room_to_watch(&mut self, epoll: &Epoll, now: Duration) -> bool {
        if self.watchers() < self.max_clients / 2 {
            return true;
        }
        let stalled = self.clients.iter().filter(|(_, client)| client.is_watching());
        let stalled = stalled.filter_map(|(id, client)| Some((client.stalled_since()?, *id)));
        let longest = stalled.min().filter(|(since, _)| now.saturating_sub(*since) >= STALLED);
        longest.is_some_and(|(_, id)| {
            self.remove(id, epoll);
            true
        })
    }

    /// Runs a step of a client, and removes it on an error.
    fn progress(
        &mut self,
        id: u64,
        epoll: &Epoll,
        step: impl FnOnce(&mut Client<P>) -> nix::Result<()>,
    ) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if step(client).is_err() {
            self.remove(id, epoll);
            return;
        }
        let interest = client.interest();
        let mut event = EpollEvent::new(interest, self.listener.token(id));
        let _cannot_fail = epoll.modify(&*client, &mut event);
        if interest == EpollFlags::EPOLLIN {
            // It may become idle, so that it can be closed for another.
            self.listener.pause(false, epoll);
        }
    }

    /// Accepts one client. Further ones cause further events.
    fn accept(&mut self, source: &dyn Source<P>, epoll: &Epoll, now: Duration) {
        if self.clients.len() >= self.max_clients && !self.close_the_idlest(source, epoll, now) {
            self.listener.pause(true, epoll);
            return;
        }
        let Some(listener) = self.listener.socket() else { return };
        match source.accept(listener) {
            Ok(socket) => {
                self.admit(socket, epoll, now);
                self.listener.pause(false, epoll);
            }
            Err(Errno::EAGAIN | Errno::ECONNABORTED | Errno::EINTR) => {
                self.listener.pause(false, epoll);
            }
            // Out of descriptors or memory; the connection stays in the listener's queue.
            Err(_) => self.listener.pause(true, epoll),
        }
    }

    fn admit(&mut self, socket: OwnedFd, epoll: &Epoll, now: Duration) {
        let id = self.next;
        self.next += 1;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, self.listener.token(id));
        if epoll.add(&socket, event).is_ok() {
            self.clients.insert(id, Client::new(socket, now));
        }
    }

    /// Closes the client that has been idle longest, preferably one that has sent nothing. False if all are being
    /// answered, or watch.
    fn close_the_idlest(&mut self, source: &dyn Source<P>, epoll: &Epoll, now: Duration) -> bool {
        let idle = self.clients.iter().filter_map(|(id, client)| Some((client.idleness()?, *id)));
        let mut idle: Vec<_> = idle.collect();
        idle.sort_unstable();
        for (_, id) in idle {
            // A client whose request has arrived but was not read yet is not idle.
            if self.clients.get_mut(&id).is_some_and(|client| client.read() == Ok(true)) {
                self.serve(id, source, epoll, now);
                continue;
            }
            self.clients.remove(&id);
            return true;
        }
        false
    }

    fn remove(&mut self, id: u64, epoll: &Epoll) {
        self.clients.remove(&id);
        self.listener.pause(false, epoll);
    }

    /// Bytes that all clients hold.
    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        self.clients.values().map(Client::held).sum()
    }

    /// Number of clients.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.clients.len()
    }
}

fn errno(errno: Errno) -> String {
    let mut text = String::new();
    format::end(&mut text, errno as i32);
    text
}
