//! What a dataplane that was taken over could try on its helper.

/// One attack. The helper hands its number on as the mark of `--fwmark`, which is how a test says
/// what it wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attack {
    /// Requests sockets before it is locked down.
    OpenUdpBeforeLockDown = 1,
    /// Reports its lock-down without it.
    UnconfinedLiar,
    /// Has a thread more than it should.
    OneThreadTooMany,
    /// Its report has layers in a state that there is none of.
    SenselessReport,
    /// Reports its lock-down twice.
    SecondLockedDown,
    /// A frame with a tag that no request has.
    UnknownTag,
    /// A frame that ends within its header.
    Short,
    /// A frame one byte longer than frames may be.
    Oversized,
    /// A request with a byte behind it.
    Trailing,
    /// A request of another version of the contract.
    WrongVersion,
    /// A frame of nothing.
    Empty,
    /// A request with a descriptor.
    OneDescriptor,
    /// A request with two.
    TwoDescriptors,
    /// A request with as many as the kernel passes at once.
    ManyDescriptors,
    /// Requests as fast as the socket takes them, without a look at the replies.
    Flood,
    /// Many requests, each after the reply to the one before, then a farewell.
    Hurry,
    /// Asks for what the operator's policy forbids, prints the reply, then a farewell.
    Policy,
    /// Breaks the contract when a client connects, and then hangs up on that client.
    OnConnect,
    /// Answers a ping that never came.
    PongWithoutPing,
    /// Asks for one new port after the other without a pause and keeps all of the sockets, says how long the last one
    /// took, how often it was put off and what can be done with the first, and waits.
    HoardPorts,
    /// Exits as soon as it has reported its lock-down.
    EndsOnceLockedDown,
}

/// Ports of [`Attack::HoardPorts`]: one more than are opened at once.
pub const HOARDED_PORTS: usize = 5;

impl Attack {
    /// All of them.
    pub const ALL: [Self; 21] = [
        Self::OpenUdpBeforeLockDown,
        Self::UnconfinedLiar,
        Self::OneThreadTooMany,
        Self::SenselessReport,
        Self::SecondLockedDown,
        Self::UnknownTag,
        Self::Short,
        Self::Oversized,
        Self::Trailing,
        Self::WrongVersion,
        Self::Empty,
        Self::OneDescriptor,
        Self::TwoDescriptors,
        Self::ManyDescriptors,
        Self::Flood,
        Self::Hurry,
        Self::Policy,
        Self::OnConnect,
        Self::PongWithoutPing,
        Self::HoardPorts,
        Self::EndsOnceLockedDown,
    ];

    /// The number that stands for it.
    #[must_use]
    pub const fn mark(self) -> u32 {
        self as u32
    }

    /// The attack that a number stands for.
    #[must_use]
    pub fn of_mark(mark: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|attack| attack.mark() == mark)
    }
}

/// Requests of [`Attack::Hurry`].
pub const HURRIED_REQUESTS: u32 = 250;
