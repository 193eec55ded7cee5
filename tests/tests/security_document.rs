//! Documents that name tests: those that SECURITY.md names exist, and tests/README.md has each file of tests.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// Every Rust file below a directory, but for what a build made.
fn sources(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut found = Vec::new();
    for path in entries {
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// The names of all tests of the repository.
fn tests() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for path in sources(&repository()) {
        let text = fs::read_to_string(path).unwrap();
        for (_, after) in text.match_indices("#[test]").map(|(at, _)| text.split_at(at)) {
            let name = after.split_once("fn ").and_then(|(_, rest)| rest.split_once('('));
            names.insert(name.unwrap().0.to_owned());
        }
    }
    names
}

/// The words in code spans of a text.
fn code_spans(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The last cells of a table whose header begins in this way.
fn last_cells<'a>(document: &'a str, header: &str) -> Vec<&'a str> {
    let (_, table) = document.split_once(header).unwrap();
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_end_matches('|').rsplit_once('|').unwrap().1).collect()
}

#[test]
fn each_claim_of_security_names_tests_that_exist() {
    let document = fs::read_to_string(repository().join("SECURITY.md")).unwrap();
    let tests = tests();
    let mut rows = 0;
    for (at, header) in document.match_indices("| Because of | Test |") {
        for cell in last_cells(&document[at..], header) {
            let mut named = code_spans(cell).filter(|name| *name != "make reproducible").peekable();
            assert!(named.peek().is_some(), "a claim without a test: {cell}");
            for name in named {
                assert!(tests.contains(name), "SECURITY.md names {name}, which is no test");
            }
            rows += 1;
        }
    }
    assert!(rows > 50, "{rows} rows: the tables were not found");
}

#[test]
fn each_attack_of_security_has_a_test_of_its_number_and_the_other_way_round() {
    let document = fs::read_to_string(repository().join("SECURITY.md")).unwrap();
    let files: BTreeSet<_> = sources(&repository())
        .into_iter()
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    let header = "| | Attack | Outcome | Test |";
    for cell in last_cells(&document, header) {
        for name in code_spans(cell) {
            assert!(files.contains(name), "SECURITY.md names {name}, which is no file of tests");
        }
    }
    let (_, table) = document.split_once(header).unwrap();
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let listed: BTreeSet<u32> =
        rows.map(|row| row.split('|').nth(1).unwrap().trim().parse().unwrap()).collect();
    let tests = tests();
    let numbers = tests.iter().filter_map(|name| name.strip_prefix("attack_")?.get(..2));
    let tried: BTreeSet<u32> = numbers.map(|number| number.parse().unwrap()).collect();
    assert_eq!(listed, tried);
}

#[test]
fn the_readme_of_the_tests_has_each_file_of_tests() {
    let document = fs::read_to_string(repository().join("tests/README.md")).unwrap();
    for (heading, directory, unlisted) in [
        ("| behaviour | file |", "tests/tests", None),
        (
            "| simulated behaviour | module of `dataplane/proto/tests/simulation` |",
            "dataplane/proto/tests/simulation",
            Some("main"),
        ),
    ] {
        let cells = last_cells(&document, heading);
        let listed: BTreeSet<_> = cells.iter().flat_map(|cell| code_spans(cell)).collect();
        let files = sources(&repository().join(directory));
        let files: BTreeSet<_> = files
            .iter()
            .map(|path| path.file_stem().unwrap().to_str().unwrap())
            .filter(|file| Some(*file) != unlisted)
            .collect();
        assert_eq!(listed, files);
    }
}
