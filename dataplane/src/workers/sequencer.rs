//! A sequencer: workers process the batches of one source in parallel and write them in the order read.
//!
//! A worker holds the source lock while it reads a batch and does everything that depends on the order
//! of packets; it then takes a sequence number and releases the lock. It encrypts or decrypts in
//! parallel with the other workers. Batches are written in the order of their sequence numbers: a worker
//! that finishes early parks its batch, which the worker with the preceding batch then writes, and
//! continues with an empty one. No worker spins, and none waits for a batch while it holds the source
//! lock.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Most free batches that a worker waits for.
const MOST_AWAITED: usize = 4;

/// The source lock, and the batches that are read from the source.
pub(crate) struct Sequencer<B> {
    /// Free batches for which a worker that waits is woken while others are still being written. One that is woken for
    /// each interrupts the worker that writes, if both are on one processor, and soon waits again.
    enough: usize,
    source: Mutex<SequencedSource>,
    output: Mutex<Output<B>>,
    freed: Condvar,
}

/// The state under the source lock.
pub(crate) struct SequencedSource {
    next: u64,
}

impl SequencedSource {
    /// Assigns the next sequence number, with which [`Sequencer::submit`] must be called.
    pub(crate) fn assign(&mut self) -> SequenceNumber {
        let number = SequenceNumber(self.next);
        self.next += 1;
        number
    }
}

/// A batch's position in the order of its source.
#[must_use = "later batches would wait for ever"]
pub(crate) struct SequenceNumber(u64);

/// The batches that are not being read or processed.
struct Output<B> {
    /// Sequence number of the batch to write next.
    next: u64,
    /// A worker is writing, and looks for parked batches when it is done.
    busy: bool,
    parked: Vec<(u64, B)>,
    free: Vec<B>,
    /// Number of workers that wait for a free batch. It is nearly always 0, which saves the system call
    /// that wakes them.
    waiting: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B> Sequencer<B> {
    /// Creates a sequencer with all its batches: at least two for each worker.
    pub(crate) fn new(batches: Vec<B>) -> Self {
        let parked = Vec::with_capacity(batches.len());
        Self {
            enough: (batches.len() / 2).clamp(1, MOST_AWAITED),
            source: Mutex::new(SequencedSource { next: 0 }),
            output: Mutex::new(Output { next: 0, busy: false, parked, free: batches, waiting: 0 }),
            freed: Condvar::new(),
        }
    }

    /// Takes an empty batch; waits for one if all are in use.
    pub(crate) fn take_batch(&self) -> B {
        let mut output = lock(&self.output);
        loop {
            if let Some(batch) = output.free.pop() {
                return batch;
            }
            output.waiting += 1;
            output = self.freed.wait(output).unwrap_or_else(PoisonError::into_inner);
            output.waiting -= 1;
        }
    }

    /// Returns an empty batch that has no sequence number.
    pub(crate) fn return_batch(&self, batch: B) {
        let mut output = lock(&self.output);
        output.free.push(batch);
        let is_awaited = output.waiting > 0;
        // Before the wake-up, or the woken worker would wait for the lock at once.
        drop(output);
        if is_awaited {
            self.freed.notify_one();
        }
    }

    /// Takes the source lock, under which a worker reads.
    pub(crate) fn lock_source(&self) -> MutexGuard<'_, SequencedSource> {
        lock(&self.source)
    }

    /// Writes a batch, and the parked ones that follow it, if all before it are written; otherwise parks
    /// it.
    pub(crate) fn submit(
        &self,
        SequenceNumber(number): SequenceNumber,
        mut batch: B,
        mut write: impl FnMut(&mut B),
    ) {
        {
            let mut output = lock(&self.output);
            if output.busy || output.next != number {
                output.parked.push((number, batch));
                return;
            }
            output.busy = true;
        }
        loop {
            write(&mut batch);
            let mut output = lock(&self.output);
            output.next += 1;
            let next = output.next;
            output.free.push(batch);
            let parked = output.parked.iter().position(|(parked, _)| *parked == next);
            output.busy = parked.is_some();
            let are_enough = output.free.len() >= self.enough;
            let is_awaited = output.waiting > 0 && (are_enough || parked.is_none());
            let following = parked.map(|index| output.parked.swap_remove(index).1);
            drop(output);
            if is_awaited {
                self.freed.notify_all();
            }
            match following {
                Some(following) => batch = following,
                None => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn batches_are_written_in_the_order_of_their_sequence_numbers() {
        for workers in [1, 2, 4] {
            const TOTAL: u64 = 20_000;
            let sequencer = Arc::new(Sequencer::new(vec![0u64; workers * 2]));
            let written = Arc::new(Mutex::new(Vec::new()));
            let threads: Vec<_> = (0..workers)
                .map(|worker| {
                    let (sequencer, written) = (Arc::clone(&sequencer), Arc::clone(&written));
                    std::thread::spawn(move || {
                        loop {
                            let mut batch = sequencer.take_batch();
                            let mut source = sequencer.lock_source();
                            if source.next == TOTAL {
                                drop(source);
                                sequencer.return_batch(batch);
                                return;
                            }
                            batch = source.next;
                            let number = source.assign();
                            drop(source);
                            if (batch + worker as u64).is_multiple_of(97) {
                                std::thread::sleep(Duration::from_micros(50));
                            }
                            sequencer.submit(number, batch, |batch| lock(&written).push(*batch));
                        }
                    })
                })
                .collect();
            for thread in threads {
                thread.join().unwrap();
            }
            assert!(lock(&written).iter().copied().eq(0..TOTAL));
            assert_eq!(lock(&sequencer.output).free.len(), workers * 2);
        }
    }

    #[test]
    fn a_worker_that_waits_for_a_batch_is_woken_when_half_of_them_are_free() {
        let sequencer = Arc::new(Sequencer::new(vec![0; 4]));
        let batches: Vec<_> =
            (0..4).map(|_| (sequencer.lock_source().assign(), sequencer.take_batch())).collect();
        let waiter = {
            let sequencer = Arc::clone(&sequencer);
            std::thread::spawn(move || sequencer.take_batch())
        };
        while lock(&sequencer.output).waiting == 0 {
            std::thread::yield_now();
        }
        // The first is submitted last, and those that are parked are written after it.
        let mut written = 0;
        for (number, batch) in batches.into_iter().rev() {
            sequencer.submit(number, batch, |_| {
                if written == 1 {
                    // Long enough for one that was woken after the first.
                    std::thread::sleep(Duration::from_millis(50));
                    assert!(!waiter.is_finished(), "woken for a single batch");
                }
                written += 1;
            });
        }
        assert_eq!((written, waiter.join().unwrap()), (4, 0));
    }
}
