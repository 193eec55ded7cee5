//! Protection against replay: a sliding window of counters (RFC 6479, whitepaper section 5.4.6).

use crate::invariant::present;
use crate::session::keypair::REJECT_AFTER_MESSAGES;

const WORD_BITS: u64 = u64::BITS as u64;
const WORDS: u64 = 128;
/// How far behind the newest a counter may be: 8192 bits, less one word, which may be partly cleared.
pub const REPLAY_WINDOW: u64 = (WORDS - 1) * WORD_BITS;

/// The set of seen counters among the newest and the 8128 before it. Only authenticated counters may be passed to it.
pub struct ReplayWindow {
    /// One past the newest counter seen; 0 before any.
    next: u64,
    seen: [u64; WORDS as usize],
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self { next: 0, seen: [0; WORDS as usize] }
    }
}

impl ReplayWindow {
    /// True, once, for a counter that is fresh; false if it was seen, is too old, or is past the
    /// end of the keypair's life.
    pub fn validate(&mut self, counter: u64) -> bool {
        if counter >= REJECT_AFTER_MESSAGES || counter.saturating_add(REPLAY_WINDOW + 1) < self.next
        {
            return false;
        }
        if counter >= self.next {
            self.advance(counter);
        }
        let bit = 1 << (counter % WORD_BITS);
        let word = present(
            self.seen.get_mut(Self::word(counter)),
            "words are numbered modulo their count",
        );
        let Some(word) = word else { return false };
        let fresh = *word & bit == 0;
        *word |= bit;
        fresh
    }

    /// Moves the window so that `counter` is its newest, clearing the words it moves over.
    fn advance(&mut self, counter: u64) {
        let newest = self.next.saturating_sub(1);
        let steps = (counter / WORD_BITS).saturating_sub(newest / WORD_BITS).min(WORDS);
        for step in 0..steps {
            if let Some(word) =
                self.seen.get_mut(Self::word(counter.saturating_sub(step * WORD_BITS)))
            {
                *word = 0;
            }
        }
        self.next = counter.saturating_add(1);
    }

    /// One past the newest counter, and the words of the window.
    #[cfg(feature = "internals")]
    pub(crate) fn save(&self) -> (u64, Vec<u64>) {
        (self.next, self.seen.to_vec())
    }

    /// The window that [`Self::save`] returned; `None` if it has another number of words.
    #[cfg(feature = "internals")]
    pub(crate) fn restore(next: u64, seen: &[u64]) -> Option<Self> {
        Some(Self { next, seen: seen.try_into().ok()? })
    }

    const fn word(counter: u64) -> usize {
        ((counter / WORD_BITS) % WORDS) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_counter_is_accepted_once_in_any_order() {
        let mut window = ReplayWindow::default();
        for (counter, fresh) in [
            (0, true),
            (1, true),
            (1, false),
            (9, true),
            (8, true),
            (7, true),
            (7, false),
            (2, true),
            (3, true),
            (9, false),
            (0, false),
        ] {
            assert_eq!(window.validate(counter), fresh, "{counter}");
        }
    }

    #[test]
    fn a_counter_may_be_8128_behind_the_newest() {
        assert_eq!(REPLAY_WINDOW, 8128);
        let newest = 100_000;
        for (counter, fresh) in [
            (newest - 8129, false),
            (newest - 8128, true),
            (newest - 8127, true),
            (newest - 8128, false),
        ] {
            let mut window = ReplayWindow::default();
            assert!(window.validate(newest));
            if !fresh {
                let _seen = window.validate(newest - 8128);
            }
            assert_eq!(window.validate(counter), fresh, "{counter}");
        }
    }

    #[test]
    fn a_jump_past_the_window_forgets_everything_before() {
        let mut window = ReplayWindow::default();
        for counter in 0..REPLAY_WINDOW {
            assert!(window.validate(counter));
        }
        assert!(window.validate(1 << 40));
        assert!(!window.validate(5));
        for counter in (1 << 40) - 1000..1 << 40 {
            assert!(window.validate(counter), "{counter}");
            assert!(!window.validate(counter), "{counter}");
        }
    }

    #[test]
    fn the_last_counters_of_a_keypair() {
        let mut window = ReplayWindow::default();
        assert!(window.validate(REJECT_AFTER_MESSAGES - 1));
        assert!(!window.validate(REJECT_AFTER_MESSAGES - 1));
        assert!(!window.validate(REJECT_AFTER_MESSAGES));
        assert!(!window.validate(u64::MAX));
    }

    #[test]
    fn agrees_with_a_set_on_random_walks() {
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        let mut window = ReplayWindow::default();
        let mut seen = BTreeSet::new();
        let mut newest = 0u64;
        for _ in 0..200_000 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let spread = if random.is_multiple_of(97) { 20_000 } else { 300 };
            let counter = (newest + (random >> 32) % spread).saturating_sub(spread * 2 / 3);
            let in_window = counter + REPLAY_WINDOW >= newest;
            let expected = in_window && !seen.contains(&counter);
            assert_eq!(window.validate(counter), expected, "{counter} after {newest}");
            if expected {
                seen.insert(counter);
                newest = newest.max(counter);
            }
        }
    }
}
