//! Dumps of the kernel's tables: what to request, when, and whether a dump was complete.
//!
//! A netlink socket loses messages when its receive buffer is full, and reports only that it did. The
//! state known from messages is then stale and must be dumped. The kernel runs one dump at a time for
//! each socket. It produces a dump while the socket is read, so a dump itself is not lost, but its start
//! may be refused, and a change of the table interrupts it (NLM_F_DUMP_INTR). In both cases the dump is
//! requested again, at increasing intervals.

use crate::link::netlink::{self, NetlinkMessage};
use nix::libc;
use std::collections::VecDeque;
use std::time::Duration;
use wgsep_proto::Instant;

const NLMSG_ERROR: u16 = libc::NLMSG_ERROR as u16;
const NLMSG_DONE: u16 = libc::NLMSG_DONE as u16;

/// Until a failed dump is requested again; doubled with each setback up to the longest, until there was
/// none for a while.
const SHORTEST_DELAY: Duration = Duration::from_millis(50);
const LONGEST_DELAY: Duration = Duration::from_secs(2);
const CALM: Duration = Duration::from_secs(10);

/// A table of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    /// The network interfaces.
    Links,
    /// The IPv4 rules.
    Rules,
    /// The routes of a family to our interface.
    Routes(i32),
}

impl Table {
    const ALL: [Self; 4] =
        [Self::Links, Self::Rules, Self::Routes(libc::AF_INET), Self::Routes(libc::AF_INET6)];
}

/// How a dump ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It is complete: an entry that it did not list does not exist.
    Complete(Table),
    /// It will be requested again, or the kernel cannot do it at all.
    Failed,
}

struct Running {
    table: Table,
    sequence: u32,
    interrupted: bool,
}

/// The queue of dumps, each at most once, and the dump in progress.
pub(crate) struct Dumps {
    waiting: VecDeque<Table>,
    running: Option<Running>,
    not_before: Instant,
    delay: Duration,
    last_setback: Instant,
}

impl Default for Dumps {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
            running: None,
            not_before: Instant::default(),
            delay: SHORTEST_DELAY,
            last_setback: Instant::default(),
        }
    }
}

impl Dumps {
    /// Queues the dump of a table, even if one is in progress, which may have passed the changed entry.
    pub(crate) fn require(&mut self, table: Table) {
        if !self.waiting.contains(&table) {
            self.waiting.push_back(table);
        }
    }

    /// Queues the dumps of all tables.
    pub(crate) fn require_all(&mut self) {
        Table::ALL.into_iter().for_each(|table| self.require(table));
    }

    /// Queues the dumps of all tables after messages were lost; with an interval if that happens repeatedly.
    pub(crate) fn require_all_after_loss(&mut self, now: Instant) {
        self.require_all();
        self.set_back(now);
    }

    /// True if the dump of a table is queued or in progress.
    pub(crate) fn is_pending(&self, table: Table) -> bool {
        self.waiting.contains(&table)
            || self.running.as_ref().is_some_and(|running| running.table == table)
    }

    /// The table to request now, if any, with this sequence number.
    pub(crate) fn start_next(&mut self, sequence: u32, now: Instant) -> Option<Table> {
        if self.running.is_some() || now < self.not_before {
            return None;
        }
        let table = self.waiting.pop_front()?;
        self.running = Some(Running { table, sequence, interrupted: false });
        Some(table)
    }

    /// When [`Self::start_next`] is due; `None` if no dump is queued.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        (self.running.is_none() && !self.waiting.is_empty()).then_some(self.not_before)
    }

    /// Tracks the dump in progress. Returns its outcome if this message ends it.
    pub(crate) fn receive(
        &mut self,
        message: &NetlinkMessage<'_>,
        now: Instant,
    ) -> Option<Outcome> {
        let running = self.running.as_mut().filter(|dump| dump.sequence == message.sequence)?;
        running.interrupted |= message.flags & libc::NLM_F_DUMP_INTR as u16 != 0;
        if !matches!(message.kind, NLMSG_ERROR | NLMSG_DONE) {
            return None;
        }
        let (table, interrupted) = (running.table, running.interrupted);
        match netlink::errno(message.body) {
            0 if interrupted => Some(self.fail(now)),
            0 => {
                self.running = None;
                Some(Outcome::Complete(table))
            }
            libc::EBUSY | libc::ENOBUFS | libc::ENOMEM | libc::EAGAIN | libc::EINTR => {
                Some(self.fail(now))
            }
            // This kernel does not have the table, or the interface is elsewhere.
            _ => {
                self.running = None;
                Some(Outcome::Failed)
            }
        }
    }

    /// The table that was started cannot be dumped at present.
    pub(crate) fn skip(&mut self) {
        self.running = None;
    }

    /// Handles that no message is left to be read: a dump in progress was then never started, and its refusal
    /// was lost, because a dump that was started always has a message to be read.
    pub(crate) fn drained(&mut self, now: Instant) {
        if self.running.is_some() {
            self.fail(now);
        }
    }

    fn fail(&mut self, now: Instant) -> Outcome {
        if let Some(running) = self.running.take()
            && !self.waiting.contains(&running.table)
        {
            self.waiting.push_front(running.table);
        }
        self.set_back(now);
        Outcome::Failed
    }

    /// Starts the interval to the next request, unless it has started: repeated losses must not postpone the
    /// dumps for ever.
    fn set_back(&mut self, now: Instant) {
        if now < self.not_before {
            return;
        }
        if now.since(self.last_setback) > CALM {
            self.delay = SHORTEST_DELAY;
        }
        self.last_setback = now;
        self.not_before = now.after(self.delay);
        self.delay = (self.delay * 2).min(LONGEST_DELAY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Instant = Instant::from_nanos(1);

    fn end(
        dumps: &mut Dumps,
        sequence: u32,
        errno: i32,
        flags: i32,
        now: Instant,
    ) -> Option<Outcome> {
        let body = (-errno).to_ne_bytes();
        let kind = if errno == 0 { NLMSG_DONE } else { NLMSG_ERROR };
        let flags = flags as u16;
        let message = NetlinkMessage { kind, flags, sequence, port: 0, body: &body };
        dumps.receive(&message, now)
    }

    #[test]
    fn tables_are_dumped_one_after_the_other_and_each_once() {
        let mut dumps = Dumps::default();
        dumps.require_all();
        dumps.require(Table::Links);
        for (sequence, table) in (1..).zip(Table::ALL) {
            assert!(dumps.is_pending(table));
            assert_eq!(dumps.start_next(sequence, START), Some(table));
            assert_eq!(dumps.start_next(sequence, START), None, "one at a time");
            assert_eq!(end(&mut dumps, sequence + 9, 0, 0, START), None, "not its sequence number");
            let outcome = end(&mut dumps, sequence, 0, 0, START);
            assert_eq!(outcome, Some(Outcome::Complete(table)));
            assert!(!dumps.is_pending(table));
        }
        assert_eq!((dumps.start_next(9, START), dumps.next_timeout()), (None, None));
    }

    #[test]
    fn what_is_required_during_its_dump_is_dumped_again() {
        let mut dumps = Dumps::default();
        dumps.require(Table::Rules);
        dumps.start_next(1, START);
        dumps.require(Table::Rules);
        assert!(end(&mut dumps, 1, 0, 0, START).is_some());
        assert_eq!(dumps.start_next(2, START), Some(Table::Rules));
    }

    /// A way for the dump under way to fail.
    type Failure = fn(&mut Dumps, Instant);

    #[test]
    fn a_dump_that_fails_is_requested_again_less_and_less_often() {
        let failures: [Failure; 4] = [
            |dumps, now| assert!(end(dumps, 1, libc::EBUSY, 0, now).is_some()),
            |dumps, now| assert!(end(dumps, 1, libc::ENOBUFS, 0, now).is_some()),
            |dumps, now| assert!(end(dumps, 1, 0, libc::NLM_F_DUMP_INTR, now).is_some()),
            |dumps, now| dumps.drained(now),
        ];
        for failure in failures {
            let (mut dumps, mut now) = (Dumps::default(), START);
            dumps.require_all();
            for expected in [50, 100, 200, 400, 800, 1600, 2000, 2000] {
                assert_eq!(dumps.start_next(1, now), Some(Table::Links));
                failure(&mut dumps, now);
                let next = dumps.next_timeout().unwrap();
                assert_eq!(next.since(now), Duration::from_millis(expected));
                assert_eq!(dumps.start_next(1, now), None);
                now = next;
            }
            dumps.start_next(1, now);
            end(&mut dumps, 1, 0, 0, now);
            now = now.after(CALM).after(SHORTEST_DELAY);
            assert_eq!(dumps.start_next(1, now), Some(Table::Rules));
            failure(&mut dumps, now);
            let delay = dumps.next_timeout().unwrap().since(now);
            assert_eq!(delay, SHORTEST_DELAY, "calm ends the backoff");
        }
    }

    #[test]
    fn losses_one_after_the_other_neither_cause_a_dump_each_nor_put_them_off_for_ever() {
        let (mut dumps, mut now, mut requests) = (Dumps::default(), START, Vec::new());
        for _ in 0..30_000 {
            dumps.require_all_after_loss(now);
            now = now.after(Duration::from_millis(1));
            requests.extend(dumps.start_next(1, now));
            end(&mut dumps, 1, 0, 0, now);
        }
        assert!((15..25).contains(&requests.len()), "{requests:?} in 30 s");
        let links = requests.iter().filter(|table| **table == Table::Links).count();
        assert!(links >= 3, "{requests:?}");
    }

    #[test]
    fn what_the_kernel_cannot_dump_is_not_requested_again() {
        let mut dumps = Dumps::default();
        dumps.require(Table::Rules);
        dumps.start_next(1, START);
        assert_eq!(end(&mut dumps, 1, libc::EOPNOTSUPP, 0, START), Some(Outcome::Failed));
        assert!(!dumps.is_pending(Table::Rules));
    }
}
