//! A process that does without vectors.

use wgsep_aead::{
    Key, Packet, TAG_LEN, disable_vectors, open, open_batch, seal_batch, uses_vectors,
};

#[test]
fn batches_are_the_same_without_vectors() {
    let key = Key::new(&[7; 32]);
    let sealed = |texts: &mut [[u8; 100]; 8]| {
        let mut tags = [[0; TAG_LEN]; 8];
        let mut done = [false; 8];
        let parts = texts.iter_mut().zip(&mut tags).zip(&mut done);
        seal_batch(parts.map(|((text, tag), done)| Packet {
            key: &key,
            nonce: [7; 12],
            text,
            tag,
            done,
        }));
        assert_eq!(done, [true; 8]);
        tags
    };
    let (mut with, mut without) = ([[1; 100]; 8], [[1; 100]; 8]);
    let tags = sealed(&mut with);
    disable_vectors();
    assert!(!uses_vectors());
    assert_eq!(sealed(&mut without), tags);
    assert_eq!(without, with);
    let mut tag = tags[0];
    let mut done = false;
    let text = &mut with[0];
    open_batch([Packet { key: &key, nonce: [7; 12], text, tag: &mut tag, done: &mut done }]);
    assert_eq!((done, with[0]), (true, [1; 100]));
    let text = &mut with[1];
    open(Packet { key: &key, nonce: [7; 12], text, tag: &mut tag, done: &mut done });
    assert_eq!((done, with[1]), (true, [1; 100]));
}
