//! Several workers, one source of packets, and still every packet leaves in its turn.
//!
//! A worker reads a batch and fixes all that depends on order while it holds the source's turn, and
//! takes a ticket. It then does its cryptography in parallel with the others. Batches go out in the
//! order of their tickets: a worker that finishes early parks its batch for the one whose turn it
//! is, and goes on with an empty one. Nobody spins, and nobody waits while holding a turn.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The turns to read one source, and the batches that travel from it.
pub(crate) struct Ordered<B> {
    turn: Mutex<Turn>,
    exit: Mutex<Exit<B>>,
    freed: Condvar,
}

/// The right to read the source.
pub(crate) struct Turn {
    next_ticket: u64,
}

impl Turn {
    /// A batch's place in the order. Each ticket taken must be completed.
    pub(crate) fn take_ticket(&mut self) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        ticket
    }
}

/// A batch's place in the order.
#[must_use = "batches behind it would wait for ever"]
pub(crate) struct Ticket(u64);

struct Exit<B> {
    /// The ticket that goes out next.
    next: u64,
    /// Somebody is writing; they will look for parked batches when done.
    busy: bool,
    parked: Vec<(u64, B)>,
    free: Vec<B>,
    /// Workers that wait for a free one: nearly always none, and waking none is a system call too.
    waiting: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B> Ordered<B> {
    /// Takes all the batches that will ever travel from the source: at least two for each worker.
    pub(crate) fn new(batches: Vec<B>) -> Self {
        let parked = Vec::with_capacity(batches.len());
        Self {
            turn: Mutex::new(Turn { next_ticket: 0 }),
            exit: Mutex::new(Exit { next: 0, busy: false, parked, free: batches, waiting: 0 }),
            freed: Condvar::new(),
        }
    }

    /// An empty batch; waits for one if all are under way.
    pub(crate) fn take_batch(&self) -> B {
        let mut exit = lock(&self.exit);
        loop {
            if let Some(batch) = exit.free.pop() {
                return batch;
            }
            exit.waiting += 1;
            exit = self.freed.wait(exit).unwrap_or_else(PoisonError::into_inner);
            exit.waiting -= 1;
        }
    }

    /// Gives back a batch that carries nothing and has no ticket.
    pub(crate) fn return_batch(&self, batch: B) {
        self.free(&mut lock(&self.exit), batch);
    }

    fn free(&self, exit: &mut Exit<B>, batch: B) {
        exit.free.push(batch);
        if exit.waiting > 0 {
            self.freed.notify_one();
        }
    }

    /// The turn to read.
    pub(crate) fn turn(&self) -> MutexGuard<'_, Turn> {
        lock(&self.turn)
    }

    /// Writes a batch when its turn has come, and those parked behind it; or parks it.
    pub(crate) fn complete(&self, Ticket(ticket): Ticket, batch: B, mut write: impl FnMut(&mut B)) {
        let mut batch = batch;
        {
            let mut exit = lock(&self.exit);
            if exit.busy || exit.next != ticket {
                exit.parked.push((ticket, batch));
                return;
            }
            exit.busy = true;
        }
        loop {
            write(&mut batch);
            let mut exit = lock(&self.exit);
            exit.next += 1;
            let next = exit.next;
            self.free(&mut exit, batch);
            let Some(place) = exit.parked.iter().position(|(parked, _)| *parked == next) else {
                exit.busy = false;
                return;
            };
            batch = exit.parked.swap_remove(place).1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn batches_leave_in_the_order_of_their_tickets() {
        for workers in [1, 2, 4] {
            const TOTAL: u64 = 20_000;
            let ordered = Arc::new(Ordered::new(vec![0u64; workers * 2]));
            let written = Arc::new(Mutex::new(Vec::new()));
            let threads: Vec<_> = (0..workers)
                .map(|worker| {
                    let (ordered, written) = (Arc::clone(&ordered), Arc::clone(&written));
                    std::thread::spawn(move || {
                        loop {
                            let mut batch = ordered.take_batch();
                            let mut turn = ordered.turn();
                            if turn.next_ticket == TOTAL {
                                drop(turn);
                                ordered.return_batch(batch);
                                return;
                            }
                            batch = turn.next_ticket;
                            let ticket = turn.take_ticket();
                            drop(turn);
                            if (batch + worker as u64).is_multiple_of(97) {
                                std::thread::sleep(Duration::from_micros(50));
                            }
                            ordered.complete(ticket, batch, |batch| lock(&written).push(*batch));
                        }
                    })
                })
                .collect();
            for thread in threads {
                thread.join().unwrap();
            }
            assert!(lock(&written).iter().copied().eq(0..TOTAL));
            assert_eq!(lock(&ordered.exit).free.len(), workers * 2);
        }
    }
}
