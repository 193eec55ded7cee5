//! Why packets were dropped: the causes of the protocol, and those of the sockets, the TUN device and the queues.
//!
//! What each means for an operator is in `CAUSES` in `bin/wgsep/src/stats.rs`; `.github/CONTRIBUTING.md` says how to
//! add one.

use core::sync::atomic::{AtomicU64, Ordering};
use wgsep_proto::{DropCause, DropCounters};

/// Defines the daemon's causes, one row each: what it means, its variant, its name, and the protocol's cause after
/// which it is listed.
macro_rules! local_causes {
    ($($(#[$meaning:meta])* $cause:ident = $name:literal after $before:ident,)*) => {
        /// Why the daemon dropped a packet to which the protocol had no objection.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum LocalCause {
            $($(#[$meaning])* $cause,)*
        }

        impl LocalCause {
            /// Every cause, in the order a packet meets them.
            const ALL: [Self; [$($name),*].len()] = [$(Self::$cause),*];

            /// Its name for operators, which does not change from one release to the next.
            pub(crate) const fn name(self) -> &'static str {
                match self {
                    $(Self::$cause => $name,)*
                }
            }

            const fn after(self) -> DropCause {
                match self {
                    $(Self::$cause => DropCause::$before,)*
                }
            }
        }
    };
}

local_causes! {
    /// Out: no route leads to its peer's endpoint.
    SendNoRoute = "send_no_route" after StagedExpired,
    /// Out: a firewall of this machine refused it.
    SendForbidden = "send_forbidden" after StagedExpired,
    /// Out: the queue of the socket or of the link was full.
    SendNoBuffer = "send_no_buffer" after TooLong,
    /// Out: the network refused it for another reason.
    SendFailed = "send_failed" after TooLong,
    /// In: too many handshake messages waited.
    HandshakeQueueFull = "handshake_queue_full" after RateLimited,
    /// In: the interface was down when it was written.
    InterfaceDown = "interface_down" after RouterAdvertisement,
    /// In: the TUN device refused it for another reason.
    WriteFailed = "tun_refused" after RouterAdvertisement,
}

/// A cause of either kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    Protocol(DropCause),
    Local(LocalCause),
}

impl From<DropCause> for Cause {
    fn from(cause: DropCause) -> Self {
        Self::Protocol(cause)
    }
}

impl From<LocalCause> for Cause {
    fn from(cause: LocalCause) -> Self {
        Self::Local(cause)
    }
}

/// Counters of the daemon's causes.
#[derive(Default)]
pub(crate) struct LocalDrops([AtomicU64; LocalCause::ALL.len()]);

/// All counters of dropped packets.
#[derive(Clone, Copy)]
pub(crate) struct Drops<'a> {
    pub(crate) protocol: &'a DropCounters,
    pub(crate) local: &'a LocalDrops,
}

impl Drops<'_> {
    /// Counts `packets` lost to one cause.
    pub(crate) fn add(self, cause: impl Into<Cause>, packets: usize) {
        match cause.into() {
            Cause::Protocol(cause) => self.protocol.add(cause, packets),
            Cause::Local(cause) => {
                let packets = u64::try_from(packets).unwrap_or(u64::MAX);
                self.local.counter(cause).fetch_add(packets, Ordering::Relaxed);
            }
        }
    }

    /// Packets lost to each cause so far, by its name, in the order a packet meets the causes.
    pub(crate) fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        DropCause::ALL.into_iter().flat_map(move |cause| {
            let local = LocalCause::ALL.into_iter().filter(move |local| local.after() == cause);
            let local = local.map(|local| (local.name(), self.local.count(local)));
            core::iter::once((cause.name(), self.protocol.count(cause))).chain(local)
        })
    }
}

impl LocalDrops {
    fn counter(&self, cause: LocalCause) -> &AtomicU64 {
        &self.0[cause as usize]
    }

    /// Packets lost to each cause so far, by its name.
    pub(crate) fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        LocalCause::ALL.into_iter().map(|cause| (cause.name(), self.count(cause)))
    }

    /// Adds counters of another process by their names; those that this version does not have are left out.
    pub(crate) fn add_counts(&self, counts: &[(Vec<u8>, u64)]) {
        for (name, packets) in counts {
            let cause = LocalCause::ALL.into_iter().find(|cause| cause.name().as_bytes() == name);
            if let Some(cause) = cause {
                self.counter(cause).fetch_add(*packets, Ordering::Relaxed);
            }
        }
    }

    /// Packets lost to one cause so far.
    pub(crate) fn count(&self, cause: LocalCause) -> u64 {
        self.counter(cause).load(Ordering::Relaxed)
    }
}

/// The counters of a protocol without a daemon; those of the daemon are new.
#[cfg(test)]
pub(crate) fn of_protocol(protocol: &DropCounters) -> Drops<'_> {
    Drops { protocol, local: Box::leak(Box::default()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_cause_has_a_counter_and_a_name_of_its_own() {
        let (protocol, local) = (DropCounters::default(), LocalDrops::default());
        let drops = Drops { protocol: &protocol, local: &local };
        for (packets, cause) in (1..).zip(LocalCause::ALL) {
            drops.add(cause, packets);
        }
        drops.add(DropCause::NoPeer, 99);
        let counts: Vec<_> = drops.counts().collect();
        assert_eq!(counts.len(), DropCause::ALL.len() + LocalCause::ALL.len());
        let names: BTreeSet<_> = counts.iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), counts.len());
        for (packets, cause) in (1..).zip(LocalCause::ALL) {
            assert!(counts.contains(&(cause.name(), packets)), "{cause:?}");
        }
        assert!(counts.contains(&("no_peer", 99)));
    }
}
