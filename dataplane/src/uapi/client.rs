//! One client: its socket, what it sent, and the reply it has not read yet.

use super::inbox::Inbox;
use super::parse::Refusal;
use super::secret_text::SecretText;
use super::{Operation, Scopes};
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use zeroize::Zeroize;

/// Most that is read at a time, in bytes, so that a long `set` leaves the others their turn.
const READ_LEN: usize = 16 * 1024;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Its input is read.
    Reading,
    /// Its transaction is being carried out; its input waits.
    Waiting,
    /// Its reply is being written; its input waits.
    Writing,
}

/// What became of reading.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// More than there was.
    Some,
    /// Nothing, for now.
    None,
    /// The client will send no more, but may still read.
    End,
}

/// A connected client.
pub(super) struct Client {
    socket: OwnedFd,
    state: State,
    inbox: Inbox,
    output: SecretText,
    written: usize,
    /// It will send no more.
    ended: bool,
    /// When it was last heard of, as the server counts.
    last_active: u64,
}

impl Client {
    pub(super) fn new(socket: OwnedFd, now: u64) -> Self {
        Self {
            socket,
            state: State::Reading,
            inbox: Inbox::default(),
            output: SecretText::default(),
            written: 0,
            ended: false,
            last_active: now,
        }
    }

    /// What its socket is watched for.
    pub(super) fn interest(&self) -> EpollFlags {
        match self.state {
            State::Reading if !self.ended => EpollFlags::EPOLLIN,
            State::Reading | State::Waiting => EpollFlags::empty(),
            State::Writing => EpollFlags::EPOLLOUT,
        }
    }

    /// How much it would lose if it were closed now, and since when it is silent, to compare with
    /// others; `None` while a transaction or reply is under way.
    pub(super) fn idleness(&self) -> Option<(bool, u64)> {
        (self.state == State::Reading).then(|| (self.inbox.has_begun(), self.last_active))
    }

    /// Bytes of it that were read and not taken yet.
    pub(super) fn held(&self) -> usize {
        self.inbox.len()
    }

    /// Whether nothing is left to do for it.
    pub(super) fn is_finished(&self) -> bool {
        self.ended && self.state == State::Reading
    }

    /// Goes on as its state demands, when its socket is ready. An error is the client's end.
    pub(super) fn advance(&mut self, hung_up: bool, now: u64) -> nix::Result<()> {
        self.last_active = now;
        match self.state {
            State::Reading => self.read().map(|_| ()),
            State::Waiting if hung_up => Err(Errno::EPIPE),
            State::Waiting => Ok(()),
            State::Writing => self.write(),
        }
    }

    /// Reads a bounded amount.
    pub(super) fn read(&mut self) -> nix::Result<Input> {
        let mut buffer = [0; READ_LEN];
        match nix::unistd::read(&self.socket, &mut buffer) {
            Ok(0) => {
                self.ended = true;
                Ok(Input::End)
            }
            Ok(len) => {
                let filled = buffer.get_mut(..len).unwrap_or_default();
                self.inbox.push(filled);
                filled.zeroize();
                Ok(Input::Some)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(Input::None),
            Err(error) => Err(error),
        }
    }

    /// Takes its next whole transaction, of at most `room` bytes, unless one is under way; it waits for
    /// the reply then.
    pub(super) fn next_transaction(
        &mut self,
        scopes: &dyn Scopes,
        room: usize,
    ) -> Option<Result<Operation, Refusal>> {
        if self.state != State::Reading {
            return None;
        }
        let transaction = self.inbox.next_transaction(scopes, room)?;
        self.state = State::Waiting;
        Some(transaction)
    }

    /// Starts its reply. An error is the client's end.
    pub(super) fn reply(&mut self, text: SecretText) -> nix::Result<()> {
        self.output = text;
        self.written = 0;
        self.state = State::Writing;
        self.write()
    }

    /// Writes what the socket takes, and goes back to reading once that is all.
    fn write(&mut self) -> nix::Result<()> {
        while let Some(rest) =
            self.output.as_bytes().get(self.written..).filter(|rest| !rest.is_empty())
        {
            match nix::unistd::write(&self.socket, rest) {
                Ok(len) => self.written += len,
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        self.output.clear();
        self.state = State::Reading;
        Ok(())
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
