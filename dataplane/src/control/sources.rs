//! After a change of routes: which peers' cached source addresses still hold.
//!
//! The kernel's WireGuard keeps the address that a peer spoke to for as long as the route to the peer
//! leads to the interface it spoke by. It looks at each packet; we ask after each change of routes,
//! some peers a round, so that handshakes do not wait for it.

use crate::link::LinkMonitor;
use std::collections::VecDeque;
use wgsep_proto::device::Device;
use wgsep_proto::peer::PeerId;

/// Peers looked at before the other events get their turn: about 1 ms of work.
const PEERS_PER_ROUND: usize = 256;

/// The peers that are still to be looked at.
#[derive(Default)]
pub(super) struct SourceCheck {
    waiting: VecDeque<PeerId>,
    /// Routes changed while the check was under way.
    again: bool,
}

impl SourceCheck {
    /// Some route is another.
    pub(super) fn routes_changed(&mut self, device: &Device) {
        if self.waiting.is_empty() {
            self.waiting.extend(device.peers_with_source());
        } else {
            self.again = true;
        }
    }

    /// Looks at the next peers; true if more are left.
    pub(super) fn check(&mut self, device: &Device, link: &mut LinkMonitor) -> bool {
        for _ in 0..PEERS_PER_ROUND {
            let Some(id) = self.waiting.pop_front() else { break };
            let mark = device.fwmark();
            device.check_source(id, |from, to| link.leaves_by(from, to, mark));
        }
        if self.waiting.is_empty() && core::mem::take(&mut self.again) {
            self.waiting.extend(device.peers_with_source());
        }
        !self.waiting.is_empty()
    }
}
