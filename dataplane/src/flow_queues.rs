//! Which queues of the TUN device have packets, and which of them is read next: each in turn, a
//! share of the batch at a time, so that a flow waits for its own packets and for a share of every
//! other queue at most.

/// What a queue gives in its turn, in bytes: half of the longest super-packet, or of small packets as
/// many as take about as long.
const SHARE_LEN: usize = 32_768;
/// What the shortest packet counts as.
const LEAST_LEN: usize = 512;

/// A set of at most [`Self::CAPACITY`] queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ReadyQueues(u64);

impl ReadyQueues {
    /// As many queues as are told apart.
    pub(crate) const CAPACITY: usize = 64;

    pub(crate) const fn insert(&mut self, queue: usize) {
        self.0 |= Self::bit(queue);
    }

    pub(crate) const fn remove(&mut self, queue: usize) {
        self.0 &= !Self::bit(queue);
    }

    pub(crate) const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The first queue of the set from `start` on, and behind the last the first.
    pub(crate) fn next_from(self, start: usize) -> Option<usize> {
        (0..Self::CAPACITY)
            .map(|step| (start + step) % Self::CAPACITY)
            .find(|queue| self.0 & Self::bit(*queue) != 0)
            .filter(|_| !self.is_empty())
    }

    const fn bit(queue: usize) -> u64 {
        if queue < Self::CAPACITY { 1 << queue } else { 0 }
    }
}

/// What a queue may still give in its turn.
pub(crate) struct Share(usize);

impl Share {
    pub(crate) const fn new() -> Self {
        Self(SHARE_LEN)
    }

    /// Takes a packet of `len` bytes off the share.
    pub(crate) fn take(&mut self, len: usize) {
        self.0 = self.0.saturating_sub(len.max(LEAST_LEN));
    }

    pub(crate) const fn is_used_up(&self) -> bool {
        self.0 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_have_their_turns_round_the_end() {
        let mut ready = ReadyQueues::default();
        assert_eq!(ready.next_from(0), None);
        for queue in [0, 5, 63, 64] {
            ready.insert(queue);
        }
        let next = [0, 1, 5, 6, 63, 64, 65].map(|start| ready.next_from(start).unwrap());
        assert_eq!(next, [0, 5, 5, 63, 63, 0, 5]);
        for queue in [0, 5, 63] {
            assert!(!ready.is_empty());
            ready.remove(queue);
        }
        assert!(ready.is_empty(), "a queue past the capacity is none");
    }

    #[test]
    fn a_share_is_one_super_packet_or_64_small_ones() {
        let packets = |len| {
            let mut share = Share::new();
            (1..).find(|_| {
                share.take(len);
                share.is_used_up()
            })
        };
        assert_eq!(packets(62_000), Some(1));
        assert_eq!(packets(1420), Some(24));
        assert_eq!(packets(0), Some(64));
    }
}
