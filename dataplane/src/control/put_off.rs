//! The queue of what is put off because it needs a new UDP port too early.

use std::collections::VecDeque;
use std::time::Duration;
use wgsep_proto::Instant;

/// Time between two requests for the port of the first in the queue.
const INTERVAL: Duration = Duration::from_secs(1);

/// What waits for a port that is not opened yet, in order. Only the first of them is asked for.
pub(super) struct PutOff<T> {
    queue: VecDeque<T>,
    /// When to ask again; `None` while the queue is empty, and once it was due.
    due: Option<Instant>,
}

impl<T> PutOff<T> {
    pub(super) const fn new() -> Self {
        Self { queue: VecDeque::new(), due: None }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Queues what has to wait behind the others.
    pub(super) fn push(&mut self, last: T) {
        self.queue.push_back(last);
    }

    /// Queues what was asked for too early: it is the first.
    pub(super) fn too_early(&mut self, first: T, now: Instant) {
        self.queue.push_front(first);
        self.due = Some(now.after(INTERVAL));
    }

    /// Asks for the first at once, because what was before it is done.
    pub(super) fn hasten(&mut self, now: Instant) {
        self.due = (!self.is_empty()).then_some(now);
    }

    /// When to ask again.
    pub(super) const fn next_timeout(&self) -> Option<Instant> {
        self.due
    }

    /// True, once, when the time to ask again has come.
    pub(super) fn take_due(&mut self, now: Instant) -> bool {
        self.due.take_if(|due| *due <= now).is_some()
    }

    /// Takes the first.
    pub(super) fn pop(&mut self) -> Option<T> {
        self.queue.pop_front()
    }

    /// Takes the last; once the queue is empty, nothing is asked for any more.
    pub(super) fn pop_last(&mut self) -> Option<T> {
        let last = self.queue.pop_back();
        self.due = self.due.filter(|_| !self.is_empty());
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_asked_for_each_second_and_the_next_as_soon_as_it_is_done() {
        let (mut put_off, mut now) = (PutOff::new(), Instant::from_nanos(1));
        put_off.hasten(now);
        assert!(put_off.is_empty() && put_off.next_timeout().is_none());
        put_off.too_early('a', now);
        put_off.push('b');
        for _ in 0..9 {
            assert!(!put_off.take_due(now));
            now = now.after(INTERVAL);
            assert!(put_off.take_due(now) && !put_off.take_due(now), "once");
            let first = put_off.pop().unwrap();
            assert_eq!((first, put_off.next_timeout()), ('a', None));
            put_off.too_early(first, now);
            assert_eq!(put_off.next_timeout(), Some(now.after(INTERVAL)));
        }
        now = now.after(INTERVAL);
        assert!(put_off.take_due(now));
        assert_eq!(put_off.pop(), Some('a'));
        put_off.hasten(now);
        assert!(put_off.take_due(now));
        assert_eq!((put_off.pop(), put_off.is_empty()), (Some('b'), true));
        put_off.hasten(now);
        assert_eq!(put_off.next_timeout(), None);
    }

    #[test]
    fn nothing_is_asked_for_once_the_last_was_taken() {
        let mut put_off = PutOff::new();
        put_off.too_early('a', Instant::from_nanos(1));
        put_off.push('b');
        assert_eq!((put_off.pop_last(), put_off.pop_last()), (Some('b'), Some('a')));
        assert_eq!((put_off.pop_last(), put_off.next_timeout()), (None, None));
    }
}
