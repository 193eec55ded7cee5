//! What the granted ports mean for a start: a capability, and what the dataplane is told. No request reaches it.

use crate::grants::{FIRST_HIGH_PORT, Grants};

impl Grants {
    /// Whether a permitted port takes CAP_NET_BIND_SERVICE. A pinned one was chosen by the operator already, and
    /// needs `low_ports` only above 1023 where the limit of the host cannot be read.
    #[must_use]
    pub fn needs_low_ports(&self) -> bool {
        match (self.port, self.first_unprivileged) {
            (None, _) => self.low_ports,
            (Some(pinned), Some(first)) => pinned < first,
            (Some(pinned), None) => pinned < FIRST_HIGH_PORT || self.low_ports,
        }
    }

    /// The lowest and the highest port that may be asked for. The dataplane receives them, so that it can
    /// refuse what would be refused here only when the interface comes up.
    #[must_use]
    pub fn ports(&self) -> (u16, u16) {
        match self.port {
            Some(pinned) => (pinned, pinned),
            None if self.low_ports => (1, u16::MAX),
            None => (self.first_high_port(), u16::MAX),
        }
    }
}
