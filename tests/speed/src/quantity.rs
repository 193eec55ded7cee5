//! What is measured.

use serde::{Deserialize, Serialize};

/// A number that a measure gives, with its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Quantity {
    /// One TCP stream from left to right, Gbit/s of payload.
    TcpForth,
    /// One from right to left.
    TcpBack,
    /// Four from left to right.
    TcpFour,
    /// Processor time of both ends' programs for a byte of [`Self::TcpForth`], ns.
    DaemonCpu,
    /// Of the whole machine, tools and kernel included.
    MachineCpu,
    /// Median round trip of a ping through an idle tunnel, µs.
    PingIdle,
    /// The one that 99 of 100 are below.
    PingIdleTail,
    /// Median round trip beside a TCP stream, µs.
    PingLoaded,
    /// The one that 99 of 100 are below.
    PingLoadedTail,
    /// 64-byte datagrams with at most 1 % lost, thousands a second.
    SmallLossless,
    /// 64-byte datagrams that arrive when as many are sent as the sender can.
    SmallOverload,
    /// The same as a share of the most that ever arrived, percent.
    SmallKept,
    /// 1,372-byte datagrams that arrive when as many are sent as the sender can, thousands a second.
    LargeOverload,
    /// Most memory that one end's processes ever had resident, MiB.
    Memory,
    /// Initiations answered in a second of one core's time.
    Handshakes,
    /// Initiations answered a second, by the clock.
    HandshakeRate,
    /// Rate of a TCP stream during a flood of invalid initiations, percent of that without.
    FloodKept,
    /// Cost of a packet with 10,000 peers over that with one.
    ScaleCost,
    /// Memory of a peer without a keypair, bytes.
    PeerMemory,
    /// Throughput lost to the system-call filter, percent.
    SandboxCost,
}

impl Quantity {
    /// Those of one contender in one round, in the order of tables.
    pub(crate) const OF_EACH: [Self; 17] = [
        Self::TcpForth,
        Self::TcpBack,
        Self::TcpFour,
        Self::DaemonCpu,
        Self::MachineCpu,
        Self::PingIdle,
        Self::PingIdleTail,
        Self::PingLoaded,
        Self::PingLoadedTail,
        Self::SmallLossless,
        Self::SmallOverload,
        Self::SmallKept,
        Self::LargeOverload,
        Self::Memory,
        Self::Handshakes,
        Self::HandshakeRate,
        Self::FloodKept,
    ];

    /// What a table calls it, with its unit.
    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::TcpForth => "TCP, 1 stream, Gbit/s",
            Self::TcpBack => "TCP, 1 stream back, Gbit/s",
            Self::TcpFour => "TCP, 4 streams, Gbit/s",
            Self::DaemonCpu => "CPU of both daemons, ns a byte",
            Self::MachineCpu => "CPU of the machine, ns a byte",
            Self::PingIdle => "ping, idle, µs",
            Self::PingIdleTail => "ping, idle, 99 of 100, µs",
            Self::PingLoaded => "ping under TCP, µs",
            Self::PingLoadedTail => "ping under TCP, 99 of 100, µs",
            Self::SmallLossless => "UDP 64 B, ≤ 1 % lost, kpps",
            Self::SmallOverload => "UDP 64 B, overload, kpps",
            Self::SmallKept => "UDP 64 B, overload, % of peak",
            Self::LargeOverload => "UDP 1372 B, overload, kpps",
            Self::Memory => "memory of one end, peak MiB",
            Self::Handshakes => "initiations answered a core-second",
            Self::HandshakeRate => "initiations answered a second",
            Self::FloodKept => "TCP under a handshake flood, % kept",
            Self::ScaleCost => "cost of a packet, 10,000 peers / 1",
            Self::PeerMemory => "memory of an idle peer, bytes",
            Self::SandboxCost => "processor's time lost to the filter, %",
        }
    }

    /// Digits after the point that mean something.
    pub(crate) const fn digits(self) -> usize {
        match self {
            Self::TcpForth
            | Self::TcpBack
            | Self::TcpFour
            | Self::DaemonCpu
            | Self::MachineCpu
            | Self::ScaleCost => 2,
            Self::Memory | Self::SandboxCost | Self::SmallKept | Self::FloodKept => 1,
            _ => 0,
        }
    }
}
