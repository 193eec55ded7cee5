//! The programs as they are built for other targets: how they are linked and packaged. What holds for this
//! machine's own is in `meta/programs`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::built_for;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::run;
use wgsep_tests::scratch::Scratch;
use wgsep_tests::skip::skip;
use wgsep_tests::{repository, require};

const AARCH64: &str = "aarch64-unknown-linux-gnu";
const MUSL: &str = "x86_64-unknown-linux-musl";

/// Whether an executable asks for no loader, and may be loaded at any address.
#[track_caller]
fn assert_static_and_position_independent(program: &Path) {
    let headers = run(Command::new("readelf").args(["--headers", "--wide"]).arg(program));
    let kind = headers.lines().find(|line| line.trim_start().starts_with("Type:")).unwrap();
    assert!(kind.contains("DYN"), "{}: {kind}", program.display());
    assert!(!headers.contains("INTERP"), "{} wants a loader", program.display());
    // Nothing that can be written can be executed, and what is relocated is read-only after it.
    assert!(!headers.contains(" RWE "), "{}", program.display());
    assert!(headers.contains("GNU_RELRO"), "{}", program.display());
}

#[test]
fn the_dataplane_for_aarch64_is_static_and_position_independent() {
    match built_for(AARCH64, "wgsep-dataplane") {
        Ok(program) => assert_static_and_position_independent(&program),
        Err(reason) => skip(&reason),
    }
}

#[test]
fn with_musl_both_programs_are_static_and_position_independent() {
    for program in ["wgsep", "wgsep-dataplane"] {
        match built_for(MUSL, program) {
            Ok(program) => assert_static_and_position_independent(&program),
            Err(reason) => return skip(&reason),
        }
    }
}

/// Where the program of a running dataplane was loaded.
fn load_address() -> String {
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let maps = fs::read_to_string(format!("/proc/{}/maps", daemon.dataplane())).unwrap();
    let program = maps.lines().find(|line| line.ends_with("/wgsep-dataplane")).unwrap();
    program.split('-').next().unwrap().to_owned()
}

#[test]
fn the_dataplane_is_loaded_at_another_address_each_time() {
    require!(Wgsep);
    let addresses: BTreeSet<_> = (0..3).map(|_| load_address()).collect();
    assert_eq!(addresses.len(), 3, "{addresses:?}");
}

/// The control file of the package that `make deb` makes of programs that `make other-targets` built.
fn control_of_package(target: &str) -> Result<String, String> {
    let built = built_for(target, "wgsep")?;
    let scratch = Scratch::new();
    run(Command::new("make")
        .current_dir(repository())
        .args(["--no-print-directory", "--old-file=build", "deb"])
        .arg(format!("TARGET={target}"))
        .arg(format!("DEBDIR={}", scratch.display()))
        .env("CARGO_TARGET_DIR", built.ancestors().nth(3).unwrap())
        .env_remove("MAKEFLAGS"));
    let made = fs::read_dir(&*scratch).unwrap().map(|entry| entry.unwrap().path());
    let package = made.into_iter().find(|path| path.extension().is_some_and(|end| end == "deb"));
    Ok(run(Command::new("dpkg-deb").arg("--field").arg(package.unwrap())))
}

#[test]
fn make_deb_for_aarch64_makes_an_arm64_package() {
    match control_of_package(AARCH64) {
        Ok(control) => {
            assert!(control.contains("\nArchitecture: arm64\n"), "{control}");
            assert!(control.contains("\nDepends: libc6 (>= 2."), "{control}");
        }
        Err(reason) => skip(&reason),
    }
}

#[test]
fn make_deb_with_musl_makes_a_package_that_needs_no_c_library() {
    match control_of_package(MUSL) {
        Ok(control) => {
            assert!(control.contains("\nArchitecture: amd64\n"), "{control}");
            assert!(control.contains("\nDepends: iproute2, wireguard-tools\n"), "{control}");
        }
        Err(reason) => skip(&reason),
    }
}

/// What `make demo` shows, with the pair that needs no library.
#[test]
fn with_musl_the_demo_works() {
    require!(Wgsep);
    let programs = match built_for(MUSL, "wgsep") {
        Ok(program) => program.parent().unwrap().to_owned(),
        Err(reason) => return skip(&reason),
    };
    let demo = repository().join("tests/demo.sh");
    let shown = run(Command::new(demo).env("WGSEP_BIN_DIR", programs));
    assert!(shown.ends_with("demo: all of it worked\n"), "{shown}");
}
