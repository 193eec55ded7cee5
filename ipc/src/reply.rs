//! What the helper sends. The dataplane trusts it, and only the dataplane decodes it.

use crate::startup::LogLevel;
use serde::{Deserialize, Serialize};

/// What a TUN queue exchanges besides plain packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunOffload {
    /// Packets have a virtio_net_hdr before them (IFF_VNET_HDR).
    pub vnet_hdr: bool,
    /// TCP super-packets, and checksums yet to be completed, both ways.
    pub tso: bool,
    /// UDP super-packets, both ways.
    pub uso: bool,
}

/// The helper's answer; each request but [`crate::Request::Pong`] gets one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The sandbox was verified. Comes with the UAPI listener, the netlink socket, the TUN
    /// queues, the listeners of the status socket and of the socket for preshared keys, if any, and the socket by which the
    /// state comes, if one is taken over, in this order.
    Granted {
        /// Index of the interface.
        ifindex: u32,
        /// The network namespace it is in, as the netlink socket's own numbers it; `None` for that.
        netns: Option<i32>,
        /// Whether the netlink socket reports the interface wherever it is moved to.
        follows_moves: bool,
        /// How many TUN queues come with it. The first is written to; it is read only if it is alone.
        tun_queues: u8,
        /// What these do besides single packets.
        offload: TunOffload,
        /// A listener of the status socket comes with it.
        status: bool,
        /// A listener of the socket for preshared keys comes with it.
        psk: bool,
        /// A state comes from another dataplane. Answered by [`crate::Request::Pong`] once the dataplane has all of it.
        take_over: bool,
    },
    /// Comes with the UDP sockets.
    UdpOpened {
        /// The port bound by all of them.
        port: u16,
        /// How many there are.
        sockets: u8,
    },
    /// Done.
    Done,
    /// Not done, nothing changed.
    Refused {
        /// Positive errno for the UAPI client, but for that of [`Reply::TOO_EARLY`].
        errno: i32,
    },
}

impl Reply {
    /// The answer to [`crate::Request::OpenUdp`] for a new port that may be opened only later. No other refusal has its
    /// errno.
    pub const TOO_EARLY: Self = Self::Refused { errno: nix::libc::EAGAIN };

    /// How many descriptors come with it.
    #[must_use]
    pub const fn descriptors(&self) -> usize {
        match self {
            Self::Granted { tun_queues, status, psk, take_over, .. } => {
                2 + *tun_queues as usize + *status as usize + *psk as usize + *take_over as usize
            }
            Self::UdpOpened { sockets, .. } => *sockets as usize,
            Self::Done | Self::Refused { .. } => 0,
        }
    }
}

/// What the helper sends unrequested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Notice {
    /// Log this much from now on.
    LogLevel(LogLevel),
    /// End now.
    Shutdown,
    /// This virtual machine was cloned, or restored from a snapshot: drop every key that a copy has.
    NewGeneration,
    /// Answer with [`crate::Request::Pong`], to show that the control thread runs.
    Ping,
    /// Hand everything over by the socket that comes with this. Answered by [`crate::Request::Bye`]
    /// if that is done, and by [`crate::Request::Pong`] if nothing was handed over and it goes on.
    HandOver,
}

impl Notice {
    /// How many descriptors come with it.
    #[must_use]
    pub const fn descriptors(&self) -> usize {
        matches!(self, Self::HandOver) as usize
    }
}

/// Everything the helper sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromHelper {
    /// An answer.
    Reply {
        /// Sequence number of the request it answers.
        sequence: u32,
        /// The answer.
        reply: Reply,
    },
    /// Unasked.
    Notice(Notice),
}

impl FromHelper {
    /// How many descriptors come with it.
    #[must_use]
    pub const fn descriptors(&self) -> usize {
        match self {
            Self::Reply { reply, .. } => reply.descriptors(),
            Self::Notice(notice) => notice.descriptors(),
        }
    }
}
