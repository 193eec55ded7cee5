//! One client: its socket, what it has asked, and what it has not read yet.

use crate::event::Event;
use crate::format;
use crate::report::Item;
use crate::request::{MAX_REQUEST, Refused, Request, Requests};
use nix::errno::Errno;
use nix::sys::epoll::EpollFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// Bytes of an answer that are formatted at a time: all that a client that does not read takes.
pub(crate) const PART_LEN: usize = 16 * 1024;
/// Bytes of events that wait for a client; further ones are counted, and lost.
pub(crate) const MAX_QUEUED: usize = 16 * 1024;

/// How long a client may take to send a request.
pub(crate) const IDLE: Duration = Duration::from_secs(30);
/// How long it may read nothing of an answer.
pub(crate) const STALLED: Duration = Duration::from_secs(10);
/// The same while another client waits for its place.
pub(crate) const STALLED_WHEN_FULL: Duration = Duration::from_secs(1);

/// Text that is written from its front.
#[derive(Default)]
struct Output {
    text: String,
    written: usize,
}

impl Output {
    fn unwritten(&self) -> &[u8] {
        self.text.as_bytes().get(self.written..).unwrap_or_default()
    }

    fn len(&self) -> usize {
        self.unwritten().len()
    }

    fn advance(&mut self, len: usize) {
        self.written = self.written.saturating_add(len);
        if self.unwritten().is_empty() {
            // What a long one had is freed.
            *self = Self::default();
        }
    }

    fn push(&mut self, text: &str) {
        if self.written > 0 && self.text.len() + text.len() > self.text.capacity() {
            self.text.drain(..self.written);
            self.written = 0;
        }
        self.text.push_str(text);
    }
}

/// What a client does.
enum State<P> {
    /// It may send a request.
    Reading,
    /// It receives an answer, of which this is not formatted yet.
    Answered(Option<P>),
    /// It receives events.
    Watching {
        /// It has had the first one.
        is_greeted: bool,
        /// Events that were lost since the last that was not, and when the last of them happened.
        lost: u64,
        lost_at: Duration,
    },
}

pub(crate) struct Client<P> {
    socket: OwnedFd,
    requests: Requests,
    state: State<P>,
    output: Output,
    /// When its state began, or its socket last accepted something.
    since: Duration,
}

impl<P> Client<P> {
    pub(crate) fn new(socket: OwnedFd, now: Duration) -> Self {
        Self {
            socket,
            requests: Requests::default(),
            state: State::Reading,
            output: Output::default(),
            since: now,
        }
    }

    /// The events for which its socket is watched. That it is closed is always reported.
    pub(crate) fn interest(&self) -> EpollFlags {
        match self.state {
            State::Reading => EpollFlags::EPOLLIN,
            State::Watching { .. } if self.output.len() == 0 => EpollFlags::empty(),
            State::Answered(_) | State::Watching { .. } => EpollFlags::EPOLLOUT,
        }
    }

    pub(crate) const fn is_watching(&self) -> bool {
        matches!(self.state, State::Watching { .. })
    }

    /// Sort key of those that may be closed for another: those that have sent part of a request last, and each by how
    /// long it has been idle.
    pub(crate) fn idleness(&self) -> Option<(bool, Duration)> {
        matches!(self.state, State::Reading).then(|| (self.requests.has_begun(), self.since))
    }

    /// Since when it reads nothing although there is something to read.
    pub(crate) fn stalled_since(&self) -> Option<Duration> {
        (self.output.len() > 0).then_some(self.since)
    }

    /// When it is closed unless it does something; earlier if others wait.
    pub(crate) fn deadline(&self, others_wait: bool) -> Option<Duration> {
        let stalled = if others_wait { STALLED_WHEN_FULL } else { STALLED };
        match self.state {
            State::Reading => Some(self.since.saturating_add(IDLE)),
            State::Answered(_) => Some(self.since.saturating_add(stalled)),
            State::Watching { .. } => None,
        }
    }

    /// Reads what there is room for; false if nothing waits.
    ///
    /// # Errors
    /// If it is closed, or as read(2).
    pub(crate) fn read(&mut self) -> nix::Result<bool> {
        if !matches!(self.state, State::Reading) {
            return Ok(false);
        }
        let mut buffer = [0; MAX_REQUEST];
        let room = buffer.get_mut(..self.requests.room()).unwrap_or_default();
        match nix::unistd::read(&self.socket, room) {
            Ok(0) => Err(Errno::EPIPE),
            Ok(len) => {
                self.requests.push(buffer.get(..len).unwrap_or_default());
                Ok(true)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Its next request, if it may send one.
    pub(crate) fn next_request(&mut self) -> Option<Result<Request, Refused>> {
        if matches!(self.state, State::Reading) { self.requests.take() } else { None }
    }

    /// Begins an answer with a text, which goes on with what `rest` leads to.
    pub(crate) fn answer(&mut self, text: &str, rest: Option<P>, now: Duration) {
        self.output.push(text);
        self.state = State::Answered(rest);
        self.since = now;
    }

    pub(crate) fn watch(&mut self, now: Duration) {
        self.state = State::Watching { is_greeted: false, lost: 0, lost_at: Duration::ZERO };
        self.since = now;
    }

    /// Queues its first event, once.
    pub(crate) fn greet(&mut self, text: &str, now: Duration) {
        if let State::Watching { is_greeted: is_greeted @ false, .. } = &mut self.state {
            *is_greeted = true;
            self.queue(text, now);
        }
    }

    /// Queues an event, or counts it as lost.
    pub(crate) fn publish(&mut self, text: &str, now: Duration, wall: Duration) {
        let has_room = self.output.len() + text.len() + format::LONGEST_ITEM <= MAX_QUEUED;
        let State::Watching { lost, lost_at, .. } = &mut self.state else { return };
        if *lost > 0 || !has_room {
            *lost = lost.saturating_add(1);
            *lost_at = wall;
        } else {
            self.queue(text, now);
        }
    }

    fn queue(&mut self, text: &str, now: Duration) {
        if self.output.len() == 0 {
            self.since = now;
        }
        self.output.push(text);
    }

    /// Queues how many events were lost, once half of the queue was read.
    fn report_lost(&mut self) {
        let has_room = self.output.len() <= MAX_QUEUED / 2;
        if let State::Watching { lost: lost @ 1.., lost_at, .. } = &mut self.state
            && has_room
        {
            let event = Event::Lost { count: core::mem::take(lost) };
            let text = format::event(&event, *lost_at);
            self.output.push(&text);
        }
    }

    /// Writes a bounded amount of what there is, as far as the socket accepts it. `next` has the items of an answer.
    /// Once that is complete, it may send another request.
    ///
    /// # Errors
    /// If it is closed.
    pub(crate) fn write(
        &mut self,
        now: Duration,
        mut next: impl FnMut(&mut P) -> Option<Item>,
    ) -> nix::Result<()> {
        if self.output.len() == 0 {
            self.format_part(&mut next);
        }
        while self.output.len() > 0 {
            match nix::unistd::write(&self.socket, self.output.unwritten()) {
                Ok(len) => {
                    self.output.advance(len);
                    self.since = now;
                    self.report_lost();
                }
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        if matches!(self.state, State::Answered(None)) {
            self.state = State::Reading;
        }
        Ok(())
    }

    /// Formats the next part of an answer. It ends with a whole line.
    fn format_part(&mut self, next: &mut impl FnMut(&mut P) -> Option<Item>) {
        let State::Answered(rest) = &mut self.state else { return };
        let Some(position) = rest else { return };
        let mut text = String::with_capacity(PART_LEN);
        while text.len() <= PART_LEN - format::LONGEST_ITEM {
            let Some(item) = next(position) else {
                *rest = None;
                format::end(&mut text, 0);
                break;
            };
            format::item(&mut text, &item);
        }
        self.output.push(&text);
    }

    /// Bytes that it holds.
    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        self.output.text.capacity() + MAX_REQUEST
    }
}

impl<P> AsFd for Client<P> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
