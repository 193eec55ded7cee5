//! The clients of the UAPI socket: bounded in number and in memory, and none ever waits for another.

use super::parse::{Refusal, parse};
use super::secret_text::SecretText;
use super::{Operation, Scopes, format};
use nix::errno::Errno;
use nix::libc;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{SockFlag, accept4};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use wgsep_proto::config::{DeviceStatus, PeerStatus};
use zeroize::Zeroize;

/// Clients at a time; one more closes the idle one that came first.
const MAX_CLIENTS: usize = 64;
/// Longest line, in bytes.
const MAX_LINE: usize = 64 * 1024;
/// Longest transaction, in bytes.
const MAX_TRANSACTION: usize = 64 * 1024 * 1024;

/// A client, never mistaken for a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ClientId(u64);

/// All clients, and the socket they come by.
pub(crate) struct Server {
    listener: Option<OwnedFd>,
    first_token: u64,
    next: u64,
    clients: BTreeMap<ClientId, Client>,
    /// Clients that may have a whole transaction waiting.
    runnable: VecDeque<ClientId>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Its input is read.
    Reading,
    /// Its transaction is being carried out; its input waits.
    Waiting,
    /// Its reply is being written; its input waits.
    Writing,
}

struct Client {
    socket: OwnedFd,
    state: State,
    input: SecretText,
    /// How far `input` was searched for the end of a transaction.
    searched: usize,
    line_start: usize,
    /// The transaction under way breaks a bound: it is read to its end, not kept, and refused.
    refused: Option<Refusal>,
    output: SecretText,
    written: usize,
    closing: bool,
}

impl Server {
    /// A server whose descriptors have epoll tokens from `first_token` on.
    pub(crate) const fn new(first_token: u64) -> Self {
        let clients = BTreeMap::new();
        Self { listener: None, first_token, next: 0, clients, runnable: VecDeque::new() }
    }

    /// Starts to accept.
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
        let Some(number) = event.data().checked_sub(self.first_token + 1) else {
            self.accept(epoll);
            return;
        };
        let id = ClientId(number);
        let Some(client) = self.clients.get_mut(&id) else { return };
        let gone = event.events().intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
        let alive = match client.state {
            State::Reading => client.read(),
            State::Waiting => !gone,
            State::Writing => client.write(),
        };
        if alive {
            self.runnable.push_back(id);
            self.watch(id, epoll);
        } else {
            self.clients.remove(&id);
        }
    }

    /// The next whole transaction of any client. One that is malformed is answered here.
    pub(crate) fn next_operation(
        &mut self,
        scopes: &dyn Scopes,
        epoll: &Epoll,
    ) -> Option<(ClientId, Operation)> {
        while let Some(id) = self.runnable.pop_front() {
            let Some(client) = self.clients.get_mut(&id) else { continue };
            match client.next_transaction(scopes) {
                Some(Ok(operation)) => {
                    client.state = State::Waiting;
                    self.watch(id, epoll);
                    return Some((id, operation));
                }
                Some(Err(refusal)) => {
                    let Refusal { errno, line, reason } = refusal;
                    tracing::warn!("UAPI line {line}: {reason}; nothing changed");
                    self.reply_errno(id, errno, epoll);
                }
                None if client.closing && client.state == State::Reading => {
                    self.clients.remove(&id);
                }
                None => {}
            }
        }
        None
    }

    /// Answers a `get`.
    pub(crate) fn reply_get(
        &mut self,
        id: ClientId,
        device: &DeviceStatus,
        peers: impl Iterator<Item = PeerStatus>,
        scopes: &dyn Scopes,
        epoll: &Epoll,
    ) {
        if self.clients.contains_key(&id) {
            self.reply(id, format::format(device, peers, scopes), epoll);
        }
    }

    /// Answers a `set`: 0, or a negative errno.
    pub(crate) fn reply_set(&mut self, id: ClientId, errno: i32, epoll: &Epoll) {
        self.reply_errno(id, errno, epoll);
    }

    fn reply_errno(&mut self, id: ClientId, errno: i32, epoll: &Epoll) {
        let mut text = SecretText::with_capacity(32);
        text.push(format!("errno={errno}\n\n").as_bytes());
        self.reply(id, text, epoll);
    }

    fn reply(&mut self, id: ClientId, text: SecretText, epoll: &Epoll) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        client.output = text;
        client.written = 0;
        client.state = State::Writing;
        if client.write() {
            self.runnable.push_back(id);
            self.watch(id, epoll);
        } else {
            self.clients.remove(&id);
        }
    }

    fn accept(&mut self, epoll: &Epoll) {
        loop {
            let Some(listener) = &self.listener else { return };
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let socket = match accept4(listener.as_raw_fd(), flags) {
                Ok(raw) => crate::sys::own_accepted(raw),
                Err(Errno::ECONNABORTED | Errno::EINTR) => continue,
                Err(_) => return,
            };
            if self.clients.len() >= MAX_CLIENTS && !self.close_an_idle_client() {
                continue;
            }
            let id = ClientId(self.next);
            self.next += 1;
            let token = self.first_token + 1 + id.0;
            if epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, token)).is_ok() {
                self.clients.insert(id, Client::new(socket));
            }
        }
    }

    /// Makes room for a client; false if every one there is has work under way.
    fn close_an_idle_client(&mut self) -> bool {
        let idle = self.clients.iter().find(|(_, client)| client.state == State::Reading);
        let Some(id) = idle.map(|(id, _)| *id) else { return false };
        self.clients.remove(&id);
        true
    }

    /// Watches a client for what its state waits for.
    fn watch(&self, id: ClientId, epoll: &Epoll) {
        let Some(client) = self.clients.get(&id) else { return };
        let flags = match client.state {
            State::Reading if client.closing => EpollFlags::empty(),
            State::Reading => EpollFlags::EPOLLIN,
            State::Waiting => EpollFlags::empty(),
            State::Writing => EpollFlags::EPOLLOUT,
        };
        let mut event = EpollEvent::new(flags, self.first_token + 1 + id.0);
        let _cannot_fail = epoll.modify(&client.socket, &mut event);
    }
}

impl Client {
    fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            state: State::Reading,
            input: SecretText::default(),
            searched: 0,
            line_start: 0,
            refused: None,
            output: SecretText::default(),
            written: 0,
            closing: false,
        }
    }

    /// Reads a bounded amount; false if the client is gone.
    fn read(&mut self) -> bool {
        let mut buffer = [0; 16 * 1024];
        let result = nix::unistd::read(&self.socket, &mut buffer);
        match result {
            Ok(0) => self.closing = true,
            Ok(len) => self.input.push(buffer.get(..len).unwrap_or_default()),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => return false,
        }
        buffer.zeroize();
        true
    }

    /// Writes what it takes; false if the client is gone.
    fn write(&mut self) -> bool {
        while let Some(rest) =
            self.output.as_bytes().get(self.written..).filter(|rest| !rest.is_empty())
        {
            match nix::unistd::write(&self.socket, rest) {
                Ok(len) => self.written += len,
                Err(Errno::EAGAIN) => return true,
                Err(Errno::EINTR) => {}
                Err(_) => return false,
            }
        }
        self.output.clear();
        self.written = 0;
        self.state = State::Reading;
        true
    }

    /// Takes the next whole transaction out of the input.
    fn next_transaction(&mut self, scopes: &dyn Scopes) -> Option<Result<Operation, Refusal>> {
        if self.state != State::Reading {
            return None;
        }
        let Some(end) = self.find_end() else {
            self.check_bounds();
            return None;
        };
        let result = match self.refused.take() {
            Some(refusal) => Err(refusal),
            None => parse(self.input.as_bytes().get(..end).unwrap_or_default(), scopes),
        };
        self.input.consume(end + 1);
        self.searched = 0;
        self.line_start = 0;
        if self.input.as_bytes().is_empty() {
            self.input.clear();
        }
        Some(result)
    }

    /// Where the blank line is that ends a transaction; looks at each byte once.
    fn find_end(&mut self) -> Option<usize> {
        let input = self.input.as_bytes();
        while let Some(rest) = input.get(self.searched..) {
            let Some(newline) = rest.iter().position(|byte| *byte == b'\n') else {
                self.searched = input.len();
                return None;
            };
            let newline = self.searched + newline;
            self.searched = newline + 1;
            if newline == self.line_start {
                return Some(newline);
            }
            if newline - self.line_start > MAX_LINE && self.refused.is_none() {
                self.refused = Some(self.refusal(libc::EINVAL, "a line is longer than 64 KiB"));
            }
            self.line_start = newline + 1;
        }
        None
    }

    /// Refuses a transaction that is too long, and stops keeping what was refused.
    fn check_bounds(&mut self) {
        let len = self.input.as_bytes().len();
        if self.refused.is_none() {
            if len - self.line_start > MAX_LINE {
                self.refused = Some(self.refusal(libc::EINVAL, "a line is longer than 64 KiB"));
            } else if len > MAX_TRANSACTION {
                self.refused =
                    Some(self.refusal(libc::ENOMEM, "a transaction is longer than 64 MiB"));
            }
        }
        if self.refused.is_some() {
            // Only whether the present line is empty matters from here on.
            let in_line = len > self.line_start;
            self.input.clear();
            if in_line {
                self.input.push(b"x");
            }
            self.searched = self.input.as_bytes().len();
            self.line_start = 0;
        }
    }

    fn refusal(&self, errno: i32, reason: &'static str) -> Refusal {
        let is_get = self.input.as_bytes().starts_with(b"get=");
        Refusal { errno: if is_get { errno } else { -errno }, line: 0, reason }
    }
}
