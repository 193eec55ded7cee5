//! The symmetric half of Noise as WireGuard uses it: BLAKE2s, HMAC, KDF and the handshake's AEAD.
#![allow(clippy::unreachable, reason = "all lengths are constants, which the other crates accept")]

use crate::secret::Secret;
use crate::wire::messages::{MAC_LEN, TAG_LEN};
use blake2::digest::{Digest, KeyInit, Mac, consts::U16};
use blake2::{Blake2s256, Blake2sMac};
use chacha20poly1305::aead::AeadInOut;
use chacha20poly1305::aead::inout::InOutBuf;
use chacha20poly1305::{ChaCha20Poly1305, Tag};
use hmac::SimpleHmac;

/// Output length of BLAKE2s, and of every key derived.
pub const HASH_LEN: usize = 32;

const CONSTRUCTION: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";

/// An authentication failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unauthentic;

/// `HASH(parts[0] || parts[1] || …)`.
pub fn hash(parts: &[&[u8]]) -> [u8; HASH_LEN] {
    let mut hasher = Blake2s256::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().into()
}

/// `MAC(key, parts…)`: keyed BLAKE2s with 16 bytes of output; `key` is at most 32 bytes.
pub fn mac(key: &[u8], parts: &[&[u8]]) -> [u8; MAC_LEN] {
    let Ok(mut state) = <Blake2sMac<U16> as KeyInit>::new_from_slice(key) else {
        unreachable!("keys are 16 or 32 bytes, BLAKE2s takes up to 32")
    };
    for part in parts {
        Mac::update(&mut state, part);
    }
    state.finalize().into_bytes().into()
}

fn hmac(key: &[u8; HASH_LEN], parts: &[&[u8]]) -> Secret {
    let Ok(mut state) = <SimpleHmac<Blake2s256> as KeyInit>::new_from_slice(key) else {
        unreachable!("HMAC takes a key of any length")
    };
    for part in parts {
        Mac::update(&mut state, part);
    }
    Secret::new(state.finalize().into_bytes().into())
}

/// `KDF1`: one output key.
pub fn kdf1(chaining_key: &[u8; HASH_LEN], input: &[u8]) -> Secret {
    let extracted = hmac(chaining_key, &[input]);
    hmac(&extracted, &[&[1]])
}

/// `KDF2`: two output keys.
pub fn kdf2(chaining_key: &[u8; HASH_LEN], input: &[u8]) -> (Secret, Secret) {
    let extracted = hmac(chaining_key, &[input]);
    let first = hmac(&extracted, &[&[1]]);
    let second = hmac(&extracted, &[first.as_slice(), &[2]]);
    (first, second)
}

/// `KDF3`: three output keys.
pub fn kdf3(chaining_key: &[u8; HASH_LEN], input: &[u8]) -> (Secret, Secret, Secret) {
    let extracted = hmac(chaining_key, &[input]);
    let first = hmac(&extracted, &[&[1]]);
    let second = hmac(&extracted, &[first.as_slice(), &[2]]);
    let third = hmac(&extracted, &[second.as_slice(), &[3]]);
    (first, second, third)
}

/// Seals `buffer` under a key used once, hence nonce 0.
fn seal(key: &Secret, associated: &[u8], buffer: &mut [u8]) -> [u8; TAG_LEN] {
    let cipher = ChaCha20Poly1305::new((&**key).into());
    let sealed = cipher.encrypt_inout_detached(&[0; 12].into(), associated, InOutBuf::from(buffer));
    let Ok(tag) = sealed else { unreachable!("handshake fields are far below the cipher's limit") };
    tag.into()
}

fn open(
    key: &Secret,
    associated: &[u8],
    buffer: &mut [u8],
    tag: &[u8; TAG_LEN],
) -> Result<(), Unauthentic> {
    let cipher = ChaCha20Poly1305::new((&**key).into());
    let tag = Tag::from(*tag);
    cipher
        .decrypt_inout_detached(&[0; 12].into(), associated, InOutBuf::from(buffer), &tag)
        .map_err(|_| Unauthentic)
}

/// Chaining key and hash of a handshake in progress. Erased on drop.
#[derive(Clone)]
pub struct SymmetricState {
    chaining_key: Secret,
    hash: Secret,
}

impl SymmetricState {
    /// The state both sides start from: the construction, the identifier, the responder's key.
    pub fn new(responder_public: &[u8; 32]) -> Self {
        let chaining_key = hash(&[CONSTRUCTION]);
        let prologue = hash(&[&chaining_key, IDENTIFIER]);
        let hash = Secret::new(hash(&[&prologue, responder_public]));
        Self { chaining_key: Secret::new(chaining_key), hash }
    }

    /// An empty state, for when there is no handshake.
    pub const fn zeroed() -> Self {
        Self { chaining_key: Secret::new([0; HASH_LEN]), hash: Secret::new([0; HASH_LEN]) }
    }

    /// The chaining key and the hash.
    #[cfg(feature = "internals")]
    pub(crate) fn save(&self) -> [Secret; 2] {
        [self.chaining_key.clone(), self.hash.clone()]
    }

    /// The state that [`Self::save`] returned.
    #[cfg(feature = "internals")]
    pub(crate) fn restore([chaining_key, hash]: [Secret; 2]) -> Self {
        Self { chaining_key, hash }
    }

    /// `H := HASH(H || data)`.
    pub fn mix_hash(&mut self, data: &[u8]) {
        *self.hash = hash(&[self.hash.as_slice(), data]);
    }

    /// `C := KDF1(C, input)`, for the ephemeral keys.
    pub fn mix_key(&mut self, input: &[u8]) {
        self.chaining_key = kdf1(&self.chaining_key, input);
    }

    /// `(C, k) := KDF2(C, shared)`, after a Diffie-Hellman.
    pub fn mix_dh(&mut self, shared: &[u8; 32]) -> Secret {
        let (chaining_key, key) = kdf2(&self.chaining_key, shared);
        self.chaining_key = chaining_key;
        key
    }

    /// `(C, t, k) := KDF3(C, psk)`, `H := HASH(H || t)`.
    pub fn mix_psk(&mut self, psk: &[u8; 32]) -> Secret {
        let (chaining_key, temporary, key) = kdf3(&self.chaining_key, psk);
        self.chaining_key = chaining_key;
        self.mix_hash(temporary.as_slice());
        key
    }

    /// Seals `N` bytes into `M = N + 16` bound to the transcript, and adds them to it.
    pub fn encrypt_and_hash<const N: usize, const M: usize>(
        &mut self,
        key: &Secret,
        plaintext: &[u8; N],
    ) -> [u8; M] {
        const { assert!(M == N + TAG_LEN) };
        let mut sealed = [0; M];
        let (body, tag) = sealed.split_at_mut(N);
        body.copy_from_slice(plaintext);
        tag.copy_from_slice(&seal(key, self.hash.as_slice(), body));
        self.mix_hash(&sealed);
        sealed
    }

    /// Opens what [`Self::encrypt_and_hash`] sealed.
    pub fn decrypt_and_hash<const N: usize, const M: usize>(
        &mut self,
        key: &Secret,
        sealed: &[u8; M],
    ) -> Result<[u8; N], Unauthentic> {
        const { assert!(M == N + TAG_LEN) };
        let (body, tag) = sealed.split_at(N);
        let mut plaintext: [u8; N] = body.try_into().map_err(|_| Unauthentic)?;
        let tag: [u8; TAG_LEN] = tag.try_into().map_err(|_| Unauthentic)?;
        open(key, self.hash.as_slice(), &mut plaintext, &tag)?;
        self.mix_hash(sealed);
        Ok(plaintext)
    }

    /// The two transport keys: the initiator's for sending, then the responder's.
    pub fn split(&self) -> (Secret, Secret) {
        kdf2(&self.chaining_key, &[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initial_values_match_the_published_ones() {
        // HASH(CONSTRUCTION) and HASH(that || IDENTIFIER), the constants every implementation has.
        let chaining_key = hash(&[CONSTRUCTION]);
        assert_eq!(&chaining_key[..4], &[0x60, 0xe2, 0x6d, 0xae]);
        assert_eq!(&hash(&[&chaining_key, IDENTIFIER])[..4], &[0x22, 0x11, 0xb3, 0x61]);
    }

    #[test]
    fn what_was_sealed_opens_once_and_only_unchanged() {
        let key = Secret::new([7; 32]);
        let start = SymmetricState::new(&[9; 32]);
        let sealed: [u8; 48] = start.clone().encrypt_and_hash(&key, &[5; 32]);
        assert_eq!(start.clone().decrypt_and_hash::<32, 48>(&key, &sealed), Ok([5; 32]));
        for bit in 0..sealed.len() * 8 {
            let mut bad = sealed;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(start.clone().decrypt_and_hash::<32, 48>(&key, &bad), Err(Unauthentic));
        }
    }
}
