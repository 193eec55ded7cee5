//! `wgsep audit`: what it says of a daemon that runs, and with which exit status.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::unistd::Pid;
use serde_json::Value;
use wgsep_tests::daemon::{Daemon, SOCKETS, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::{Wgsep, WireguardGo};
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{Process, output, run};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::uapi::Uapi;
use wgsep_tests::{procfs, repository, require, wait};

/// How long a process may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(10);

/// Layers that the kernel shows, and layers of which there is only the helper's word.
const SEEN: [&str; 12] = [
    "user",
    "capabilities",
    "bounding-set",
    "no-new-privs",
    "seccomp",
    "tracer",
    "namespaces",
    "empty-root",
    "limits",
    "sealed-memory",
    "no-processes",
    "non-dumpable",
];
const CLAIMED: [&str; 5] = ["securebits", "no-fd-out", "death-signal", "untraceable", "landlock"];

fn audit(netns: &Netns, interface: &str, options: &[&str]) -> Output {
    let mut command = netns.command(wgsep_program("wgsep"));
    output(command.arg("audit").args(options).arg(interface))
}

#[track_caller]
fn audit_json(daemon: &Daemon) -> (i32, Value) {
    let said = audit(&daemon.netns, &daemon.interface, &["--json"]);
    let text = String::from_utf8_lossy(&said.stdout);
    let Ok(json) = serde_json::from_str(&text) else { panic!("no JSON: {said:?}") };
    (said.status.code().unwrap(), json)
}

/// The finding of one layer of one process.
#[track_caller]
fn finding<'j>(json: &'j Value, process: &str, layer: &str) -> &'j Value {
    let findings = json["findings"].as_array().unwrap();
    let found = findings.iter().find(|one| one["process"] == process && one["layer"] == layer);
    found.unwrap_or_else(|| panic!("no {layer} of the {process} in {json}"))
}

#[test]
fn started_by_root_every_layer_is_in_force() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let (status, json) = audit_json(&daemon);
    assert_eq!(status, 0, "{json}");
    assert_eq!(json["helper"], daemon.process.pid().as_raw());
    assert_eq!(json["dataplane"], daemon.dataplane().as_raw());
    for (layers, source) in [(&SEEN[..], "kernel"), (&CLAIMED[..], "claimed")] {
        for layer in layers {
            let finding = finding(&json, "dataplane", layer);
            assert_eq!(
                (&finding["state"], &finding["source"]),
                (&"applied".into(), &source.into())
            );
        }
    }
    // How much there is, from the kernel; that all keys are in it, from the report.
    let findings = json["findings"].as_array().unwrap();
    let [kernels, claimed] = ["kernel", "claimed"].map(|source| {
        let is = |one: &&Value| one["layer"] == "secret-memory" && one["source"] == source;
        findings.iter().find(is).unwrap_or_else(|| panic!("no {source} secret-memory in {json}"))
    });
    let kilobytes = kernels["seen"].as_str().and_then(|seen| seen.strip_suffix(" KiB")).unwrap();
    assert!(kilobytes.parse::<u32>().unwrap() >= 1024, "{kernels}");
    assert_eq!(claimed["state"], "applied", "{claimed}");
    let capabilities = &finding(&json, "helper", "capabilities")["seen"];
    assert_eq!(capabilities, "CAP_KILL CAP_NET_ADMIN");

    // A client of another network namespace is a socket that none of this one's tables lists.
    let _stays = Uapi::connect(&daemon.interface).unwrap();
    let table = audit(&daemon.netns, &daemon.interface, &[]);
    let text = String::from_utf8_lossy(&table.stdout).into_owned();
    assert_eq!(table.status.code(), Some(0), "{text}");
    assert!(text.ends_with("every layer is in force\n"), "{text}");
    // A header, a line a finding, and the verdict, with a blank line before and after the table.
    let findings = json["findings"].as_array().unwrap().len();
    assert_eq!(text.lines().count(), findings + 5, "{text}");
}

/// Without CAP_SETPCAP no process empties a bounding set.
#[test]
fn a_degraded_layer_is_named_with_its_errno_and_a_remedy() {
    require!(Wgsep);
    let netns = Netns::new();
    let daemon = Daemon::start_with(Wgsep, &netns, |command| {
        let program = command.get_program().to_owned();
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let mut without = netns.command("setpriv");
        without.arg("--bounding-set=-setpcap").arg(program).args(arguments);
        *command = without;
    });
    let (status, json) = audit_json(&daemon);
    assert_eq!(status, 1, "{json}");
    let bounding = finding(&json, "dataplane", "bounding-set");
    assert_eq!((&bounding["state"], &bounding["source"]), (&"degraded".into(), &"kernel".into()));
    assert!(bounding["remedy"].as_str().unwrap().contains("root"), "{bounding}");
    let securebits = finding(&json, "dataplane", "securebits");
    assert_eq!(securebits["seen"], "degraded(EPERM)", "{securebits}");
    // The rest does not suffer.
    assert_eq!(finding(&json, "dataplane", "seccomp")["state"], "applied");

    let table = audit(&netns, &daemon.interface, &[]);
    assert_eq!(table.status.code(), Some(1));
    let text = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(text.contains("dataplane bounding-set: start wgsep as root"), "{text}");
}

#[test]
fn without_its_report_the_audit_is_incomplete() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let report = format!("{SOCKETS}/{}.sandbox", daemon.interface);
    std::fs::remove_file(&report).unwrap();
    let (status, json) = audit_json(&daemon);
    assert_eq!(status, 3, "{json}");
    assert_eq!(finding(&json, "dataplane", "landlock")["state"], "unread");
    assert_eq!(finding(&json, "dataplane", "seccomp")["state"], "applied");
    let table = audit(&daemon.netns, &daemon.interface, &[]);
    let text = String::from_utf8_lossy(&table.stdout).into_owned();
    let remedies: Vec<_> = text.lines().filter(|line| line.starts_with(&report)).collect();
    let [remedy] = remedies[..] else { panic!("{text}") };
    assert!(remedy.contains("ENOENT") && remedy.contains("start wgsep again"), "{text}");
    // Root has no more to read.
    assert!(!text.contains("root may"), "{text}");
}

#[test]
fn there_is_one_line_for_what_cannot_be_audited() {
    require!(Wgsep, WireguardGo);
    let netns = Netns::new();
    let unserved = unique_interface();
    let other = Daemon::start(WireguardGo, &netns);
    let ours = Daemon::start(Wgsep, &netns);
    let program = wgsep_program("wgsep");
    let stranger = |interface: &str| {
        let mut command = Arc::clone(&netns).command("setpriv");
        command.args(["--reuid=61000", "--regid=61000", "--clear-groups"]);
        // The build directory may be out of a stranger's reach; its descriptor is not.
        command.args(["sh", "-c", "exec \"$0\" audit \"$1\""]).arg(&program).arg(interface);
        output(&mut command)
    };
    for (said, reason) in [
        (audit(&netns, &unserved, &[]), "no daemon serves"),
        (audit(&netns, &other.interface, &[]), "not wgsep"),
        (audit(&netns, "a/b", &[]), "bad interface name"),
        (stranger(&ours.interface), "ermission denied"),
    ] {
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(matches!(said.status.code(), Some(2 | 126)), "{said:?}");
        assert!(text.contains(reason) && text.lines().count() == 1, "{text}");
        assert!(said.stdout.is_empty(), "{said:?}");
    }
}

/// Numbers of processes are those of a PID namespace, and /proc has those of the one that it was mounted in.
#[test]
fn from_another_pid_namespace_the_audit_says_where_to_run_it() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let program = wgsep_program("wgsep");
    for (around, named) in [
        (
            &["--mount-proc"][..],
            "it is in another PID namespace, as of another container; run this",
        ),
        (&[], "/proc is another PID namespace's; mount this container's own"),
    ] {
        let mut command = daemon.netns.command("unshare");
        command.args(["--pid", "--fork", "--kill-child"]).args(around).arg(&program);
        let said = output(command.args(["audit", &daemon.interface]));
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        assert_eq!(said.status.code(), Some(2), "{said:?}");
        assert!(text.contains(named) && text.lines().count() == 1, "{text}");
        assert!(
            text.contains("run this where the daemon is") && !text.contains("end it"),
            "{text}"
        );
    }
    // What is further inside has numbers here, too.
    let (netns, interface) = (Netns::new(), unique_interface());
    let mut command = netns.command("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]).arg(&program);
    command.args(["--foreground", &interface]);
    let mut inside = Process::spawn(command, "wgsep in a PID namespace");
    wait::until("it has started", LIMIT, || {
        assert_eq!(inside.try_exit(), None, "{}", inside.log());
        inside.log().contains("started: ")
    });
    let audited = audit(&netns, &interface, &[]);
    assert_eq!(audited.status.code(), Some(0), "{audited:?}");
}

/// What a script may rely on; the tests here and of `wgsep stats` have each of them.
#[test]
fn the_manual_has_every_exit_status_of_the_queries() {
    let page = fs::read_to_string(repository().join("bin/dist/wgsep.8")).unwrap();
    let section = page.split_once(".Sh EXIT STATUS\n").unwrap().1.split_once("\n.Sh ").unwrap().0;
    for (query, statuses) in
        [("audit", &["0", "1", "2", "3"][..]), ("stats", &["0", "2"]), ("watch", &["0", "2"])]
    {
        let stated = section.split_once(&format!(".Nm Cm {query} :\n")).unwrap().1;
        let stated = stated.split("\nOf\n").next().unwrap();
        for status in statuses {
            let mut words = stated.split(|one: char| !one.is_alphanumeric());
            assert!(words.any(|word| word == *status), "{query} {status}: {stated}");
        }
    }
}

#[test]
fn the_report_goes_with_the_daemon() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let report = format!("{SOCKETS}/{}.sandbox", daemon.interface);
    assert!(std::fs::metadata(&report).is_ok());
    let interface = daemon.interface.clone();
    let mut daemon = daemon;
    daemon.netns.run(format!("ip link del {interface}"));
    daemon.process.exit_within(std::time::Duration::from_secs(1));
    assert!(std::fs::metadata(&report).is_err(), "{report} was left behind");
}

/// In a group's directory a member may make the report of a daemon that has none.
#[test]
fn attack_11_a_report_that_the_helper_did_not_write_is_not_believed_followed_or_waited_for() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let report = format!("{SOCKETS}/{}.sandbox", daemon.interface);
    let claims = std::fs::read_to_string(&report).unwrap();
    let fake = format!("{report}-fake");
    std::fs::write(&fake, &claims).unwrap();
    for (script, reason) in [
        ("mkfifo -m 0644 $0", "no regular file"),
        ("mkdir $0", "no regular file"),
        ("ln -s $0-fake $0", "ymbolic link"),
        ("cp $0-fake $0; chown 61001 $0", "uid 61001's"),
        ("head -c 20000 /dev/zero >$0", "longer than"),
        ("truncate -s 1T $0", "longer than"),
        ("printf '\\377' >$0", "utf-8"),
    ] {
        let mut plant = Command::new("sh");
        run(plant.args(["-ec", &format!("rm -rf $0; {script}"), &report]));
        let mut command = daemon.netns.command("timeout");
        command.arg("10").arg(wgsep_program("wgsep")).args(["audit", &daemon.interface]);
        let said = output(&mut command);
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        assert_eq!(said.status.code(), Some(3), "{script}: {said:?}");
        let line = text.lines().find(|line| line.contains("landlock")).unwrap();
        assert!(line.contains("unread") && line.contains(reason), "{script}: {line}");
    }
    // Root's own may still have been spoilt.
    let spoilt = claims.replace("landlock=applied", "landlock=\u{1b}]0;x\u{7}\u{9b}2J");
    std::fs::remove_file(&report).unwrap();
    std::fs::write(&report, spoilt).unwrap();
    for options in [&[][..], &["--json"]] {
        let said = audit(&daemon.netns, &daemon.interface, options);
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        let shown = |one: char| one == '\n' || !one.is_control();
        assert!(text.contains("]0;x") && text.chars().all(shown), "{text:?}");
    }
    for left in [report, fake] {
        std::fs::remove_file(left).unwrap();
    }
}

/// A socket under the name of an interface, which this process holds and serves.
struct Impostor {
    interface: String,
    socket: OwnedFd,
}

impl Impostor {
    fn new() -> Self {
        let interface = unique_interface();
        fs::create_dir_all(SOCKETS).unwrap();
        let (family, flags) = (AddressFamily::Unix, SockFlag::SOCK_CLOEXEC);
        let socket = socket(family, SockType::Stream, flags, None).unwrap();
        let address = UnixAddr::new(&socket_path(&interface)).unwrap();
        bind(socket.as_raw_fd(), &address).unwrap();
        Self { interface, socket }
    }

    /// Has the process of a command make it listen, before it executes its program.
    fn listen_from(&self, command: &mut Command) {
        let socket = self.socket.as_raw_fd();
        let listen = move || match Errno::result(
            // SAFETY: listen(2) reads and writes no memory.
            unsafe { nix::libc::listen(socket, 8) },
        ) {
            Ok(_) => Ok(()),
            Err(errno) => Err(errno.into()),
        };
        // SAFETY: between fork and exec the closure makes one system call, and allocates nothing.
        unsafe { command.pre_exec(listen) };
    }

    /// The one line of an audit that is refused.
    #[track_caller]
    fn refused(&self, netns: &Netns) -> String {
        let said = audit(netns, &self.interface, &[]);
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        assert_eq!(said.status.code(), Some(2), "{said:?}");
        assert!(said.stdout.is_empty() && text.lines().count() == 1, "{said:?}");
        text
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        let _ = fs::remove_file(socket_path(&self.interface));
    }
}

/// The number of such a process may be another one's by now.
#[test]
fn attack_11_a_socket_whose_maker_has_ended_is_not_audited() {
    require!(Wgsep);
    let (netns, impostor) = (Netns::new(), Impostor::new());
    let mut maker = Command::new("true");
    impostor.listen_from(&mut maker);
    let mut maker = maker.spawn().unwrap();
    let pid = Pid::from_raw(maker.id().cast_signed());
    let expected =
        format!("process {pid}, which made {SOCKETS}/{}.sock, has ended", impostor.interface);
    wait::until("it is a zombie", LIMIT, || !procfs::is_running(pid));
    let said = impostor.refused(&netns);
    assert!(said.contains(&expected), "{said}");
    maker.wait().unwrap();
    let said = impostor.refused(&netns);
    assert!(said.contains(&expected), "{said}");
}

/// As if the number of the socket's maker had become the number of root's helper.
#[test]
fn attack_11_a_daemon_is_not_audited_by_a_socket_that_it_does_not_serve() {
    require!(Wgsep);
    let (netns, impostor) = (Netns::new(), Impostor::new());
    let daemon = Daemon::start_with(Wgsep, &netns, |command| impostor.listen_from(command));
    let said = impostor.refused(&netns);
    let expected = format!("the dataplane {} does not hold", daemon.dataplane());
    assert!(said.contains(&expected), "{said}");
    std::os::unix::fs::chown(socket_path(&impostor.interface), Some(61_001), None).unwrap();
    let said = impostor.refused(&netns);
    assert!(said.contains("uid 61001's") && said.contains("another user"), "{said}");
    assert_eq!(audit_json(&daemon).0, 0);
}

#[test]
fn a_daemon_whose_program_has_another_name_is_audited() {
    require!(Wgsep);
    let scratch = Scratch::new();
    for (program, name) in [("wgsep", "tunnel"), ("wgsep-dataplane", "wgsep-dataplane")] {
        fs::copy(wgsep_program(program), scratch.join(name)).unwrap();
    }
    let netns = Netns::new();
    let interface = unique_interface();
    let mut command = netns.command(scratch.join("tunnel"));
    run(command.arg(&interface));
    let said = audit(&netns, &interface, &[]);
    netns.run(format!("ip link del {interface}"));
    assert!(said.status.success(), "{said:?}");
}

#[test]
fn a_daemon_whose_socket_was_renamed_is_audited() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let (name, other) = (socket_path(&daemon.interface), unique_interface());
    fs::rename(&name, socket_path(&other)).unwrap();
    let said = audit(&daemon.netns, &other, &["--json"]);
    fs::rename(socket_path(&other), name).unwrap();
    // Without its report, which has the other name.
    assert_eq!(said.status.code(), Some(3), "{said:?}");
    let json: Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!(json["dataplane"], daemon.dataplane().as_raw());
}

#[test]
fn a_daemon_is_audited_while_another_has_the_name_that_it_had() {
    require!(Wgsep);
    let mut first = Daemon::start(Wgsep, &Netns::new());
    let (name, other) = (first.interface.clone(), unique_interface());
    first.netns.run(format!("ip link set {name} name {other}"));
    fs::rename(socket_path(&name), socket_path(&other)).unwrap();
    first.interface = other;
    let second = Daemon::start_on(&name, Wgsep, &Netns::new(), |_| {});
    for daemon in [&first, &second] {
        let said = audit(&daemon.netns, &daemon.interface, &["--json"]);
        let json: Value =
            serde_json::from_slice(&said.stdout).unwrap_or_else(|_| panic!("no JSON: {said:?}"));
        assert_eq!(json["dataplane"], daemon.dataplane().as_raw());
    }
}

#[test]
fn a_daemon_that_accepts_no_clients_is_named_as_the_trouble() {
    require!(Wgsep);
    let (netns, impostor) = (Netns::new(), Impostor::new());
    listen(&impostor.socket, Backlog::new(1).unwrap()).unwrap();
    let path = socket_path(&impostor.interface);
    let _waiting = [0; 2].map(|_| UnixStream::connect(&path).unwrap());
    let said = impostor.refused(&netns);
    assert!(said.contains("accepts no clients") && said.contains("restart it"), "{said}");
}
