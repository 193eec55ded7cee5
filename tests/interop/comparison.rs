//! SECURITY.md's comparison, measured: the kernel's view of whichever process reads the network's
//! packets, in every implementation, started by root. The rows are printed and held against the file.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::{Pid, User, getpid};
use wgsep_tests::daemon::{Daemon, unique_interface};
use wgsep_tests::implementation::Implementation::{self, Boringtun, Gotatun, Wgsep, WireguardGo};
use wgsep_tests::netns::Netns;
use wgsep_tests::nft::Counter;
use wgsep_tests::process::{self, Process};
use wgsep_tests::procfs::{self, namespace, threads};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{repository, require, wait};

const LIMIT: Duration = Duration::from_secs(10);
/// A user of every Debian, whom boringtun and gotatun take for the one who logged in.
const USER: &str = "daemon";
/// What the launcher leaves open for who does not close it.
const LEAKED: &str = "/etc/hostname";

/// An implementation, and whether it gives its privileges to the user who logged in.
type Candidate = (Implementation, bool);

/// What is found of a daemon and the process of it that reads packets.
type Fact = fn(&Running, Pid) -> &'static str;

/// SECURITY.md's columns.
const COLUMNS: [Candidate; 6] = [
    (Wgsep, false),
    (WireguardGo, false),
    (Boringtun, false),
    (Boringtun, true),
    (Gotatun, false),
    (Gotatun, true),
];

/// What is looked at, and how it is put.
const ROWS: [(&str, Fact); 10] = [
    ("User", user),
    ("Capabilities", |_, pid| amount(pid, "CapEff")),
    ("Capabilities it may ever have", |_, pid| amount(pid, "CapBnd")),
    ("Programs that it starts may gain privileges", |_, pid| yes(pid, "NoNewPrivs", "0")),
    ("System calls are filtered", |_, pid| yes(pid, "Seccomp", "2")),
    ("Files", files),
    ("New sockets reach", network),
    ("May start processes", |_, pid| limit(pid, "Max processes", ["no", "yes"])),
    ("Leaves a core file", |_, pid| limit(pid, "Max core file size", ["never", "if configured"])),
    ("A file that the launcher left open", leaked),
];

/// A daemon in mounts of its own, in which /run/wireguard is empty: boringtun and gotatun give that
/// directory away to the user.
struct Running {
    process: Process,
    interface: String,
    netns: Arc<Netns>,
}

impl Running {
    /// Starts it as root, in a session of somebody who logged in.
    fn start((implementation, drops): Candidate) -> Self {
        let (netns, interface) = (Netns::new(), unique_interface());
        let script = format!(
            "mkdir -p /run/wireguard; mount -t tmpfs none /run/wireguard; exec 9<{LEAKED}; exec \"$@\""
        );
        let mut command = netns.command("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-ec", &script, "sh"]);
        command.arg(implementation.program().unwrap());
        let options = implementation.foreground(&interface);
        let is_wanted = |option: &&&str| !(drops && **option == "--disable-drop-privileges");
        command.args(options.iter().filter(is_wanted));
        command.env("WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD", "1");
        if drops {
            log_in(&mut command);
        }
        let process = Process::spawn(command, format!("{implementation:?}"));
        let mut running = Self { process, interface, netns };
        wait::until("it answers", LIMIT, || {
            let ended = running.process.try_exit();
            assert!(ended.is_none(), "it ended: {ended:?}");
            running.wg("show", "listen-port").status.success()
        });
        if drops {
            let pid = running.process.pid();
            wait::until("it drops its privileges", LIMIT, || threads(pid)[0].ids("Uid")[0] != 0);
        }
        running.netns.run(format!("ip link set {} up", running.interface));
        running
    }

    /// `wg VERB INTERFACE REST`, where the socket is.
    fn wg(&self, verb: &str, rest: &str) -> Output {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--net", "--target", &self.process.pid().to_string()]);
        command.args(["wg", verb, &self.interface]).args(rest.split(' '));
        process::output(&mut command)
    }

    /// The process that reads the network's packets.
    fn dataplane(&self) -> Pid {
        let helper = self.process.pid();
        procfs::children(helper).first().copied().unwrap_or(helper)
    }
}

/// Has the kernel remember who logged in, which getlogin(3) asks it.
fn log_in(command: &mut Command) {
    let uid = User::from_name(USER).unwrap().unwrap().uid.to_string();
    // Opened by the child, as it refers to the process that opens it.
    let reported = move || {
        fs::OpenOptions::new().write(true).open("/proc/self/loginuid")?.write_all(uid.as_bytes())
    };
    // SAFETY: between fork and exec, it makes three system calls; the path is short enough to need no
    // memory but the stack.
    unsafe {
        command.pre_exec(reported);
    }
}

fn user(running: &Running, pid: Pid) -> &'static str {
    let uids: Vec<_> = threads(pid).iter().map(|thread| thread.ids("Uid")[1]).collect();
    let login = User::from_name(USER).unwrap().unwrap().uid.as_raw();
    match uids[0] {
        uid if uids.iter().any(|other| *other != uid) => "differs by thread",
        0 => "root",
        uid if uid == login => "who logged in",
        _ if pid != running.process.pid() => "its own",
        _ => "another",
    }
}

/// What the threads have of a set of capabilities together, against what the launcher has.
fn amount(pid: Pid, set: &str) -> &'static str {
    let all = threads(getpid())[0].capabilities(set);
    match threads(pid).iter().fold(0, |held, thread| held | thread.capabilities(set)) {
        0 => "none",
        held if held == all => "root's",
        _ => "some",
    }
}

fn yes(pid: Pid, field: &str, value: &str) -> &'static str {
    if threads(pid).iter().all(|thread| thread.text(field) == value) { "yes" } else { "no" }
}

fn files(_: &Running, pid: Pid) -> &'static str {
    let seen = fs::read_dir(format!("/proc/{pid}/root/")).unwrap().count();
    if seen == 0 { "none" } else { "the machine's" }
}

fn network(running: &Running, pid: Pid) -> &'static str {
    let of_the_launcher = namespace(running.process.pid(), "net");
    if namespace(pid, "net") == of_the_launcher { "the network" } else { "nothing" }
}

fn limit(pid: Pid, name: &str, zero_or_not: [&'static str; 2]) -> &'static str {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    // Soft and hard: the soft one may be raised to the other.
    let hard = line.split_whitespace().nth(1).unwrap();
    zero_or_not[usize::from(hard != "0")]
}

fn leaked(_: &Running, pid: Pid) -> &'static str {
    let held = procfs::descriptors(pid);
    if held.values().any(|target| target == LEAKED) { "stays open" } else { "is closed" }
}

/// Whether `wg set fwmark` still does what it says, as the firewall sees it; gotatun refuses only the
/// next change.
fn mark(running: &Running) -> &'static str {
    let any = Counter::new(&running.netns, "any", "output", "udp dport 9");
    let marked = Counter::new(&running.netns, "marked", "output", "udp dport 9 meta mark 51820");
    let (scratch, keys) = (Scratch::new(), KeyPair::generate());
    let file = scratch.join("key");
    fs::write(&file, keys.private).unwrap();
    let key = format!("private-key {}", file.display());
    let peer =
        format!("peer {} endpoint 127.0.0.1:9 persistent-keepalive 1", KeyPair::generate().public);
    let changes = ["fwmark 51820", &key, &peer];
    if !changes.into_iter().all(|change| running.wg("set", change).status.success()) {
        return "fails";
    }
    wait::until("it begins a handshake", LIMIT, || any.packets() > 0);
    if marked.packets() > 0 { "works" } else { "has no effect" }
}

#[test]
fn the_table_in_security_is_what_the_kernel_shows() {
    require!(Wgsep, WireguardGo, Boringtun, Gotatun);
    let mut rows: Vec<String> = ROWS.iter().map(|(name, _)| format!("| {name} |")).collect();
    rows.push("| `wg set IF fwmark` later |".to_owned());
    for candidate in COLUMNS {
        let running = Running::start(candidate);
        let pid = running.dataplane();
        let facts = ROWS.iter().map(|(_, fact)| fact(&running, pid));
        for (row, fact) in rows.iter_mut().zip(facts.chain([mark(&running)])) {
            row.push_str(&format!(" {fact} |"));
        }
    }
    println!("{}", rows.join("\n"));
    let path = repository().join("SECURITY.md");
    let security = fs::read_to_string(path).unwrap();
    for row in rows {
        assert!(security.lines().any(|line| line.starts_with(&row)), "not in SECURITY.md: {row}");
    }
}

/// What wgsep(8) says in "Beside other implementations".
#[test]
fn the_interface_of_another_implementation_ends_with_its_process() {
    require!(WireguardGo, Boringtun, Gotatun);
    for implementation in [WireguardGo, Boringtun, Gotatun] {
        let netns = Netns::new();
        let daemon = Daemon::start(implementation, &netns);
        netns.run(format!("ip link set {} up", daemon.interface));
        daemon.process.signal(Signal::SIGKILL);
        wait::until("the interface is gone", LIMIT, || {
            !netns.run("ip -oneline link").contains(&daemon.interface)
        });
    }
}
