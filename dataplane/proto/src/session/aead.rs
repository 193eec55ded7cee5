//! The AEAD of transport messages: ring by default, the pure-Rust chacha20poly1305 without it.
//!
//! Handshakes and cookies always use the latter (see `symmetric` and `cookie`), as their speed matters less.

use crate::noise::symmetric::Secret;
use crate::wire::messages::TAG_LEN;

/// A transport key, ready to seal or open; the nonce is the message counter.
pub struct AeadKey(backend::Key);

impl AeadKey {
    /// Expands 32 bytes of key.
    #[must_use]
    pub fn new(key: &Secret) -> Self {
        Self(backend::Key::new(key))
    }

    /// Encrypts `buffer` in place and returns its tag.
    #[must_use]
    pub fn seal(&self, counter: u64, buffer: &mut [u8]) -> Option<[u8; TAG_LEN]> {
        self.0.seal(nonce(counter), buffer)
    }

    /// Decrypts `ciphertext || tag` in place; true if the tag is right. The plaintext is all but the
    /// last 16 bytes. On failure the buffer's content is undefined.
    #[must_use]
    pub fn open(&self, counter: u64, buffer: &mut [u8]) -> bool {
        self.0.open(nonce(counter), buffer)
    }
}

/// Four zero bytes, then the counter, little-endian (whitepaper, section 5.4.6).
fn nonce(counter: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    let (_, low) = nonce.split_at_mut(4);
    low.copy_from_slice(&counter.to_le_bytes());
    nonce
}

#[cfg(feature = "ring")]
mod backend {
    use super::TAG_LEN;
    use crate::noise::symmetric::Secret;
    use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

    pub(super) struct Key(LessSafeKey);

    impl Key {
        pub(super) fn new(key: &Secret) -> Self {
            let Ok(key) = UnboundKey::new(&CHACHA20_POLY1305, key.as_slice()) else {
                unreachable!("the key is 32 bytes")
            };
            Self(LessSafeKey::new(key))
        }

        pub(super) fn seal(&self, nonce: [u8; 12], buffer: &mut [u8]) -> Option<[u8; TAG_LEN]> {
            let nonce = Nonce::assume_unique_for_key(nonce);
            let tag = self.0.seal_in_place_separate_tag(nonce, Aad::empty(), buffer).ok()?;
            tag.as_ref().try_into().ok()
        }

        pub(super) fn open(&self, nonce: [u8; 12], buffer: &mut [u8]) -> bool {
            let nonce = Nonce::assume_unique_for_key(nonce);
            self.0.open_in_place(nonce, Aad::empty(), buffer).is_ok()
        }
    }

    impl Drop for Key {
        /// Overwrites the key with a zero key, because ring does not erase its keys. `black_box` keeps the
        /// compiler from eliminating the write.
        fn drop(&mut self) {
            if let Ok(zero) = UnboundKey::new(&CHACHA20_POLY1305, &[0; 32]) {
                self.0 = LessSafeKey::new(zero);
            }
            core::hint::black_box(&self.0);
        }
    }
}

#[cfg(not(feature = "ring"))]
mod backend {
    use super::TAG_LEN;
    use crate::noise::symmetric::Secret;
    use chacha20poly1305::aead::AeadInOut;
    use chacha20poly1305::aead::inout::InOutBuf;
    use chacha20poly1305::{ChaCha20Poly1305, KeyInit, Tag};

    pub(super) struct Key(ChaCha20Poly1305);

    impl Key {
        pub(super) fn new(key: &Secret) -> Self {
            Self(ChaCha20Poly1305::new((&**key).into()))
        }

        pub(super) fn seal(&self, nonce: [u8; 12], buffer: &mut [u8]) -> Option<[u8; TAG_LEN]> {
            let buffer = InOutBuf::from(buffer);
            self.0.encrypt_inout_detached(&nonce.into(), &[], buffer).ok().map(Into::into)
        }

        pub(super) fn open(&self, nonce: [u8; 12], buffer: &mut [u8]) -> bool {
            let Some((body, tag)) = buffer.split_last_chunk_mut::<TAG_LEN>() else { return false };
            let tag = Tag::from(*tag);
            self.0.decrypt_inout_detached(&nonce.into(), &[], InOutBuf::from(body), &tag).is_ok()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chacha20poly1305::aead::AeadInOut;
    use chacha20poly1305::aead::inout::InOutBuf;
    use chacha20poly1305::{ChaCha20Poly1305, KeyInit};

    #[test]
    fn agrees_with_the_pure_rust_cipher_at_every_length() {
        for len in (0..300).chain([1419, 1420, 1436, 9000]) {
            let key = Secret::new(core::array::from_fn(|i| (i * 7 + len) as u8));
            let counter = (len as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let plaintext: Vec<u8> = (0..len).map(|i| (i * 31) as u8).collect();
            let mut ours = plaintext.clone();
            let tag = AeadKey::new(&key).seal(counter, &mut ours).unwrap();
            let mut theirs = plaintext.clone();
            let their_tag = ChaCha20Poly1305::new((&*key).into())
                .encrypt_inout_detached(&nonce(counter).into(), &[], InOutBuf::from(&mut *theirs))
                .unwrap();
            assert_eq!((&ours, tag), (&theirs, their_tag.into()));
            ours.extend_from_slice(&tag);
            assert!(!AeadKey::new(&key).open(counter ^ 1, &mut ours.clone()));
            assert!(AeadKey::new(&key).open(counter, &mut ours));
            assert_eq!(&ours[..len], plaintext);
        }
    }

    #[test]
    fn a_buffer_shorter_than_a_tag_does_not_open() {
        assert!(!AeadKey::new(&Secret::new([1; 32])).open(0, &mut [0; 15]));
    }
}
