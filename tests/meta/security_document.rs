//! Documents that name tests: those that SECURITY.md names exist, and tests/README.md has each file of tests. And that no
//! file is left half merged.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use wgsep_tests::process::output;
use wgsep_tests::repository;

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
    let files = sources(&repository());
    let is_file = |name: &str| files.iter().any(|path| path.with_extension("").ends_with(name));
    let header = "| | Attack | Outcome | Test |";
    for cell in last_cells(&document, header) {
        for name in code_spans(cell) {
            assert!(is_file(name), "SECURITY.md names {name}, which is no file of tests");
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

/// The files of a directory of tests, by their names.
fn names_in(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().map(|entry| entry.unwrap().path());
    let sources =
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    sources.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

/// Each group of tests, which is one program, and the names of its files.
fn groups() -> Vec<(PathBuf, BTreeSet<String>)> {
    let entries = fs::read_dir(repository().join("tests")).unwrap();
    let directories = entries.map(|entry| entry.unwrap().path());
    let groups = directories.filter(|directory| directory.join("main.rs").exists());
    let with_files = groups.map(|group| {
        let mut files = names_in(&group);
        files.remove("main");
        (group, files)
    });
    with_files.collect()
}

#[test]
fn the_readme_of_the_tests_has_each_file_of_tests() {
    let document = fs::read_to_string(repository().join("tests/README.md")).unwrap();
    let cells = last_cells(&document, "| behaviour | file |");
    let listed: BTreeSet<_> =
        cells.iter().flat_map(|cell| code_spans(cell)).map(str::to_owned).collect();
    let mut files = BTreeSet::new();
    for (group, names) in groups() {
        let group = group.file_name().unwrap().to_str().unwrap();
        // Those that are programs of their own are there by their name only.
        if names.is_empty() {
            files.insert(group.to_owned());
        }
        files.extend(names.iter().map(|name| format!("{group}/{name}")));
    }
    assert_eq!(listed, files);

    let simulation = "dataplane/proto/tests/simulation";
    let cells =
        last_cells(&document, &format!("| simulated behaviour | module of `{simulation}` |"));
    let listed: BTreeSet<_> =
        cells.iter().flat_map(|cell| code_spans(cell)).map(str::to_owned).collect();
    let mut files = names_in(&repository().join(simulation));
    files.remove("main");
    assert_eq!(listed, files);
}

/// What git leaves in a file where it cannot merge two changes, and what takes the place of both.
#[test]
fn no_file_has_the_marks_of_a_merge_that_was_not_resolved() {
    let mut grep = Command::new("git");
    grep.current_dir(repository()).args(["grep", "-I", "-n", "-E", "^(<{7}|>{7}|[|]{7}) "]);
    let found = output(&mut grep);
    // With 1 git grep says that it found nothing.
    assert_eq!(found.status.code(), Some(1), "{}", String::from_utf8_lossy(&found.stdout));
}

/// A file that no `mod` names is not compiled, and its tests never run.
#[test]
fn each_file_of_a_group_is_a_module_of_it() {
    let groups = groups();
    assert!(groups.len() > 4, "{groups:?}");
    for (group, files) in groups {
        let main = fs::read_to_string(group.join("main.rs")).unwrap();
        let modules = main.lines().filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'));
        let modules: BTreeSet<_> = modules.map(str::to_owned).collect();
        assert_eq!(modules, files, "{}", group.display());
    }
}
