//! Keys as text: base64 (RFC 4648, section 4), as wg(8) has them, and hexadecimal, as the cross-platform UAPI does.
//!
//! No branch and no index depends on a digit, so the time reveals only the length of a text and whether it is a key.
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use crate::secret::Secret;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq, ConstantTimeGreater};

/// Characters of a key in base64: 43 digits and the padding.
pub const BASE64_LEN: usize = 44;
/// Digits of a key in hexadecimal.
pub const HEX_LEN: usize = 64;

/// Consecutive characters, and the value of the first as a digit.
type Digits = (u8, u8, u8);
const BASE64: [Digits; 5] =
    [(b'A', b'Z', 0), (b'a', b'z', 26), (b'0', b'9', 52), (b'+', b'+', 62), (b'/', b'/', 63)];
const HEX: [Digits; 3] = [(b'0', b'9', 0), (b'a', b'f', 10), (b'A', b'F', 10)];

/// The value of a digit, and whether it is one.
fn value(character: u8, alphabet: &[Digits]) -> (u8, Choice) {
    let (mut value, mut is_digit) = (0, Choice::from(0));
    for &(first, last, of_first) in alphabet {
        let is_in = !first.ct_gt(&character) & !character.ct_gt(&last);
        let candidate = character.wrapping_sub(first).wrapping_add(of_first);
        value.conditional_assign(&candidate, is_in);
        is_digit |= is_in;
    }
    (value, is_digit)
}

/// The digit of a value. The first set of the alphabet that has it counts.
fn digit(value: u8, alphabet: &[Digits]) -> u8 {
    let mut digit = 0;
    for &(first, last, of_first) in alphabet.iter().rev() {
        let candidate = value.wrapping_sub(of_first).wrapping_add(first);
        let is_in = !of_first.ct_gt(&value) & !candidate.ct_gt(&last);
        digit.conditional_assign(&candidate, is_in);
    }
    digit
}

/// The key that 44 characters of base64 are; `None` if they are none.
#[must_use]
pub fn from_base64(text: &str) -> Option<Secret> {
    let text: &[u8; BASE64_LEN] = text.as_bytes().try_into().ok()?;
    let (padding, digits) = text.split_last()?;
    let (mut key, mut is_key) = (Secret::new([0; 32]), padding.ct_eq(&b'='));
    for (digits, bytes) in digits.chunks(4).zip(key.chunks_mut(3)) {
        let mut word = 0u32;
        for position in 0..4 {
            // The padding counts as zeros.
            let character = digits.get(position).copied().unwrap_or(b'A');
            let (value, is_digit) = value(character, &BASE64);
            is_key &= is_digit;
            word = (word << 6) | u32::from(value);
        }
        let [_, decoded @ ..] = word.to_be_bytes();
        let (taken, rest) = decoded.split_at_checked(bytes.len())?;
        bytes.copy_from_slice(taken);
        is_key &= rest.iter().fold(0, |bits, byte| bits | byte).ct_eq(&0);
    }
    bool::from(is_key).then_some(key)
}

/// The key that 64 hexadecimal digits are, of either case; `None` if they are none.
#[must_use]
pub fn from_hex(text: &str) -> Option<Secret> {
    let digits: &[u8; HEX_LEN] = text.as_bytes().try_into().ok()?;
    let (mut key, mut is_key) = (Secret::new([0; 32]), Choice::from(1));
    for (digits, byte) in digits.chunks(2).zip(key.iter_mut()) {
        for character in digits {
            let (value, is_digit) = value(*character, &HEX);
            is_key &= is_digit;
            *byte = (*byte << 4) | value;
        }
    }
    bool::from(is_key).then_some(key)
}

/// Writes a key in base64.
pub fn write_base64(key: &[u8; 32], text: &mut [u8; BASE64_LEN]) {
    for (bytes, digits) in key.chunks(3).zip(text.chunks_mut(4)) {
        let mut word = 0u32;
        for position in 0..3 {
            word = (word << 8) | u32::from(bytes.get(position).copied().unwrap_or(0));
        }
        for character in digits.iter_mut().rev() {
            *character = digit((word & 63) as u8, &BASE64);
            word >>= 6;
        }
    }
    let [.., padding] = text;
    *padding = b'=';
}

/// Writes a key as hexadecimal digits, in lower case.
pub fn write_hex(key: &[u8; 32], text: &mut [u8; HEX_LEN]) {
    for (byte, digits) in key.iter().zip(text.chunks_mut(2)) {
        for (value, character) in [byte >> 4, byte & 15].into_iter().zip(digits) {
            *character = digit(value, &HEX);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests {
    use super::*;

    /// Keys of all kinds of bytes.
    fn keys() -> impl Iterator<Item = [u8; 32]> {
        let counted =
            (0..=255u8).map(|first| core::array::from_fn(|at| first.wrapping_add((at * 37) as u8)));
        counted.chain([[0; 32], [0xff; 32]])
    }

    #[test]
    fn every_key_survives_both_encodings() {
        for key in keys() {
            let (mut base64, mut hex) = ([0; BASE64_LEN], [0; HEX_LEN]);
            write_base64(&key, &mut base64);
            write_hex(&key, &mut hex);
            let [base64, hex] = [&base64[..], &hex].map(|text| core::str::from_utf8(text).unwrap());
            assert_eq!(*from_base64(base64).unwrap(), key, "{base64}");
            assert_eq!(*from_hex(hex).unwrap(), key, "{hex}");
            assert_eq!(*from_hex(&hex.to_uppercase()).unwrap(), key, "{hex}");
        }
    }

    #[test]
    fn the_encodings_are_those_of_base64_1_and_xxd_1() {
        let key: [u8; 32] = core::array::from_fn(|at| 0xfb_u8.wrapping_add(at as u8));
        let (mut base64, mut hex) = ([0; BASE64_LEN], [0; HEX_LEN]);
        write_base64(&key, &mut base64);
        write_hex(&key, &mut hex);
        assert_eq!(&base64, b"+/z9/v8AAQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRo=");
        assert_eq!(&hex, b"fbfcfdfeff000102030405060708090a0b0c0d0e0f101112131415161718191a");
    }

    #[test]
    fn a_text_with_any_wrong_character_is_no_key() {
        let (mut base64, mut hex) = ([0; BASE64_LEN], [0; HEX_LEN]);
        write_base64(&[0x5a; 32], &mut base64);
        write_hex(&[0x5a; 32], &mut hex);
        let is_base64 =
            |character: u8| character.is_ascii_alphanumeric() || b"+/".contains(&character);
        for character in 0..0x80u8 {
            for at in [0, 1, 20, 41] {
                let mut text = base64;
                text[at] = character;
                let text = core::str::from_utf8(&text).unwrap();
                assert_eq!(from_base64(text).is_some(), is_base64(character), "{text:?}");
            }
            for at in [0, 31, 63] {
                let mut text = hex;
                text[at] = character;
                let text = core::str::from_utf8(&text).unwrap();
                assert_eq!(from_hex(text).is_some(), character.is_ascii_hexdigit(), "{text:?}");
            }
        }
    }

    #[test]
    fn a_text_of_another_length_or_with_bits_after_its_end_is_no_key() {
        let whole = "A".repeat(43) + "=";
        assert!(from_base64(&whole).is_some());
        for text in ["", "=", &whole[1..], &(whole.clone() + "A"), &"A".repeat(44)] {
            assert!(from_base64(text).is_none(), "{text}");
        }
        // The last digit has two bits too many.
        for (last, is_key) in [('B', false), ('C', false), ('D', false), ('E', true)] {
            let text = format!("{}{last}=", "A".repeat(42));
            assert_eq!(from_base64(&text).is_some(), is_key, "{text}");
        }
        for text in ["", &"0".repeat(63), &"0".repeat(65), &"é".repeat(32)] {
            assert!(from_hex(text).is_none(), "{text}");
        }
    }
}
