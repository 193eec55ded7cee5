//! One UAPI client: its socket, its input, and the reply that is not written yet.

use super::answer::Answer;
use super::inbox::Inbox;
use super::parse::Refusal;
use super::{Access, Operation, Scopes};
use crate::clock;
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use wgsep_proto::Instant;
use wgsep_proto::device::control_plane::ControlPlane;
use wgsep_proto::invariant::{part, present};
use zeroize::Zeroize;

/// Most bytes that are read at a time, so that a long `set` does not delay the other clients.
const READ_LEN: usize = 16 * 1024;
/// Most bytes that are formatted and written at a time, so that neither does a long reply to a client that reads it fast.
const WRITE_LEN: usize = 64 * 1024;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Its input is read.
    Reading,
    /// Its transaction is being executed; no input is read.
    Waiting,
    /// Its reply is being written; no input is read.
    Writing,
}

/// The result of a read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// More input.
    Some,
    /// No input at present.
    None,
    /// The client will send no more, but may still read.
    End,
}

/// A connected client.
pub(super) struct Client {
    socket: OwnedFd,
    state: State,
    inbox: Inbox,
    answer: Answer,
    /// It will send no more.
    ended: bool,
    /// The server's number of the last event of this client.
    last_active: u64,
    /// When its socket last accepted part of a reply, or the reply began.
    progressed: Instant,
}

impl Client {
    pub(super) fn new(socket: OwnedFd, access: Access, now: u64) -> Self {
        Self {
            socket,
            state: State::Reading,
            inbox: Inbox::new(access),
            answer: Answer::default(),
            ended: false,
            last_active: now,
            progressed: Instant::default(),
        }
    }

    /// The events for which its socket is watched.
    pub(super) fn interest(&self) -> EpollFlags {
        match self.state {
            State::Reading if !self.ended => EpollFlags::EPOLLIN,
            State::Reading | State::Waiting => EpollFlags::empty(),
            State::Writing => EpollFlags::EPOLLOUT,
        }
    }

    /// Sort key of idle clients: whether it would lose part of a transaction, and since when it is idle.
    /// `None` while it has a transaction or a reply in progress.
    pub(super) fn idleness(&self) -> Option<(bool, u64)> {
        (self.state == State::Reading).then(|| (self.inbox.has_begun(), self.last_active))
    }

    /// Bytes of its input that were read and not taken yet.
    pub(super) fn held(&self) -> usize {
        self.inbox.len()
    }

    /// True if nothing is left to be done for it.
    pub(super) fn is_finished(&self) -> bool {
        self.ended && self.state == State::Reading
    }

    /// Reads or writes, according to its state, when its socket is ready. An error disconnects the client.
    pub(super) fn advance(
        &mut self,
        hung_up: bool,
        now: u64,
        device: &ControlPlane,
    ) -> nix::Result<()> {
        self.last_active = now;
        match self.state {
            State::Reading => self.read().map(|_| ()),
            State::Waiting if hung_up => Err(Errno::EPIPE),
            State::Waiting => Ok(()),
            State::Writing => self.write(Some(device)),
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
                let filled =
                    present(buffer.get_mut(..len), "read(2) fills no more than the buffer")
                        .unwrap_or_default();
                self.inbox.push(filled);
                filled.zeroize();
                Ok(Input::Some)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(Input::None),
            Err(error) => Err(error),
        }
    }

    /// Takes its next complete transaction, of at most `limit` bytes, unless one is in progress. The client
    /// then waits for the reply.
    pub(super) fn next_transaction(
        &mut self,
        scopes: &dyn Scopes,
        limit: usize,
    ) -> Option<Result<Operation, Refusal>> {
        if self.state != State::Reading {
            return None;
        }
        let transaction = self.inbox.next_transaction(scopes, limit)?;
        self.state = State::Waiting;
        Some(transaction)
    }

    /// Starts its reply. An error disconnects the client.
    pub(super) fn reply(&mut self, answer: Answer) -> nix::Result<()> {
        self.answer = answer;
        self.state = State::Writing;
        self.progressed = clock::instant();
        self.write(None)
    }

    /// True while its reply is being written.
    pub(super) fn is_writing(&self) -> bool {
        self.state == State::Writing
    }

    /// Since when it has read nothing of its reply; `None` if it has none.
    pub(super) fn stalled_since(&self) -> Option<Instant> {
        self.is_writing().then_some(self.progressed)
    }

    /// The server's number of its last event.
    pub(super) const fn last_active(&self) -> u64 {
        self.last_active
    }

    /// Completes its reply as [`Answer::complete`].
    pub(super) fn complete_answer(&mut self, device: &ControlPlane, most: usize) -> usize {
        self.answer.complete(device, most)
    }

    /// Writes a bounded amount of the reply, as far as the socket accepts it, and returns to reading once it is
    /// complete. Without a device it writes only what is formatted.
    fn write(&mut self, device: Option<&ControlPlane>) -> nix::Result<()> {
        let mut left = WRITE_LEN;
        while left > 0 {
            if let Some(device) = device {
                self.answer.format_if_written(device);
            }
            let unwritten = self.answer.unwritten();
            let next = part(unwritten, 0..unwritten.len().min(left));
            if next.is_empty() {
                break;
            }
            match nix::unistd::write(&self.socket, next) {
                Ok(len) => {
                    self.answer.advance(len);
                    self.progressed = clock::instant();
                    left -= len;
                }
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        if self.answer.is_complete() {
            self.answer = Answer::default();
            self.state = State::Reading;
        }
        Ok(())
    }

    /// Parts of its reply that are formatted.
    #[cfg(test)]
    pub(super) fn parts(&self) -> usize {
        self.answer.parts()
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::KernelRandom;
    use crate::uapi::secret_text::SecretText;
    use nix::sys::socket::sockopt::SndBuf;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair};

    /// The socket's buffer holds all of the reply, as if the client read it as fast as it is written.
    #[test]
    fn a_long_reply_is_written_in_parts() {
        let (socket, _reader) =
            socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_NONBLOCK)
                .unwrap();
        setsockopt(&socket, SndBuf, &(2 * WRITE_LEN)).unwrap();
        let mut client = Client::new(socket, Access::Everything, 0);
        let mut reply = SecretText::default();
        reply.push(&[b'x'; WRITE_LEN + 1]);
        client.reply(reply.into()).unwrap();
        assert_eq!(
            (client.interest(), client.answer.unwritten()),
            (EpollFlags::EPOLLOUT, &b"x"[..])
        );
        let device = ControlPlane::new(Box::new(KernelRandom));
        client.advance(false, 1, &device).unwrap();
        assert_eq!(client.interest(), EpollFlags::EPOLLIN);
    }
}
