//! The version that both programs and the package carry, and what building needs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use wgsep_tests::daemon::unique_interface;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{Process, output, run};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::{readme, repository, require};

/// How long a start that fails may take.
const LIMIT: Duration = Duration::from_secs(20);

/// A source tree with nothing but what `bin/dist/version` reads.
struct Tree(Scratch);

impl Tree {
    fn new() -> Self {
        let tree = Self(Scratch::new());
        fs::create_dir_all(tree.0.join("bin/dist")).unwrap();
        for file in ["Cargo.toml", "bin/dist/version", "bin/dist/check-tools"] {
            // By another process, for the reason that `Scratch::install` has one.
            let mut copy = Command::new("cp");
            run(copy.arg("--preserve=mode").arg(repository().join(file)).arg(tree.0.join(file)));
        }
        tree
    }

    fn git(&self, line: &str, date: &str) {
        let mut git = Command::new("git");
        git.current_dir(&*self.0).args(["-c", "user.name=a", "-c", "user.email=a@localhost"]);
        git.env("GIT_AUTHOR_DATE", "2020-01-01T00:00:00Z").env("GIT_COMMITTER_DATE", date);
        run(git.args(line.split(' ')));
    }

    fn commit(&self, date: &str) {
        self.git("add --all", date);
        self.git("commit --quiet --allow-empty --message=change", date);
    }

    fn version_output(&self) -> Output {
        // Neither the place that it is called from nor the time zone there matters.
        let mut command = Command::new(self.0.join("bin/dist/version"));
        output(command.current_dir("/").env("TZ", "Asia/Tokyo"))
    }

    fn version(&self) -> String {
        let output = self.version_output();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }
}

/// What the workspace says.
fn release() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

#[track_caller]
fn assert_newer(newer: &str, than: &str) {
    let compared = Command::new("dpkg").args(["--compare-versions", newer, "gt", than]).status();
    assert!(compared.unwrap().success(), "{newer} is not newer than {than}");
}

#[test]
fn a_later_commit_is_a_newer_version_and_a_release_newer_than_all_on_its_way() {
    let tree = Tree::new();
    assert_eq!(tree.version(), release(), "an archive without a repository");

    tree.git("init --quiet", "");
    // The first is past midnight of the third's day only in another zone; two are of one day.
    let mut versions = vec!["0.1.0".to_owned()];
    for date in ["2026-11-28T23:30:00-0100", "2026-11-29T09:05:59Z", "2026-11-29T18:30:00Z"] {
        tree.commit(date);
        versions.push(tree.version());
        assert_eq!(versions.last(), Some(&tree.version()), "of one commit");
    }
    assert!(versions[1].contains("~git20261129.003000."), "{versions:?}");
    let start = format!("{}~git20261129.183000.", release());
    let hash = versions[3].strip_prefix(&start).expect(&versions[3]);
    assert!(hash.len() == 7 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()), "{hash}");

    // Files that git does not know are no part of it.
    fs::write(tree.0.join("notes"), "").unwrap();
    assert_eq!(tree.version(), versions[3]);
    fs::write(tree.0.join("bin/dist/check-tools"), "changed").unwrap();
    versions.push(tree.version());
    assert_eq!(versions[4], format!("{}+dirty", versions[3]));
    tree.git("checkout --quiet bin", "");

    // The same commit, or an archive of it, has the same date.
    let date = || run(Command::new(tree.0.join("bin/dist/version")).arg("date"));
    assert_eq!(date(), "1795977000\n");

    tree.git(&format!("tag v{}", release()), "");
    versions.push(tree.version());
    assert_eq!(versions[5], release());
    for pair in versions.windows(2) {
        assert_newer(&pair[1], &pair[0]);
    }
}

/// A version without the commit would be newer than all that have one, and keep them out.
#[test]
fn a_repository_that_git_cannot_read_gives_no_version() {
    let tree = Tree::new();
    fs::write(tree.0.join(".git"), "gitdir: /nowhere\n").unwrap();
    let printed = tree.version_output();
    assert!(!printed.status.success() && printed.stdout.is_empty(), "{printed:?}");
    let mut check = Command::new(tree.0.join("bin/dist/check-tools"));
    let checked = output(check.arg("deb").env_remove("WGSEP_VERSION"));
    let stderr = String::from_utf8_lossy(&checked.stderr);
    assert!(!checked.status.success() && stderr.contains("make deb WGSEP_VERSION="), "{stderr}");
    assert!(output(check.env("WGSEP_VERSION", "1")).status.success());
}

/// `sudo make deb` in a repository that is a user's.
#[test]
fn root_reads_the_version_of_another_users_repository() {
    wgsep_tests::require_root!();
    let tree = Tree::new();
    tree.git("init --quiet", "");
    tree.commit("2026-11-29T18:30:00Z");
    let version = tree.version();
    run(Command::new("chown").args(["--recursive", "65500:65500"]).arg(&*tree.0));
    assert_eq!(tree.version(), version);
}

fn version_of(program: &Path) -> String {
    run(Command::new(program).arg("--version")).trim_end().to_owned()
}

#[test]
fn both_programs_say_the_version_that_make_recorded() {
    let programs = ["wgsep", "wgsep-dataplane"].map(wgsep_program);
    let recorded = fs::read_to_string(programs[0].with_file_name("wgsep.version")).unwrap();
    for program in &programs {
        let name = program.file_name().unwrap().to_str().unwrap();
        assert_eq!(version_of(program), format!("{name} {}", recorded.trim_end()));
    }
    assert!(recorded.starts_with(release()), "{recorded}");
}

/// A dataplane with the helper of another build, as an interrupted update leaves them.
#[test]
fn a_helper_of_another_build_is_refused() {
    require!(Wgsep);
    let scratch = Scratch::new();
    scratch.install("wgsep", "wgsep");
    scratch.install("wgsep-dataplane", "wgsep-dataplane");
    let helper = scratch.join("wgsep");
    let (_, version) =
        version_of(&helper).split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    // The same program with another version in it. The helper's, which it only passes on: the compiler
    // may have made instructions of the one that the dataplane compares with.
    let other = format!("9{}", &version[1..]);
    run(Command::new("sed").arg("-i").arg(format!("s/{version}/{other}/g")).arg(&helper));
    assert_eq!(version_of(&helper), format!("wgsep {other}"));

    let (netns, interface) = (Netns::new(), unique_interface());
    let mut command = netns.command(scratch.join("wgsep"));
    command.args(["-f", &interface]);
    let mut refused = Process::spawn(command, "wgsep of another build");
    let status = refused.exit_within(LIMIT);
    let log = refused.log();
    assert!(!status.success(), "{log}");
    assert!(
        log.contains(&format!(
            "wgsep-dataplane is version {version}, but wgsep is version {other}"
        )) && log.contains("install both programs from one build"),
        "{log}"
    );
}

/// A search path with these programs only.
fn path_of(scratch: &Scratch, programs: &[&str]) -> PathBuf {
    let directory = scratch.join("bin");
    fs::create_dir(&directory).unwrap();
    for program in programs {
        let found = run(Command::new("sh").arg("-c").arg(format!("command -v {program}")));
        symlink(found.trim_end(), directory.join(program)).unwrap();
    }
    directory
}

#[test]
fn all_that_is_missing_for_a_build_is_named_at_once_and_by_the_readme() {
    let readme = readme::block("What building needs, on a Debian that has nothing yet");
    let [_update, line] = &readme[..] else { panic!("{readme:?}") };
    let named: Vec<_> =
        line.strip_prefix("apt install --no-install-recommends ").unwrap().split(' ').collect();

    let (scratch, tree) = (Scratch::new(), Tree::new());
    tree.git("init --quiet", "");
    let check = |path: &Path, goal: &str| {
        let mut check = Command::new(tree.0.join("bin/dist/check-tools"));
        let checked = output(
            check.arg(goal).env("PATH", path).env_remove("CARGO").env_remove("WGSEP_VERSION"),
        );
        assert!(!checked.status.success());
        String::from_utf8(checked.stderr).unwrap()
    };
    let printed = check(&path_of(&scratch, &["sh", "sed", "dirname", "dpkg-deb"]), "deb");
    let [rust, packages] = &printed.lines().collect::<Vec<_>>()[..] else { panic!("{printed}") };
    assert!(rust.contains("there is no cargo in PATH: install Rust 1."), "{rust}");
    let (_, install) = packages.split_once("apt install --no-install-recommends ").unwrap();
    assert_eq!(install, "gcc libc6-dev binutils git");
    for package in install.split(' ').chain(["make"]) {
        assert!(named.contains(&package), "README does not name {package}: {line}");
    }
}

#[test]
fn a_rust_that_is_too_old_is_named() {
    let (scratch, tree) = (Scratch::new(), Tree::new());
    let old = scratch.write_script("cargo", "#!/bin/sh\necho 'cargo 1.66.0 (of Debian 12)'\n");
    let mut check = Command::new(tree.0.join("bin/dist/check-tools"));
    let checked = output(check.arg("build").env("CARGO", &old));
    let stderr = String::from_utf8_lossy(&checked.stderr);
    assert!(stderr.contains("cargo 1.66.0 (of Debian 12) is too old"), "{stderr}");
    assert!(!checked.status.success());
}
