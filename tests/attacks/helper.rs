//! Attacks on the helper, by a dataplane that was taken over and by any user who may start or configure
//! it. The numbers are those of the list in SECURITY.md.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use wgsep_hostile::{Attack, HURRIED_REQUESTS};
use wgsep_tests::daemon::{Daemon, remove_files, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::launched_as::LaunchedAs;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{self, Process, stop};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::{procfs, require, wait};

/// The exit status of a breach of the contract.
const BREACH: i32 = 76;
/// How long a start, an attack and the end may take together on a busy machine.
const LIMIT: Duration = Duration::from_secs(20);

/// The real helper with a hostile dataplane.
struct Attacked {
    helper: Process,
    interface: String,
    netns: Arc<Netns>,
    /// Where the two programs are.
    _programs: Scratch,
}

impl Attacked {
    fn start(attack: Attack) -> Self {
        Self::start_by(&["env"], attack)
    }

    /// Started by another program.
    fn start_by(around: &[&str], attack: Attack) -> Self {
        let (netns, interface, programs) = (Netns::new(), unique_interface(), Scratch::new());
        for (from, to) in [("wgsep", "wgsep"), ("hostile-dataplane", "wgsep-dataplane")] {
            programs.install(from, to);
        }
        let launched_as = LaunchedAs::this_run();
        if launched_as == LaunchedAs::FileCapability {
            let helper = programs.join("wgsep");
            fs::set_permissions(&*programs, fs::Permissions::from_mode(0o755)).unwrap();
            process::run(Command::new("setcap").arg("cap_net_admin+ep").arg(helper));
        }
        let mut command = netns.command(around[0]);
        command.args(&around[1..]).args(launched_as.prefix()).arg(programs.join("wgsep"));
        command.args(["-f", &interface, "--workers", "1"]);
        command.args(["--fwmark", &attack.mark().to_string()]);
        let helper = Process::spawn(command, format!("wgsep under {attack:?}"));
        Self { helper, interface, netns, _programs: programs }
    }

    fn wait_for_log(&self, text: &str) {
        wait::until(text, LIMIT, || self.helper.log().contains(text));
    }

    /// The helper ends with this status; then there is no dataplane, interface or socket.
    #[track_caller]
    fn assert_ends(&mut self, status: i32) -> String {
        assert_eq!(self.helper.exit_within(LIMIT).code(), Some(status), "{}", self.helper.log());
        let left = procfs::with_argument(&self.interface);
        wait::until("the dataplane is gone", LIMIT, || !left.iter().any(|pid| is_alive(*pid)));
        let links = self.netns.output(format!("ip link show {}", self.interface));
        assert!(!links.status.success(), "the interface is left");
        assert!(socket_path(&self.interface).symlink_metadata().is_err(), "the socket is left");
        self.helper.log()
    }
}

impl Drop for Attacked {
    fn drop(&mut self) {
        remove_files(&self.interface);
    }
}

fn is_alive(pid: Pid) -> bool {
    procfs::is_running(pid)
}

#[test]
fn attack_07_every_breach_of_the_contract_ends_the_dataplane_and_names_itself() {
    require!(Wgsep);
    // A lockdown that fails is no breach: nothing hostile can have been read yet.
    for (attack, named) in [
        (Attack::UnconfinedLiar, "not locked down as it says: Seccomp is 0, not 2"),
        (Attack::OneThreadTooMany, "the dataplane has 4 threads where 3 were expected"),
        (Attack::SenselessReport, "the report of its sandbox makes no sense"),
    ] {
        let log = Attacked::start(attack).assert_ends(1);
        assert!(log.contains(named), "{attack:?}: {log}");
    }
    // Its error is in the helper's line, unless the interface could be handed over before the end was seen.
    let log = Attacked::start(Attack::EndsOnceLockedDown).assert_ends(1);
    let is_named = log.contains("the dataplane exited with status 1");
    assert!(is_named && log.contains("hostile: the end"), "{log}");
    for (attack, named) in [
        (Attack::OpenUdpBeforeLockDown, "OpenUdp is not permitted now"),
        (Attack::SecondLockedDown, "LockedDown is not permitted now"),
        (Attack::UnknownTag, "malformed frame"),
        (Attack::Short, "malformed frame"),
        (Attack::Oversized, "malformed frame"),
        (Attack::Trailing, "malformed frame"),
        (Attack::WrongVersion, "malformed frame"),
        (Attack::Empty, "it closed its channel or its log"),
        (Attack::Flood, "a flood of requests"),
        (Attack::PongWithoutPing, "Pong without a ping"),
    ] {
        let log = Attacked::start(attack).assert_ends(BREACH);
        assert!(log.contains(named), "{attack:?}: {log}");
    }
}

/// The line is lost then; an attacker who floods the log can have that.
#[test]
fn attack_07_a_log_that_no_process_reads_neither_hides_a_breach_from_the_exit_status_nor_delays_the_end()
 {
    require!(Wgsep);
    let scratch = Scratch::new();
    let path = scratch.join("log");
    fs::set_permissions(&*scratch, fs::Permissions::from_mode(0o755)).unwrap();
    mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    let mut open = fs::OpenOptions::new();
    let open = open.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let mut fifo = open.open(&path).unwrap();
    while fifo.write(&[b'x'; 4096]).is_ok() {}
    let script = format!("exec \"$@\" 2>{}", path.display());
    for attack in [Attack::UnknownTag, Attack::Flood] {
        let log = Attacked::start_by(&["sh", "-c", &script, "sh"], attack).assert_ends(BREACH);
        assert_eq!(log, "");
    }
    let mut read = vec![0; 1 << 20];
    let len = fifo.read(&mut read).unwrap();
    assert!(read[..len].iter().all(|byte| *byte == b'x'), "the log was not full");
}

/// Where the dataplane has a user of its own, the kernel does not let it send them, and it ends by itself.
#[test]
fn attack_07_descriptors_that_reach_the_helper_end_the_dataplane() {
    require!(Wgsep);
    let has_own_uid = LaunchedAs::this_run().has_own_uid();
    let without_user: &[&str] =
        if has_own_uid { &["setpriv", "--bounding-set=-setuid"] } else { &["env"] };
    for attack in [Attack::OneDescriptor, Attack::TwoDescriptors, Attack::ManyDescriptors] {
        if has_own_uid {
            let log = Attacked::start(attack).assert_ends(1);
            assert!(log.contains("sendmsg: Too many references"), "{attack:?}: {log}");
        }
        let log = Attacked::start_by(without_user, attack).assert_ends(BREACH);
        assert!(log.contains("wrong number of descriptors"), "{attack:?}: {log}");
    }
}

/// A dataplane that waits for its replies is slowed down, however much it asks for, and the helper
/// grows neither in descriptors nor in memory.
#[test]
fn attack_07_requests_beyond_the_rate_are_delayed_and_cost_the_helper_nothing() {
    require!(Wgsep);
    let begun = Instant::now();
    let mut attacked = Attacked::start(Attack::Hurry);
    let pid = attacked.helper.pid();
    attacked.wait_for_log("started");
    let (mut descriptors, mut memory) = (Vec::new(), Vec::new());
    let ended = wait::poll(LIMIT, || {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        // None are left once it has ended.
        descriptors.extend((open > 0).then_some(open));
        memory.extend(procfs::memory(pid, "RssAnon"));
        attacked.helper.try_exit()
    });
    assert_eq!(ended.and_then(|status| status.code()), Some(0), "{}", attacked.helper.log());
    // The first hundred are answered at once; the rest in the two seconds after.
    assert!(begun.elapsed() >= Duration::from_secs(u64::from(HURRIED_REQUESTS / 100 - 1)));
    // Compared with the beginning: a look at its last moment may find some of them gone.
    let (most, peak) = (descriptors.iter().max().copied(), memory.iter().max().copied());
    // Two sockets before the first request, two more while the old ones are given up.
    assert!(descriptors.len() > 20 && most <= Some(descriptors[0] + 6), "{descriptors:?}");
    assert!(peak <= Some(memory[0] + 256), "kilobytes: {memory:?}");
}

/// It keeps all of its sockets. Those of the ports before the last are useless, and the audit reports them.
#[test]
fn attack_17_new_ports_come_slowly_and_given_up_sockets_neither_send_nor_receive() {
    require!(Wgsep);
    let attacked = Attacked::start(Attack::HoardPorts);
    attacked.netns.run("ip link set lo up");
    attacked.wait_for_log("last receives");
    let log = attacked.helper.log();
    let (_, after) = log.split_once("opened all after ").unwrap();
    let milliseconds: u64 = after.split(' ').next().unwrap().parse().unwrap();
    // Four at once, and the fifth when ten seconds have gone by since the first.
    assert!((9_500..20_000).contains(&milliseconds), "{log}");
    // It asks again all the time, as often as the helper answers: a hundred times a second.
    let (_, times) = log.split_once("was put off ").unwrap();
    let times: u32 = times.split(' ').next().unwrap().parse().unwrap();
    assert!((100..=2_000).contains(&times), "{log}");
    for reported in [
        "first sends: Err(EPIPE)",
        "last sends: Ok(2)",
        "first receives: Err(EAGAIN)",
        "last receives: Ok(2)",
    ] {
        assert!(log.contains(reported), "{reported:?} is not in {log}");
    }
    let program = wgsep_program("wgsep");
    let audit =
        attacked.netns.output(format!("{} audit {}", program.display(), attacked.interface));
    let table = String::from_utf8_lossy(&audit.stdout);
    assert_eq!(audit.status.code(), Some(1), "{table}");
    let is_degraded =
        |line: &str| line.starts_with("dataplane  descriptors") && line.contains("DEGRADED");
    assert!(table.lines().any(is_degraded), "{table}");
    assert!(table.contains("dataplane descriptors: it holds UDP sockets of more"), "{table}");
}

#[test]
fn attack_08_the_helper_itself_refuses_what_the_policy_forbids() {
    require!(Wgsep);
    let log = Attacked::start(Attack::Policy).assert_ends(0);
    let mark = Attack::Policy.mark();
    for reported in [
        format!("OpenUdp {{ port: 0, mark: {} }}: errno 1, 0 descriptors", mark + 1),
        format!("OpenUdp {{ port: 1023, mark: {mark} }}: errno 13, 0 descriptors"),
        format!("OpenUdp {{ port: 0, mark: {mark} }}: granted, 2 descriptors"),
        format!("SetMark {{ mark: {} }}: errno 1, 0 descriptors", mark + 1),
        format!("SetMark {{ mark: {mark} }}: granted, 0 descriptors"),
    ] {
        assert!(log.contains(&reported), "{reported:?} is not in {log}");
    }
}

#[test]
fn attack_08_wg_receives_the_errno_and_the_old_mark_and_port_stay() {
    require!(Wgsep);
    let daemon = Daemon::start_with(Wgsep, &Netns::new(), |command| {
        command.args(["--fwmark", "0x100/0xff00", "--listen-port", "4321"]);
    });
    let shown = |what: &str| daemon.netns.run(format!("wg show {} {what}", daemon.interface));
    let set = |what: &str| {
        let output = daemon.netns.output(format!("wg set {} {what}", daemon.interface));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { Err(said) }
    };
    // With the link down nothing would be opened, but it is no more permitted.
    assert!(set("listen-port 4322").unwrap_err().contains("not permitted"));
    set("listen-port 4321").unwrap();
    daemon.netns.run(format!("ip link set {} up", daemon.interface));
    set("fwmark 0x1ab").unwrap();
    for forbidden in ["fwmark 0x2ab", "fwmark 0", "listen-port 4322", "listen-port 53"] {
        let said = set(forbidden).unwrap_err();
        assert!(said.contains("not permitted"), "{forbidden}: {said}");
        assert_eq!(shown("fwmark").trim(), "0x1ab", "after {forbidden}");
        assert_eq!(shown("listen-port").trim(), "4321", "after {forbidden}");
    }

    let free = Daemon::start(Wgsep, &Netns::new());
    for state in ["down", "up"] {
        free.netns.run(format!("ip link set {} {state}", free.interface));
        let low = free.netns.output(format!("wg set {} listen-port 1023", free.interface));
        let said = String::from_utf8_lossy(&low.stderr);
        assert!(!low.status.success() && said.contains("Permission denied"), "{state}: {said}");
    }

    if LaunchedAs::this_run() != LaunchedAs::Root {
        // Without CAP_NET_BIND_SERVICE no option helps.
        return;
    }
    // By the option, and by the variable for wg-quick, which passes no options.
    for (option, variable) in [(Some("--allow-low-ports"), "0"), (None, "1")] {
        let allowed = Daemon::start_with(Wgsep, &Netns::new(), |command| {
            command.args(option).env("WGSEP_ALLOW_LOW_PORTS", variable);
        });
        allowed.netns.run(format!("wg set {} listen-port 1022", allowed.interface));
        allowed.netns.run(format!("ip link set {} up", allowed.interface));
        allowed.netns.run(format!("wg set {} listen-port 1023", allowed.interface));
        let port = allowed.netns.run(format!("wg show {} listen-port", allowed.interface));
        assert_eq!(port.trim(), "1023");
    }
}

#[test]
fn attack_14_a_stopped_dataplane_dies_with_the_helper() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let dataplane = daemon.dataplane();
    stop(dataplane);
    daemon.process.signal(Signal::SIGKILL);
    wait::until("the dataplane is gone", LIMIT, || !is_alive(dataplane));
    wait::until("the interface is gone", LIMIT, || !daemon.has_interface());
}

#[test]
fn attack_14_a_stopped_dataplane_is_killed_for_what_it_sent_before() {
    require!(Wgsep);
    let mut attacked = Attacked::start(Attack::OnConnect);
    attacked.wait_for_log("waiting for a client");
    let dataplane = procfs::children(attacked.helper.pid())[0];
    stop(attacked.helper.pid());
    // It hangs up once the frame is under way.
    let mut client = UnixStream::connect(socket_path(&attacked.interface)).unwrap();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(std::io::Read::read(&mut client, &mut [0]).unwrap(), 0);
    stop(dataplane);
    attacked.helper.signal(Signal::SIGCONT);
    let log = attacked.assert_ends(BREACH);
    assert!(log.contains("broke the contract and was killed: malformed frame"), "{log}");
}
