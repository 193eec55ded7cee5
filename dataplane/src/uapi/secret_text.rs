//! Text that holds keys, erased when it is dropped and when it is reallocated.

use std::fmt;
use wgsep_proto::invariant::part;
use wgsep_proto::secret::{Secret, check};

/// A byte buffer that leaves no copy behind.
#[derive(Default)]
pub(crate) struct SecretText(Secret<Vec<u8>>);

impl SecretText {
    /// Creates an empty buffer of `capacity` bytes.
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self(Secret::new(Vec::with_capacity(capacity)))
    }

    /// Appends bytes. If the capacity is exceeded, it is doubled and the old memory erased, which `Vec` itself
    /// does not do.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let needed = self.0.len() + bytes.len();
        if needed > self.0.capacity() {
            let mut larger = Secret::new(Vec::with_capacity(needed.next_power_of_two().max(512)));
            larger.extend_from_slice(&self.0);
            *self = Self(larger);
        }
        self.0.extend_from_slice(bytes);
    }

    /// Checks that the bytes are in secret memory.
    fn check_place(&self) {
        if self.0.capacity() > 0 {
            check(self.0.as_ptr());
        }
    }

    /// Adds a key in hexadecimal.
    pub(super) fn push_hex(&mut self, key: &[u8; 32]) {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        for byte in key {
            let digit = |nibble: u8| DIGITS.get(usize::from(nibble)).copied().unwrap_or(b'?');
            self.push(&[digit(byte >> 4), digit(byte & 15)]);
        }
    }

    /// Removes and erases the first `count` bytes, of which there are so many, and frees their memory.
    pub(super) fn consume(&mut self, count: usize) {
        let mut rest = Self::default();
        rest.push(part(&self.0, count..self.0.len()));
        *self = rest;
    }

    /// Erases everything and frees the memory.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        self.check_place();
        &self.0
    }
}

#[cfg(debug_assertions)]
impl Drop for SecretText {
    fn drop(&mut self) {
        self.check_place();
    }
}

impl fmt::Write for SecretText {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text.as_bytes());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growing_and_consuming_keep_the_rest() {
        let mut text = SecretText::with_capacity(1);
        for number in 0..2000u32 {
            text.push(&number.to_le_bytes());
        }
        text.consume(4 * 1999);
        assert_eq!(text.as_bytes(), 1999u32.to_le_bytes());
        assert!(text.0.capacity() < 1000, "it keeps {} bytes", text.0.capacity());
        text.consume(4);
        assert_eq!(text.as_bytes(), b"");
        text.push_hex(&[0xa5; 32]);
        assert_eq!(text.as_bytes(), "a5".repeat(32).as_bytes());
    }
}
