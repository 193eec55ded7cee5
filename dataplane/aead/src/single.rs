//! One packet: vectors where the processor has them; otherwise ring by default, and the pure-Rust chacha20poly1305 without
//! it and on WebAssembly.

use crate::avx512::Vectors;
use crate::{Key, LONGEST, NONCE_LEN, Packet, TAG_LEN, equal};

/// Encrypts a packet and writes its tag.
#[inline]
pub(crate) fn seal(vectors: Option<Vectors>, packet: &mut Packet<'_>) {
    let Packet { key, nonce, text, tag, done } = packet;
    let sealed = match vectors {
        Some(vectors) if text.len() <= LONGEST => {
            Some(vectors.seal_one(&key.0, nonce_words(nonce), text))
        }
        _ => backend::seal(key, *nonce, text),
    };
    **done = sealed.is_some();
    match sealed {
        Some(sealed) => **tag = sealed,
        None => text.fill(0),
    }
}

/// Decrypts a packet and verifies its tag. The text of a packet that is not authentic is zeroed.
#[inline]
pub(crate) fn open(vectors: Option<Vectors>, packet: &mut Packet<'_>) {
    let Packet { key, nonce, text, tag, .. } = packet;
    let is_authentic = match vectors {
        Some(vectors) if text.len() <= LONGEST => {
            equal(**tag, vectors.open_one(&key.0, nonce_words(nonce), text))
        }
        _ => backend::open(key, *nonce, text, tag),
    };
    packet.set_opened(is_authentic);
}

/// The first four bytes of a nonce, and the other eight: a nonce of WireGuard is written in these two parts, and reading it
/// in others would wait until both writes have reached the cache.
#[inline]
fn nonce_words([a, b, c, d, counter @ ..]: &[u8; NONCE_LEN]) -> (u32, u64) {
    (u32::from_le_bytes([*a, *b, *c, *d]), u64::from_le_bytes(*counter))
}
#[cfg(all(feature = "ring", not(target_family = "wasm")))]
mod backend {
    use super::{Key, NONCE_LEN, TAG_LEN};
    use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

    /// A key of ring, which does not erase its keys.
    struct Expanded(LessSafeKey);

    impl Expanded {
        fn new(key: &Key) -> Option<Self> {
            let key = UnboundKey::new(&CHACHA20_POLY1305, &key.0).ok()?;
            Some(Self(LessSafeKey::new(key)))
        }
    }

    impl Drop for Expanded {
        /// Overwrites the key with a zero key. `black_box` keeps the compiler from eliminating the write.
        fn drop(&mut self) {
            if let Ok(zero) = UnboundKey::new(&CHACHA20_POLY1305, &[0; crate::KEY_LEN]) {
                self.0 = LessSafeKey::new(zero);
            }
            core::hint::black_box(&self.0);
        }
    }

    /// Encrypts `text` and returns its tag; `None` if it is longer than the cipher's limit of 256 GiB.
    pub(crate) fn seal(
        key: &Key,
        nonce: [u8; NONCE_LEN],
        text: &mut [u8],
    ) -> Option<[u8; TAG_LEN]> {
        let nonce = Nonce::assume_unique_for_key(nonce);
        let Expanded(key) = &Expanded::new(key)?;
        let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), text).ok()?;
        tag.as_ref().try_into().ok()
    }

    /// Decrypts `text`, and returns true if its tag is right.
    pub(crate) fn open(
        key: &Key,
        nonce: [u8; NONCE_LEN],
        text: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> bool {
        let nonce = Nonce::assume_unique_for_key(nonce);
        let Some(Expanded(key)) = &Expanded::new(key) else { return false };
        key.open_in_place_separate_tag(nonce, Aad::empty(), (*tag).into(), text, 0..).is_ok()
    }
}

#[cfg(any(not(feature = "ring"), target_family = "wasm"))]
mod backend {
    use super::{Key, NONCE_LEN, TAG_LEN};
    use chacha20poly1305::aead::AeadInOut;
    use chacha20poly1305::aead::inout::InOutBuf;
    use chacha20poly1305::{ChaCha20Poly1305, KeyInit, Tag};

    /// Encrypts `text` and returns its tag; `None` if it is longer than the cipher's limit of 256 GiB.
    pub(crate) fn seal(
        key: &Key,
        nonce: [u8; NONCE_LEN],
        text: &mut [u8],
    ) -> Option<[u8; TAG_LEN]> {
        let cipher = ChaCha20Poly1305::new((&key.0).into());
        let text = InOutBuf::from(text);
        cipher.encrypt_inout_detached(&nonce.into(), &[], text).ok().map(Into::into)
    }

    /// Decrypts `text`, and returns true if its tag is right.
    pub(crate) fn open(
        key: &Key,
        nonce: [u8; NONCE_LEN],
        text: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> bool {
        let cipher = ChaCha20Poly1305::new((&key.0).into());
        let (text, tag) = (InOutBuf::from(text), Tag::from(*tag));
        cipher.decrypt_inout_detached(&nonce.into(), &[], text, &tag).is_ok()
    }
}
