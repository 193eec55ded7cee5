//! wgsep-proto as a library: its examples run, its documentation builds, and nothing in it knows of an
//! operating system.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use wgsep_tests::process::{output, run};
use wgsep_tests::repository;

fn library() -> PathBuf {
    repository().join("dataplane/proto")
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(library()).args(arguments);
    command
}

fn example(name: &str, arguments: &[&str]) -> String {
    run(cargo(&["run", "--locked", "--quiet", "--example", name, "--"]).args(arguments))
}

#[test]
fn two_peers_receive_from_each_other() {
    assert!(example("two_peers", &[]).ends_with("alice received the answer\n"));
}

#[test]
fn a_whole_tunnel_over_udp_takes_less_than_100_lines() {
    let source = fs::read_to_string(library().join("examples/udp_tunnel.rs")).unwrap();
    assert!(source.lines().count() < 100, "{} lines", source.lines().count());
    let printed = example("udp_tunnel", &[]);
    let received: Vec<_> =
        printed.lines().filter_map(|line| line.strip_prefix("through the tunnel: ")).collect();
    assert_eq!(received, ["one", "two", "three"]);
}

#[test]
fn a_simulation_survives_whatever_its_bytes_say() {
    assert!(example("simulation", &["20"]).starts_with("20 runs: "));
}

#[test]
fn documentation_builds_without_a_warning() {
    let mut command = cargo(&["doc", "--locked", "--quiet", "--no-deps", "--all-features"]);
    let built = output(command.env("RUSTDOCFLAGS", "--deny=warnings"));
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
}

/// Crates that bind to a system.
const SYSTEM: [&str; 7] = ["libc", "nix", "rustix", "mio", "socket2", "windows-sys", "getrandom"];

#[test]
fn without_ring_no_crate_of_its_tree_depends_on_a_system() {
    let tree = |features: &[&str]| {
        let edges =
            ["tree", "--locked", "--edges", "normal", "--prefix", "none", "--format", "{p}"];
        let tree = run(cargo(&edges).args(features));
        let names = tree.lines().filter_map(|line| line.split(' ').next());
        names.filter(|name| SYSTEM.contains(name)).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(tree(&["--no-default-features", "--target", "x86_64-unknown-linux-gnu"]), [""; 0]);
    // ring brings some, which shows that this test can see them.
    assert!(!tree(&[]).is_empty());
}

/// What the standard library has of a system, and a state machine has no use for.
const NOT_PURE: [&str; 8] = [
    "std::net::UdpSocket",
    "std::time::Instant",
    "SystemTime",
    "std::thread",
    "std::fs",
    "std::io",
    "std::env",
    "std::process",
];

#[test]
fn its_source_uses_nothing_of_a_system() {
    let sources = run(Command::new("find").arg(library().join("src")).args(["-name", "*.rs"]));
    assert!(sources.lines().count() > 20, "{sources}");
    for source in sources.lines() {
        let text = fs::read_to_string(source).unwrap();
        // Unit tests may, and come last in a file.
        let code = text.split("#[cfg(test)]").next().unwrap();
        for line in code.lines().filter(|line| !line.trim_start().starts_with("//")) {
            for name in NOT_PURE {
                assert!(!line.contains(name), "{source}: {line}");
            }
        }
    }
}
