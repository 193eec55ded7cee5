//! Round robin over the queues of the TUN device, with a quantum in bytes.
//!
//! It works like deficit round robin, except that a queue carries no deficit to its next round. A packet
//! thus waits for its own flow's packets and for at most one quantum, plus a packet, of each other queue.

/// Bytes that are read from a queue before the next one: half of the longest super-packet.
const QUANTUM_LEN: usize = 32_768;
/// Bytes that a packet counts for at least, as the cost of a short one is not its length.
const LEAST_LEN: usize = 512;

/// A set of at most [`Self::CAPACITY`] queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ReadyQueues(u64);

impl ReadyQueues {
    /// Number of queues that a set can hold.
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

    /// The first queue of the set at or after `start`, wrapping around at the end.
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

/// Bytes that may still be read from a queue in this round.
pub(crate) struct Quantum(usize);

impl Quantum {
    pub(crate) const fn new() -> Self {
        Self(QUANTUM_LEN)
    }

    /// Subtracts a packet of `len` bytes.
    pub(crate) fn consume(&mut self, len: usize) {
        self.0 = self.0.saturating_sub(len.max(LEAST_LEN));
    }

    pub(crate) const fn is_spent(&self) -> bool {
        self.0 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queue_after_the_last_is_the_first() {
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
    fn a_quantum_is_one_super_packet_or_64_small_ones() {
        let packets = |len| {
            let mut quantum = Quantum::new();
            (1..).find(|_| {
                quantum.consume(len);
                quantum.is_spent()
            })
        };
        assert_eq!(packets(62_000), Some(1));
        assert_eq!(packets(1420), Some(24));
        assert_eq!(packets(0), Some(64));
    }
}
