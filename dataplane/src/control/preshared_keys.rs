//! Preshared keys that are set on the socket for them, by which nothing else is done.

use super::{Control, Scopes};
use crate::clock;
use crate::uapi::{Operation, require_peers};

/// Transactions that are carried out before other events are handled.
const STEPS_PER_ROUND: usize = 4;

impl Control {
    /// Carries out complete transactions. They need no answer of the helper, so they wait for no other action; none is
    /// taken once everything is handed over.
    pub(super) fn take_preshared_keys(&mut self) {
        let mut steps = STEPS_PER_ROUND;
        while self.end.is_none()
            && let Some((client, operation)) =
                self.psk.next_operation(&Scopes(None), &self.epoll, &mut steps)
        {
            let Operation::Set(mut configuration) = operation else {
                debug_assert!(false, "a get is refused by the parser");
                continue;
            };
            let device = &self.device;
            let errno = match require_peers(&mut configuration, |peer| device.has_peer(peer)) {
                Ok(()) => {
                    self.configure(configuration);
                    0
                }
                Err(errno) => {
                    self.psk_refusals.write(clock::instant(), || {
                        tracing::warn!(
                            "preshared key refused, nothing changed: no such peer; configure it first, by wg(8) on the UAPI socket"
                        );
                    });
                    -(errno as i32)
                }
            };
            self.psk.reply_set(client, errno, &self.epoll);
        }
    }
}
