//! Which ports and marks the dataplane may ask the helper for. What a start derives from that is in `port_range`.

/// What an operator lets the dataplane ask for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Grants {
    /// The only port.
    pub port: Option<u16>,
    /// Value and mask: only marks with these bits.
    pub mark: Option<(u32, u32)>,
    /// Ports below 1024 too, and others that this host keeps for privileged processes, where no port is pinned.
    pub low_ports: bool,
    /// The first port that any process may bind where the UDP sockets live
    /// (net.ipv4.ip_unprivileged_port_start); `None` if that cannot be read.
    pub first_unprivileged: Option<u16>,
}

/// The lowest port that the dataplane may ask for where neither `port` nor `low_ports` is set, and the first that
/// any process may bind on most hosts.
pub(crate) const FIRST_HIGH_PORT: u16 = 1024;

impl Grants {
    /// The lowest port that may be asked for without `low_ports`. Where the host lets any process bind ports below
    /// 1024, they still have to be enabled.
    pub(crate) fn first_high_port(&self) -> u16 {
        self.first_unprivileged.unwrap_or(0).max(FIRST_HIGH_PORT)
    }

    /// The port to open for a request.
    ///
    /// # Errors
    /// EPERM or EACCES if the policy forbids it.
    pub fn permit_port(&self, port: u16) -> nix::Result<u16> {
        match self.port {
            Some(pinned) if port == 0 || port == pinned => Ok(pinned),
            Some(_) => Err(nix::Error::EPERM),
            None if (1..self.first_high_port()).contains(&port) && !self.low_ports => {
                Err(nix::Error::EACCES)
            }
            None => Ok(port),
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
    fn ports_that_the_host_keeps_for_privileged_processes_are_low_ports() {
        let with = |first| Grants { first_unprivileged: Some(first), ..Grants::default() };
        for (grants, lowest) in [(with(20_000), 20_000), (with(1024), 1024), (with(0), 1024)] {
            assert_eq!(grants.ports(), (lowest, u16::MAX));
            assert_eq!(grants.permit_port(lowest - 1), Err(nix::Error::EACCES));
            assert_eq!(grants.permit_port(lowest), Ok(lowest));
            assert_eq!(Grants { low_ports: true, ..grants }.permit_port(53), Ok(53));
        }
    }

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
            (pinned, false),
            // The limit cannot be read.
            (Grants { low_ports: true, ..pinned }, true),
            (Grants { low_ports: true, first_unprivileged: Some(1024), ..pinned }, false),
            (Grants { first_unprivileged: Some(51820), ..pinned }, false),
            (Grants { first_unprivileged: Some(51821), ..pinned }, true),
            (Grants { first_unprivileged: Some(53), ..low }, false),
            (Grants { first_unprivileged: Some(20_000), ..open }, false),
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
