//! A token bucket per source address, consulted only under load (kernel ratelimiter.c).

use crate::time::Instant;
use core::net::IpAddr;
use core::time::Duration;
use std::collections::HashMap;

/// Handshake messages a second that one source may send.
pub const PACKETS_PER_SECOND: u64 = 20;
/// Handshake messages that may come at once after a pause.
pub const PACKETS_BURSTABLE: u64 = 5;
/// An entry unused for this long says nothing that a new one would not, and is collected.
pub const COLLECT_AFTER: Duration = Duration::from_secs(1);
/// Sources remembered at once; when full, unknown sources wait.
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
    buckets: HashMap<u64, Bucket>,
    collected: Instant,
}

impl RateLimiter {
    /// Takes a token of `source`, if it has one left.
    pub fn allow(&mut self, source: IpAddr, now: Instant) -> bool {
        self.collect(now);
        if self.buckets.len() >= MAX_ENTRIES && !self.buckets.contains_key(&key(source)) {
            return false;
        }
        let bucket =
            self.buckets.entry(key(source)).or_insert(Bucket { tokens: TOKEN_MAX, filled: now });
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

    /// Drops what is stale, at most once a second.
    fn collect(&mut self, now: Instant) {
        if now.since(self.collected) >= COLLECT_AFTER {
            self.collected = now;
            self.buckets.retain(|_, bucket| now.since(bucket.filled) < COLLECT_AFTER);
        }
    }

    /// Drops every entry, and the memory they took.
    pub fn clear(&mut self) {
        self.buckets = HashMap::new();
    }

    /// True while it remembers no source.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.buckets.is_empty()
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

    #[test]
    fn the_table_is_bounded_and_collected_after_a_second() {
        let mut limiter = RateLimiter::default();
        for host in 0..u32::try_from(MAX_ENTRIES).unwrap() {
            assert!(limiter.allow(IpAddr::V4(host.into()), millis(0)));
        }
        assert!(!limiter.allow("255.0.0.1".parse().unwrap(), millis(999)));
        assert!(limiter.allow("0.0.0.1".parse().unwrap(), millis(999)));
        assert!(limiter.allow("255.0.0.1".parse().unwrap(), millis(1000)));
        assert_eq!(limiter.buckets.len(), 2);
    }
}
