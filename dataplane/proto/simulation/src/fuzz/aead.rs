//! Batches of packets, and the same packets singly, with and without keystream that is computed ahead, against ring.

use super::Input;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use wgsep_aead::{
    KEY_LEN, Key, KeystreamCache, NONCE_LEN, Packet, TAG_LEN, open_batch, seal_batch,
};

/// Most packets of a batch, and bytes of a packet.
const MAX_PACKETS: u8 = 24;
const MAX_LEN: u16 = 2200;

#[derive(Clone)]
struct Sample {
    key: [u8; KEY_LEN],
    nonce: [u8; NONCE_LEN],
    plain: Vec<u8>,
    text: Vec<u8>,
    tag: [u8; TAG_LEN],
    done: bool,
    /// The byte of tag and text that is changed before it is opened, and how.
    change: Option<(usize, u8)>,
}

impl Sample {
    /// Each byte of the input decides on one packet; what it is filled with follows from a few.
    fn new(input: &mut Input<'_>) -> Self {
        let len = usize::from(input.word() % MAX_LEN);
        let (key, nonce, fill) = (input.byte(), input.word(), input.byte());
        // One of four kinds of texts: those of one byte, of zeros and ones among them, and those of many.
        let byte = |i: usize| if fill < 64 { fill } else { (i as u8).wrapping_mul(fill) };
        let plain: Vec<u8> = (0..len).map(|i| if fill == 63 { 0xff } else { byte(i) }).collect();
        let change = input
            .byte()
            .is_multiple_of(4)
            .then(|| (usize::from(input.word()) % (len + TAG_LEN), input.byte()));
        let [low, high] = nonce.to_le_bytes();
        Self {
            key: [key % 4; KEY_LEN].map(|byte| byte.wrapping_mul(0x55)),
            // One of few counters, so that one follows another, or of two bytes.
            nonce: match high {
                ..128 => [high % 2, 0, 0, 0, low % 32, 0, 0, 0, 0, 0, 0, 0],
                _ => core::array::from_fn(|i| [low, high][i % 2]),
            },
            text: plain.clone(),
            plain,
            tag: [0; TAG_LEN],
            done: false,
            change,
        }
    }
}

/// Runs a function on all samples.
fn run(samples: &mut [Sample], process: fn(Vec<Packet<'_>>)) {
    let keys: Vec<_> = samples.iter().map(|sample| Key::new(&sample.key)).collect();
    let packets = samples.iter_mut().zip(&keys).map(|(sample, key)| Packet {
        key,
        nonce: sample.nonce,
        text: &mut sample.text,
        tag: &mut sample.tag,
        done: &mut sample.done,
    });
    process(packets.collect());
}

/// Seals a batch as ring does, and opens what was not changed, and nothing else; and the same packets singly in both ways.
///
/// # Panics
/// If a packet differs.
pub fn aead(bytes: &[u8]) {
    let mut input = Input(bytes);
    let count = input.byte() % (MAX_PACKETS + 1);
    let samples: Vec<_> = (0..count).map(|_| Sample::new(&mut input)).collect();
    check(samples.clone(), |packets| seal_batch(packets), |packets| open_batch(packets));
    check(
        samples.clone(),
        |packets| packets.into_iter().for_each(wgsep_aead::seal),
        |packets| packets.into_iter().for_each(wgsep_aead::open),
    );
    check(
        samples,
        |packets| {
            let mut cache = KeystreamCache::default();
            packets.into_iter().for_each(|packet| cache.seal_batch([packet]));
        },
        |packets| {
            let mut cache = KeystreamCache::default();
            packets.into_iter().for_each(|packet| cache.open_batch([packet]));
        },
    );
}

fn check(mut samples: Vec<Sample>, seal: fn(Vec<Packet<'_>>), open: fn(Vec<Packet<'_>>)) {
    run(&mut samples, seal);
    for sample in &mut samples {
        let Ok(key) = UnboundKey::new(&CHACHA20_POLY1305, &sample.key) else { continue };
        let (key, nonce) = (LessSafeKey::new(key), Nonce::assume_unique_for_key(sample.nonce));
        let mut expected = sample.plain.clone();
        let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut expected);
        assert!(sample.done && sample.text == expected);
        assert!(tag.is_ok_and(|tag| tag.as_ref() == sample.tag));
        if let Some((at, mask)) = sample.change {
            let mut sealed = sample.tag.iter_mut().chain(&mut sample.text);
            if let Some(byte) = sealed.nth(at) {
                *byte ^= mask;
            }
        }
    }
    run(&mut samples, open);
    for sample in &samples {
        let is_unchanged = sample.change.is_none_or(|(_, mask)| mask == 0);
        assert_eq!(sample.done, is_unchanged);
        let zeroed = vec![0; sample.plain.len()];
        assert_eq!(sample.text, if is_unchanged { &sample.plain[..] } else { &zeroed });
    }
}
