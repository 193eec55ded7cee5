//! The listening socket of a server whose clients are bounded in number.

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A listening socket in an epoll instance, and the tokens there of it and of its clients. The UAPI's servers have one, too.
pub struct Listener {
    socket: Option<OwnedFd>,
    /// Accepting is paused, because another client would be one too many.
    paused: bool,
    /// That of the socket; those of the clients follow it.
    first_token: u64,
}

impl Listener {
    /// Creates one that does not listen yet.
    #[must_use]
    pub const fn new(first_token: u64) -> Self {
        Self { socket: None, paused: false, first_token }
    }

    /// Starts accepting from a listening socket, which is non-blocking.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn listen(&mut self, socket: OwnedFd, epoll: &Epoll) -> nix::Result<()> {
        epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, self.first_token))?;
        self.socket = Some(socket);
        Ok(())
    }

    /// The listening socket, if there is one yet.
    #[must_use]
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Whether accepting is paused.
    #[must_use]
    pub const fn is_paused(&self) -> bool {
        self.paused
    }

    /// The number of the client that an event is of; `None` if it is of the listening socket.
    #[must_use]
    pub fn client_of(&self, event: &EpollEvent) -> Option<u64> {
        event.data().checked_sub(self.first_token + 1)
    }

    /// The epoll token of a client of this number.
    #[must_use]
    pub const fn token(&self, client: u64) -> u64 {
        self.first_token + 1 + client
    }

    /// Pauses or resumes accepting. While paused, a new connection still causes one attempt, because
    /// descriptors may have become available, which causes no event.
    pub fn pause(&mut self, paused: bool, epoll: &Epoll) {
        let Some(socket) = &self.socket else { return };
        if self.paused == paused {
            return;
        }
        self.paused = paused;
        let edge = if paused { EpollFlags::EPOLLET } else { EpollFlags::empty() };
        let mut event = EpollEvent::new(EpollFlags::EPOLLIN | edge, self.first_token);
        let _cannot_fail = epoll.modify(socket, &mut event);
    }
}
