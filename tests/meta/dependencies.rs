//! Which crate may use which: the directions of the design, and allow-lists for the crates whose
//! smallness is a promise. Cargo itself is the witness.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use wgsep_tests::process::run;
use wgsep_tests::repository;

/// Runs cargo on this workspace without touching its lock file.
fn cargo(arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO"));
    run(command.current_dir(env!("CARGO_MANIFEST_DIR")).args(arguments))
}

/// The crates that are linked when a package is built, itself included. What only runs in the
/// compiler (procedural macros, build scripts) is not part of the program.
fn linked_into(package: &str, features: &[&str]) -> BTreeSet<String> {
    let edges = ["--edges", "normal,no-proc-macro", "--prefix", "none", "--format", "{p}"];
    let tree = cargo(&[&["tree", "--locked", "--package", package][..], &edges, features].concat());
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
    let (linked, allowed) = (linked_into(package, &[]), allowed(list));
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

/// What SECURITY.md says of `make build DATAPLANE_FLAGS='--no-default-features --features ring'`.
#[test]
fn the_dataplane_can_be_built_without_vectors() {
    let features_of_aead = |features: &[&str]| {
        let tree = ["tree", "--locked", "--package", "wgsep-dataplane-bin", "--edges", "normal"];
        let format = ["--prefix", "none", "--format", "{p} {f}"];
        let tree = cargo(&[&tree[..], &format, features].concat());
        let line = tree.lines().find(|line| line.starts_with("wgsep-aead ")).unwrap();
        line.rsplit(' ').next().unwrap().to_owned()
    };
    assert_eq!(features_of_aead(&[]), "avx512,ring");
    assert_eq!(features_of_aead(&["--no-default-features", "--features", "ring"]), "ring");
}

/// What SECURITY.md says of `make build DATAPLANE_FLAGS=--no-default-features`.
#[test]
fn the_dataplane_can_be_built_without_ring() {
    let with = linked_into("wgsep-dataplane-bin", &[]);
    let without = linked_into("wgsep-dataplane-bin", &["--no-default-features"]);
    assert!(with.contains("ring") && !without.contains("ring"));
    assert!(without.contains("chacha20poly1305"));
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
const DIRECTIONS: [(&str, &[&str]); 20] = [
    // The audit names capabilities, and gives up its own.
    ("wgsep", &["wgsep-policy", "wgsep-launch"]),
    ("wgsep-dataplane-bin", &["wgsep-dataplane"]),
    // What runs before there is a dataplane hands over to what talks to it, and is not called back.
    (
        "wgsep-launch",
        &["wgsep-monitor", "wgsep-upgrade", "wgsep-ipc", "wgsep-journal", "wgsep-policy"],
    ),
    (
        "wgsep-monitor",
        &["wgsep-upgrade", "wgsep-host", "wgsep-ipc", "wgsep-journal", "wgsep-policy"],
    ),
    ("wgsep-upgrade", &["wgsep-host", "wgsep-ipc", "wgsep-journal"]),
    ("wgsep-host", &["wgsep-policy"]),
    (
        "wgsep-dataplane",
        &["wgsep-proto", "wgsep-aead", "wgsep-ipc", "wgsep-policy", "wgsep-status"],
    ),
    // It has none of the crates in which there are keys, so that none of them can be in an answer of the status socket.
    ("wgsep-status", &[]),
    ("wgsep-proto", &["wgsep-aead"]),
    ("wgsep-aead", &[]),
    ("wgsep-simulation", &["wgsep-aead", "wgsep-proto"]),
    // What embeds the protocol has nothing of the daemon.
    ("wgsep-proto-c", &["wgsep-proto"]),
    ("wgsep-tokio", &["wgsep-proto"]),
    ("wgsep-ipc", &[]),
    ("wgsep-journal", &["wgsep-ipc"]),
    ("wgsep-policy", &[]),
    ("wgsep-hostile", &["wgsep-ipc", "wgsep-policy"]),
    (
        "wgsep-tests",
        &[
            "wgsep-aead",
            "wgsep-proto",
            "wgsep-simulation",
            "wgsep-ipc",
            "wgsep-policy",
            "wgsep-dataplane",
            "wgsep-monitor",
            "wgsep-status",
        ],
    ),
    ("wgsep-soak", &["wgsep-proto", "wgsep-simulation", "wgsep-tests"]),
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

/// The owner's promise: lines of the crate that an attacker could ever talk to.
const PROMISE: (&str, usize) = ("privileged/monitor/src", 1000);
/// Most lines of all the code that a hijacked dataplane's bytes reach.
const MOST_REACHED: usize = 1200;

/// A row of SECURITY.md's table of the helper's parts.
struct Part {
    /// A file, or a directory with all files that have no row of their own.
    path: PathBuf,
    /// As stated.
    lines: usize,
    /// As promised.
    most: usize,
    /// Whether a hijacked dataplane's bytes reach it.
    is_reached: bool,
}

/// Lines of a file that are neither blank nor comment nor test. Tests stand last in a file.
fn code_lines(file: &Path) -> usize {
    let text = fs::read_to_string(file).unwrap();
    let code = text.lines().map(str::trim).take_while(|line| *line != "#[cfg(test)]");
    code.filter(|line| !line.is_empty() && !line.starts_with("//")).count()
}

/// The file itself, or all files of a directory.
fn files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    fs::read_dir(path).unwrap().flat_map(|entry| files(&entry.unwrap().path())).collect()
}

/// The row that counts a file: its own, or its directory's.
fn part_of<'a>(parts: &'a [Part], file: &Path) -> Option<&'a Part> {
    let holds = |part: &&Part| file.starts_with(&part.path);
    parts.iter().filter(holds).max_by_key(|part| part.path.components().count())
}

/// The rows of the table, and the two sums below it: of all lines, and of those that are reached.
fn stated_lines() -> (Vec<Part>, usize, usize) {
    let text = fs::read_to_string(repository().join("SECURITY.md")).unwrap();
    let (_, section) = text.split_once("## Proof-reading the helper").unwrap();
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let number = |cell: &str| cell.replace(',', "").parse::<usize>().ok();
    let rows = section.lines().map(cells).filter(|cells| cells.len() == 7);
    let (mut parts, mut sums) = (Vec::new(), Vec::new());
    for cells in rows {
        let path = repository().join(cells[1].replace('`', ""));
        match (number(&cells[2]), number(&cells[3])) {
            (Some(lines), Some(most)) => {
                let is_reached = match cells[4].as_str() {
                    "yes" => true,
                    "no" => false,
                    other => panic!("{}: {other:?}", path.display()),
                };
                parts.push(Part { path, lines, most, is_reached });
            }
            (Some(lines), None) => sums.push(lines),
            _ => {}
        }
    }
    let [all, reached] = sums[..] else { panic!("two sums, and not {sums:?}") };
    (parts, all, reached)
}

#[test]
fn the_helper_stays_as_small_as_promised() {
    let (parts, all, reached) = stated_lines();
    let sum = |wanted: &dyn Fn(&&Part) -> bool| -> usize {
        parts.iter().filter(wanted).map(|part| part.lines).sum()
    };
    assert_eq!(all, sum(&|_| true), "SECURITY.md's sum");
    assert_eq!(reached, sum(&|part| part.is_reached), "SECURITY.md's sum of what is reached");
    let promised = sum(&|part| part.path.starts_with(repository().join(PROMISE.0)));
    assert!(promised <= PROMISE.1, "{} has {promised} lines", PROMISE.0);
    let mut really_reached = 0;
    for Part { path, lines: stated, most, is_reached } in &parts {
        let of_it = files(path);
        let of_it = of_it.iter().filter(|file| part_of(&parts, file).unwrap().path == *path);
        let (lines, path) = (of_it.map(|file| code_lines(file)).sum::<usize>(), path.display());
        really_reached += if *is_reached { lines } else { 0 };
        assert!(lines <= *most, "{path} has {lines} lines of code, more than {most}: what can go?");
        assert!(
            lines.abs_diff(*stated) <= 10,
            "{path} has {lines} lines of code, and SECURITY.md says {stated}: correct it"
        );
        // A bound that is far away bounds nothing.
        assert!(lines + 50 > *most, "{path} has {lines} lines: lower its {most}");
    }
    assert!(really_reached < MOST_REACHED, "{really_reached} lines can be reached");
}

#[test]
fn all_of_our_own_code_in_the_helper_is_counted() {
    let (parts, ..) = stated_lines();
    let linked = linked_into("wgsep", &[]);
    let metadata = cargo(&["metadata", "--locked", "--no-deps", "--format-version", "1"]);
    let metadata: Value = serde_json::from_str(&metadata).unwrap();
    let packages = metadata["packages"].as_array().unwrap().iter();
    let ours: Vec<_> =
        packages.filter(|package| linked.contains(package["name"].as_str().unwrap())).collect();
    assert_eq!(ours.len(), linked.iter().filter(|name| name.starts_with("wgsep")).count());
    for package in ours {
        let manifest = Path::new(package["manifest_path"].as_str().unwrap());
        // Of the program's own crate, only the two files that are the daemon's have rows.
        let is_program = package["name"] == "wgsep";
        let source = manifest.with_file_name("src");
        let lacks = |file: &&PathBuf| part_of(&parts, file).is_none();
        let uncounted: Vec<_> = files(&source).into_iter().filter(|file| lacks(&file)).collect();
        assert!(uncounted.is_empty() || is_program, "SECURITY.md's table lacks {uncounted:?}");
    }
}
