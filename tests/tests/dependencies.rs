//! Which crate may use which: the directions of the design, and allow-lists for the crates whose
//! smallness is a promise. Cargo itself is the witness.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use wgsep_tests::process::run;

/// Runs cargo on this workspace without touching its lock file.
fn cargo(arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO"));
    run(command.current_dir(env!("CARGO_MANIFEST_DIR")).args(arguments))
}

/// The crates that are linked when a package is built, itself included. What only runs in the
/// compiler (procedural macros, build scripts) is not part of the program.
fn linked_into(package: &str) -> BTreeSet<String> {
    let edges = ["--edges", "normal,no-proc-macro", "--prefix", "none", "--format", "{p}"];
    let tree = cargo(&[&["tree", "--locked", "--package", package][..], &edges].concat());
    let names = tree.lines().filter_map(|line| line.split(' ').next());
    names.filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// The first word of each line of an allow-list that is not a comment.
fn allowed(list: &str) -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("allow").join(list);
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

#[track_caller]
fn assert_linked_is_allowed(package: &str, list: &str) {
    let (linked, allowed) = (linked_into(package), allowed(list));
    let uninvited: Vec<_> = linked.difference(&allowed).collect();
    assert!(
        uninvited.is_empty(),
        "{package} links {uninvited:?}, which allow/{list} does not list"
    );
    let unused: Vec<_> = allowed.difference(&linked).collect();
    assert!(unused.is_empty(), "allow/{list} lists {unused:?}, which {package} does not link");
}

#[test]
fn the_helper_links_only_what_is_allowed() {
    assert_linked_is_allowed("wgsep", "helper.txt");
}

#[test]
fn the_protocol_links_only_cryptography() {
    assert_linked_is_allowed("wgsep-proto", "protocol.txt");
}

#[test]
fn the_contract_links_only_the_codec_and_bindings_to_the_system() {
    assert_linked_is_allowed("wgsep-ipc", "ipc.txt");
}

#[test]
fn the_confinement_links_only_bindings_to_the_system() {
    assert_linked_is_allowed("wgsep-policy", "policy.txt");
}

/// Each crate of the workspace, and those of its siblings that it may use.
const DIRECTIONS: [(&str, &[&str]); 10] = [
    // The audit names capabilities, and gives up its own.
    ("wgsep", &["wgsep-policy", "wgsep-privileged"]),
    ("wgsep-dataplane-bin", &["wgsep-dataplane"]),
    ("wgsep-privileged", &["wgsep-ipc", "wgsep-policy"]),
    ("wgsep-dataplane", &["wgsep-proto", "wgsep-ipc", "wgsep-policy"]),
    ("wgsep-proto", &[]),
    ("wgsep-ipc", &[]),
    ("wgsep-policy", &[]),
    ("wgsep-hostile", &["wgsep-ipc", "wgsep-policy"]),
    (
        "wgsep-tests",
        &["wgsep-proto", "wgsep-ipc", "wgsep-policy", "wgsep-dataplane", "wgsep-privileged"],
    ),
    ("wgsep-speed", &["wgsep-proto", "wgsep-dataplane", "wgsep-tests"]),
];

#[test]
fn dependencies_run_one_way() {
    let directions: BTreeMap<_, _> = DIRECTIONS.into_iter().collect();
    let metadata = cargo(&["metadata", "--locked", "--no-deps", "--format-version", "1"]);
    let metadata: Value = serde_json::from_str(&metadata).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert_eq!(packages.len(), directions.len(), "a crate without a place in the design");
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let permitted = directions[name];
        for dependency in package["dependencies"].as_array().unwrap() {
            let used = dependency["name"].as_str().unwrap();
            // `kind` is null for what is linked; tests may use what they like.
            let is_sibling = dependency["kind"].is_null() && directions.contains_key(used);
            assert!(!is_sibling || permitted.contains(&used), "{name} must not use {used}");
        }
    }
}
