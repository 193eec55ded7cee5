//! What the kernel can do for many packets at once, and what an operator chose to do without.

/// A way of handing over many packets in one system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// A header before each packet of the TUN device, without which it has only plain packets.
    VnetHdr,
    /// TCP super-packets on the TUN device.
    Tso,
    /// UDP super-packets on the TUN device, since Linux 6.2.
    Uso,
    /// Many datagrams of one peer in one send, since Linux 4.18.
    UdpGso,
    /// Many datagrams of one peer in one receive, since Linux 5.0.
    UdpGro,
}

impl Offload {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::VnetHdr, Self::Tso, Self::Uso, Self::UdpGso, Self::UdpGro];

    /// Its name on the command line and in the log.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::VnetHdr => "vnet-hdr",
            Self::Tso => "tso",
            Self::Uso => "uso",
            Self::UdpGso => "udp-gso",
            Self::UdpGro => "udp-gro",
        }
    }
}

/// A set of offloads, empty by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads(u8);

impl Offloads {
    /// True if this one is in the set.
    #[must_use]
    pub const fn contains(self, offload: Offload) -> bool {
        self.0 & (1 << offload as u8) != 0
    }
}

impl FromIterator<Offload> for Offloads {
    fn from_iter<T: IntoIterator<Item = Offload>>(offloads: T) -> Self {
        Self(offloads.into_iter().fold(0, |set, offload| set | 1 << offload as u8))
    }
}

/// A line of the log about an offload that is not used.
pub fn missing(offload: Offload, without: Offloads) -> String {
    let why = if without.contains(offload) {
        "as --without says"
    } else {
        "because this kernel or interface does not have it"
    };
    format!("going on without {}, more slowly, {why}", offload.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_what_was_put_in() {
        for (i, one) in Offload::ALL.into_iter().enumerate() {
            let set: Offloads = Offload::ALL.into_iter().skip(i).collect();
            assert!(set.contains(one));
            assert!(Offload::ALL.into_iter().take(i).all(|other| !set.contains(other)));
            assert!(missing(one, set).contains("--without"));
            assert!(!missing(one, Offloads::default()).contains("--without"));
        }
    }
}
