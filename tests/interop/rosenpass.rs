//! rosenpass, as crates.io has it, sets preshared keys by the socket for them: two real ends, as wgsep(8) says to run it
//! without systemd.
#![allow(clippy::unwrap_used)]

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::process::{Process, run};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::skip::skip;
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::End;
use wgsep_tests::{cache, manual, require, wait};

/// Two exchanges, on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
/// A user and a group that no account has.
const USER: u32 = 61_000;
const GROUP: u32 = 4242;

/// One end's keys and file.
struct Rosenpass {
    program: PathBuf,
    directory: Scratch,
}

impl Rosenpass {
    fn new(program: PathBuf) -> Self {
        let directory = Scratch::new();
        let (secret, public) = (directory.join("secret"), directory.join("public"));
        let mut command = Command::new(&program);
        command.arg("gen-keys").arg("--secret-key").arg(&secret);
        run(command.arg("--public-key").arg(&public));
        fs::set_permissions(&*directory, Permissions::from_mode(0o711)).unwrap();
        fs::set_permissions(&secret, Permissions::from_mode(0o400)).unwrap();
        chown(&secret, Some(USER), None).unwrap();
        Self { program, directory }
    }

    /// Writes wgsep(8)'s file for it. The other's endpoint is left out where it is to wait for that.
    fn configure(&self, end: &End, other: &End, others: &Self, begins: bool) {
        fs::copy(others.directory.join("public"), self.directory.join("peer")).unwrap();
        let text = manual::text("with the peer's key of WireGuard last")
            .replace("/etc/rosenpass", &self.directory.display().to_string())
            .replace("wg0", &end.daemon.interface)
            .replace("PUBLIC KEY", &other.key.public)
            .replace("192.0.2.2", &other.side.outer(Family::V4).to_string());
        let is_kept = |line: &&str| begins || !line.starts_with("endpoint");
        let text: Vec<_> = text.lines().filter(is_kept).collect();
        let file = self.directory.join(format!("{}.toml", end.daemon.interface));
        fs::write(&file, text.join("\n")).unwrap();
        fs::set_permissions(file, Permissions::from_mode(0o444)).unwrap();
    }

    /// Runs wgsep(8)'s command.
    fn start(&self, end: &End) -> Process {
        let block = manual::block("Without systemd, where");
        let [line] = &block[..] else { panic!("{block:?}") };
        let line = line
            .replace("/etc/rosenpass", &self.directory.display().to_string())
            .replace("wg0", &end.daemon.interface)
            .replace("--reuid rosenpass", &format!("--reuid {USER}"))
            .replace("--regid rosenpass", &format!("--regid {GROUP}"))
            .replace(" rosenpass ", &format!(" {} ", self.program.display()));
        let mut command = end.daemon.netns.command("sh");
        command.args(["-ec", &format!("exec {line}")]).env("RUST_LOG", "debug");
        Process::spawn(command, format!("rosenpass of {}", end.daemon.interface))
    }
}

/// The one peer's preshared key, if it has one.
fn key(end: &End) -> Option<String> {
    let shown = end.daemon.wg("show", "preshared-keys");
    let (_, key) = shown.trim().split_once('\t').unwrap();
    (key != "(none)").then(|| key.to_owned())
}

/// The key that both have, once it is another than one before.
#[track_caller]
fn agreed(ends: [&End; 2], before: Option<&String>, both: &[Process]) -> String {
    let found = wait::poll(LIMIT, || {
        let [left, right] = ends.map(key);
        left.filter(|left| right.as_ref() == Some(left) && before != Some(left))
    });
    found.unwrap_or_else(|| {
        let logs: Vec<_> = both.iter().map(Process::log).collect();
        panic!("no new key that both have: {}", logs.join("\n"))
    })
}

#[test]
fn rosenpass_sets_and_rotates_the_key_of_both_ends_without_root() {
    require!(Wgsep);
    let program = match cache::entry("rosenpass") {
        Ok(entry) => entry.join("bin/rosenpass"),
        Err(reason) => return skip(&reason),
    };
    let (left, right) = link::joined();
    let start = |netns| {
        Daemon::start_with(Wgsep, netns, |command| {
            command.args(["--psk-group", &GROUP.to_string()]);
        })
    };
    let left = End::new(Side::Left, start(&left));
    let right = End::new(Side::Right, start(&right));
    left.configure(&right.key.public, Some(right.endpoint(Family::V4)), None);
    right.configure(&left.key.public, None, None);
    let configured = |end: &End| {
        let text = end.daemon.wg("showconf", "");
        let others = text.lines().filter(|line| !line.starts_with("PresharedKey"));
        others.map(str::to_owned).collect::<Vec<_>>()
    };
    let before = [&left, &right].map(configured);

    let [ours, theirs] = [(); 2].map(|()| Rosenpass::new(program.clone()));
    ours.configure(&left, &right, &theirs, true);
    theirs.configure(&right, &left, &ours, false);
    let mut running = vec![theirs.start(&right), ours.start(&left)];
    let ends = [&left, &right];
    let first = agreed(ends, None, &running);
    assert_eq!([&left, &right].map(configured), before, "more than a key was set");
    let handshake = || {
        let (netns, interface) = (&left.daemon.netns, &left.daemon.interface);
        netns.run(format!("ip link set {interface} down"));
        netns.run(format!("ip link set {interface} up"));
        until_ping(netns, right.side.inner(Family::V4));
    };
    handshake();

    // The one that began does so again when it is started again.
    drop(running.pop());
    running.push(ours.start(&left));
    let second = agreed(ends, Some(&first), &running);
    assert_ne!(first, second);
    handshake();
    for process in &running {
        let log = process.log();
        assert!(!log.contains("could not pass psk"), "{log}");
        assert!(!log.contains(&first) && !log.contains(&second), "a key in the log");
    }
    for end in ends {
        let log = end.daemon.process.log();
        assert!(!log.contains("refused") && !log.contains("nothing changed"), "{log}");
    }
}
