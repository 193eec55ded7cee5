//! Packets one by one: vectors where the processor has them; otherwise ring by default, and the pure-Rust chacha20poly1305 without
//! it and on WebAssembly.

use crate::avx512::{Keystream, Vectors};
use crate::{LONGEST, NONCE_LEN, Packet, equal};
use backend::Cipher;
use core::ptr;

/// Encrypts a packet and writes its tag. With vectors, `keystream` has what was computed ahead.
#[inline]
pub(crate) fn seal(
    vectors: Option<Vectors>,
    keystream: Option<&mut Keystream>,
    packet: &mut Packet<'_>,
) {
    match vectors {
        Some(vectors) if packet.text.len() <= LONGEST => {
            let Packet { key, nonce, text, tag, done } = packet;
            **tag = vectors.crypt_one::<true>(keystream, &key.0, nonce_words(nonce), text);
            **done = true;
        }
        _ => seal_without_vectors(&mut [copied(packet)]),
    }
}

/// Decrypts a packet and verifies its tag. The text of a packet that is not authentic is zeroed. With vectors, `keystream` has
/// what was computed ahead.
#[inline]
pub(crate) fn open(
    vectors: Option<Vectors>,
    keystream: Option<&mut Keystream>,
    packet: &mut Packet<'_>,
) {
    match vectors {
        Some(vectors) if packet.text.len() <= LONGEST => {
            let Packet { key, nonce, text, .. } = packet;
            let expected = vectors.crypt_one::<false>(keystream, &key.0, nonce_words(nonce), text);
            packet.set_opened(equal(packet.tag, &expected));
        }
        _ => open_without_vectors(&mut [copied(packet)]),
    }
}

/// Encrypts packets one after the other, without vectors of this crate, and writes their tags.
pub(crate) fn seal_without_vectors(packets: &mut [Packet<'_>]) {
    each_with_cipher(packets, |cipher, packet| {
        let Packet { nonce, text, tag, done, .. } = packet;
        let sealed = cipher.and_then(|cipher| cipher.seal(*nonce, text));
        **done = sealed.is_some();
        match sealed {
            Some(sealed) => **tag = sealed,
            None => text.fill(0),
        }
    });
}

/// Decrypts packets one after the other, without vectors of this crate, and verifies their tags. The text of a packet that is
/// not authentic is zeroed.
pub(crate) fn open_without_vectors(packets: &mut [Packet<'_>]) {
    each_with_cipher(packets, |cipher, packet| {
        let Packet { nonce, text, tag, .. } = packet;
        let is_authentic = cipher.is_some_and(|cipher| cipher.open(*nonce, text, tag));
        packet.set_opened(is_authentic);
    });
}

/// Calls `process` with each packet and the cipher of its key, which is made once for adjacent packets of the same key; it
/// is `None` if it cannot be made.
fn each_with_cipher(
    packets: &mut [Packet<'_>],
    process: impl Fn(Option<&Cipher>, &mut Packet<'_>),
) {
    for run in packets.chunk_by_mut(|one, next| ptr::eq(one.key, next.key)) {
        let cipher = run.first().and_then(|first| Cipher::new(first.key));
        run.iter_mut().for_each(|packet| process(cipher.as_ref(), packet));
    }
}

/// The same packet in a place of its own: were a reference to the original passed on, the compiler would have to keep that in
/// memory on the way to the vectors too, which costs 10 to 40 ns (measured on Zen 5).
#[inline]
const fn copied<'r>(packet: &'r mut Packet<'_>) -> Packet<'r> {
    let Packet { key, nonce, text, tag, done } = packet;
    Packet { key, nonce: *nonce, text, tag, done }
}

/// The first four bytes of a nonce, and the other eight: a nonce of WireGuard is written in these two parts, and reading it
/// in others would wait until both writes have reached the cache.
#[inline]
pub(crate) fn nonce_words([a, b, c, d, counter @ ..]: &[u8; NONCE_LEN]) -> (u32, u64) {
    (u32::from_le_bytes([*a, *b, *c, *d]), u64::from_le_bytes(*counter))
}

#[cfg(all(feature = "ring", not(target_family = "wasm")))]
mod backend {
    use crate::{KEY_LEN, Key, NONCE_LEN, TAG_LEN};
    use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
    use std::sync::LazyLock;

    /// ChaCha20-Poly1305 with a key of ring, which does not erase its keys.
    pub(crate) struct Cipher(LessSafeKey);

    fn expand(key: &[u8; KEY_LEN]) -> Option<LessSafeKey> {
        Some(LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).ok()?))
    }

    /// A key of zeros, which replaces others.
    static ZERO: LazyLock<Option<LessSafeKey>> = LazyLock::new(|| expand(&[0; KEY_LEN]));

    impl Drop for Cipher {
        /// Overwrites the key with the key of zeros. `black_box` keeps the compiler from eliminating the write.
        fn drop(&mut self) {
            if let Some(zero) = &*ZERO {
                self.0.clone_from(zero);
            }
            core::hint::black_box(&self.0);
        }
    }

    impl Cipher {
        /// `None` where ring refuses the key, which it never does.
        pub(crate) fn new(key: &Key) -> Option<Self> {
            expand(&key.0).map(Self)
        }

        /// Encrypts `text` and returns its tag; `None` if it is longer than the cipher's limit of 256 GiB.
        pub(crate) fn seal(
            &self,
            nonce: [u8; NONCE_LEN],
            text: &mut [u8],
        ) -> Option<[u8; TAG_LEN]> {
            let nonce = Nonce::assume_unique_for_key(nonce);
            let tag = self.0.seal_in_place_separate_tag(nonce, Aad::empty(), text).ok()?;
            tag.as_ref().try_into().ok()
        }

        /// Decrypts `text`, and returns true if its tag is right.
        pub(crate) fn open(
            &self,
            nonce: [u8; NONCE_LEN],
            text: &mut [u8],
            tag: &[u8; TAG_LEN],
        ) -> bool {
            let nonce = Nonce::assume_unique_for_key(nonce);
            let tag = (*tag).into();
            self.0.open_in_place_separate_tag(nonce, Aad::empty(), tag, text, 0..).is_ok()
        }
    }
}

#[cfg(any(not(feature = "ring"), target_family = "wasm"))]
mod backend {
    use crate::{Key, NONCE_LEN, TAG_LEN};
    use chacha20poly1305::aead::AeadInOut;
    use chacha20poly1305::aead::inout::InOutBuf;
    use chacha20poly1305::{ChaCha20Poly1305, KeyInit, Tag};

    /// ChaCha20-Poly1305, which erases its key on drop.
    pub(crate) struct Cipher(ChaCha20Poly1305);

    impl Cipher {
        /// Always `Some`.
        pub(crate) fn new(key: &Key) -> Option<Self> {
            Some(Self(ChaCha20Poly1305::new((&key.0).into())))
        }

        /// Encrypts `text` and returns its tag; `None` if it is longer than the cipher's limit of 256 GiB.
        pub(crate) fn seal(
            &self,
            nonce: [u8; NONCE_LEN],
            text: &mut [u8],
        ) -> Option<[u8; TAG_LEN]> {
            let text = InOutBuf::from(text);
            self.0.encrypt_inout_detached(&nonce.into(), &[], text).ok().map(Into::into)
        }

        /// Decrypts `text`, and returns true if its tag is right.
        pub(crate) fn open(
            &self,
            nonce: [u8; NONCE_LEN],
            text: &mut [u8],
            tag: &[u8; TAG_LEN],
        ) -> bool {
            let (text, tag) = (InOutBuf::from(text), Tag::from(*tag));
            self.0.decrypt_inout_detached(&nonce.into(), &[], text, &tag).is_ok()
        }
    }
}
