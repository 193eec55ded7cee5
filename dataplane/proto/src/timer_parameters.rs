//! The times that a program may choose for its timers, within what does no harm to a peer or to the keys.

use crate::session::keypair::{REJECT_AFTER_TIME, REKEY_AFTER_TIME};
use crate::session::timers::{
    KEEPALIVE_TIMEOUT, RECEIVE_REKEY_AGE, REKEY_ATTEMPT_TIME, REKEY_TIMEOUT, ZERO_KEY_MATERIAL_TIME,
};
use core::fmt;
use core::time::Duration;

/// Times of the timers, to be relaxed on a battery or where each datagram is paid for; by default those of the whitepaper
/// (section 6.1).
///
/// Each can only be relaxed, so that less is sent, and only as far as a peer with the whitepaper's times notices nothing.
/// What protects the keys cannot be changed: a keypair is used for at most 180 s ([REJECT_AFTER_TIME]) and 2^64 − 2^13 − 1
/// messages, and is erased after 540 s.
///
/// ```
/// use std::time::Duration;
/// use wgsep_proto::{TimerError, TimerParameters};
///
/// let timers = TimerParameters::default().with_rekey_timeout(Duration::from_secs(20))?;
/// assert_eq!(timers.with_rekey_timeout(Duration::from_secs(1)), Err(TimerError::RekeyTimeout));
/// # Ok::<(), TimerError>(())
/// ```
///
/// [REJECT_AFTER_TIME]: https://www.wireguard.com/papers/wireguard.pdf
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimerParameters {
    rekey_after_time: Duration,
    rekey_timeout: Duration,
    rekey_attempt_time: Duration,
    keepalive_timeout: Duration,
}

impl Default for TimerParameters {
    fn default() -> Self {
        Self {
            rekey_after_time: REKEY_AFTER_TIME,
            rekey_timeout: REKEY_TIMEOUT,
            rekey_attempt_time: REKEY_ATTEMPT_TIME,
            keepalive_timeout: KEEPALIVE_TIMEOUT,
        }
    }
}

/// The least time until a peer that sent data and received nothing starts a handshake is 15 s; a keepalive takes up to
/// a second.
const MAX_KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(14);
/// As long as a keypair stays usable while its successor is awaited.
const MAX_REKEY_TIMEOUT: Duration = Duration::from_secs(60);

const _: () = assert!(
    MAX_KEEPALIVE_TIMEOUT.as_secs() < KEEPALIVE_TIMEOUT.as_secs() + REKEY_TIMEOUT.as_secs()
        && RECEIVE_REKEY_AGE.as_secs() + KEEPALIVE_TIMEOUT.as_secs() < REJECT_AFTER_TIME.as_secs()
);

impl TimerParameters {
    /// Age at which the initiator of a keypair that it sends with starts the next handshake (REKEY_AFTER_TIME): 120 s, and at
    /// most 165 s, so that there is time for a retransmission before the keypair expires at 180 s.
    ///
    /// # Errors
    /// [`TimerError::RekeyAfterTime`] outside of 120 to 165 s.
    pub fn with_rekey_after_time(self, rekey_after_time: Duration) -> Result<Self, TimerError> {
        let limits = REKEY_AFTER_TIME..=RECEIVE_REKEY_AGE;
        let is_within = limits.contains(&rekey_after_time);
        is_within.then_some(Self { rekey_after_time, ..self }).ok_or(TimerError::RekeyAfterTime)
    }

    /// Least time between two initiations, and time until one is repeated (REKEY_TIMEOUT): 5 s, which protects the
    /// peer from a flood, and at most 60 s.
    ///
    /// # Errors
    /// [`TimerError::RekeyTimeout`] outside of 5 to 60 s.
    pub fn with_rekey_timeout(self, rekey_timeout: Duration) -> Result<Self, TimerError> {
        let is_within = (REKEY_TIMEOUT..=MAX_REKEY_TIMEOUT).contains(&rekey_timeout);
        is_within.then_some(Self { rekey_timeout, ..self }).ok_or(TimerError::RekeyTimeout)
    }

    /// Time for which initiations are repeated before the handshake is given up and the packets that wait for it are
    /// dropped (REKEY_ATTEMPT_TIME): 90 s, and from 5 s, for little patience, to 540 s, after which the keys are erased.
    ///
    /// # Errors
    /// [`TimerError::RekeyAttemptTime`] outside of 5 to 540 s.
    pub fn with_rekey_attempt_time(self, rekey_attempt_time: Duration) -> Result<Self, TimerError> {
        let is_within = (REKEY_TIMEOUT..=ZERO_KEY_MATERIAL_TIME).contains(&rekey_attempt_time);
        let with = Self { rekey_attempt_time, ..self };
        is_within.then_some(with).ok_or(TimerError::RekeyAttemptTime)
    }

    /// Time after receiving data until a keepalive is sent if nothing else was (KEEPALIVE_TIMEOUT): 10 s, and at most
    /// 14 s, because after 15 s the peer takes the keypair for lost and starts a handshake.
    ///
    /// # Errors
    /// [`TimerError::KeepaliveTimeout`] outside of 10 to 14 s.
    pub fn with_keepalive_timeout(self, keepalive_timeout: Duration) -> Result<Self, TimerError> {
        let is_within = (KEEPALIVE_TIMEOUT..=MAX_KEEPALIVE_TIMEOUT).contains(&keepalive_timeout);
        is_within.then_some(Self { keepalive_timeout, ..self }).ok_or(TimerError::KeepaliveTimeout)
    }

    /// See [`Self::with_rekey_after_time`].
    #[must_use]
    pub const fn rekey_after_time(&self) -> Duration {
        self.rekey_after_time
    }

    /// See [`Self::with_rekey_timeout`].
    #[must_use]
    pub const fn rekey_timeout(&self) -> Duration {
        self.rekey_timeout
    }

    /// See [`Self::with_rekey_attempt_time`].
    #[must_use]
    pub const fn rekey_attempt_time(&self) -> Duration {
        self.rekey_attempt_time
    }

    /// See [`Self::with_keepalive_timeout`].
    #[must_use]
    pub const fn keepalive_timeout(&self) -> Duration {
        self.keepalive_timeout
    }

    /// Repetitions before giving up: one every [`Self::rekey_timeout`], and the one that ends it; with the first
    /// initiation that makes 20 by default.
    pub(crate) fn max_handshake_retries(&self) -> u32 {
        let repetitions = self.rekey_attempt_time.as_secs() / self.rekey_timeout.as_secs().max(1);
        u32::try_from(repetitions).unwrap_or(u32::MAX).saturating_add(1)
    }
}

/// A time that is outside of its limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TimerError {
    /// See [`TimerParameters::with_rekey_after_time`].
    RekeyAfterTime,
    /// See [`TimerParameters::with_rekey_timeout`].
    RekeyTimeout,
    /// See [`TimerParameters::with_rekey_attempt_time`].
    RekeyAttemptTime,
    /// See [`TimerParameters::with_keepalive_timeout`].
    KeepaliveTimeout,
}

impl fmt::Display for TimerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RekeyAfterTime => "REKEY_AFTER_TIME is 120 to 165 s",
            Self::RekeyTimeout => "REKEY_TIMEOUT is 5 to 60 s",
            Self::RekeyAttemptTime => "REKEY_ATTEMPT_TIME is 5 to 540 s",
            Self::KeepaliveTimeout => "KEEPALIVE_TIMEOUT is 10 to 14 s",
        })
    }
}

impl core::error::Error for TimerError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_is_taken_within_its_limits_and_refused_beyond() {
        type With = fn(TimerParameters, Duration) -> Result<TimerParameters, TimerError>;
        let times: [(With, [u64; 2], TimerError); 4] = [
            (TimerParameters::with_rekey_after_time, [120, 165], TimerError::RekeyAfterTime),
            (TimerParameters::with_rekey_timeout, [5, 60], TimerError::RekeyTimeout),
            (TimerParameters::with_rekey_attempt_time, [5, 540], TimerError::RekeyAttemptTime),
            (TimerParameters::with_keepalive_timeout, [10, 14], TimerError::KeepaliveTimeout),
        ];
        for (with, [least, most], error) in times {
            let (least, most) = (Duration::from_secs(least), Duration::from_secs(most));
            let with = |time| with(TimerParameters::default(), time);
            assert!(with(least).is_ok() && with(most).is_ok(), "{error}");
            let nanosecond = Duration::from_nanos(1);
            assert_eq!(with(least - nanosecond), Err(error));
            assert_eq!(with(most + nanosecond), Err(error));
            let said = format!("{} to {} s", least.as_secs(), most.as_secs());
            assert!(error.to_string().ends_with(&said), "{error}");
        }
    }

    #[test]
    fn a_longer_timeout_means_fewer_repetitions_in_the_same_time() {
        let default = TimerParameters::default();
        assert_eq!(default.max_handshake_retries(), 19);
        let slow = default.with_rekey_timeout(Duration::from_secs(30)).unwrap();
        assert_eq!(slow.max_handshake_retries(), 4);
        let impatient = slow.with_rekey_attempt_time(Duration::from_secs(5)).unwrap();
        assert_eq!(impatient.max_handshake_retries(), 1);
    }
}
