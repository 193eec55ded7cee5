//! What the built programs contain, read from the files that are installed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::run;
use wgsep_tests::require;

/// Names that code of cryptography, of the protocol and of the dataplane leaves in a program: in
/// its symbols and in the paths of its line tables.
const DATAPLANE_ONLY: [&str; 8] = [
    "chacha20",
    "poly1305",
    "x25519",
    "curve25519",
    "blake2",
    "ring_core",
    "wgsep_proto",
    "wgsep_dataplane",
];

fn contains(program: &[u8], name: &str) -> bool {
    program.windows(name.len()).any(|window| window == name.as_bytes())
}

#[test]
fn the_helper_has_no_cryptography_no_protocol_and_no_uapi_parser() {
    let helper = fs::read(wgsep_program("wgsep")).unwrap();
    let dataplane = fs::read(wgsep_program("wgsep-dataplane")).unwrap();
    // Were the programs stripped, the absence of a name would show nothing.
    assert!(contains(&helper, "wgsep_monitor"), "the helper has no symbols to look at");
    for name in DATAPLANE_ONLY {
        assert!(
            contains(&dataplane, name),
            "{name} is not in the dataplane: look for another name"
        );
        assert!(!contains(&helper, name), "{name} is in the helper");
    }
}

/// What ships is attacked, and contains no attack.
#[test]
fn no_attacker_is_in_a_program_that_ships() {
    let names = ["wgsep_hostile", "hostile-dataplane"];
    let hostile = fs::read(wgsep_program("hostile-dataplane")).unwrap();
    assert!(contains(&hostile, names[0]), "the hostile dataplane has no symbols to look for");
    for program in ["wgsep", "wgsep-dataplane"] {
        let program_file = fs::read(wgsep_program(program)).unwrap();
        for name in names {
            assert!(!contains(&program_file, name), "{name} is in {program}");
        }
    }
}

/// A program says where it was built by panics' messages and by line tables. Two builds in different
/// directories must not differ by that; `make reproducible` compares all of the bytes.
#[test]
fn no_program_has_a_path_of_the_machine_that_built_it() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let cargo_home = std::env::var("CARGO_HOME")
        .unwrap_or_else(|_| format!("{}/.cargo", std::env::var("HOME").unwrap()));
    for program in ["wgsep", "wgsep-dataplane"] {
        let built = wgsep_program(program);
        let program_file = fs::read(&built).unwrap();
        let target = built.ancestors().nth(2).unwrap();
        assert!(contains(&program_file, "/cargo/registry/src/"), "{program} has no such paths");
        for place in [repository, target, Path::new(&cargo_home)] {
            let place = place.to_str().unwrap();
            assert!(!contains(&program_file, place), "{place} is in {program}");
        }
    }
}

/// Arithmetic on hostile bytes must not go on with a wrong length. A message of the panic is in a program only
/// where its code checks.
#[test]
fn both_programs_check_arithmetic_for_overflow() {
    for program in ["wgsep", "wgsep-dataplane"] {
        let program_file = fs::read(wgsep_program(program)).unwrap();
        assert!(contains(&program_file, "panic_const_add_overflow"), "{program}");
    }
}

fn headers(program: &str) -> String {
    run(Command::new("readelf")
        .args(["--file-header", "--program-headers", "--dynamic", "--wide"])
        .arg(wgsep_program(program)))
}

/// It is executed by descriptor inside an empty root, where no loader could be found.
#[test]
fn the_dataplane_is_static_and_position_independent() {
    let headers = headers("wgsep-dataplane");
    assert!(headers.contains("DYN (Position-Independent Executable file)"), "{headers}");
    assert!(!headers.contains("INTERP"), "{headers}");
    assert!(!headers.contains("(NEEDED)"), "{headers}");
}

#[test]
fn both_programs_are_hardened() {
    for program in ["wgsep", "wgsep-dataplane"] {
        let headers = headers(program);
        assert!(headers.contains("DYN"), "{program} is at a fixed address");
        assert!(headers.contains("GNU_RELRO") && headers.contains("NOW"), "{program}: {headers}");
        let stack = headers.lines().find(|line| line.contains("GNU_STACK")).unwrap();
        assert!(!stack.contains("RWE"), "{program} has an executable stack");
        let mode = fs::metadata(wgsep_program(program)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7022, 0, "{program} may be written by others, or is setuid: {mode:o}");
    }
}

/// As both run: the start of what their headers ask to be read-only after relocation, and its permissions.
#[test]
fn what_is_relocated_at_the_start_can_be_written_no_more() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    for (program, pid) in [("wgsep", daemon.process.pid()), ("wgsep-dataplane", daemon.dataplane())]
    {
        let headers = headers(program);
        let relro = headers.lines().find(|line| line.contains("GNU_RELRO")).unwrap();
        let hex = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap();
        let linked_at = hex(relro.split_whitespace().nth(2).unwrap());
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let range = |line: &str| {
            let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
            hex(start)..hex(end)
        };
        let file = format!("/{program}");
        let first = maps.lines().find(|line| line.ends_with(&file)).unwrap();
        let place = range(first).start + linked_at;
        let mapped = maps.lines().find(|line| range(line).contains(&place)).unwrap();
        assert!(mapped.contains(" r--p "), "{program}: {mapped}");
    }
}

/// RUSTFLAGS, which `make` sets, takes the place of cargo's configuration.
#[test]
fn the_programs_are_built_with_what_cargo_is_configured_for() {
    let [configuration, makefile] = [".cargo/config.toml", "Makefile"]
        .map(|file| std::fs::read_to_string(wgsep_tests::repository().join(file)).unwrap());
    let lines = configuration.lines().filter(|line| line.starts_with("rustflags = "));
    let configured: std::collections::BTreeSet<_> = lines
        .flat_map(|line| line.split(['[', ',', ']']))
        .filter(|word| word.contains('='))
        .filter_map(|word| {
            Some(word.trim().strip_prefix('"')?.strip_suffix('"')?.replace('\\', ""))
        })
        .collect();
    assert_eq!(configured.len(), 2, "{configured:?}");
    for flag in configured {
        assert!(makefile.contains(&format!("--cfg {flag}")), "the Makefile lacks {flag}");
    }
}
