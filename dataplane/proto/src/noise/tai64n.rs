//! TAI64N timestamps, the replay protection of initiations (whitepaper, section 5.1).

use core::time::Duration;

/// Length of a timestamp on the wire, in bytes.
pub const TAI64N_LEN: usize = 12;

/// TAI64 label of the Unix epoch: 2^62, and the 10 s TAI was ahead in 1970. The whole field uses
/// this fixed offset and ignores leap seconds since.
const EPOCH: u64 = (1 << 62) + 10;

/// Nanoseconds are rounded down to a multiple of this: the largest power of two that distinguishes 50
/// initiations a second, so that the timestamp leaks no fine timing.
const WHITENING_NANOS: u32 = 1 << 24;

/// A whitened timestamp; ordered as its big-endian bytes are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tai64n([u8; TAI64N_LEN]);

impl Tai64n {
    /// The timestamp of a time of day, given since the Unix epoch.
    #[must_use]
    pub fn from_wall(wall: Duration) -> Self {
        let seconds = EPOCH.saturating_add(wall.as_secs());
        let nanoseconds = wall.subsec_nanos() & !(WHITENING_NANOS - 1);
        let mut bytes = [0; TAI64N_LEN];
        let (high, low) = bytes.split_at_mut(8);
        high.copy_from_slice(&seconds.to_be_bytes());
        low.copy_from_slice(&nanoseconds.to_be_bytes());
        Self(bytes)
    }

    /// A timestamp as a peer sent it.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; TAI64N_LEN]) -> Self {
        Self(bytes)
    }

    /// The bytes to send.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; TAI64N_LEN] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epoch_is_two_to_the_62_plus_10() {
        let stamp = Tai64n::from_wall(Duration::ZERO);
        assert_eq!(stamp.as_bytes(), &[0x40, 0, 0, 0, 0, 0, 0, 0x0a, 0, 0, 0, 0]);
    }

    #[test]
    fn nanoseconds_are_whitened_to_a_power_of_two_below_20_ms() {
        let just_below = Duration::new(1, (1 << 24) - 1);
        assert_eq!(Tai64n::from_wall(just_below), Tai64n::from_wall(Duration::from_secs(1)));
        let at = Duration::new(1, 1 << 24);
        assert!(Tai64n::from_wall(at) > Tai64n::from_wall(just_below));
    }

    #[test]
    fn order_follows_time_across_a_second() {
        let before = Tai64n::from_wall(Duration::new(99, 999_999_999));
        assert!(Tai64n::from_wall(Duration::from_secs(100)) > before);
    }
}
