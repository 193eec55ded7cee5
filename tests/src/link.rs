//! Two namespaces joined by a veth pair: the network between the ends of a tunnel.

use std::net::IpAddr;
use std::sync::Arc;

use crate::netns::Netns;

/// The name of each end's device towards the other.
pub const DEVICE: &str = "veth0";

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// One end of a pair; its number is the last part of each of its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Number 1.
    Left = 1,
    /// Number 2.
    Right = 2,
}

impl Side {
    /// The address on the veth.
    #[must_use]
    pub fn outer(self, family: Family) -> IpAddr {
        let number = self as u16;
        match family {
            Family::V4 => [10, 77, 0, self as u8].into(),
            Family::V6 => [0xfd07, 0, 0, 0, 0, 0, 0, number].into(),
        }
    }

    /// The address within the tunnel.
    #[must_use]
    pub fn inner(self, family: Family) -> IpAddr {
        let number = self as u16;
        match family {
            Family::V4 => [192, 168, 77, self as u8].into(),
            Family::V6 => [0xfd77, 0, 0, 0, 0, 0, 0, number].into(),
        }
    }
}

/// Two new namespaces with a veth pair between them, addressed for both families and up.
#[track_caller]
#[must_use]
pub fn joined() -> (Arc<Netns>, Arc<Netns>) {
    let (left, right) = (Netns::new(), Netns::new());
    left.run(format!("ip link add {DEVICE} type veth peer name {DEVICE} netns {}", right.name()));
    for (netns, side) in [(&left, Side::Left), (&right, Side::Right)] {
        netns.run(format!("ip addr add {}/24 dev {DEVICE}", side.outer(Family::V4)));
        // Without duplicate address detection the address may be used at once.
        netns.run(format!("ip addr add {}/64 dev {DEVICE} nodad", side.outer(Family::V6)));
        // No link-local address either: one would appear only after its detection.
        netns.run(format!("ip link set {DEVICE} addrgenmode none"));
        netns.run(format!("ip link set {DEVICE} up"));
    }
    (left, right)
}
