//! A process that does without vectors.

use wgsep_aead::{
    Key, KeystreamCache, Packet, TAG_LEN, disable_vectors, open, open_batch, seal_batch,
    uses_vectors,
};

/// Packets of one key are adjacent in places, as those of a batch of several peers are.
const KEYS: [usize; 8] = [0, 0, 1, 1, 1, 0, 2, 2];

type Texts = [[u8; 100]; 8];
type Tags = [[u8; TAG_LEN]; 8];

/// Calls `process` with the packets, and returns which of them are done.
fn run(texts: &mut Texts, tags: &mut Tags, process: fn(Vec<Packet<'_>>)) -> [bool; 8] {
    let keys = [1, 2, 3].map(|byte| Key::new(&[byte; 32]));
    let mut done = [false; 8];
    let mut packets = Vec::new();
    for (number, ((text, tag), done)) in texts.iter_mut().zip(tags).zip(&mut done).enumerate() {
        let (key, nonce) = (&keys[KEYS[number]], [number as u8; 12]);
        packets.push(Packet { key, nonce, text, tag, done });
    }
    process(packets);
    done
}

#[test]
fn batches_are_the_same_without_vectors() {
    let [mut with, mut without] = [[[1; 100]; 8]; 2];
    let [mut tags, mut tags_without] = [[[0; TAG_LEN]; 8]; 2];
    assert_eq!(run(&mut with, &mut tags, |packets| seal_batch(packets)), [true; 8]);
    disable_vectors();
    assert!(!uses_vectors());
    assert_eq!(run(&mut without, &mut tags_without, |packets| seal_batch(packets)), [true; 8]);
    assert_eq!((without, tags_without), (with, tags));

    let ways: [fn(Vec<Packet<'_>>); 3] = [
        |packets| open_batch(packets),
        |packets| packets.into_iter().for_each(open),
        |packets| {
            let mut cache = KeystreamCache::default();
            packets.into_iter().for_each(|packet| cache.open_batch([packet]));
            assert!(cache.is_empty());
        },
    ];
    for process in ways {
        let (mut texts, mut changed) = (with, tags);
        changed[3][0] ^= 1;
        let authentic = [true, true, true, false, true, true, true, true];
        assert_eq!(run(&mut texts, &mut changed, process), authentic);
        // One that is not authentic is zeroed, and no other.
        assert_eq!(texts, authentic.map(|authentic| [u8::from(authentic); 100]));
    }
}
