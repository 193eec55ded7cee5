//! The Debian source package: the tree, its crates, and rules that make the package of `make deb` without a network.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{output, run};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::skip::skip;
use wgsep_tests::{machine, repository, require};

#[test]
fn a_source_package_has_all_that_the_package_is_built_from_without_a_network() {
    require!(Wgsep);
    if Command::new("dpkg-source").arg("--version").output().is_err() {
        return skip("dpkg-source is missing: install dpkg-dev");
    }
    let (scratch, netns) = (Scratch::new(), Netns::new());
    let mut make = Command::new("make");
    make.current_dir(repository()).env_remove("MAKEFLAGS");
    make.args(["--no-print-directory", "source-package"]);
    let made = output(make.arg(format!("DEBDIR={}", scratch.display())));
    let said = String::from_utf8_lossy(&made.stderr);
    if said.contains("failed to download") {
        return skip("the crates of other systems are not there, and there is no network");
    }
    assert!(made.status.success(), "{said}");
    let files_with = |end: &str| -> Vec<PathBuf> {
        let files = fs::read_dir(&*scratch).unwrap().map(|file| file.unwrap().path());
        files.filter(|file| file.to_str().unwrap().ends_with(end)).collect()
    };
    let [dsc] = &files_with(".dsc")[..] else { panic!("{:?}", files_with("")) };
    let tree = scratch.join("tree");
    run(Command::new("dpkg-source").args(["--no-check", "--extract"]).arg(dsc).arg(&tree));
    let tracked = run(Command::new("git").current_dir(repository()).args(["ls-files"]));
    for file in tracked.lines() {
        assert!(tree.join(file).symlink_metadata().is_ok(), "{file} is missing");
    }
    let top = |directory: PathBuf| -> BTreeSet<_> {
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    };
    let tops: BTreeSet<_> = tracked.lines().filter_map(|file| file.split('/').next()).collect();
    let added: Vec<_> = top(tree.clone())
        .into_iter()
        .filter(|name| !tops.contains(name.to_str().unwrap()))
        .collect();
    // dpkg-source notes in .pc which patches it applied.
    assert_eq!(added, [".pc", "debian", "vendor"]);

    // With the programs as they are built; cargo decides without a network what they are made of.
    let _stage = machine::stage();
    let built = wgsep_program("wgsep");
    let mut rules = netns.command("debian/rules");
    rules.current_dir(&tree).args(["binary", "MAKE=make --old-file=build"]).env_remove("MAKEFLAGS");
    rules.env("CARGO_TARGET_DIR", built.ancestors().nth(2).unwrap());
    let done = output(&mut rules);
    assert!(done.status.success(), "{done:?}");
    let [deb] = &files_with(".deb")[..] else { panic!("{:?}", files_with("")) };
    let field = |name: &str| {
        run(Command::new("dpkg-deb").arg("--field").arg(deb).arg(name)).trim_end().to_owned()
    };
    let version = run(Command::new(&built).arg("--version"));
    let upstream = field("Version").strip_suffix("-1").unwrap().to_owned();
    assert!(dsc.to_str().unwrap().ends_with(&format!("wgsep_{}.dsc", field("Version"))));
    // The programs may have been built from an earlier commit.
    assert_eq!(upstream.split('~').next(), version.trim_end()["wgsep ".len()..].split('~').next());
    let listed = fs::read_to_string(tree.join("debian/files")).unwrap();
    assert_eq!(listed.split(' ').next(), deb.file_name().unwrap().to_str());
    if Command::new("lintian").arg("--version").output().is_ok() {
        let mut lintian = Command::new("lintian");
        let judged = output(lintian.args(["--allow-root", "--fail-on", "error"]).args([dsc, deb]));
        assert!(judged.status.success(), "{judged:?}");
    }
}
