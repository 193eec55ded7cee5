//! Mistakes of the operator: each is one clear line and a status, and breaks nothing that runs.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use wgsep_tests::daemon::{Daemon, remove_files, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{self, Process};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::uapi::{Uapi, is_answering};
use wgsep_tests::{procfs, require, wait};

/// How long a refusal may take.
const LIMIT: &str = "10";

/// Runs wgsep in the foreground with these arguments, for it to refuse.
fn refused(netns: &Netns, arguments: &[&str]) -> String {
    let mut command = netns.command("timeout");
    command.arg(LIMIT).arg(wgsep_program("wgsep")).args(arguments);
    message_of_refusal(&process::output(&mut command))
}

/// The one line of stderr with which a command failed.
#[track_caller]
fn message_of_refusal(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let code = output.status.code();
    // 124 is timeout(1)'s: it started instead of refusing.
    assert!(matches!(code, Some(1..=123)), "{}: {stderr}", output.status);
    assert_eq!(stderr.trim_end().lines().count(), 1, "more than one line: {stderr}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    stderr
}

/// A command that runs wgsep in mounts of its own, which `script` has changed first.
fn in_private_mounts(netns: &Netns, script: &str, arguments: &[&str]) -> Command {
    let script = format!("{script}; exec \"$@\"");
    let mut command = netns.command("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-ec", &script, "sh"]);
    command.args(arguments);
    command
}

#[test]
fn attack_11_impossible_interface_names_are_refused() {
    require!(Wgsep);
    let netns = Netns::new();
    let names = [
        "",
        ".",
        "..",
        "a/b",
        "../x",
        "with space",
        "tab\there",
        "line\nfeed",
        "sixteen-bytes-xx",
        "%s%n",
    ];
    for name in names {
        let message = refused(&netns, &["-f", name]);
        assert!(message.contains("name"), "{name:?} is refused with {message}");
        assert!(!socket_path(name).exists(), "a socket was left behind for {name:?}");
    }
    let links = netns.run("ip -o link");
    assert_eq!(links.lines().count(), 1, "more than the loopback: {links}");
}

#[test]
fn a_name_in_use_is_refused_and_its_owner_left_alone() {
    require!(Wgsep);
    let (netns, name) = (Netns::new(), unique_interface());
    netns.run(format!("ip link add {name} type veth peer name other"));
    let message = refused(&netns, &["-f", &name]);
    assert!(message.contains(&name), "{message}");
    assert!(netns.run(format!("ip -d link show {name}")).contains("veth"));
    assert!(!socket_path(&name).exists(), "a socket was left behind");
}

#[test]
fn without_the_tun_device_it_says_so() {
    require!(Wgsep);
    let (netns, name) = (Netns::new(), unique_interface());
    let program = wgsep_program("wgsep");
    let arguments = ["timeout", LIMIT, program.to_str().unwrap(), "-f", &name];
    let mut command = in_private_mounts(&netns, "mount -t tmpfs tmpfs /dev/net", &arguments);
    let message = message_of_refusal(&process::output(&mut command));
    assert!(message.contains("/dev/net/tun"), "{message}");
    assert!(!socket_path(&name).exists(), "a socket was left behind");
}

/// A user may not be able to reach the build directory, so it is shown to them at /mnt.
#[test]
fn without_privilege_it_names_the_capability() {
    require!(Wgsep);
    let (netns, name) = (Netns::new(), unique_interface());
    let programs = wgsep_program("wgsep");
    let programs = programs.parent().map(Path::display).unwrap();
    let arguments = ["setpriv", "--reuid=61000", "--regid=61000", "--clear-groups"];
    let arguments = [&arguments[..], &["timeout", LIMIT, "/mnt/wgsep", "-f", &name]].concat();
    let script = format!("mount --bind {programs} /mnt");
    let mut command = in_private_mounts(&netns, &script, &arguments);
    let message = message_of_refusal(&process::output(&mut command));
    assert!(message.contains("CAP_NET_ADMIN"), "{message}");
}

#[test]
fn root_without_the_capability_gets_an_error_with_its_name() {
    require!(Wgsep);
    let (netns, name) = (Netns::new(), unique_interface());
    let mut command = netns.command("setpriv");
    command.args(["--bounding-set=-net_admin", "timeout", LIMIT]);
    command.arg(wgsep_program("wgsep")).args(["-f", &name]);
    let message = message_of_refusal(&process::output(&mut command));
    assert!(message.contains("CAP_NET_ADMIN"), "{message}");
    assert!(!socket_path(&name).exists(), "a socket was left behind");
}

#[test]
fn a_missing_socket_directory_is_made() {
    require!(Wgsep);
    let (netns, name) = (Netns::new(), unique_interface());
    let program = wgsep_program("wgsep");
    let arguments = [program.to_str().unwrap(), "-f", &name];
    let mut daemon =
        Process::spawn(in_private_mounts(&netns, "mount -t tmpfs tmpfs /run", &arguments), "wgsep");
    // unshare and sh exec their successor: the process is the daemon, in its own mounts.
    let seen = |path: &str| PathBuf::from(format!("/proc/{}/root{path}", daemon.pid()));
    let socket = seen("/run/wireguard").join(format!("{name}.sock"));
    let answers = || std::os::unix::net::UnixStream::connect(&socket).is_ok();
    wait::until("the daemon listens in the directory it made", Duration::from_secs(10), answers);
    let mode = fs::metadata(seen("/run/wireguard")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o755, "{mode:o}");
    let shown = format!("nsenter --mount --target {} wg show {name}", daemon.pid());
    netns.run(shown);
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(daemon.exit_within(Duration::from_secs(1)).code(), Some(0));
}

/// Root may bind a socket where the directory's mode does not let its owner write, but what has become of
/// root's privileges by then may not remove it; nor where boringtun or gotatun, started later, have given
/// the directory to the user who logged in.
#[test]
fn a_socket_that_cannot_be_removed_is_logged_at_the_start_or_at_the_end() {
    require!(Wgsep);
    let program = wgsep_program("wgsep");
    for (mode, owner, at_start, at_end) in [
        ("0555", "root", true, true),
        ("0755", "12345", false, true),
        ("0755", "root", false, false),
    ] {
        let (netns, name) = (Netns::new(), unique_interface());
        let script = format!("mount -t tmpfs tmpfs /run; mkdir -m {mode} /run/wireguard");
        let arguments = [program.to_str().unwrap(), "-f", &name];
        let mut daemon = Process::spawn(in_private_mounts(&netns, &script, &arguments), "wgsep");
        wait::until("it has started", Duration::from_secs(10), || {
            assert_eq!(daemon.try_exit(), None, "{}", daemon.log());
            daemon.log().contains("started: ")
        });
        // And it serves.
        netns.run(format!("nsenter --mount --target {} wg show {name}", daemon.pid()));
        let directory = format!("/proc/{}/root/run/wireguard", daemon.pid());
        process::run(Command::new("chown").args([owner, &directory]));
        daemon.signal(nix::sys::signal::Signal::SIGTERM);
        // What was asked for has come, though something stays behind.
        assert_eq!(daemon.exit_within(Duration::from_secs(10)).code(), Some(0));
        let log = daemon.log();
        let reported = |start: &str, text: &str| {
            log.lines().any(|line| {
                line.contains(start) && line.contains(text) && line.contains("chown root")
            })
        };
        assert_eq!(reported(" WARN ", "the UAPI socket stays"), at_start, "{log}");
        assert_eq!(reported(" ERROR ", &format!("{name}.sock stays")), at_end, "{log}");
    }
}

#[test]
fn a_socket_directory_that_cannot_be_written_is_named() {
    require!(Wgsep);
    let (netns, name) = (Netns::new(), unique_interface());
    let program = wgsep_program("wgsep");
    let arguments = ["timeout", LIMIT, program.to_str().unwrap(), "-f", &name];
    for script in [
        "mount -t tmpfs -o ro tmpfs /run",
        "mount -t tmpfs tmpfs /run; mkdir /run/wireguard; mount -t tmpfs -o ro tmpfs /run/wireguard",
        "mount -t tmpfs tmpfs /run; touch /run/wireguard",
    ] {
        let mut command = in_private_mounts(&netns, script, &arguments);
        let message = message_of_refusal(&process::output(&mut command));
        assert!(message.contains("/run/wireguard"), "{script}: {message}");
        assert!(!netns.run("ip -o link").contains(&name), "an interface was left behind");
    }
}

#[test]
fn attack_11_a_live_socket_is_refused_and_continues_to_serve() {
    require!(Wgsep);
    let first = Daemon::start(Wgsep, &Netns::new());
    let elsewhere = Netns::new();
    let message = refused(&elsewhere, &["-f", &first.interface]);
    assert!(message.contains(&format!("{}.sock", first.interface)), "{message}");
    assert!(is_answering(&first.interface), "the first daemon lost its socket");
    assert!(!elsewhere.run("ip -o link").contains(&first.interface));
}

#[test]
fn attack_11_a_foreign_file_at_the_socket_path_is_refused_and_left_alone() {
    require!(Wgsep);
    let _directory = Daemon::start(Wgsep, &Netns::new());
    let netns = Netns::new();

    let regular = Planted::new();
    fs::write(&regular.path, "not yours").unwrap();
    let message = refused(&netns, &["-f", &regular.name]);
    assert!(message.contains(&format!("{}.sock", regular.name)), "{message}");
    assert_eq!(fs::read_to_string(&regular.path).unwrap(), "not yours");

    let stale = Planted::new();
    drop(UnixListener::bind(&stale.path).unwrap());
    for target in [stale.path.clone(), "/nowhere/at/all".into(), "/etc/passwd".into()] {
        let link = Planted::new();
        symlink(&target, &link.path).unwrap();
        refused(&netns, &["-f", &link.name]);
        assert_eq!(fs::read_link(&link.path).unwrap(), target);
    }
    assert!(stale.path.exists(), "a symlink was followed and its target removed");

    let directory = Planted::new();
    fs::create_dir(&directory.path).unwrap();
    refused(&netns, &["-f", &directory.name]);
    assert!(directory.path.is_dir());
    assert_eq!(netns.run("ip -o link").lines().count(), 1, "an interface was left behind");
}

#[test]
fn attack_11_a_stale_socket_is_replaced() {
    require!(Wgsep);
    let _directory = Daemon::start(Wgsep, &Netns::new());
    let stale = Planted::new();
    drop(UnixListener::bind(&stale.path).unwrap());
    let netns = Netns::new();
    let daemon = Process::spawn(Wgsep.command(&netns, &stale.name), "wgsep over a stale socket");
    wait::until("the daemon answers", Duration::from_secs(10), || is_answering(&stale.name));
    drop(daemon);
}

/// After SIGKILL to both processes, the same command must work again.
#[test]
fn attack_11_it_starts_again_after_both_processes_were_killed() {
    require!(Wgsep);
    let netns = Netns::new();
    let first = Daemon::start(Wgsep, &netns);
    let name = first.interface.clone();
    for pid in [first.process.pid(), first.dataplane()] {
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    // A process's main thread may be gone while another still holds its descriptors.
    wait::until("no process listens", Duration::from_secs(1), || {
        Uapi::connect(&name).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    });
    wait::until("the interface is gone", Duration::from_secs(1), || !first.has_interface());
    assert!(first.has_socket(), "somebody else cleaned up, so this shows nothing");
    let mut again = Process::spawn(Wgsep.command(&netns, &name), "wgsep again");
    wait::until("the daemon answers", Duration::from_secs(10), || is_answering(&name));
    // What the killed one left behind goes with its successor.
    again.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(again.exit_within(Duration::from_secs(1)).code(), Some(0));
    for left in [socket_path(&name), socket_path(&name).with_extension("sandbox")] {
        assert!(!left.exists(), "{}", left.display());
    }
}

/// The kernel takes a moment to remove the interface of a daemon that was killed.
#[test]
fn an_interface_that_is_being_removed_is_waited_for() {
    require!(Wgsep);
    let (netns, name) = (Netns::new(), unique_interface());
    netns.run(format!("ip tuntap add {name} mode tun"));
    let again = Process::spawn(Wgsep.command(&netns, &name), "wgsep, too early");
    wait::until("it asks for the interface", Duration::from_secs(10), || {
        procfs::descriptors(again.pid()).values().any(|target| target == "/dev/net/tun")
    });
    netns.run(format!("ip link del {name}"));
    wait::until("the daemon answers", Duration::from_secs(10), || is_answering(&name));
    drop(again);
    remove_files(&name);
}

#[test]
fn mistaken_options_are_errors_that_name_them() {
    require!(Wgsep);
    let (netns, name) = (Netns::new(), unique_interface());
    for (arguments, named) in [
        (&["-f", "--no-such-option", &name][..], "--no-such-option"),
        (&["-f", "-Z", &name], "-Z"),
        (&["-f", &name, "another"], "another"),
        (&["-f"], "IF"),
        (&[], "IF"),
    ] {
        let mut command = netns.command("timeout");
        command.arg(LIMIT).arg(wgsep_program("wgsep")).args(arguments);
        let output = process::output(&mut command);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(1..=123)), "{arguments:?}: {stderr}");
        assert!(stderr.contains(named), "{arguments:?}: {stderr}");
    }
    assert_eq!(netns.run("ip -o link").lines().count(), 1, "an interface was left behind");
}

/// A slip must not become a daemon of root's on an interface of that name.
#[test]
fn words_that_are_commands_start_no_daemon_and_suggest_what_was_meant() {
    require!(Wgsep);
    let netns = Netns::new();
    for (line, meant) in [
        ("help", "wgsep --help"),
        ("version", "wgsep --version"),
        ("show", "wg show"),
        ("-f status", "wgsep stats IF"),
        ("stat", "wgsep stats IF"),
        ("up wg0", "wg-quick up IF"),
        ("genkey", "wg"),
        ("audti wg0", "wgsep audit wg0"),
        ("wg0 wg1", "one interface at a time"),
    ] {
        let message = refused(&netns, &line.split(' ').collect::<Vec<_>>());
        assert!(message.contains(meant), "{line}: {message}");
    }
    assert_eq!(netns.run("ip -o link").lines().count(), 1, "an interface was left behind");
    assert!(!socket_path("show").exists(), "a socket was left behind");

    // An interface of such a name, asked for explicitly, is one that wg(8) finds.
    let program = wgsep_program("wgsep");
    let mut command = in_private_mounts(
        &netns,
        "mount -t tmpfs none /run; \"$1\" -- show; wg show show; ip link delete show; shift",
        &[program.to_str().unwrap(), "true"],
    );
    assert!(process::output(&mut command).status.success());
}

#[test]
fn a_repeated_foreground_is_one() {
    require!(Wgsep);
    let netns = Netns::new();
    let daemon = Daemon::start_with(Wgsep, &netns, |command| {
        command.args(["--foreground", "--foreground", "--workers", "1", "--workers", "2"]);
    });
    assert_eq!(procfs::threads(daemon.dataplane()).len(), 2 + 2);
}

#[test]
fn help_and_version_go_to_stdout() {
    require!(Wgsep);
    for option in ["--help", "--version"] {
        let output = process::output(Netns::new().command(wgsep_program("wgsep")).arg(option));
        assert_eq!(output.status.code(), Some(0), "{option}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("wgsep"), "{option}");
        assert!(output.stderr.is_empty(), "{option}");
    }
}

/// The dataplane is no tool of its own: without a helper it has nothing to do.
#[test]
fn the_dataplane_refuses_to_run_by_itself() {
    require!(Wgsep);
    let netns = Netns::new();
    for arguments in [&[][..], &["-f", "wg0"], &["--help"]] {
        let mut command = netns.command("timeout");
        command.arg(LIMIT).arg(wgsep_program("wgsep-dataplane")).args(arguments);
        let output = process::output(&mut command);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(1..=123)), "{}: {stderr}", output.status);
        assert!(stderr.contains("wgsep"), "{arguments:?}: {stderr}");
    }
}

/// A program beside wgsep that others may write is not what it should start as root.
#[test]
fn a_dataplane_that_others_may_write_is_not_started() {
    require!(Wgsep);
    let (netns, name) = (Netns::new(), unique_interface());
    let directory = Scratch::new();
    for program in ["wgsep", "wgsep-dataplane"] {
        directory.install(program, program);
    }
    let dataplane = directory.join("wgsep-dataplane");
    fs::set_permissions(&dataplane, fs::Permissions::from_mode(0o757)).unwrap();
    let line = format!("timeout {LIMIT} {} -f {name}", directory.join("wgsep").display());
    let message = message_of_refusal(&netns.output(&line));
    assert!(message.contains("wgsep-dataplane"), "{message}");

    fs::remove_file(&dataplane).unwrap();
    let message = message_of_refusal(&netns.output(&line));
    assert!(message.contains("wgsep-dataplane"), "{message}");
    assert!(procfs::with_argument(&name).is_empty());
}

/// A path in the socket directory under a name of its own; removed when dropped.
struct Planted {
    name: String,
    path: PathBuf,
}

impl Planted {
    fn new() -> Self {
        let name = unique_interface();
        Self { path: socket_path(&name), name }
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path).or_else(|_| fs::remove_dir(&self.path));
    }
}
