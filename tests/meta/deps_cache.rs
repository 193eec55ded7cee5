//! What `make deps` keeps in its cache: named after all that it is made of, complete or not there, made
//! once by runs at the same time, and removed when nothing makes it any more.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use wgsep_tests::process::{Process, output, run};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::wait;

const LIMIT: Duration = Duration::from_secs(20);

/// A recipe in place of the one that builds crates: depends on the file `inputs`, and makes the file
/// `content`, of which `slow` prolongs the making and `broken` prevents it.
const RECIPE: &str = r#"#!/bin/sh
set -eu
state=$(dirname "$0")/../..
if [ "$3" = --inputs ]; then
	cat "$state/inputs"
	exit
fi
mkdir "$3"
echo made >>"$state/times"
while [ -e "$state/slow" ]; do sleep 0.05; done
[ ! -e "$state/broken" ] || { echo "the recipe is broken" >&2; exit 1; }
cp "$state/inputs" "$3/content"
"#;

/// A copy of deps.sh with that recipe, and a cache of its own.
struct Deps(Scratch);

impl Deps {
    fn new() -> Self {
        let deps = Self(Scratch::new());
        fs::create_dir_all(deps.0.join("tests/deps")).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deps.sh");
        fs::copy(script, deps.0.join("tests/deps.sh")).unwrap();
        for recipe in ["kernel", "arm64", "debian"] {
            fs::write(deps.0.join("tests/deps").join(recipe), "").unwrap();
        }
        deps.write_recipe(RECIPE);
        deps.write("inputs", "1");
        deps
    }

    fn write(&self, file: &str, text: &str) {
        fs::write(self.0.join(file), text).unwrap();
    }

    fn write_recipe(&self, text: &str) {
        self.0.write_script("tests/deps/crate", text);
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("sh");
        command.arg(self.0.join("tests/deps.sh")).args(arguments);
        command.env("XDG_CACHE_HOME", self.0.join("cache"));
        command
    }

    fn make(&self) {
        run(&mut self.command(&["deny"]));
    }

    /// Where tests look for the entry.
    fn link(&self) -> PathBuf {
        run(&mut self.command(&["where", "cargo-deny"])).trim_end().into()
    }

    fn content(&self) -> Option<String> {
        fs::read_to_string(self.link().join("content")).ok()
    }

    fn times_made(&self) -> usize {
        fs::read_to_string(self.0.join("times")).map_or(0, |times| times.lines().count())
    }

    fn entries(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.join("cache/wgsep")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "lock" && !name.ends_with(".log")).collect()
    }

    fn age(&self, path: &Path) {
        run(Command::new("touch").args(["--no-dereference", "--date", "2 days ago"]).arg(path));
    }
}

#[test]
fn an_entry_is_made_once_and_anew_when_an_input_changes() {
    let deps = Deps::new();
    assert_eq!(deps.content(), None);
    deps.make();
    deps.make();
    assert_eq!((deps.content().as_deref(), deps.times_made()), (Some("1"), 1));
    deps.write("inputs", "2");
    deps.make();
    assert_eq!((deps.content().as_deref(), deps.times_made()), (Some("2"), 2));
}

#[test]
fn a_changed_recipe_has_an_entry_of_its_own() {
    let deps = Deps::new();
    deps.make();
    let before = deps.link();
    deps.write_recipe(&format!("{RECIPE}\n# changed\n"));
    assert_eq!(deps.content(), None, "that of another recipe is used");
    deps.make();
    assert_eq!((deps.content().as_deref(), deps.times_made()), (Some("1"), 2));
    assert!(before.join("content").exists(), "another tree may be using it");
}

#[test]
fn what_no_recipe_makes_any_more_is_removed_after_a_day() {
    let deps = Deps::new();
    deps.make();
    let current = deps.link();
    let (old, of_today) = (current.with_file_name("debian"), current.with_file_name("kernel-0-0"));
    for entry in [&old, &of_today] {
        fs::create_dir(entry).unwrap();
    }
    for path in [&old, &current, &fs::canonicalize(&current).unwrap()] {
        deps.age(path);
    }
    deps.make();
    assert!(!old.exists() && of_today.exists());
    assert_eq!((deps.content().as_deref(), deps.times_made()), (Some("1"), 1));
}

#[test]
fn an_interrupted_or_failed_run_leaves_nothing_that_is_used() {
    let deps = Deps::new();
    deps.write("slow", "");
    let interrupted = Process::spawn(deps.command(&["deny"]), "deps.sh");
    wait::until("the recipe runs", LIMIT, || deps.times_made() == 1);
    drop(interrupted);
    assert_eq!(deps.content(), None);

    fs::remove_file(deps.0.join("slow")).unwrap();
    deps.write("broken", "");
    let failed = output(&mut deps.command(&["deny"]));
    let stderr = String::from_utf8_lossy(&failed.stderr);
    assert!(!failed.status.success() && stderr.contains("the recipe is broken"), "{stderr}");
    assert_eq!(deps.content(), None);

    fs::remove_file(deps.0.join("broken")).unwrap();
    deps.make();
    assert_eq!(deps.content().as_deref(), Some("1"));
    assert_eq!(deps.entries().len(), 2, "the entry and its link: {:?}", deps.entries());
}

#[test]
fn runs_at_the_same_time_make_it_once() {
    let deps = Deps::new();
    deps.write("slow", "");
    let mut first = Process::spawn(deps.command(&["deny"]), "first deps.sh");
    wait::until("the recipe runs", LIMIT, || deps.times_made() == 1);
    let mut second = Process::spawn(deps.command(&["deny"]), "second deps.sh");
    wait::until("it waits", LIMIT, || second.log().contains("waiting for another run"));
    fs::remove_file(deps.0.join("slow")).unwrap();
    assert!(first.exit_within(LIMIT).success() && second.exit_within(LIMIT).success());
    assert_eq!((deps.content().as_deref(), deps.times_made()), (Some("1"), 1));
}

#[test]
fn an_empty_variable_is_as_good_as_none() {
    let deps = Deps::new();
    let mut command = deps.command(&["where", "debian"]);
    let shown = run(command.env("XDG_CACHE_HOME", "").env("HOME", "/home/user"));
    assert!(shown.starts_with("/home/user/.cache/wgsep/debian-"), "{shown}");
}
