//! Stage 3 of the way in: all transport messages of a batch are opened in place.

use super::{InboundBatch, TransportMessage};
use crate::path::Parts;
use crate::path::data_path::{DataPath, DropCause};
use crate::session::keypair::{OpenJob, open_batch};
use crate::time::Instant;

impl InboundBatch {
    /// Stage 3: opens every message. Those that do not open are counted.
    pub fn open(&mut self, data_path: &DataPath, memory: &mut [u8], now: Instant) {
        let Self { messages, keypairs, keystream, .. } = self;
        let mut parts = Parts::new(memory);
        let jobs = messages.iter_mut().filter_map(|message| {
            let TransportMessage { sealed, counter, dropped, is_authentic, .. } = message;
            let keypair = &*keypairs.get(message.keypair)?.keypair;
            if !keypair.can_receive(*counter, now) {
                *dropped = Some(DropCause::KeypairExpired);
            }
            let sealed = parts.take(sealed.clone()).filter(|_| dropped.is_none())?;
            Some(OpenJob { keypair, counter: *counter, sealed, is_authentic })
        });
        open_batch(keystream.as_mut().map(|cache| &mut ***cache), jobs);
        for message in messages.iter_mut().filter(|message| !message.is_authentic) {
            let cause = message.dropped.get_or_insert(DropCause::Unauthentic);
            data_path.drops.add(*cause, 1);
        }
    }
}
