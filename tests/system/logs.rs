//! What is logged, where to, how much of it, and that an operator can change that while it runs.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use wgsep_tests::daemon::{Daemon, remove_files, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::{self, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{self, Process};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::traffic::ping;
use wgsep_tests::tunnel::{End, Plan, Tunnel};
use wgsep_tests::wg::{KeyPair, preshared_key};
use wgsep_tests::{procfs, require, wait};

/// How long a line may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(10);

#[track_caller]
fn until_logged(daemon: &Daemon, text: &str) {
    wait::until(text, LIMIT, || daemon.process.log().contains(text));
}

/// Gives the interface an MTU, which only `debug` tells of, and takes it up, which `info` does too;
/// true if the first was logged.
fn logs_the_mtu(daemon: &Daemon, mtu: u32) -> bool {
    let (netns, interface) = (&daemon.netns, &daemon.interface);
    let ups = || daemon.process.log().matches("interface up").count();
    let before = ups();
    netns.run(format!("ip link set {interface} mtu {mtu}"));
    netns.run(format!("ip link set {interface} up"));
    wait::until("the interface is up", LIMIT, || ups() > before);
    netns.run(format!("ip link set {interface} down"));
    daemon.process.log().contains(&format!("MTU is {mtu}"))
}

#[test]
fn sighup_turns_debug_on_and_off_in_both_processes() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    assert!(!logs_the_mtu(&daemon, 1300));
    daemon.process.signal(Signal::SIGHUP);
    until_logged(&daemon, "log level was INFO and is now DEBUG");
    let mut mtu = 1300;
    wait::until("the dataplane tells more", LIMIT, || {
        mtu += 1;
        logs_the_mtu(&daemon, mtu)
    });
    daemon.process.signal(Signal::SIGHUP);
    until_logged(&daemon, "log level was DEBUG and is now INFO");
    wait::until("the dataplane tells less", LIMIT, || {
        mtu += 1;
        !logs_the_mtu(&daemon, mtu)
    });
}

/// As `systemctl stop` and `systemctl kill` send them to every process of a service.
#[test]
fn the_dataplane_leaves_signals_to_the_helper() {
    require!(Wgsep);
    let mut daemon = Daemon::start(Wgsep, &Netns::new());
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM] {
        kill(daemon.dataplane(), signal).unwrap();
    }
    daemon.wg("show", "listen-port");
    assert_eq!(daemon.process.try_exit(), None, "{}", daemon.process.log());
    kill(daemon.dataplane(), Signal::SIGTERM).unwrap();
    daemon.process.signal(Signal::SIGTERM);
    assert_eq!(daemon.process.exit_within(LIMIT).code(), Some(0), "{}", daemon.process.log());
}

/// As what rotates logs, or a timer inherited from the launcher, sends them.
#[test]
fn signals_that_mean_nothing_to_a_daemon_change_nothing() {
    require!(Wgsep);
    let mut daemon = Daemon::start(Wgsep, &Netns::new());
    for signal in [
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGALRM,
        Signal::SIGVTALRM,
        Signal::SIGPROF,
        Signal::SIGIO,
        Signal::SIGPWR,
    ] {
        kill(daemon.dataplane(), signal).unwrap();
        daemon.process.signal(signal);
        daemon.wg("show", "listen-port");
        assert_eq!(daemon.process.try_exit(), None, "{signal}: {}", daemon.process.log());
    }
}

/// wgsep in the background, in mounts of its own.
struct Background {
    netns: Arc<Netns>,
    interface: String,
    /// The helper's parent, with which it ends.
    _process: Process,
}

impl Drop for Background {
    fn drop(&mut self) {
        remove_files(&self.interface);
    }
}

/// Starts wgsep in the background, in mounts that `script` arranges.
fn in_background(script: &str) -> Background {
    let (netns, interface) = (Netns::new(), unique_interface());
    let program = wgsep_program("wgsep");
    let script = format!(
        "{script}\n{} {interface}\nip link set {interface} up\necho it returned\nexec sleep 60",
        program.display()
    );
    let mut command = netns.command("unshare");
    command.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]);
    command.args(["--mount-proc", "sh", "-ec", &script]);
    let mut process = Process::spawn(command, "wgsep in the background");
    wait::until("it returns", LIMIT, || {
        assert_eq!(process.try_exit(), None, "{}", process.log());
        process.log().contains("it returned")
    });
    Background { netns, interface, _process: process }
}

/// Directories to mount for a start in the background on a machine without a log daemon.
struct WithoutSyslog {
    /// A /dev with what a start needs, and no /dev/log.
    dev: PathBuf,
    /// An empty /var/log.
    logs: PathBuf,
    /// The script that mounts both, for [`in_background`].
    mounts: String,
    _scratch: Scratch,
}

fn without_syslog() -> WithoutSyslog {
    let scratch = Scratch::new();
    let (dev, logs) = (scratch.join("dev"), scratch.join("log"));
    fs::create_dir_all(dev.join("net")).unwrap();
    for (node, major, minor) in [("null", 1, 3), ("urandom", 1, 9), ("net/tun", 10, 200)] {
        let numbers = [major, minor].map(|number| number.to_string());
        process::run(Command::new("mknod").arg(dev.join(node)).arg("c").args(numbers));
    }
    fs::create_dir(&logs).unwrap();
    let mounts = [(&dev, "/dev"), (&logs, "/var/log")]
        .map(|(from, to)| format!("mount --bind {} {to}", from.display()));
    WithoutSyslog { mounts: mounts.join("\n"), dev, logs, _scratch: scratch }
}

impl WithoutSyslog {
    /// The socket of a log daemon that starts there.
    fn start_syslog(&self) -> UnixDatagram {
        let syslog = UnixDatagram::bind(self.dev.join("log")).unwrap();
        syslog.set_read_timeout(Some(LIMIT)).unwrap();
        syslog
    }

    /// The log file of an interface.
    fn log_of(&self, interface: &str) -> String {
        fs::read_to_string(self.logs.join(format!("wgsep-{interface}.log"))).unwrap()
    }
}

#[track_caller]
fn next_message(syslog: &UnixDatagram) -> String {
    let mut message = [0; 4096];
    let len = syslog.recv(&mut message).expect("a message");
    String::from_utf8_lossy(&message[..len]).into_owned()
}

#[test]
fn in_the_background_without_syslog_there_is_a_file_in_var_log_and_none_in_tmp() {
    require!(Wgsep);
    let machine = without_syslog();
    let background = in_background(&machine.mounts);
    let interface = &background.interface;
    let log = machine.log_of(interface);
    assert!(log.contains(" INFO ") && log.contains("started: version "), "{log}");
    let in_tmp = fs::read_dir("/tmp").unwrap().flatten().map(|entry| entry.file_name());
    let ours: Vec<_> =
        in_tmp.filter(|name| name.to_string_lossy().contains(&**interface)).collect();
    assert!(ours.is_empty(), "{ours:?}");
}

#[test]
fn in_the_background_syslog_receives_lines_with_facility_and_level() {
    require!(Wgsep);
    let machine = without_syslog();
    let syslog = machine.start_syslog();
    let background = in_background(&machine.mounts);
    let interface = &background.interface;
    let next = || next_message(&syslog);
    // Facility daemon (3 << 3), level info (6): RFC 3164.
    let message = next();
    assert!(message.starts_with(&format!("<30>wgsep[{interface}]: ")), "{message}");
    let message = std::iter::repeat_with(next).find(|message| message.contains("interface up"));
    let tag = format!("<30>wgsep-dataplane[{interface}]: ");
    assert!(message.as_ref().is_some_and(|message| message.starts_with(&tag)), "{message:?}");
    assert!(fs::read_dir(&machine.logs).unwrap().next().is_none(), "there is a file, too");
}

#[test]
fn in_the_background_each_interface_that_the_kernel_numbers_has_a_file_of_its_own() {
    require!(Wgsep);
    let machine = without_syslog();
    let program = wgsep_program("wgsep").display().to_string();
    let _background = in_background(&format!(
        "{}\nmount -t tmpfs -o mode=755 none /run/wireguard\n{program} numbered%d\n{program} numbered%d",
        machine.mounts
    ));
    for interface in ["numbered0", "numbered1"] {
        let log = machine.log_of(interface);
        assert!(log.contains(&format!("wgsep[{interface}]: started: version ")), "{log}");
    }
}

/// A log daemon that restarts removes its socket and binds another one at the same path.
#[test]
fn in_the_background_a_restarted_syslog_gets_the_later_lines() {
    require!(Wgsep);
    let machine = without_syslog();
    let before = machine.start_syslog();
    let background = in_background(&machine.mounts);
    let Background { netns, interface, .. } = &background;
    wait::until("the interface is up", LIMIT, || next_message(&before).contains("interface up"));
    drop(before);
    fs::remove_file(machine.dev.join("log")).unwrap();
    let after = machine.start_syslog();
    netns.run(format!("ip link set {interface} down"));
    wait::until("the new socket receives a line", LIMIT, || {
        next_message(&after).contains("interface down, UDP port closed")
    });
}

/// A log daemon whose queue is full. It reads when the test does.
struct FullSyslog {
    syslog: UnixDatagram,
    fill: UnixDatagram,
    path: PathBuf,
}

impl FullSyslog {
    fn start(machine: &WithoutSyslog) -> Self {
        let syslog = machine.start_syslog();
        let fill = UnixDatagram::unbound().unwrap();
        fill.set_nonblocking(true).unwrap();
        Self { syslog, fill, path: machine.dev.join("log") }
    }

    fn fill(&self) {
        while self.fill.send_to(b"of another program", &self.path).is_ok() {}
    }

    /// All that waits.
    fn drain(&self) -> Vec<String> {
        self.syslog.set_nonblocking(true).unwrap();
        let mut message = [0; 4096];
        let read = || self.syslog.recv(&mut message).ok().map(|len| message[..len].to_vec());
        let read: Vec<_> = std::iter::from_fn(read).collect();
        self.syslog.set_nonblocking(false).unwrap();
        read.iter().map(|message| String::from_utf8_lossy(message).into_owned()).collect()
    }
}

#[test]
fn lines_that_syslog_does_not_take_are_counted() {
    require!(Wgsep);
    let machine = without_syslog();
    let log = FullSyslog::start(&machine);
    let Background { netns, interface, .. } = &in_background(&machine.mounts);
    let count = format!("<27>wgsep[{interface}]: ");
    wait::until("a line that counts others", LIMIT, || {
        log.fill();
        netns.run(format!("ip link set {interface} down"));
        netns.run(format!("ip link set {interface} up"));
        let read = log.drain();
        let counts = |line: &&String| line.contains("lines could not be written to the log");
        read.iter().find(counts).is_some_and(|line| {
            assert!(line.starts_with(&count), "{line}");
            true
        })
    });
}

/// Why the daemon ended is not lost in a burst of lines that what reads the log is busy with.
#[test]
fn a_log_that_was_full_for_a_moment_has_the_line_of_the_end() {
    require!(Wgsep);
    let machine = without_syslog();
    let log = FullSyslog::start(&machine);
    // On a busy machine the moment may be too long.
    let was_read = (0..5).any(|_| {
        let background = in_background(&machine.mounts);
        let Background { netns, interface, .. } = &background;
        let processes = procfs::with_argument(interface);
        let dataplane = processes.into_iter().flat_map(procfs::children).next().unwrap();
        log.fill();
        netns.run(format!("ip link del {interface}"));
        wait::until("the dataplane has ended", LIMIT, || !procfs::is_running(dataplane));
        std::thread::sleep(Duration::from_millis(20));
        let mut read = log.drain();
        wait::until("the daemon has ended", LIMIT, || !socket_path(interface).exists());
        read.extend(log.drain());
        read.iter().any(|line| line.contains("ended: the interface was deleted"))
    });
    assert!(was_read, "the line of the end was lost");
}

/// As logrotate does with copytruncate.
#[test]
fn a_log_file_that_is_truncated_begins_anew() {
    require!(Wgsep);
    let scratch = Scratch::new();
    let path = scratch.join("log");
    let daemon = Daemon::start_with(Wgsep, &Netns::new(), |command| {
        command.arg("--log-file").arg(&path);
    });
    let log = || fs::read_to_string(&path).unwrap();
    wait::until("the first line", LIMIT, || log().contains("started: version "));
    fs::File::create(&path).unwrap();
    daemon.process.signal(Signal::SIGHUP);
    wait::until("the next line", LIMIT, || log().ends_with("is now DEBUG\n"));
    // At the beginning of the file, and not behind a hole.
    assert!(log().lines().count() == 1 && log().starts_with("20"), "{:?}", log());
}

#[test]
fn a_fifo_without_a_reader_as_a_log_file_is_refused_at_once() {
    require!(Wgsep);
    let (scratch, netns) = (Scratch::new(), Netns::new());
    let fifo = scratch.join("fifo");
    nix::unistd::mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    for mode in [&["--foreground"][..], &[]] {
        let mut command = netns.command(wgsep_program("wgsep"));
        command.args(mode).arg("--log-file").arg(&fifo).arg(unique_interface());
        let mut process = Process::spawn(command, "wgsep");
        assert_eq!(process.exit_within(LIMIT).code(), Some(1), "{mode:?}");
        let log = process.log();
        let why = format!(
            "wgsep: open the log {}: No such device or address (ENXIO); start what reads from it",
            fifo.display()
        );
        assert!(log.lines().count() == 1 && log.starts_with(&why), "{log}");
    }
}

/// As where the connection to it hangs.
#[test]
fn a_terminal_that_no_process_reads_blocks_nothing() {
    require!(Wgsep);
    let terminal = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname_r(&terminal).unwrap();
    let netns = Netns::new();
    let mut daemon = Daemon::start_with(Wgsep, &netns, |command| {
        let mut shell = netns.command("sh");
        shell.args(["-c", "exec \"$@\" 2>\"$0\"", &name]);
        shell.arg(command.get_program()).args(command.get_args());
        *command = shell;
    });
    let dataplane = daemon.dataplane();
    // More than the terminal, and the pipe from the dataplane, have room for.
    let mut open = fs::OpenOptions::new();
    open.write(true).custom_flags(OFlag::O_NONBLOCK.bits());
    let mut pipe = open.open(format!("/proc/{dataplane}/fd/2")).unwrap();
    let line = format!("INFO {}\n", "x".repeat(990));
    let mut written = 0;
    wait::until("the helper reads all lines", LIMIT, || {
        while written < 512 << 10 {
            let Ok(len) = pipe.write(line.as_bytes()) else { return false };
            written += len;
        }
        true
    });
    // The launcher's open file is as it was.
    let stderr = fs::read_to_string(format!("/proc/{}/fdinfo/2", daemon.process.pid())).unwrap();
    let flags = stderr.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
    let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
    assert!(!OFlag::from_bits_truncate(flags).contains(OFlag::O_NONBLOCK), "{flags:o}");
    daemon.process.signal(Signal::SIGTERM);
    assert_eq!(daemon.process.exit_within(LIMIT).code(), Some(0));
    assert!(!daemon.has_interface() && !daemon.has_socket() && !procfs::is_running(dataplane));
    let mut first = [0; 4096];
    let len = nix::unistd::read(&terminal, &mut first).unwrap();
    let first = String::from_utf8_lossy(&first[..len]).into_owned();
    assert!(first.contains(&format!("wgsep[{}]: started: version ", daemon.interface)), "{first}");
}

#[test]
fn lines_of_the_dataplane_have_a_tag_of_their_own_as_text_and_in_json() {
    require!(Wgsep);
    for format in ["text", "json"] {
        let daemon = Daemon::start_with(Wgsep, &Netns::new(), |command| {
            command.args(["--log-format", format]);
        });
        let interface = &daemon.interface;
        daemon.netns.run(format!("ip link set {interface} up"));
        until_logged(&daemon, "interface up");
        let log = daemon.process.log();
        for (program, text) in [("wgsep", "started: "), ("wgsep-dataplane", "interface up")] {
            let line = log.lines().find(|line| line.contains(text)).unwrap();
            let tag = format!("{program}[{interface}]");
            if format == "text" {
                assert!(line.contains(&format!(" INFO {tag}: {text}")), "{line}");
            } else {
                let line: serde_json::Value = serde_json::from_str(line).unwrap();
                assert_eq!((&line["tag"], &line["level"]), (&tag.into(), &"INFO".into()), "{line}");
            }
        }
    }
}

#[test]
fn the_start_is_a_short_line_and_in_json_it_has_each_layer_of_both_processes() {
    require!(Wgsep);
    let start = |format: &str| {
        let daemon = Daemon::start_with(Wgsep, &Netns::new(), |command| {
            command.args(["--log-format", format]);
        });
        until_logged(&daemon, "started: ");
        let (log, dataplane) = (daemon.process.log(), daemon.dataplane());
        (log.lines().find(|line| line.contains("started: ")).unwrap().to_owned(), dataplane)
    };
    let (text, _) = start("text");
    assert!(text.len() < 200 && text.ends_with("; sandbox: every layer in force"), "{text}");
    let (json, dataplane) = start("json");
    let event: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(event["pid"], dataplane.as_raw());
    assert!(event["uid"].is_u64() && event["version"].is_string(), "{json}");
    for (process, layer) in
        [("dataplane", "seccomp"), ("dataplane", "empty-root"), ("helper", "landlock")]
    {
        assert_eq!(event["sandbox"][process][layer], "applied", "{json}");
    }
}

// ---------------------------------------------------------------- a handshake that fails says why

/// Two ends that are joined and know nothing of each other.
fn strangers() -> [End; 2] {
    let (left, right) = link::joined();
    [(Side::Left, left), (Side::Right, right)]
        .map(|(side, netns)| End::new(side, Daemon::start(Wgsep, &netns)))
}

/// Makes the left end want a handshake.
#[track_caller]
fn begin(left: &End, right: &End) {
    assert_eq!(ping(&left.daemon.netns, right.side.inner(Family::V4), 1).received, 0);
}

/// A line with these words, which names the peer as wg(8)'s users know it, if there is one.
#[track_caller]
fn until_reported(daemon: &Daemon, peer: Option<&KeyPair>, words: &[&str]) {
    let name = peer.map(KeyPair::name).unwrap_or_default();
    wait::until(&format!("{words:?} and {name}"), LIMIT, || {
        let log = daemon.process.log();
        log.lines().any(|line| line.contains(&name) && words.iter().all(|word| line.contains(word)))
    });
}

#[test]
fn a_wrong_public_key_for_this_end_is_logged_with_the_sender() {
    require!(Wgsep);
    let [left, right] = strangers();
    let wrong = KeyPair::generate();
    right.configure(&left.key.public, None, None);
    left.configure(&wrong.public, Some(right.endpoint(Family::V4)), None);
    begin(&left, &right);
    let from = left.endpoint(Family::V4).to_string();
    until_reported(&right.daemon, None, &[&from, "another key than ours", "check the public key"]);
}

#[test]
fn a_key_that_is_no_peers_is_logged_with_the_sender() {
    require!(Wgsep);
    let [left, right] = strangers();
    right.configure(&KeyPair::generate().public, None, None);
    left.configure(&right.key.public, Some(right.endpoint(Family::V4)), None);
    begin(&left, &right);
    let from = left.endpoint(Family::V4).to_string();
    until_reported(&right.daemon, Some(&left.key), &[&from, "no peer here has", "wg set"]);
}

#[test]
fn different_preshared_keys_are_suspected_by_the_initiator() {
    require!(Wgsep);
    let [left, right] = strangers();
    right.configure(&left.key.public, None, None);
    left.configure(&right.key.public, Some(right.endpoint(Family::V4)), Some(&preshared_key()));
    begin(&left, &right);
    let words = ["response does not open", "same preshared key"];
    until_reported(&left.daemon, Some(&right.key), &words);
}

#[test]
fn a_missing_route_is_logged_once_and_so_is_that_it_works_again() {
    require!(Wgsep);
    let Tunnel { left, right } = &Plan::new(Wgsep, Wgsep).build();
    left.set_peer(right, "endpoint 198.51.100.1:51820 persistent-keepalive 1");
    until_reported(&left.daemon, Some(&right.key), &["no route to its endpoint", "ip route get"]);
    left.set_peer(right, format!("endpoint {}", right.endpoint(Family::V4)));
    until_reported(&left.daemon, Some(&right.key), &["first handshake complete"]);
    let log = left.daemon.process.log();
    assert_eq!(log.matches("no route to its endpoint").count(), 1, "{log}");
}

/// EACCES is the errno of both a route of type prohibit and a broadcast address.
#[test]
fn a_prohibited_and_a_broadcast_endpoint_have_no_route_by_the_mark() {
    require!(Wgsep);
    for (route, to) in [("prohibit", "10.77.0.2"), ("broadcast", "10.77.0.255")] {
        let Tunnel { left, right } = &Plan::new(Wgsep, Wgsep).build();
        let netns = &left.daemon.netns;
        if route == "prohibit" {
            netns.run(format!("ip route add prohibit {to}"));
        }
        left.daemon.wg_set("fwmark 7");
        left.set_peer(right, format!("endpoint {to}:51820 persistent-keepalive 1"));
        let cause = format!("no route to its endpoint {to}:51820: Permission denied");
        let advice = format!("see: ip route get {to} mark 0x7");
        until_reported(&left.daemon, Some(&right.key), &[&cause, &advice]);
        if route == "prohibit" {
            netns.run(format!("ip route del prohibit {to}"));
        } else {
            left.set_peer(right, format!("endpoint {}", right.endpoint(Family::V4)));
        }
        until_reported(&left.daemon, Some(&right.key), &["first handshake complete"]);
        let log = left.daemon.process.log();
        assert!(!log.contains("firewall"), "{log}");
    }
}

/// The kernel answers EINVAL, which does not suggest a route.
#[test]
fn an_endpoint_behind_a_blackhole_has_no_route() {
    require!(Wgsep);
    for (family, to, ip) in
        [(Family::V4, "198.51.100.1", "ip"), (Family::V6, "2001:db8:5::1", "ip -6")]
    {
        let Tunnel { left, right } = &Plan::new(Wgsep, Wgsep).build();
        let netns = &left.daemon.netns;
        let bracketed = if family == Family::V4 { to.to_owned() } else { format!("[{to}]") };
        netns.run(format!("{ip} route add blackhole {to}"));
        left.set_peer(right, format!("endpoint {bracketed}:51820 persistent-keepalive 1"));
        let cause = format!("no route to its endpoint {bracketed}:51820: Invalid argument");
        let advice = format!("see: {ip} route show table all type blackhole, {ip} rule");
        until_reported(&left.daemon, Some(&right.key), &[&cause, &advice]);
        assert!(netns.run(format!("{ip} route show table all type blackhole")).contains(to));
        let interface = &left.daemon.interface;
        let stats = format!("{} stats {interface}", wgsep_program("wgsep").display());
        let counted = netns.run(stats);
        assert!(counted.contains("send_no_route") && !counted.contains("send_failed"), "{counted}");
        left.set_peer(right, format!("endpoint {}", right.endpoint(Family::V4)));
        until_reported(&left.daemon, Some(&right.key), &["first handshake complete"]);
    }
}

#[test]
fn an_ipsec_policy_of_this_machine_is_logged() {
    require!(Wgsep);
    let Tunnel { left, right } = &Plan::new(Wgsep, Wgsep).build();
    let netns = &left.daemon.netns;
    netns.run("ip xfrm policy add dir out dst 0.0.0.0/0 proto udp dport 51820 action block");
    begin(left, right);
    until_reported(&left.daemon, Some(&right.key), &["or an IPsec policy", "ip xfrm policy"]);
}

#[test]
fn a_firewall_of_this_machine_is_logged() {
    require!(Wgsep);
    let Tunnel { left, right } = &Plan::new(Wgsep, Wgsep).build();
    let nft = "add table inet t; add chain inet t c { type filter hook output priority 0; }; \
               add rule inet t c udp dport 51820 drop";
    process::run(left.daemon.netns.command("nft").arg(nft));
    begin(left, right);
    until_reported(
        &left.daemon,
        Some(&right.key),
        &["a firewall of this machine", "nft list ruleset", "IPAddressDeny="],
    );
}

/// 1,100 datagrams whose senders do not exist, each with a wrong mac1; the route lets them have any
/// address of 10.99.0.0/16.
fn flood_with_spoofed_senders(from: &End, to: &End) {
    let (netns, endpoint) = (&from.daemon.netns, to.endpoint(Family::V4));
    netns.run("ip route add local 10.99.0.0/16 dev lo");
    let mut initiation = [7; 148];
    initiation[..4].copy_from_slice(&[1, 0, 0, 0]);
    netns.inside(|| {
        for number in 0..1100_u16 {
            let [high, low] = number.to_be_bytes();
            let socket = UdpSocket::bind((Ipv4Addr::new(10, 99, high, low), 0)).unwrap();
            socket.send_to(&initiation, endpoint).unwrap();
        }
    });
}

#[test]
fn a_flood_of_spoofed_senders_hides_no_peer_s_failure() {
    require!(Wgsep);
    let [left, right] = strangers();
    right.configure(&left.key.public, Some(left.endpoint(Family::V4)), Some(&preshared_key()));
    left.configure(&right.key.public, Some(right.endpoint(Family::V4)), None);
    flood_with_spoofed_senders(&left, &right);
    until_reported(&right.daemon, None, &["10.99.", "another key than ours"]);
    let log = right.daemon.process.log();
    assert!(log.matches("another key than ours").count() <= 10, "{log}");
    begin(&right, &left);
    let words = ["response does not open", "same preshared key"];
    until_reported(&right.daemon, Some(&left.key), &words);
}
