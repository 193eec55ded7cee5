//! `wgsep upgrade` of a daemon that is process 1 of a PID namespace, as in a container without an init.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::net::IpAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use wgsep_tests::daemon::{Daemon, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{Process, output, run};
use wgsep_tests::procfs::{children, is_running, namespace, with_argument};
use wgsep_tests::skip::skip;
use wgsep_tests::traffic::{Pinging, until_ping};
use wgsep_tests::tunnel::{End, PORT};
use wgsep_tests::wg::{KeyPair, with_input};
use wgsep_tests::{require, uapi, wait};

const LIMIT: Duration = Duration::from_secs(10);

/// A daemon that is process 1, with the other end of its tunnel outside.
struct Container {
    netns: Arc<Netns>,
    other: End,
    interface: String,
    /// unshare(1), which waits for process 1 and ends with its status.
    runtime: Process,
}

impl Container {
    fn start() -> Self {
        Self::start_in(&["--pid", "--kill-child", "--mount-proc"])
    }

    fn start_in(namespaces: &[&str]) -> Self {
        let (netns, right) = link::joined();
        let other = End::new(Side::Right, Daemon::start(Wgsep, &right));
        let (key, interface) = (KeyPair::generate(), unique_interface());
        let mut command = netns.command("unshare");
        command.arg("--fork").args(namespaces);
        command.arg(wgsep_program("wgsep")).args(["--foreground", &interface]);
        let runtime = Process::spawn(command, "a container");
        wait::until("the daemon answers", LIMIT, || uapi::is_answering(&interface));
        let endpoint = format!("{}:{PORT}", Side::Left.outer(Family::V4)).parse().unwrap();
        other.configure(&key.public, Some(endpoint), None);
        let configuration = format!(
            "[Interface]\nPrivateKey = {}\nListenPort = {PORT}\n[Peer]\nPublicKey = {}\nAllowedIPs = {}/32\nEndpoint = {}\n",
            key.private,
            other.key.public,
            other.side.inner(Family::V4),
            other.endpoint(Family::V4)
        );
        let setconf = format!("wg setconf {interface} /dev/stdin");
        with_input(&setconf, &configuration);
        netns.run(format!("ip addr add {}/24 dev {interface}", Side::Left.inner(Family::V4)));
        netns.run(format!("ip link set {interface} up"));
        let container = Self { netns, other, interface, runtime };
        until_ping(&container.netns, container.theirs());
        container
    }

    fn theirs(&self) -> IpAddr {
        self.other.side.inner(Family::V4)
    }

    fn first(&self) -> Pid {
        children(self.runtime.pid())[0]
    }

    /// `wgsep upgrade` in these namespaces of the container.
    fn upgrade(&self, namespaces: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.first().to_string()]).args(namespaces);
        command.arg(wgsep_program("wgsep")).args(["upgrade", &self.interface]);
        command
    }

    /// The helper that serves, and its dataplane.
    fn pair(&self) -> Option<[Pid; 2]> {
        let processes = with_argument(&self.interface);
        let mut pairs = processes.into_iter().filter_map(|helper| match children(helper)[..] {
            [dataplane] if name(dataplane).starts_with("wgsep-data") => Some([helper, dataplane]),
            _ => None,
        });
        pairs.next().filter(|_| pairs.next().is_none())
    }

    fn until_replaced(&self, old: Pid) -> [Pid; 2] {
        let found = wait::poll(LIMIT, || self.pair().filter(|pair| pair[1] != old));
        let Some(pair) = found else { panic!("{}", self.runtime.log()) };
        wait::until("the old dataplane is gone", LIMIT, || !is_running(old));
        pair
    }

    #[track_caller]
    fn has_ended_with(mut self, status: i32) {
        let exited = self.runtime.exit_within(LIMIT);
        assert_eq!(exited.code(), Some(status), "{}", self.runtime.log());
        wait::until("all of it ends", LIMIT, || with_argument(&self.interface).is_empty());
        assert!(!self.netns.output(format!("ip link show {}", self.interface)).status.success());
    }
}

fn name(pid: Pid) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default()
}

/// Processes that have ended and that their parent has not waited for.
fn zombies(parent: Pid) -> usize {
    let task = format!("/proc/{parent}/task/{parent}/children");
    let children = fs::read_to_string(task).unwrap_or_default();
    let pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    pids.filter(|pid| !is_running(Pid::from_raw(*pid))).count()
}

#[test]
fn process_1_stays_and_the_daemon_behind_it_is_replaced_while_traffic_flows() {
    require!(Wgsep);
    let container = Container::start();
    let first = container.first();
    let handshake = container.other.daemon.peer().latest_handshake;
    let pinging = Pinging::start(&container.netns, container.theirs());
    pinging.until_more(2);
    let mut old = container.pair().unwrap();
    assert_eq!(old[0], first);
    for _ in 0..3 {
        run(&mut container.upgrade(&["--pid", "--mount", "--net"]));
        let new = container.until_replaced(old[1]);
        assert_ne!(new[0], first);
        for kind in ["pid", "net", "mnt"] {
            assert_eq!(namespace(new[0], kind), namespace(first, kind));
        }
        wait::until("process 1 has reaped what ended", LIMIT, || zombies(first) == 0);
        old = new;
    }
    pinging.until_more(2);
    assert!(pinging.stop().were_answered(), "a ping was lost");
    assert_eq!(container.other.daemon.peer().latest_handshake, handshake);
    assert_eq!(container.first(), first);
    // As a runtime stops a container.
    kill(first, Signal::SIGTERM).unwrap();
    let socket = socket_path(&container.interface);
    container.has_ended_with(0);
    assert!(!socket.exists());
}

/// The runtime sees it, and does what its policy of restarts says.
#[test]
fn process_1_ends_with_the_pair_that_took_over() {
    require!(Wgsep);
    for victim in 0..2 {
        let container = Container::start();
        let old = container.pair().unwrap();
        run(&mut container.upgrade(&["--pid", "--mount", "--net"]));
        let new = container.until_replaced(old[1]);
        kill(new[victim], Signal::SIGKILL).unwrap();
        container.has_ended_with(1);
    }
}

/// The new pair would be no part of the container, and not end with it.
#[test]
fn from_another_pid_namespace_it_is_refused_with_the_command_that_enters_it() {
    require!(Wgsep);
    let container = Container::start();
    let before = container.pair().unwrap();
    let done = output(&mut container.upgrade(&["--net"]));
    let line = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!((done.status.code(), line.lines().count()), (Some(1), 1), "{line}");
    let (_, remedy) = line.trim_end().split_once("run it there: ").unwrap();
    // From a container beside it, which does not see it.
    let mut beside = container.netns.command("unshare");
    beside.args(["--pid", "--fork", "--mount-proc"]).arg(wgsep_program("wgsep"));
    let done = output(beside.args(["upgrade", &container.interface]));
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(!done.status.success() && said.contains("in another PID namespace"), "{said}");
    assert_eq!(container.pair(), Some(before));

    let program = wgsep_program("wgsep").display().to_string();
    let remedy = remedy.replace(" wgsep ", &format!(" {program} "));
    let mut words = remedy.split(' ');
    run(Command::new(words.next().unwrap()).args(words));
    container.until_replaced(before[1]);
    until_ping(&container.netns, container.theirs());
}

/// Its deadlines are by clocks that are ahead of those outside.
#[test]
fn from_another_time_namespace_it_is_refused_with_the_command_that_enters_it() {
    require!(Wgsep);
    let clocks = ["--time", "--boottime", "1000000", "--monotonic", "1000000"];
    if !output(Command::new("unshare").args(clocks).arg("true")).status.success() {
        return skip("the kernel has no time namespaces");
    }
    let container = Container::start_in(&[&clocks[..], &["--kill-child"]].concat());
    let before = container.pair().unwrap();
    let mut outside = container.netns.command(wgsep_program("wgsep"));
    let done = output(outside.args(["upgrade", &container.interface]));
    let line = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!((done.status.code(), line.lines().count()), (Some(1), 1), "{line}");
    assert!(line.contains("or time namespace"), "{line}");
    assert_eq!(container.pair(), Some(before));

    let (_, remedy) = line.trim_end().split_once("run it there: ").unwrap();
    let program = wgsep_program("wgsep").display().to_string();
    container.netns.run(remedy.replace(" wgsep ", &format!(" {program} ")));
    let after = container.until_replaced(before[1]);
    assert_eq!(namespace(after[0], "time"), namespace(before[0], "time"));
    until_ping(&container.netns, container.theirs());
}
