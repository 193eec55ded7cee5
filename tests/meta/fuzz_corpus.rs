//! Replays what the fuzzer ever found worth keeping, crashes included, without the fuzzer.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use wgsep_tests::fuzz::{TARGETS, Target};
use wgsep_tests::repository;

fn fuzz() -> PathBuf {
    repository().join("tests/fuzz")
}

fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn replay((name, target): Target) {
    let directory = fuzz().join("corpus").join(name);
    let inputs = names(&directory);
    assert!(!inputs.is_empty(), "{} has no inputs", directory.display());
    for input in inputs {
        let data = fs::read(directory.join(&input)).unwrap();
        assert!(catch_unwind(|| target(&data)).is_ok(), "{name} fails on {input}");
    }
}

#[test]
fn ipc() {
    replay(TARGETS[0]);
}

#[test]
fn uapi() {
    replay(TARGETS[1]);
}

#[test]
fn requests() {
    replay(TARGETS[2]);
}

#[test]
fn status() {
    replay(TARGETS[3]);
}

#[test]
fn preshared_keys() {
    replay(TARGETS[4]);
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
