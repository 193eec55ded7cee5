//! The three kinds of 32-byte key an operator handles.
//!
//! Secret kinds erase themselves when dropped and have no `Debug`, so that none can reach a log.

use crate::invariant::{part, present};
use crate::noise::x25519;
use crate::secret::Secret;
use core::fmt;
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Length of every WireGuard key, in bytes.
pub const KEY_LEN: usize = 32;

/// A Curve25519 public key: a peer's name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "internals", derive(serde::Serialize, serde::Deserialize))]
pub struct PublicKey([u8; KEY_LEN]);

impl PublicKey {
    /// Wraps 32 bytes; every value is a valid u-coordinate.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
        Self(bytes)
    }

    /// The key's 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for PublicKey {
    /// The short form operators know from logs: `peer(abcd…wxyz)`, from the base64 of the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = base64(&self.0);
        let [head, tail] = [0..4, 39..43].map(|range| {
            let ends = core::str::from_utf8(part(&text, range)).ok();
            present(ends, "base64 is ASCII").unwrap_or_default()
        });
        write!(f, "peer({head}…{tail})")
    }
}

/// Base64 with padding of 32 bytes: 44 characters, of which the last is `=`.
fn base64(bytes: &[u8; KEY_LEN]) -> [u8; 44] {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = [b'='; 44];
    for (group, four) in bytes.chunks(3).zip(out.chunks_mut(4)) {
        let mut word = 0u32;
        for position in 0..3 {
            word = (word << 8) | u32::from(group.get(position).copied().unwrap_or(0));
        }
        let characters = group.len().saturating_add(1);
        for (position, character) in four.iter_mut().take(characters).enumerate() {
            let shift =
                18u32.saturating_sub(u32::try_from(position).unwrap_or(0).saturating_mul(6));
            let sextet = usize::try_from((word >> shift) & 63).unwrap_or(0);
            *character = ALPHABET.get(sextet).copied().unwrap_or(b'=');
        }
    }
    out
}

/// A Curve25519 private key, clamped, erased on drop.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PrivateKey(Secret<[u8; KEY_LEN]>);

impl PrivateKey {
    /// Clamps 32 bytes into a private key (RFC 7748, section 5); all zeros means "no key".
    #[must_use]
    pub fn from_bytes(mut bytes: [u8; KEY_LEN]) -> Option<Self> {
        if bool::from(bytes.ct_eq(&[0; KEY_LEN])) {
            return None;
        }
        bytes[0] &= 248;
        bytes[31] &= 127;
        bytes[31] |= 64;
        let key = Self(Secret::new(bytes));
        bytes.zeroize();
        Some(key)
    }

    /// The clamped key, for the UAPI's reply and the Noise handshake only.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; KEY_LEN] {
        self.0.value()
    }

    /// The public key that goes with this private key.
    #[must_use]
    pub fn public_key(&self) -> PublicKey {
        PublicKey(x25519::public_key(&self.0))
    }
}

impl PartialEq for PrivateKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&*other.0).into()
    }
}

impl Eq for PrivateKey {}

/// A symmetric key mixed into a handshake; all zeros where none is configured. Erased on drop.
#[derive(Clone, Default, Zeroize, ZeroizeOnDrop)]
pub struct PresharedKey(Secret<[u8; KEY_LEN]>);

impl PresharedKey {
    /// Wraps 32 bytes; all zeros means "none".
    #[must_use]
    pub const fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
        Self(Secret::new(bytes))
    }

    /// The key's 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; KEY_LEN] {
        self.0.value()
    }
}

impl PartialEq for PresharedKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&*other.0).into()
    }
}

impl Eq for PresharedKey {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_key_displays_the_ends_of_its_base64() {
        // base64 of bytes 0..32 is AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=
        let bytes: [u8; KEY_LEN] = core::array::from_fn(|i| u8::try_from(i).unwrap());
        assert_eq!(PublicKey::from_bytes(bytes).to_string(), "peer(AAEC…dHh8)");
        assert_eq!(&base64(&bytes), b"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=");
    }

    #[test]
    fn private_keys_are_clamped_and_zero_is_no_key() {
        assert!(PrivateKey::from_bytes([0; KEY_LEN]).is_none());
        let key = PrivateKey::from_bytes([0xff; KEY_LEN]).unwrap();
        assert_eq!(key.as_bytes()[0], 248);
        assert_eq!(key.as_bytes()[31], 127);
    }
}
