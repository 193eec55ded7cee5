//! A token bucket per source address, consulted only under load (kernel ratelimiter.c).

use crate::time::Instant;
use core::net::IpAddr;
use core::time::Duration;
use std::collections::HashMap;

/// Handshake messages a second that one source may send.
pub const PACKETS_PER_SECOND: u64 = 20;
/// Handshake messages that one source may send at once after a pause.
pub const PACKETS_BURSTABLE: u64 = 5;
/// An entry unused for this long equals a new one: it is collected at the next
/// rotation.
pub const COLLECT_AFTER: Duration = Duration::from_secs(1);
/// Sources remembered at once; the older half is evicted. (The kernel refuses unknown sources when its
/// table is full, so that a sender with 8192 IPv6 prefixes keeps every peer out.)
pub const MAX_ENTRIES: usize = 8192;

const PACKET_COST: u64 = 1_000_000_000 / PACKETS_PER_SECOND;
const TOKEN_MAX: u64 = PACKET_COST * PACKETS_BURSTABLE;

struct Bucket {
    tokens: u64,
    filled: Instant,
}

/// Limits sources by IPv4 address or IPv6 /64.
#[derive(Default)]
pub struct RateLimiter {
    /// Sources seen since the last rotation, at most half of [`MAX_ENTRIES`].
    recent: HashMap<u64, Bucket>,
    /// Sources seen between the last two rotations, and not since.
    older: HashMap<u64, Bucket>,
    rotated: Instant,
}

impl RateLimiter {
    /// Takes a token of `source`, if it has one left.
    pub fn allow(&mut self, source: IpAddr, now: Instant) -> bool {
        self.rotate(now);
        let key = key(source);
        let full = Bucket { tokens: TOKEN_MAX, filled: now };
        let before = self.older.remove(&key).unwrap_or(full);
        let bucket = self.recent.entry(key).or_insert(before);
        let gained = u64::try_from(now.since(bucket.filled).as_nanos()).unwrap_or(TOKEN_MAX);
        bucket.tokens = bucket.tokens.saturating_add(gained).min(TOKEN_MAX);
        bucket.filled = now;
        match bucket.tokens.checked_sub(PACKET_COST) {
            Some(left) => {
                bucket.tokens = left;
                true
            }
            None => false,
        }
    }

    /// Drops what was not used since the rotation before, once a second or when half of the table is
    /// full: the cost for each message does not depend on the size of the table.
    fn rotate(&mut self, now: Instant) {
        let is_due = now.since(self.rotated) >= COLLECT_AFTER;
        if is_due || self.recent.len() >= MAX_ENTRIES / 2 {
            self.older = core::mem::take(&mut self.recent);
            self.rotated = now;
        }
    }

    /// Drops every entry, and the memory they took.
    pub fn clear(&mut self) {
        (self.recent, self.older) = (HashMap::new(), HashMap::new());
    }

    /// True if it has no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.recent.is_empty() && self.older.is_empty()
    }
}

/// What one source is: an IPv4 address, or the upper 64 bits of an IPv6 one. No /64 in use starts
/// with 32 zero bits, so the two share one space.
fn key(source: IpAddr) -> u64 {
    match source.to_canonical() {
        IpAddr::V4(v4) => u64::from(v4.to_bits()),
        IpAddr::V6(v6) => u64::try_from(v6.to_bits() >> 64).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(ms: u64) -> Instant {
        Instant::from_nanos(10_000_000_000 + ms * 1_000_000)
    }

    #[test]
    fn five_at_once_then_one_every_50_ms() {
        let mut limiter = RateLimiter::default();
        let source = "192.0.2.1".parse().unwrap();
        for _ in 0..PACKETS_BURSTABLE {
            assert!(limiter.allow(source, millis(0)));
        }
        assert!(!limiter.allow(source, millis(0)));
        assert!(!limiter.allow(source, millis(49)));
        assert!(limiter.allow(source, millis(50)));
        assert!(!limiter.allow(source, millis(50)));
        assert!(limiter.allow("192.0.2.2".parse().unwrap(), millis(50)));
    }

    #[test]
    fn an_ipv6_slash_64_is_one_source() {
        let mut limiter = RateLimiter::default();
        for host in 0..PACKETS_BURSTABLE {
            assert!(limiter.allow(format!("2001:db8::{host}").parse().unwrap(), millis(0)));
        }
        assert!(!limiter.allow("2001:db8::ffff:1".parse().unwrap(), millis(0)));
        assert!(limiter.allow("2001:db8:0:1::1".parse().unwrap(), millis(0)));
    }

    fn host(number: usize) -> IpAddr {
        IpAddr::V4(u32::try_from(number).unwrap().into())
    }

    fn entries(limiter: &RateLimiter) -> usize {
        limiter.recent.len() + limiter.older.len()
    }

    #[test]
    fn a_full_table_evicts_the_oldest_and_refuses_no_new_source() {
        let mut limiter = RateLimiter::default();
        for number in 0..MAX_ENTRIES * 3 {
            assert!(limiter.allow(host(number), millis(0)), "source {number}");
            assert!(entries(&limiter) <= MAX_ENTRIES);
        }
        // The newest are still limited.
        for _ in 1..PACKETS_BURSTABLE {
            assert!(limiter.allow(host(MAX_ENTRIES * 3 - 1), millis(0)));
        }
        assert!(!limiter.allow(host(MAX_ENTRIES * 3 - 1), millis(0)));
    }

    #[test]
    fn a_source_that_keeps_sending_is_limited_through_every_rotation() {
        let mut limiter = RateLimiter::default();
        for _ in 0..PACKETS_BURSTABLE {
            assert!(limiter.allow(host(0), millis(0)));
        }
        for number in 1..MAX_ENTRIES * 3 {
            assert!(limiter.allow(host(number), millis(0)));
            assert!(!limiter.allow(host(0), millis(0)), "after {number} others");
        }
    }

    #[test]
    fn what_was_unused_for_two_seconds_is_collected() {
        let mut limiter = RateLimiter::default();
        for number in 0..1000 {
            assert!(limiter.allow(host(number), millis(0)));
        }
        assert!(limiter.allow(host(1), millis(1000)));
        assert_eq!(entries(&limiter), 1000);
        assert!(limiter.allow(host(2000), millis(2000)));
        assert_eq!(entries(&limiter), 2);
    }
}
