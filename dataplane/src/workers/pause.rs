//! Stopping the workers between two batches, while the state is handed over to another process.

use crate::workers::leader::Leader;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

/// Whether the workers are to stop, and how many have.
#[derive(Default)]
pub(crate) struct Pause {
    /// Read by each worker before it waits.
    is_wanted: AtomicBool,
    stopped: Mutex<usize>,
    /// Notified when a worker has stopped, and when all may go on.
    changed: Condvar,
}

impl Pause {
    /// Stops the workers. When it returns, all have written the packets that they had read, and none reads more.
    pub(crate) fn stop(&self, leader: &Leader, workers: usize) {
        self.is_wanted.store(true, Ordering::SeqCst);
        leader.wake_all();
        let mut stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        while *stopped < workers {
            stopped = self.changed.wait(stopped).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets the workers go on.
    pub(crate) fn end(&self) {
        let _stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_wanted.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Called by a worker that has no batch: waits while the workers are stopped.
    pub(crate) fn wait(&self) {
        if !self.is_wanted.load(Ordering::SeqCst) {
            return;
        }
        let mut stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        *stopped += 1;
        self.changed.notify_all();
        while self.is_wanted.load(Ordering::SeqCst) {
            stopped = self.changed.wait(stopped).unwrap_or_else(PoisonError::into_inner);
        }
        *stopped -= 1;
    }
}
