//! wgsep-proto-c: its header is current, and a C program with it accesses no memory that it should not.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use wgsep_tests::process::{output, run};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::{cache, repository};

fn library() -> PathBuf {
    repository().join("dataplane/proto/c")
}

fn header() -> String {
    fs::read_to_string(library().join("include/wgsep_tunnel.h")).unwrap()
}

/// Builds the library; the paths of the shared and the static one.
fn build() -> [PathBuf; 2] {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(library()).args(["build", "--locked", "--quiet"]);
    let messages = run(command.args(["--message-format", "json"]));
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let ours = { messages }
        .filter(|message| message["target"]["name"] == "wgsep_tunnel")
        .find(|message| message["filenames"].is_array());
    let ours = ours.expect("cargo names what it built");
    [".so", ".a"].map(|end| {
        let mut paths = ours["filenames"].as_array().unwrap().iter().filter_map(Value::as_str);
        paths.find(|path| path.ends_with(end)).map(PathBuf::from).unwrap()
    })
}

/// What a static library of Rust's needs of the system.
const SYSTEM: [&str; 4] = ["-lgcc_s", "-lpthread", "-ldl", "-lm"];

/// Compiles the program of C with a library, and returns where it is.
fn compile(scratch: &Scratch, library_file: &Path, arguments: &[&str]) -> PathBuf {
    let program = scratch.join("two_ends");
    let mut command = Command::new("gcc");
    command.args(["-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror", "-g", "-O1"]);
    command.args(arguments).arg("-I").arg(library().join("include"));
    command.arg(library().join("tests/two_ends.c")).arg(library_file).args(SYSTEM);
    run(command.arg("-o").arg(&program));
    program
}

const AGREED: &str = "two ends agree\n";

#[test]
fn a_program_of_c_makes_a_tunnel_and_valgrind_finds_no_error_and_no_leak() {
    let ([shared, _], scratch) = (build(), Scratch::new());
    let program = compile(&scratch, &shared, &[]);
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--quiet", "--error-exitcode=9", "--leak-check=full", "--show-leak-kinds=all"]);
    valgrind.args(["--errors-for-leak-kinds=definite,indirect,possible"]);
    let directory = shared.parent().unwrap();
    let ran = output(valgrind.arg(&program).env("LD_LIBRARY_PATH", directory));
    let stderr = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{stderr}");
    assert_eq!(String::from_utf8_lossy(&ran.stdout), AGREED, "{stderr}");
}

#[test]
fn a_program_of_c_makes_a_tunnel_under_the_sanitizers_of_addresses_and_undefined_behaviour() {
    let ([_, archive], scratch) = (build(), Scratch::new());
    let sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
    let program = compile(&scratch, &archive, &sanitizers);
    assert_eq!(run(&mut Command::new(program)), AGREED);
}

#[test]
fn the_header_is_what_cbindgen_writes() {
    let cbindgen = match cache::entry("cbindgen") {
        Ok(entry) => entry.join("bin/cbindgen"),
        Err(reason) => return wgsep_tests::skip::skip(&reason),
    };
    let written = run(Command::new(cbindgen).current_dir(library()).args(["--quiet", "."]));
    assert!(written == header(), "the header is not current: run `make c-header`");
}

#[test]
fn the_program_of_the_manual_compiles_without_a_warning() {
    let manual = fs::read_to_string(library().join("README.md")).unwrap();
    let parts = manual.split("```c\n").skip(1).filter_map(|rest| rest.split("```").next());
    let program: String = parts.collect();
    assert!(program.contains("int run(") && program.contains("int configure("), "{program}");
    let scratch = Scratch::new();
    fs::write(scratch.join("program.c"), program).unwrap();
    let mut command = Command::new("gcc");
    command.args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I"]);
    run(command.arg(library().join("include")).arg(scratch.join("program.c")));
}

/// The functions that the header declares.
fn declared() -> Vec<String> {
    let header = header();
    let names = header.split('(').filter_map(|before| {
        let name = before.rsplit([' ', '*', '\n']).next()?;
        name.starts_with("wgsep_").then(|| name.to_owned())
    });
    let mut names: Vec<_> = names.collect();
    names.sort();
    names.dedup();
    names
}

#[test]
fn the_shared_library_exports_what_the_header_declares_and_nothing_else() {
    let [shared, _] = build();
    let symbols = run(Command::new("nm").args(["--dynamic", "--defined-only"]).arg(shared));
    let mut exported: Vec<_> =
        symbols.lines().filter_map(|line| line.split(' ').nth(2)).map(str::to_owned).collect();
    exported.sort();
    assert!(exported.len() > 10, "{exported:?}");
    assert_eq!(exported, declared());
}

/// What boringtun's wireguard_ffi.h (0.7) declares.
const BORINGTUN: [&str; 14] = [
    "x25519_secret_key",
    "x25519_public_key",
    "x25519_key_to_base64",
    "x25519_key_to_hex",
    "x25519_key_to_str_free",
    "check_base64_encoded_x25519_key",
    "set_logging_function",
    "new_tunnel",
    "tunnel_free",
    "wireguard_write",
    "wireguard_read",
    "wireguard_tick",
    "wireguard_force_handshake",
    "wireguard_stats",
];

#[test]
fn the_manual_has_each_call_and_what_replaces_each_of_boringtun_and_names_only_what_is_there() {
    let manual = fs::read_to_string(library().join("README.md")).unwrap();
    let rows: Vec<_> = manual.lines().filter(|line| line.starts_with("| `")).collect();
    for call in BORINGTUN {
        assert!(rows.iter().any(|row| row.starts_with(&format!("| `{call}`"))), "no row of {call}");
    }
    let declared = declared();
    let (_, calls) = manual.split_once("## Calls").unwrap();
    let (calls, _) = calls.split_once("\n## ").unwrap();
    for name in &declared {
        assert!(calls.contains(&format!("`{name}`")), "the table of calls has no {name}");
    }
    let (header, words) =
        (header(), manual.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'));
    for word in words.filter(|word| word.to_ascii_lowercase().starts_with("wgsep_")) {
        let is_there = declared.iter().any(|name| name == word) || header.contains(word);
        assert!(is_there || word == "wgsep_proto", "the header has no {word}");
    }
}
