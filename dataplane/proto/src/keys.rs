//! The three kinds of 32-byte key an operator handles, and their forms as text.
//!
//! Secret kinds erase themselves when dropped and have no `Debug`, so that none can reach a log.

use crate::encoding;
use crate::invariant::{part, present};
use crate::noise::x25519;
use crate::random::Random;
use crate::secret::Secret;
use core::fmt;
use core::str::FromStr;
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Length of every WireGuard key, in bytes.
pub const KEY_LEN: usize = 32;

/// Why a text is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyError {
    /// It is neither 44 characters long, as base64 is, nor 64, as hexadecimal is.
    Length,
    /// It has a character that its encoding does not have, or bits beyond the 256 of a key.
    Encoding,
    /// It is all zeros, which no private key is.
    Zero,
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Length => "a key is 44 characters of base64 or 64 hexadecimal digits",
            Self::Encoding => "not the base64 or hexadecimal form of a key",
            Self::Zero => "all zeros is no private key",
        })
    }
}

impl core::error::Error for KeyError {}

/// The bytes of a key in either encoding, which its length tells. ASCII whitespace around it does not count, such as the
/// newline of `wg genkey`; the time reveals how much of it there is, and nothing of the key.
fn decode(text: &str) -> Result<Secret, KeyError> {
    let text = text.trim_ascii();
    let decoded = match text.len() {
        encoding::BASE64_LEN => encoding::from_base64(text),
        encoding::HEX_LEN => encoding::from_hex(text),
        _ => return Err(KeyError::Length),
    };
    decoded.ok_or(KeyError::Encoding)
}

/// A secret key as text, erased on drop. It has neither `Debug` nor `Display`; [`Self::as_str`] is for where the key
/// is meant to go, such as a file.
pub struct KeyText {
    characters: Secret<[u8; encoding::HEX_LEN]>,
    len: usize,
}

impl KeyText {
    fn base64(key: &[u8; KEY_LEN]) -> Self {
        let mut text =
            Self { characters: Secret::new([0; encoding::HEX_LEN]), len: encoding::BASE64_LEN };
        if let Some(characters) = text.characters.first_chunk_mut() {
            encoding::write_base64(key, characters);
        }
        text
    }

    fn hex(key: &[u8; KEY_LEN]) -> Self {
        let mut text =
            Self { characters: Secret::new([0; encoding::HEX_LEN]), len: encoding::HEX_LEN };
        encoding::write_hex(key, &mut text.characters);
        text
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let text = core::str::from_utf8(part(&*self.characters, 0..self.len)).ok();
        present(text, "both encodings are ASCII").unwrap_or_default()
    }
}

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

    /// The key in base64, as wg(8) has it.
    #[must_use]
    pub fn to_base64(&self) -> String {
        KeyText::base64(&self.0).as_str().to_owned()
    }

    /// The key as 64 hexadecimal digits, as the cross-platform UAPI has it.
    #[must_use]
    pub fn to_hex(&self) -> String {
        KeyText::hex(&self.0).as_str().to_owned()
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    /// Reads base64 or hexadecimal, with or without whitespace around it.
    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode(text).map(|key| Self(*key))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for PublicKey {
    /// The short form operators know from logs: `peer(abcd…wxyz)`, from the base64 of the key, which
    /// [`Self::to_base64`] returns whole.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = KeyText::base64(&self.0);
        let [head, tail] = [0..4, 39..43].map(|range| {
            let ends = text.as_str().get(range);
            present(ends, "base64 is ASCII, and of 44 characters").unwrap_or_default()
        });
        write!(f, "peer({head}…{tail})")
    }
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

    /// A fresh key.
    #[must_use]
    pub fn generate(random: &mut (impl Random + ?Sized)) -> Self {
        let mut bytes = Secret::new([0; KEY_LEN]);
        loop {
            random.fill(&mut *bytes);
            // All zeros is no key, and comes once in 2^256.
            if let Some(key) = Self::from_bytes(*bytes) {
                return key;
            }
        }
    }

    /// The public key that goes with this private key.
    #[must_use]
    pub fn public_key(&self) -> PublicKey {
        PublicKey(x25519::public_key(&self.0))
    }

    /// The key in base64, as wg(8) has it.
    #[must_use]
    pub fn to_base64(&self) -> KeyText {
        KeyText::base64(&self.0)
    }

    /// The key as 64 hexadecimal digits, as the cross-platform UAPI has it.
    #[must_use]
    pub fn to_hex(&self) -> KeyText {
        KeyText::hex(&self.0)
    }
}

impl FromStr for PrivateKey {
    type Err = KeyError;

    /// Reads base64 or hexadecimal, with or without whitespace around it, and clamps the key. The caller erases the text.
    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::from_bytes(*decode(text)?).ok_or(KeyError::Zero)
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

    /// A fresh key.
    #[must_use]
    pub fn generate(random: &mut (impl Random + ?Sized)) -> Self {
        let mut key = Self::default();
        random.fill(&mut *key.0);
        key
    }

    /// The key's 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; KEY_LEN] {
        self.0.value()
    }

    /// The key in base64, as wg(8) has it.
    #[must_use]
    pub fn to_base64(&self) -> KeyText {
        KeyText::base64(&self.0)
    }

    /// The key as 64 hexadecimal digits, as the cross-platform UAPI has it.
    #[must_use]
    pub fn to_hex(&self) -> KeyText {
        KeyText::hex(&self.0)
    }
}

impl FromStr for PresharedKey {
    type Err = KeyError;

    /// Reads base64 or hexadecimal, with or without whitespace around it; all zeros means "none". The caller erases the
    /// text.
    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode(text).map(Self)
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
        let key = PublicKey::from_bytes(bytes);
        assert_eq!(key.to_string(), "peer(AAEC…dHh8)");
        assert_eq!(key.to_base64(), "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=");
    }

    #[test]
    fn private_keys_are_clamped_and_zero_is_no_key() {
        assert!(PrivateKey::from_bytes([0; KEY_LEN]).is_none());
        let key = PrivateKey::from_bytes([0xff; KEY_LEN]).unwrap();
        assert_eq!(key.as_bytes()[0], 248);
        assert_eq!(key.as_bytes()[31], 127);
    }

    #[test]
    fn keys_of_wg_8_are_read_in_both_encodings_and_written_as_they_were() {
        // `wg genkey`, and `wg pubkey` of it.
        let (private, public) = (
            "0MDi2rkGCma0zIHGPsk5hT5aaURz2pclEQLKixQhslw=",
            "jyTxwlza7smxjw1XCuoCCI4e+kmL8NNCXHmBxFOMEEA=",
        );
        let key: PrivateKey = private.parse().unwrap();
        assert_eq!(key.to_base64().as_str(), private);
        assert!(key.to_hex().as_str().parse() == Ok(key.clone()));
        let preshared: PresharedKey = private.parse().unwrap();
        assert_eq!(preshared.to_base64().as_str(), private);
        assert!(preshared.to_hex().as_str().parse() == Ok(preshared.clone()));
        let public_key = key.public_key();
        assert_eq!(public_key.to_hex().parse(), Ok(public_key));
        assert_eq!(public.parse(), Ok(public_key));
        assert_eq!(public_key.to_base64(), public);
    }

    #[test]
    fn a_key_is_read_with_the_newline_of_its_file_and_not_with_whitespace_inside() {
        let text = "0MDi2rkGCma0zIHGPsk5hT5aaURz2pclEQLKixQhslw=";
        let key: PrivateKey = text.parse().unwrap();
        let hex = key.to_hex();
        for whole in [text, hex.as_str()] {
            for (before, after) in [("", "\n"), ("", "\r\n"), (" \t", " ")] {
                assert!(format!("{before}{whole}{after}").parse() == Ok(key.clone()));
            }
            let (start, end) = whole.split_at(20);
            assert_eq!(
                format!("{start}\n{end}").parse::<PrivateKey>().err(),
                Some(KeyError::Length)
            );
            let replaced = format!("{start} {}", &end[1..]);
            assert_eq!(replaced.parse::<PrivateKey>().err(), Some(KeyError::Encoding));
        }
        assert_eq!("\n".parse::<PublicKey>().err(), Some(KeyError::Length));
    }

    #[test]
    fn a_text_that_is_no_key_says_why() {
        let of = |text: &str| text.parse::<PrivateKey>().err();
        assert_eq!(of("short"), Some(KeyError::Length));
        assert_eq!(of(&"!".repeat(44)), Some(KeyError::Encoding));
        assert_eq!(of(&"g".repeat(64)), Some(KeyError::Encoding));
        assert_eq!(of(&"0".repeat(64)), Some(KeyError::Zero));
        assert!("0".repeat(64).parse::<PresharedKey>() == Ok(PresharedKey::default()));
        assert!("0".repeat(64).parse::<PublicKey>() == Ok(PublicKey::from_bytes([0; KEY_LEN])));
    }

    #[test]
    fn generated_keys_are_what_the_generator_gives_but_never_all_zeros() {
        struct Counting(u8);
        impl Random for Counting {
            fn fill(&mut self, bytes: &mut [u8]) {
                bytes.fill(self.0);
                self.0 += 8;
            }
        }
        let random: &mut dyn Random = &mut Counting(0);
        let key = PrivateKey::generate(random);
        assert_eq!(key.as_bytes()[..31], [8; 31]);
        assert_eq!(PresharedKey::generate(random).as_bytes(), &[16; 32]);
    }
}
