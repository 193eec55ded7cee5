//! wgsep-proto as a library: its examples run, its documentation builds, and nothing in it knows of an
//! operating system.

use std::fs;
use std::net::UdpSocket;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use wgsep_proto::PrivateKey;
use wgsep_tests::process::{Process, output, run};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::{repository, wait};

fn library() -> PathBuf {
    repository().join("dataplane/proto")
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(library()).args(arguments);
    command
}

/// A command of cargo for an example, with the features that examples need.
fn of_example(command: &str, name: &str) -> Command {
    cargo(&[command, "--locked", "--quiet", "--features", "getrandom", "--example", name])
}

fn example(name: &str, arguments: &[&str]) -> String {
    run(of_example("run", name).arg("--").args(arguments))
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

/// Longer than an initiation takes to be repeated, which is 5 s, on any machine.
const LIMIT: Duration = Duration::from_secs(120);

/// The program of the README, with keys and an endpoint of its peer.
fn client(endpoint: &str) -> Command {
    run(&mut of_example("build", "client"));
    let [ours, theirs] = [1, 2].map(|byte| PrivateKey::from_bytes([byte; 32]).unwrap());
    let mut command = of_example("run", "client");
    command.env("PRIVATE_KEY", ours.to_base64().as_str());
    command.env("PEER", theirs.public_key().to_base64()).env("ENDPOINT", endpoint);
    command
}

#[test]
fn the_program_of_the_readme_is_the_example_client() {
    let source = fs::read_to_string(library().join("examples/client.rs")).unwrap();
    let program = &source[source.find("use ").unwrap()..];
    let readme = fs::read_to_string(library().join("README.md")).unwrap();
    let (_, code) = readme.split_once("```rust,no_run\n").unwrap();
    assert_eq!(code.split_once("```\n").unwrap().0, program);
}

/// A datagram whenever a program looks for one, so that no wait of it ends by time.
const FLOOD: &str = r#"
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

ssize_t recvfrom(int fd, void *buffer, size_t len, int flags, struct sockaddr *source, socklen_t *source_len) {
    struct sockaddr_in from = {.sin_family = AF_INET, .sin_port = htons(9), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    memcpy(source, &from, sizeof from);
    *source_len = sizeof from;
    memset(buffer, 0, 4);
    return 4;
}
"#;

#[test]
fn the_program_of_the_readme_expires_its_timers_under_a_flood_of_datagrams() {
    let scratch = Scratch::new();
    fs::write(scratch.join("flood.c"), FLOOD).unwrap();
    let flood = scratch.join("flood.so");
    let mut compiler = Command::new("gcc");
    run(compiler.args(["-shared", "-fPIC", "-o"]).arg(&flood).arg(scratch.join("flood.c")));

    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let mut command = client(&socket.local_addr().unwrap().to_string());
    // It prints a line for each datagram.
    command.env("LD_PRELOAD", flood).stdout(Stdio::null()).stderr(Stdio::null());
    let _client = Unlogged(command.process_group(0).spawn().unwrap());
    for initiation in ["the first", "the repeated"] {
        let received = socket.recv_from(&mut [0; 256]);
        assert_eq!(received.ok().map(|(len, _)| len), Some(148), "{initiation} initiation");
    }
}

/// A child whose process group is killed when it is dropped, and whose output is not kept.
struct Unlogged(Child);

impl Drop for Unlogged {
    fn drop(&mut self) {
        let _gone = killpg(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGKILL);
        let _status = self.0.wait();
    }
}

#[test]
fn the_program_of_the_readme_goes_on_while_nothing_can_be_sent() {
    // Linux refuses a broadcast to a socket that did not ask for it, whatever the network.
    let client = Process::spawn(client("255.255.255.255:9"), "client");
    wait::until("a second initiation", LIMIT, || {
        client.log().matches("cannot send to 255.255.255.255:9: ").count() >= 2
    });
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

#[test]
fn the_readme_names_the_targets_that_ci_compiles_for_and_those_that_it_runs() {
    let readme = fs::read_to_string(library().join("README.md")).unwrap();
    let (_, section) = readme.split_once("## Where it runs").unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    let stated: Vec<_> = rows
        .map(|(target, how)| {
            let is_run =
                ["in an emulator", "in wine", "in node"].iter().any(|way| how.contains(way));
            format!("{} {target}", if is_run { "run" } else { "check" })
        })
        .collect();
    let script = run(Command::new(repository().join("tests/targets.sh")).arg("list"));
    assert_eq!(stated, script.lines().collect::<Vec<_>>());
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

/// The tests of the rows of the README's table: of our cell, and of the cells of others that have no link.
const ROWS: [(&str, &str, Option<&str>); 14] = [
    ("It is", "a_device_says_which_peer_a_packet_came_from", None),
    ("Time", "its_source_uses_nothing_of_a_system", None),
    ("Timers", "persistent_keepalives_are_sent_in_the_interval_that_is_set", None),
    ("Timers can be changed", "each_time_is_taken_within_its_limits_and_refused_beyond", None),
    (
        "Random numbers",
        "generated_keys_are_what_the_generator_gives_but_never_all_zeros",
        Some("a_noise_library_takes_random_numbers_or_has_the_systems"),
    ),
    (
        "A buffer that is too short",
        "a_buffer_that_is_too_short_and_a_range_outside_of_it_change_nothing",
        Some("a_short_buffer_is_an_error_here_and_in_snow_and_a_panic_in_boringtun"),
    ),
    ("Opens", "a_packet_is_sealed_into_the_buffer_it_is_given_and_opened_where_it_arrives", None),
    ("Batches", "a_batch_of_any_lengths_arrives_whole_and_in_order", None),
    (
        "Allocations for a packet",
        "tunnels_allocate_nothing_for_a_packet_in_buffers_of_the_caller",
        Some("packets_cost_allocations_in_gotatun_alone"),
    ),
    (
        "Packets padded to 16 bytes, so that lengths show less",
        "padding_is_to_16_but_never_past_the_mtu",
        Some("packets_are_padded_here_and_in_gotatun_if_it_is_asked_to"),
    ),
    (
        "Of too many waiting packets",
        "staging_keeps_the_newest_128",
        Some("of_too_many_waiting_packets_the_newest_are_kept_here_and_the_oldest_by_the_others"),
    ),
    ("Follows a peer that roams", "an_endpoint_that_moves_with_data_is_an_event_once", None),
    (
        "All-zero results of Diffie-Hellman",
        "points_of_low_order_and_ones_not_reduced_are_what_they_are_to_the_ladder",
        Some("a_peer_whose_key_gives_no_secret_is_refused_here_alone"),
    ),
    ("Unsafe code in the state machine", "the_protocol_has_no_unsafe_code", None),
];

/// Cells that claim nothing: what was not looked at, and what a library does not have.
const NOTHING: [&str; 2] = ["–", "none"];

/// Whether a test, or another function without arguments, has this name.
fn is_test() -> impl Fn(&str) -> bool {
    let named = run(Command::new("git").current_dir(repository()).args(["grep", "-h", "^ *fn "]));
    move |test: &str| named.contains(&format!("fn {test}()"))
}

#[test]
fn each_test_that_the_security_page_names_exists() {
    let page = fs::read_to_string(library().join("SECURITY.md")).unwrap();
    let (mut names, is_test) = (0, is_test());
    // A test's name is a sentence; no other name in the page has that many words.
    for name in page.split('`').skip(1).step_by(2).filter(|code| code.matches('_').count() > 3) {
        assert!(is_test(name), "{name}");
        names += 1;
    }
    assert!(names > 8, "{names}");
    for (target, _) in wgsep_simulation::fuzz::TARGETS {
        assert!(target == "aead" || page.contains(&format!("`{target}`")), "{target}");
    }
}

#[test]
fn each_cell_of_the_readmes_table_has_a_test_or_a_link() {
    let readme = fs::read_to_string(library().join("README.md")).unwrap();
    let (_, table) = readme.split_once("| It is |").unwrap();
    let (table, _) = table.split_once("<!-- end -->").unwrap();
    let table = format!("| It is |{table}");
    let exists = is_test();
    let rows: Vec<_> = table.lines().collect();
    assert_eq!(rows.len(), ROWS.len(), "a row without a test, or a test without its row");
    for (row, (name, ours, theirs)) in rows.iter().zip(ROWS) {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        assert_eq!((cells[0], cells.len()), (name, 6), "{row}");
        assert!(exists(ours) && theirs.is_none_or(&exists), "{name}: no such test");
        for cell in &cells[2..] {
            let is_linked = cell.contains("](https://");
            assert!(is_linked || theirs.is_some() || NOTHING.contains(cell), "{name}: {cell}");
        }
    }
}

/// The workspace of the other libraries is not part of `cargo test --workspace`.
#[test]
fn ci_runs_the_facts_of_the_other_libraries() {
    let facts = fs::read_to_string(repository().join("tests/libraries/tests/facts.rs")).unwrap();
    for (name, _, theirs) in ROWS {
        assert!(theirs.is_none_or(|test| facts.contains(&format!("fn {test}()"))), "{name}");
    }
    let ci = fs::read_to_string(repository().join(".ci/run")).unwrap();
    assert!(ci.contains("\nmake --no-print-directory test-libraries\n"));
    let recipe = run(Command::new("make")
        .current_dir(repository())
        .args(["--no-print-directory", "--dry-run", "test-libraries"])
        .env("CARGO", "cargo"));
    assert!(recipe.contains("cargo test --locked --manifest-path tests/libraries/Cargo.toml"));
}

#[test]
fn the_protocol_has_no_unsafe_code() {
    let root = fs::read_to_string(library().join("src/lib.rs")).unwrap();
    assert!(root.contains("#![forbid(unsafe_code)]"));
}

/// Off the tree, a relative link leads nowhere.
#[test]
fn the_pages_of_the_packages_have_absolute_links_alone() {
    for page in ["proto/README.md", "proto/SECURITY.md", "aead/README.md"] {
        let text = fs::read_to_string(repository().join("dataplane").join(page)).unwrap();
        for link in text.split("](").skip(1) {
            // Those into the documentation are for rustdoc, which checks them.
            let is_item = page == "proto/SECURITY.md" && link.starts_with("crate::");
            assert!(link.starts_with("https://") || is_item, "{page}: {}", &link[..20]);
        }
    }
}

/// The example of the README, and that secret keys have no `Debug`.
#[test]
fn the_code_of_the_documentation_is_what_it_says() {
    let test = ["test", "--locked", "--quiet", "--doc", "--features", "getrandom"];
    let printed = run(&mut cargo(&test));
    assert!(printed.contains("0 failed"), "{printed}");
}

#[test]
fn both_crates_can_be_published_with_their_licence() {
    for (package, crate_name) in [("proto", "wgsep-proto"), ("aead", "wgsep-aead")] {
        let list = ["package", "--locked", "--allow-dirty", "--list", "--package", crate_name];
        let files = run(&mut cargo(&list));
        let has = |file: &str| files.lines().any(|one| one == file);
        assert!(["LICENSE", "README.md", "src/lib.rs"].into_iter().all(has), "{files}");
        let place = repository().join("dataplane").join(package).join("LICENSE");
        let licence = fs::read(repository().join("LICENSE")).unwrap();
        assert_eq!(fs::read(place).unwrap(), licence);
    }
}
