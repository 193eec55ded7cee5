//! Replays what the fuzzers ever found worth keeping, crashes included, without the fuzzers.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use wgsep_simulation::fuzz::TARGETS;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Runs a target on each input of its corpus, and names the one that fails.
fn replay(name: &str) {
    let (_, target) = TARGETS.into_iter().find(|(target, _)| *target == name).unwrap();
    let directory = fuzz().join("corpus").join(name);
    let inputs = names(&directory);
    assert!(!inputs.is_empty(), "{} has no inputs", directory.display());
    for input in inputs {
        let data = fs::read(directory.join(&input)).unwrap();
        let outcome = std::panic::catch_unwind(|| target(&data));
        assert!(outcome.is_ok(), "{name} fails on {input}");
    }
}

#[test]
fn message_parse() {
    replay("message_parse");
}

#[test]
fn handshake_consume() {
    replay("handshake_consume");
}

#[test]
fn device() {
    replay("device");
}

#[test]
fn ip_inner() {
    replay("ip_inner");
}

#[test]
fn aead() {
    replay("aead");
}

#[test]
fn saved() {
    replay("saved");
}

#[test]
fn tunnel() {
    replay("tunnel");
}

#[test]
fn every_target_has_a_corpus_and_a_fuzzer() {
    let targets: BTreeSet<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names(&fuzz().join("corpus")), targets);
    let fuzzers = names(&fuzz().join("fuzz_targets"));
    let fuzzers: BTreeSet<_> =
        fuzzers.iter().map(|name| name.trim_end_matches(".rs").to_owned()).collect();
    assert_eq!(fuzzers, targets);
}
