//! Which ports and marks the dataplane may ask the helper for.

/// What an operator lets the dataplane ask for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Grants {
    /// The only port.
    pub port: Option<u16>,
    /// Value and mask: only marks with these bits.
    pub mark: Option<(u32, u32)>,
    /// Ports below 1024 too, where no port is pinned.
    pub low_ports: bool,
    /// UDP buffers beyond the limits of the system (net.core.rmem_max and wmem_max).
    pub large_buffers: bool,
}

/// The first port that any process may bind (ip_unprivileged_port_start, as it is by default).
const FIRST_HIGH_PORT: u16 = 1024;

impl Grants {
    /// Whether a port below 1024 may be asked for: a pinned one was chosen by the operator already.
    #[must_use]
    pub fn needs_low_ports(&self) -> bool {
        self.port.map_or(self.low_ports, |pinned| pinned < FIRST_HIGH_PORT)
    }

    /// The port to open for a request.
    ///
    /// # Errors
    /// EPERM or EACCES if the policy forbids it.
    pub fn permit_port(&self, port: u16) -> nix::Result<u16> {
        match self.port {
            Some(pinned) if port == 0 || port == pinned => Ok(pinned),
            Some(_) => Err(nix::Error::EPERM),
            None if (1..FIRST_HIGH_PORT).contains(&port) && !self.low_ports => {
                Err(nix::Error::EACCES)
            }
            None => Ok(port),
        }
    }

    /// The lowest and the highest port that may be asked for. The dataplane receives them, so that it can
    /// refuse what would be refused here only when the interface comes up.
    #[must_use]
    pub fn ports(&self) -> (u16, u16) {
        match self.port {
            Some(pinned) => (pinned, pinned),
            None if self.low_ports => (1, u16::MAX),
            None => (FIRST_HIGH_PORT, u16::MAX),
        }
    }

    /// # Errors
    /// EPERM if the policy forbids the mark.
    pub fn permit_mark(&self, mark: u32) -> nix::Result<()> {
        match self.mark {
            Some((value, mask)) if mark & mask != value & mask => Err(nix::Error::EPERM),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grants_hold_ports_and_marks_to_what_the_operator_said() {
        let open = Grants::default();
        assert_eq!(open.permit_port(0), Ok(0));
        assert_eq!(open.permit_port(1023), Err(nix::Error::EACCES));
        assert_eq!(open.permit_port(1024), Ok(1024));
        assert_eq!(Grants { low_ports: true, ..open }.permit_port(53), Ok(53));
        let pinned = Grants { port: Some(51820), ..open };
        assert_eq!(pinned.permit_port(0), Ok(51820));
        assert_eq!(pinned.permit_port(51820), Ok(51820));
        assert_eq!(pinned.permit_port(51821), Err(nix::Error::EPERM));
        let low = Grants { port: Some(53), ..open };
        assert_eq!((low.permit_port(53), low.ports()), (Ok(53), (53, 53)));
        assert_eq!(low.permit_port(54), Err(nix::Error::EPERM));
        for (grants, needs) in [
            (open, false),
            (Grants { low_ports: true, ..open }, true),
            (low, true),
            (Grants { low_ports: true, ..pinned }, false),
        ] {
            assert_eq!(grants.needs_low_ports(), needs, "{grants:?}");
        }
        assert_eq!(open.permit_mark(u32::MAX), Ok(()));
        let bounded = Grants { mark: Some((0x100, 0xff00)), ..open };
        assert_eq!(bounded.permit_mark(0x1ab), Ok(()));
        assert_eq!(bounded.permit_mark(0x2ab), Err(nix::Error::EPERM));
        assert_eq!(bounded.permit_mark(0), Err(nix::Error::EPERM));
    }
}
