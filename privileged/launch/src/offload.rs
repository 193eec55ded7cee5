//! What the kernel can do for many packets and flows at once, and what an operator chose to do
//! without.

/// A way of handing over many packets in one system call, or many flows beside each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// A header before each packet of the TUN device, without which it has only plain packets.
    VnetHdr,
    /// TCP super-packets on the TUN device.
    Tso,
    /// UDP super-packets on the TUN device, since Linux 6.2.
    Uso,
    /// Queues of the TUN device for different flows, without which all wait in one.
    FlowQueues,
    /// Many datagrams of one peer in one send, since Linux 4.18.
    UdpGso,
    /// Many datagrams of one peer in one receive, since Linux 5.0.
    UdpGro,
}

impl Offload {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::VnetHdr, Self::Tso, Self::Uso, Self::FlowQueues, Self::UdpGso, Self::UdpGro];

    /// Its name on the command line and in the log.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::VnetHdr => "vnet-hdr",
            Self::Tso => "tso",
            Self::Uso => "uso",
            Self::FlowQueues => "flow-queues",
            Self::UdpGso => "udp-gso",
            Self::UdpGro => "udp-gro",
        }
    }
}

/// A line of the log about an offload that is not used.
pub fn missing(offload: Offload, without: &[Offload]) -> String {
    let why = if without.contains(&offload) {
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
    fn the_log_tells_what_was_chosen_from_what_is_missing() {
        for one in Offload::ALL {
            assert!(missing(one, &[one]).contains("--without"));
            assert!(!missing(one, &[]).contains("--without"));
        }
    }
}
