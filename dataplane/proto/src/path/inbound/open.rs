//! Stage 3 of the way in: all transport messages of a batch are opened in place.

use super::InboundBatch;
use crate::path::Parts;
use crate::path::data_path::DataPath;
use crate::session::keypair::{OpenJob, open_batch};
use crate::time::Instant;

impl InboundBatch {
    /// Stage 3: opens every message. Those that do not open are counted.
    pub fn open(&mut self, data_path: &DataPath, memory: &mut [u8], now: Instant) {
        let Self { messages, keypairs, .. } = self;
        let mut parts = Parts::new(memory);
        let jobs = messages.iter_mut().filter_map(|message| {
            let keypair = &*keypairs.get(message.keypair)?.keypair;
            let sealed = parts.take(message.sealed.clone())?;
            Some(OpenJob { keypair, counter: message.counter, sealed, result: &mut message.opened })
        });
        open_batch(jobs, now);
        for error in messages.iter().filter_map(|message| message.opened.err()) {
            data_path.drops.add(error.into(), 1);
        }
    }
}
