//! Denial-of-service protection: mac1, mac2 and cookies (whitepaper, sections 5.3 and 5.4.7).

use crate::invariant::present;
use crate::keys::PublicKey;
use crate::noise::symmetric::{hash, mac};
use crate::secret::Secret;
use crate::time::Instant;
use crate::wire::messages::{
    COOKIE_LEN, COOKIE_NONCE_LEN, CookieReply, MAC_LEN, ReceiverIndex, TAG_LEN,
};
use chacha20poly1305::aead::AeadInOut;
use chacha20poly1305::aead::inout::InOutBuf;
use chacha20poly1305::{KeyInit, Tag, XChaCha20Poly1305};
use core::net::{IpAddr, SocketAddr};
use core::time::Duration;
use subtle::ConstantTimeEq;
use zeroize::Zeroize;

/// Age at which the secret behind our cookies changes, and past which none is accepted.
pub const COOKIE_SECRET_MAX_AGE: Duration = Duration::from_secs(120);
/// How much earlier a peer stops using a cookie, to allow for the transit time.
pub const COOKIE_SECRET_LATENCY: Duration = Duration::from_secs(5);

const LABEL_MAC1: &[u8] = b"mac1----";
const LABEL_COOKIE: &[u8] = b"cookie--";

/// Why a handshake message has macs.
const HAS_MACS: &str = "a handshake message is longer than its macs";

type Cookie = [u8; COOKIE_LEN];
type Mac = [u8; MAC_LEN];

/// A handshake message, cut where its macs are.
struct Macs<'a> {
    before_mac1: &'a [u8],
    before_mac2: &'a [u8],
    mac1: Mac,
    mac2: Mac,
}

impl<'a> Macs<'a> {
    fn of(datagram: &'a [u8]) -> Option<Self> {
        let (before_mac2, mac2) = datagram.split_last_chunk()?;
        let (before_mac1, mac1) = before_mac2.split_last_chunk()?;
        Some(Self { before_mac1, before_mac2, mac1: *mac1, mac2: *mac2 })
    }
}

/// The result of validating the macs of a handshake message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MacState {
    /// mac1 is wrong: the sender does not know our public key.
    Invalid,
    /// mac1 is right; mac2 is wrong, or was not required.
    ValidMac1,
    /// Both are right: the sender receives what is sent to its address.
    ValidMac2,
}

/// Checks macs and hands out cookies on behalf of one device.
pub struct CookieChecker {
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
    secret: Secret,
    secret_born: Option<Instant>,
}

impl CookieChecker {
    /// A checker for messages to `public_key`.
    #[must_use]
    pub fn new(public_key: &PublicKey) -> Self {
        Self {
            mac1_key: hash(&[LABEL_MAC1, public_key.as_bytes()]),
            cookie_key: hash(&[LABEL_COOKIE, public_key.as_bytes()]),
            secret: Secret::default(),
            secret_born: None,
        }
    }

    /// Validates the macs of a handshake message from `source`, mac2 only if `check_cookie`.
    #[must_use]
    pub fn validate_macs(
        &self,
        datagram: &[u8],
        source: SocketAddr,
        check_cookie: bool,
        now: Instant,
    ) -> MacState {
        let Some(macs) = present(Macs::of(datagram), HAS_MACS) else { return MacState::Invalid };
        if !bool::from(mac(&self.mac1_key, &[macs.before_mac1]).ct_eq(&macs.mac1)) {
            return MacState::Invalid;
        }
        // Zeros are no cookie, which identifies most of a flood at half the cost.
        let has_cookie = check_cookie && macs.mac2 != [0; MAC_LEN];
        let Some(cookie) = has_cookie.then(|| self.cookie(source, now)).flatten() else {
            return MacState::ValidMac1;
        };
        if bool::from(mac(&cookie, &[macs.before_mac2]).ct_eq(&macs.mac2)) {
            MacState::ValidMac2
        } else {
            MacState::ValidMac1
        }
    }

    /// The cookie reply to a handshake message from `source`. `random` fills a nonce, and a new secret
    /// where the present one is too old.
    #[must_use]
    pub fn create_reply(
        &mut self,
        datagram: &[u8],
        sender_index: ReceiverIndex,
        source: SocketAddr,
        random: &mut dyn FnMut(&mut [u8]),
        now: Instant,
    ) -> Option<CookieReply> {
        if !self.secret_is_live(now) {
            random(self.secret.as_mut_slice());
            self.secret_born = Some(now);
        }
        let mut nonce = [0; COOKIE_NONCE_LEN];
        random(&mut nonce);
        let cookie = present(self.cookie(source, now), "the secret is live by now")?;
        let macs = present(Macs::of(datagram), HAS_MACS)?;
        let mut sealed_cookie = [0; COOKIE_LEN + TAG_LEN];
        let (body, tag) = sealed_cookie.split_at_mut(COOKIE_LEN);
        body.copy_from_slice(&cookie);
        let sealed = XChaCha20Poly1305::new((&self.cookie_key).into()).encrypt_inout_detached(
            &nonce.into(),
            &macs.mac1,
            InOutBuf::from(&mut *body),
        );
        tag.copy_from_slice(&present(sealed.ok(), "16 bytes are below the cipher's limit")?);
        Some(CookieReply { receiver_index: sender_index, nonce, sealed_cookie })
    }

    /// Erases the secret, so that the next reply uses a new one.
    pub fn forget_secret(&mut self) {
        self.secret.zeroize();
        self.secret_born = None;
    }

    /// The secret, and when it was made, for another process.
    #[cfg(feature = "internals")]
    pub(crate) fn save(&self) -> (Secret, Option<u64>) {
        (self.secret.clone(), self.secret_born.map(Instant::as_nanos))
    }

    /// Goes on with the secret that [`Self::save`] returned.
    #[cfg(feature = "internals")]
    pub(crate) fn restore(&mut self, secret: Secret, born: Option<u64>) {
        (self.secret, self.secret_born) = (secret, born.map(Instant::from_nanos));
    }

    fn secret_is_live(&self, now: Instant) -> bool {
        self.secret_born.is_some_and(|born| now.since(born) < COOKIE_SECRET_MAX_AGE)
    }

    /// `MAC(secret, address || port)`.
    fn cookie(&self, source: SocketAddr, now: Instant) -> Option<Cookie> {
        if !self.secret_is_live(now) {
            return None;
        }
        let port = source.port().to_be_bytes();
        Some(match source.ip() {
            IpAddr::V4(v4) => mac(self.secret.as_slice(), &[&v4.octets(), &port]),
            IpAddr::V6(v6) => mac(self.secret.as_slice(), &[&v6.octets(), &port]),
        })
    }
}

/// Adds macs to the handshake messages for one peer, and keeps the peer's cookie.
pub struct CookieGenerator {
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
    cookie: Secret<Cookie>,
    cookie_born: Option<Instant>,
    last_mac1: Option<Mac>,
}

impl CookieGenerator {
    /// A generator for messages to `public_key`.
    #[must_use]
    pub fn new(public_key: &PublicKey) -> Self {
        Self {
            mac1_key: hash(&[LABEL_MAC1, public_key.as_bytes()]),
            cookie_key: hash(&[LABEL_COOKIE, public_key.as_bytes()]),
            cookie: Secret::default(),
            cookie_born: None,
            last_mac1: None,
        }
    }

    /// Forgets the cookie, and the message that a reply would answer.
    pub fn forget_cookie(&mut self) {
        self.cookie.zeroize();
        (self.cookie_born, self.last_mac1) = (None, None);
    }

    /// The cookie, when it came, and the mac1 that a reply would answer, for another process.
    #[cfg(feature = "internals")]
    pub(crate) fn save(&self) -> (Secret<Cookie>, Option<u64>, Option<Mac>) {
        (self.cookie.clone(), self.cookie_born.map(Instant::as_nanos), self.last_mac1)
    }

    /// Goes on with what [`Self::save`] returned.
    #[cfg(feature = "internals")]
    pub(crate) fn restore(
        &mut self,
        cookie: Secret<Cookie>,
        born: Option<u64>,
        last_mac1: Option<Mac>,
    ) {
        self.cookie = cookie;
        (self.cookie_born, self.last_mac1) = (born.map(Instant::from_nanos), last_mac1);
    }

    /// Fills in the last 32 bytes of a handshake message: mac1, and mac2 if we have a cookie.
    pub fn add_macs(&mut self, datagram: &mut [u8], now: Instant) {
        let split = datagram.split_last_chunk_mut::<MAC_LEN>();
        let Some((before_mac2, mac2)) = present(split, HAS_MACS) else { return };
        let split = before_mac2.split_last_chunk_mut::<MAC_LEN>();
        let Some((before_mac1, mac1)) = present(split, HAS_MACS) else { return };
        *mac1 = mac(&self.mac1_key, &[before_mac1]);
        self.last_mac1 = Some(*mac1);
        let lifetime = COOKIE_SECRET_MAX_AGE.saturating_sub(COOKIE_SECRET_LATENCY);
        *mac2 = match self.cookie_born {
            Some(born) if now.since(born) < lifetime => mac(self.cookie.as_slice(), &[before_mac2]),
            _ => [0; MAC_LEN],
        };
    }

    /// Stores the cookie of a reply to the last message that we sent; true if it was authentic.
    pub fn consume_reply(&mut self, reply: &CookieReply, now: Instant) -> bool {
        let Some(last_mac1) = self.last_mac1 else { return false };
        let sealed = &reply.sealed_cookie;
        let parts = sealed.first_chunk::<COOKIE_LEN>().zip(sealed.last_chunk::<TAG_LEN>());
        let Some((cookie, tag)) = present(parts, "it is a cookie and a tag") else { return false };
        let mut cookie: Cookie = *cookie;
        let opened = XChaCha20Poly1305::new((&self.cookie_key).into()).decrypt_inout_detached(
            &reply.nonce.into(),
            &last_mac1,
            InOutBuf::from(cookie.as_mut_slice()),
            &Tag::from(*tag),
        );
        if opened.is_err() {
            return false;
        }
        *self.cookie = cookie;
        self.cookie_born = Some(now);
        self.last_mac1 = None;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::messages::INITIATION_LEN;

    const OURS: PublicKey = PublicKey::from_bytes([3; 32]);

    fn seconds(s: u64) -> Instant {
        Instant::from_nanos(s * 1_000_000_000)
    }

    fn source(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn message(generator: &mut CookieGenerator, now: Instant) -> [u8; INITIATION_LEN] {
        let mut datagram = [9; INITIATION_LEN];
        generator.add_macs(&mut datagram, now);
        datagram
    }

    #[test]
    fn mac1_is_always_checked_and_every_byte_counts() {
        let checker = CookieChecker::new(&OURS);
        let datagram = message(&mut CookieGenerator::new(&OURS), seconds(1));
        let from = source("192.0.2.1:5000");
        assert_eq!(checker.validate_macs(&datagram, from, false, seconds(1)), MacState::ValidMac1);
        for at in 0..INITIATION_LEN - MAC_LEN {
            let mut bad = datagram;
            bad[at] ^= 1;
            assert_eq!(checker.validate_macs(&bad, from, false, seconds(1)), MacState::Invalid);
        }
        let mac_of_another_key =
            message(&mut CookieGenerator::new(&PublicKey::from_bytes([4; 32])), seconds(1));
        assert_eq!(
            checker.validate_macs(&mac_of_another_key, from, false, seconds(1)),
            MacState::Invalid
        );
    }

    /// A checker, and a generator that holds its cookie for `from`.
    fn with_cookie(from: SocketAddr) -> (CookieChecker, CookieGenerator) {
        let (mut checker, mut generator) = (CookieChecker::new(&OURS), CookieGenerator::new(&OURS));
        let datagram = message(&mut generator, seconds(0));
        let reply = checker
            .create_reply(&datagram, 1, from, &mut |bytes| bytes.fill(7), seconds(0))
            .unwrap();
        assert!(generator.consume_reply(&reply, seconds(0)));
        (checker, generator)
    }

    #[test]
    fn a_cookie_is_bound_to_address_and_port() {
        for (from, elsewhere) in [
            ("192.0.2.1:5000", ["192.0.2.1:5001", "192.0.2.2:5000"]),
            ("[2001:db8::1]:5000", ["[2001:db8::1]:5001", "[2001:db8::2]:5000"]),
        ] {
            let (checker, mut generator) = with_cookie(source(from));
            let datagram = message(&mut generator, seconds(1));
            let state = |from| checker.validate_macs(&datagram, from, true, seconds(1));
            assert_eq!(state(source(from)), MacState::ValidMac2);
            for other in elsewhere {
                assert_eq!(state(source(other)), MacState::ValidMac1);
            }
        }
    }

    #[test]
    fn each_reply_has_a_nonce_of_its_own_and_the_secret_changes_when_it_is_too_old() {
        let mut checker = CookieChecker::new(&OURS);
        let mut drawn = 0_u8;
        let mut lens = Vec::new();
        let mut random = |bytes: &mut [u8]| {
            drawn += 1;
            lens.push(bytes.len());
            bytes.fill(drawn);
        };
        let from = source("192.0.2.1:5000");
        let datagram = message(&mut CookieGenerator::new(&OURS), seconds(0));
        let mut nonce = |second| {
            let now = seconds(second);
            checker.create_reply(&datagram, 1, from, &mut random, now).unwrap().nonce
        };
        let nonces = [0, 0, 119, 120].map(&mut nonce);
        assert_eq!(nonces, [[2; 24], [3; 24], [4; 24], [6; 24]]);
        assert_eq!(lens, [32, 24, 24, 24, 32, 24]);
    }

    #[test]
    fn a_peer_uses_a_cookie_for_115_seconds_and_we_accept_it_for_120() {
        let from = source("192.0.2.1:5000");
        let (checker, mut generator) = with_cookie(from);
        let before = Instant::from_nanos(115_000_000_000 - 1);
        let last = message(&mut generator, before);
        assert_ne!(last[INITIATION_LEN - MAC_LEN..], [0; MAC_LEN]);
        assert_eq!(checker.validate_macs(&last, from, true, seconds(119)), MacState::ValidMac2);
        assert_eq!(checker.validate_macs(&last, from, true, seconds(120)), MacState::ValidMac1);
        assert_eq!(message(&mut generator, seconds(115))[INITIATION_LEN - MAC_LEN..], [0; MAC_LEN]);
    }

    #[test]
    fn a_reply_needs_a_mac1_we_sent_and_counts_once() {
        let from = source("192.0.2.1:5000");
        let (mut checker, mut generator) = (CookieChecker::new(&OURS), CookieGenerator::new(&OURS));
        let datagram = message(&mut CookieGenerator::new(&OURS), seconds(0));
        let reply = checker
            .create_reply(&datagram, 1, from, &mut |bytes| bytes.fill(7), seconds(0))
            .unwrap();
        assert!(!generator.consume_reply(&reply, seconds(0)));
        assert_eq!(message(&mut generator, seconds(0)), datagram);
        let mut forged = reply.clone();
        forged.sealed_cookie[0] ^= 1;
        assert!(!generator.consume_reply(&forged, seconds(0)));
        assert!(generator.consume_reply(&reply, seconds(0)));
        assert!(!generator.consume_reply(&reply, seconds(0)));
    }
}
