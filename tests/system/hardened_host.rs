//! Hosts that are stricter than most: /proc that hides processes, few descriptors, file systems that allow
//! less, a family of addresses missing. Each start serves, or one line names what is in the way.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use wgsep_tests::daemon::unique_interface;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{self, Process};
use wgsep_tests::skip::skip;
use wgsep_tests::{procfs, repository, require, wait};

/// How long a start, or a refusal, may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(20);
/// Without the privileges that override limits or hidden processes.
const NO_PTRACE: [&str; 2] = ["setpriv", "--bounding-set=-sys_ptrace"];
const NO_RESOURCE: [&str; 2] = ["setpriv", "--bounding-set=-sys_resource,-ipc_lock"];

/// A start in mounts, a PID namespace and a network namespace of its own.
struct Host {
    process: Process,
    interface: String,
    netns: Arc<Netns>,
}

impl Host {
    /// `script` is what root does before, with /run empty; `around` starts wgsep.
    fn new(script: &str, around: &[&str]) -> Self {
        Self::with_arguments(script, around, &[])
    }

    fn with_arguments(script: &str, around: &[&str], arguments: &[&str]) -> Self {
        let (netns, interface) = (Netns::new(), unique_interface());
        let script = format!("mount -t tmpfs none /run\n{script}\nexec \"$@\"");
        let mut command = netns.command("unshare");
        command.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]);
        command.args(["--mount-proc", "sh", "-ec", &script, "sh"]).args(around);
        command.arg(wgsep_program("wgsep")).args(["-f", &interface]).args(arguments);
        let process = Process::spawn(command, "wgsep on a hardened host");
        Self { process, interface, netns }
    }

    #[track_caller]
    fn started(mut self) -> Self {
        wait::until("it has started", LIMIT, || {
            let ended = self.process.try_exit();
            assert!(ended.is_none(), "it ended: {ended:?}\n{}", self.process.log());
            self.process.log().contains("started: ")
        });
        self
    }

    /// The one line with which it refuses to run; nothing is left then.
    #[track_caller]
    fn refused(mut self) -> String {
        let status = self.process.exit_within(LIMIT);
        let log = self.process.log();
        assert_eq!(status.code(), Some(1), "{log}");
        assert_eq!(log.lines().count(), 1, "{log}");
        assert!(!self.netns.run("ip -o link").contains(&self.interface), "{log}");
        assert!(procfs::with_argument(&self.interface).is_empty(), "{log}");
        log
    }

    /// The helper: the child of unshare(1).
    fn helper(&self) -> Pid {
        procfs::children(self.process.pid())[0]
    }

    /// A command where the helper is.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--net", "--pid", "--target", &self.helper().to_string()]);
        command.arg(program);
        command
    }

    fn wg(&self, arguments: &str) -> String {
        process::run(self.command("wg").args(arguments.split_whitespace()))
    }
}

#[test]
fn a_proc_that_hides_processes_is_verified_by_and_audited() {
    require!(Wgsep);
    for options in ["hidepid=1,gid=77", "hidepid=2", "hidepid=2,gid=77", "hidepid=ptraceable"] {
        let host = Host::new(&format!("mount -o remount,{options} /proc"), &["env"]).started();
        let log = host.process.log();
        assert!(log.contains("every layer in force"), "{log}");
        let program = wgsep_program("wgsep");
        let mut audit = host.command(program.to_str().unwrap());
        let audited = process::output(audit.args(["audit", &host.interface]));
        assert_eq!(audited.status.code(), Some(0), "{options}: {audited:?}");
        // What was kept in order to look is gone.
        let helper = &procfs::threads(host.helper())[0];
        let (admin, kill, ptrace) = (1 << 12, 1 << 5, 1 << 19);
        assert_eq!(helper.capabilities("CapPrm") & ptrace, 0, "{options}");
        assert_eq!(helper.capabilities("CapPrm"), admin | kill, "{options}");
    }
}

#[test]
fn an_audit_that_may_not_look_at_the_daemon_says_so() {
    require!(Wgsep);
    let host = Host::new("mount -o remount,hidepid=2,gid=77 /proc", &["env"]).started();
    let mut audit = host.command(NO_PTRACE[0]);
    audit.arg(NO_PTRACE[1]).arg(wgsep_program("wgsep")).args(["audit", &host.interface]);
    let said = process::output(&mut audit);
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.status.code() == Some(2) && text.lines().count() == 1, "{said:?}");
    assert!(text.contains("/proc hides it (hidepid=)") && !text.contains("not wgsep"), "{text}");
}

#[test]
fn a_proc_that_cannot_be_looked_into_is_named_with_what_would_help() {
    require!(Wgsep);
    for (script, around, named) in [
        ("mount -o remount,hidepid=ptraceable /proc", &NO_PTRACE[..], "CAP_SYS_PTRACE"),
        ("mount -o remount,hidepid=2,gid=77 /proc", &NO_PTRACE, "hidepid="),
        ("mount -o remount,hidepid=1,gid=77 /proc", &NO_PTRACE, "ProtectProc="),
        ("umount -l /proc; mount -t tmpfs none /proc", &["env"], "mount -t proc proc /proc"),
        // As in a container that shares the host's.
        ("true", &["unshare", "--pid", "--fork", "--kill-child"], "another PID namespace's"),
    ] {
        let said = Host::new(script, around).refused();
        assert!(said.contains(named) && said.contains("/proc"), "{script}: {said}");
    }
}

#[test]
fn hosts_that_lack_what_is_not_needed_are_served() {
    require!(Wgsep);
    for script in [
        "mount -t proc -o subset=pid,hidepid=ptraceable proc /proc",
        "mount -t tmpfs -o noexec,nosuid,nodev none /tmp",
        "umount -l /sys; mount -t tmpfs none /sys",
        "mount -o remount,bind,ro /",
        "touch /run/none; mount --bind /run/none /etc/passwd",
        "touch /run/none; mount --bind /run/none /etc/nsswitch.conf",
        "prlimit --fsize=0:unlimited --pid $$",
        "prlimit --as=200000000 --pid $$",
    ] {
        let host = Host::new(script, &["env"]).started();
        let log = host.process.log();
        assert!(log.contains("every layer in force"), "{script}: {log}");
        host.wg(&format!("show {}", host.interface));
    }
}

#[test]
fn without_ipv6_there_is_a_socket_of_the_other_family() {
    require!(Wgsep);
    let script =
        "for name in all default; do echo 1 >/proc/sys/net/ipv6/conf/$name/disable_ipv6; done";
    let host = Host::new(script, &["env"]).started();
    process::run(host.command("ip").args(["link", "set", &host.interface, "up"]));
    wait::until("it has a port", LIMIT, || {
        host.wg(&format!("show {} listen-port", host.interface)).trim() != "0"
    });
    assert!(host.netns.run("ss -Hlnu").contains("0.0.0.0:"));
}

#[test]
fn a_file_system_or_a_device_that_is_missing_is_named() {
    require!(Wgsep);
    const DEV: &str = "mkdir /dev/net; mknod /dev/net/tun c 10 200; mknod /dev/null c 1 3";
    let noexec =
        "mkdir -p /run/x/sbin /run/x/libexec/wgsep; mount -t tmpfs none /run/x/libexec/wgsep
        cp $DIR/wgsep /run/x/sbin; install -m 711 $DIR/wgsep-dataplane /run/x/libexec/wgsep
        mount -o remount,noexec /run/x/libexec/wgsep; set -- /run/x/sbin/wgsep -f \"$3\"";
    let directory = wgsep_program("wgsep").with_file_name("");
    let noexec = noexec.replace("$DIR", directory.to_str().unwrap());
    for (script, named) in [
        ("mount -o remount,ro /run", "read-only file system; mount one there"),
        (&*format!("mount -t tmpfs -o nodev none /dev; {DEV}"), "without nodev"),
        ("mount -t tmpfs none /dev; mknod /dev/null c 1 3", "/dev/net/tun is missing"),
        ("mount -t tmpfs none /dev; mkdir /dev/net; mknod /dev/net/tun c 10 200", "/dev/null"),
        (
            "mount -t tmpfs none /dev; mkdir -p /dev/net/tun; mknod /dev/null c 1 3",
            "/dev/net/tun is another file or device; make it anew: rm -r /dev/net/tun; mknod",
        ),
        (
            "mount -t tmpfs none /dev; mkdir /dev/net; ln -s tun /dev/net/tun; mknod /dev/null c 1 3",
            "/dev/net/tun is another file or device; make it anew: rm -r /dev/net/tun; mknod",
        ),
        (&noexec, "not mounted noexec"),
    ] {
        let said = Host::new(script, &[]).refused();
        assert!(said.contains(named), "{script}: {said}");
    }
}

#[test]
fn an_account_that_is_not_there_is_named_and_a_uid_is_none() {
    require!(Wgsep);
    for (user, named) in [
        ("wgsep-none", "no account \"wgsep-none\"; create it: useradd --system wgsep-none"),
        ("61001", "--user 61001: write the name of an account; see getent passwd 61001"),
    ] {
        let said = Host::with_arguments("true", &["env"], &["--user", user]).refused();
        assert!(said.contains(named), "{said}");
    }
}

#[test]
fn a_limit_that_is_too_low_is_named() {
    require!(Wgsep);
    for (limit, named) in [
        ("--nofile=50:50", "the hard limit on open files is 50, and 2 workers need 64"),
        ("--nofile=20:20", "the hard limit on open files is 20, and 2 workers need 64"),
    ] {
        let around = [&NO_RESOURCE[..], &["prlimit", limit]].concat();
        let said = Host::with_arguments("true", &around, &["--workers", "2"]).refused();
        assert!(said.contains(named) && said.contains("LimitNOFILE="), "{said}");
    }
    // The log of the test is a file itself, which could not grow.
    let piped = ["sh", "-c", "\"$@\" 2>&1 | cat; exit 1", "sh"];
    let around = [&piped[..], &NO_RESOURCE, &["prlimit", "--fsize=0:0"]].concat();
    let said = Host::new("true", &around).refused();
    assert!(said.contains("size of files is 0 bytes") && said.contains("LimitFSIZE="), "{said}");
    // As a file it stays empty, and the exit status is that of a refusal. Process 1 is none that a signal kills.
    let child = ["sh", "-c", "\"$@\"; exit $?", "sh"];
    let around = [&child[..], &NO_RESOURCE, &["prlimit", "--fsize=0:0"]].concat();
    let mut host = Host::new("true", &around);
    let status = host.process.exit_within(LIMIT);
    assert_eq!(status.code(), Some(1), "{status}");
    let around = ["setpriv", "--bounding-set=-sys_resource,-sys_admin", "prlimit", "--nproc=1:1"];
    let said = Host::new("true", &around).refused();
    // The limit counts what other tests run as that user.
    let is_named = ["limit on threads", "no more processes"].iter().any(|line| said.contains(line));
    assert!(is_named, "{said}");
}

/// Descriptors are passed as ancillary data.
#[test]
fn a_limit_on_ancillary_data_that_is_too_low_is_named_with_its_setting() {
    require!(Wgsep);
    const SETTING: &str = "/proc/sys/net/core/optmem_max";
    let is_of_namespace = Command::new("unshare").args(["--net", "test", "-e", SETTING]).status();
    if !is_of_namespace.unwrap().success() {
        return skip("net.core.optmem_max is the whole machine's: take Linux 6.7 or later");
    }
    let said = Host::new(&format!("echo 0 >{SETTING}"), &["env"]).refused();
    assert!(
        said.contains("hand over the interface: No buffer space available (ENOBUFS); "),
        "{said}"
    );
    assert!(said.contains("sysctl net.core.optmem_max=131072"), "{said}");
}

/// What stops a socket that is given up from receiving needs memory of that limit, or does without.
#[test]
fn a_limit_on_ancillary_data_that_is_lowered_later_stops_no_change_of_port_or_link() {
    require!(Wgsep);
    const SETTING: &str = "/proc/sys/net/core/optmem_max";
    let host = Host::new("true", &["env"]).started();
    let has_setting = host.command("test").args(["-e", SETTING]).status();
    if !has_setting.unwrap().success() {
        return skip("net.core.optmem_max is the whole machine's: take Linux 6.7 or later");
    }
    let name = &host.interface;
    let link = |state: &str| process::run(host.command("ip").args(["link", "set", name, state]));
    let port = || host.wg(&format!("show {name} listen-port")).trim().parse::<u16>().unwrap();
    link("up");
    wait::until("a port is open", LIMIT, || port() != 0);
    process::run(host.command("sh").args(["-c", &format!("echo 0 >{SETTING}")]));
    let other = port() ^ 1;
    host.wg(&format!("set {name} listen-port {other}"));
    assert_eq!(port(), other);
    let log = || host.process.log();
    link("down");
    wait::until("the port is closed", LIMIT, || log().contains("interface down"));
    link("up");
    let is_open = || log().matches("interface up, UDP port").count() == 2;
    wait::until("the port is open again", LIMIT, is_open);
    assert_eq!(port(), other);
    assert!(!log().contains("ended: "), "{}", log());
}

/// More clients than there are descriptors for neither lock an operator out nor keep the link down.
#[test]
fn few_descriptors_bound_the_clients_and_nothing_else() {
    require!(Wgsep);
    for limit in ["--nofile=128:128", "--nofile=64:64", "--nofile=20:1024"] {
        let around = [&NO_RESOURCE[..], &["prlimit", limit]].concat();
        let host = Host::with_arguments("true", &around, &["--workers", "2"]).started();
        let log = host.process.log();
        assert!(log.contains("every layer in force"), "{limit}: {log}");
        let socket = format!("/proc/{}/root/run/wireguard/{}.sock", host.helper(), host.interface);
        let socket = PathBuf::from(socket);
        let crowd: Vec<_> = (0..100).map(|_| UnixStream::connect(&socket).unwrap()).collect();
        host.wg(&format!("show {}", host.interface));
        process::run(host.command("ip").args(["link", "set", &host.interface, "up"]));
        for port in ["40001", "40002"] {
            host.wg(&format!("set {} listen-port {port}", host.interface));
            let shown = host.wg(&format!("show {} listen-port", host.interface));
            assert_eq!(shown.trim(), port, "{limit}: {}", host.process.log());
        }
        drop(crowd);
    }
}

/// As systemd starts a service whose output goes to the journal.
#[test]
fn the_journal_gets_priorities_and_no_time_and_a_file_does_not() {
    require!(Wgsep);
    // The stream that the shell's standard error is, and one that it is not.
    let stream = "JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2); export JOURNAL_STREAM";
    for (script, is_journal) in [(stream, true), ("export JOURNAL_STREAM=1:1", false)] {
        let host = Host::new(script, &["env"]).started();
        nix::sys::signal::kill(host.helper(), Signal::SIGTERM).unwrap();
        wait::until("it has ended", LIMIT, || host.process.log().contains("ended: SIGTERM"));
        let log = host.process.log();
        for line in log.lines() {
            let is_plain = line.starts_with("<6>wgsep[") && !line.contains("INFO");
            assert_eq!(is_plain, is_journal, "{log}");
            assert_eq!(line.contains(" INFO wgsep["), !is_journal, "{log}");
        }
        let said = Host::with_arguments(script, &["env"], &["--tun-netns", "none"]).refused();
        assert_eq!(said.starts_with("<3>wgsep: "), is_journal, "{said}");
    }
}

#[test]
fn a_pinned_low_port_is_bound_and_a_refused_one_names_the_settings() {
    require!(Wgsep);
    let host = Host::with_arguments("true", &["env"], &["--listen-port", "53"]).started();
    process::run(host.command("ip").args(["link", "set", &host.interface, "up"]));
    wait::until("it has port 53", LIMIT, || host.netns.run("ss -Hlnu").contains(":53 "));
    let helper = &procfs::threads(host.helper())[0];
    assert_ne!(helper.capabilities("CapPrm") & (1 << 10), 0, "CAP_NET_BIND_SERVICE");
    let refusal = |host: &Host, port: &str, words: &[&str]| {
        let set = format!("set {} listen-port {port}", host.interface);
        let refused = process::output(host.command("wg").args(set.split(' ')));
        assert!(!refused.status.success());
        let names_it = |line: &str| words.iter().all(|word| line.contains(word));
        wait::until("the log names the setting", LIMIT, || {
            host.process.log().lines().any(names_it)
        });
    };
    refusal(&host, "54", &["EPERM", "--listen-port"]);
    let settings = ["EACCES", "--allow-low-ports", "WGSEP_ALLOW_LOW_PORTS=1", "--listen-port"];
    for state in ["down", "up"] {
        let host = Host::new("true", &["env"]).started();
        process::run(host.command("ip").args(["link", "set", &host.interface, state]));
        refusal(&host, "53", &settings);
    }
    let around = ["setpriv", "--bounding-set=-net_bind_service"];
    let host = Host::with_arguments("true", &around, &["--allow-low-ports"]).started();
    process::run(host.command("ip").args(["link", "set", &host.interface, "up"]));
    refusal(&host, "53", &["EACCES", "CAP_NET_BIND_SERVICE"]);
}

/// The capabilities that the shipped unit leaves, as setpriv(1) names them.
fn bounding_set_of_the_unit() -> String {
    let unit = repository().join("bin/dist/wgsep@.service.in");
    let unit = fs::read_to_string(unit).unwrap();
    let set = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    let names = set.split(' ').map(|name| format!(",+{}", name[4..].to_lowercase()));
    format!("--bounding-set=-all{}", names.collect::<String>())
}

impl Host {
    /// Takes the interface up, and waits until it has this port.
    #[track_caller]
    fn opens(&self, port: &str) {
        self.netns.run(format!("ip link set {} up", self.interface));
        wait::until("its port is open", LIMIT, || {
            self.process.log().contains(&format!("interface up, UDP port {port}"))
        });
    }

    /// Takes the interface up, and returns the line that says why the port is not open.
    #[track_caller]
    fn opens_nothing(&self) -> String {
        self.netns.run(format!("ip link set {} up", self.interface));
        let line = || {
            self.process.log().lines().find_map(|l| Some(l.split_once("cannot open")?.1.to_owned()))
        };
        wait::until("its port is refused", LIMIT, || line().is_some());
        line().unwrap()
    }

    fn may_bind_low_ports(&self) -> bool {
        procfs::threads(self.helper())[0].capabilities("CapPrm") & (1 << 10) != 0
    }
}

#[test]
fn the_unit_has_the_capability_for_a_low_port_and_the_helper_keeps_it_for_none_but_such() {
    require!(Wgsep);
    let set = bounding_set_of_the_unit();
    for (port, is_low) in [("443", true), ("51820", false)] {
        let around = ["setpriv", &set, "--no-new-privs"];
        let host = Host::with_arguments("true", &around, &["--listen-port", port]).started();
        host.opens(port);
        assert_eq!(host.may_bind_low_ports(), is_low, "{port}");
    }
}

#[test]
fn which_ports_are_privileged_is_up_to_the_network_namespace_of_the_sockets() {
    require!(Wgsep);
    let first = |first: u32| format!("echo {first} >/proc/sys/net/ipv4/ip_unprivileged_port_start");
    let elsewhere =
        format!("ip netns add sockets; ip netns exec sockets sh -c '{}'", first(20_000));
    for (script, arguments, is_privileged) in [
        (first(20_000), &["--listen-port", "5001"][..], true),
        (first(20_000), &["--listen-port", "5001", "--allow-low-ports"], true),
        (first(20_000), &["--listen-port", "20000", "--allow-low-ports"], false),
        (first(0), &["--listen-port", "53"], false),
        (elsewhere, &["--listen-port", "5001", "--socket-netns", "sockets"], true),
    ] {
        let host = Host::with_arguments(&script, &["env"], arguments).started();
        host.opens(arguments[1]);
        assert_eq!(host.may_bind_low_ports(), is_privileged, "{script} {arguments:?}");
    }
    // None is pinned: a port that this host keeps for privileged processes has to be enabled.
    let host = Host::new(&first(20_000), &["env"]).started();
    let set = format!("set {} listen-port 5001", host.interface);
    assert!(!process::output(host.command("wg").args(set.split(' '))).status.success());
    wait::until("the log names the setting", LIMIT, || {
        host.process.log().contains("--listen-port 5001")
    });
    let host = Host::with_arguments(&first(20_000), &["env"], &["--allow-low-ports"]).started();
    host.wg(&format!("set {} listen-port 5001", host.interface));
    host.opens("5001");
}

/// As in the shipped unit, which has ProcSubset=pid.
#[test]
fn where_the_limit_of_unprivileged_ports_cannot_be_read_an_option_is_asked_for() {
    require!(Wgsep);
    let script = "echo 20000 >/proc/sys/net/ipv4/ip_unprivileged_port_start
        mount -t proc -o subset=pid proc /proc";
    let host = Host::with_arguments(script, &["env"], &["--listen-port", "5001"]).started();
    let line = host.opens_nothing();
    for named in ["EACCES", "ip_unprivileged_port_start", "--allow-low-ports"] {
        assert!(line.contains(named), "{line}");
    }
    assert!(
        line.contains(&format!("CapabilityBoundingSet= of wgsep@{}", host.interface)),
        "{line}"
    );
    let both = ["--listen-port", "5001", "--allow-low-ports"];
    Host::with_arguments(script, &["env"], &both).started().opens("5001");
}

/// As of an init system or a language runtime that ignores what it has no use for.
#[test]
fn a_launcher_that_ignores_or_blocks_signals_changes_neither_the_exit_status_nor_the_end() {
    require!(Wgsep);
    for option in ["--ignore-signal=CHLD,TERM,INT,HUP,PIPE", "--block-signal"] {
        let around = ["env", option];
        let mut host = Host::new("true", &around).started();
        let dataplane = procfs::children(host.helper())[0];
        nix::sys::signal::kill(dataplane, Signal::SIGSYS).unwrap();
        let status = host.process.exit_within(LIMIT);
        assert_eq!(status.code(), Some(76), "{option}: {}", host.process.log());
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            let mut host = Host::new("true", &around).started();
            nix::sys::signal::kill(host.helper(), signal).unwrap();
            assert_eq!(host.process.exit_within(LIMIT).code(), Some(0), "{option} {signal}");
        }
    }
}

#[test]
fn nohup_keeps_sighup_from_changing_the_log_level_of_a_daemon_in_the_foreground() {
    require!(Wgsep);
    // The tests may have been started under nohup themselves.
    for (option, is_ignored) in [("--ignore-signal=HUP", true), ("--default-signal=HUP", false)] {
        let mut host = Host::new("true", &["env", option]).started();
        for signal in [Signal::SIGHUP, Signal::SIGTERM] {
            nix::sys::signal::kill(host.helper(), signal).unwrap();
        }
        assert_eq!(host.process.exit_within(LIMIT).code(), Some(0));
        let log = host.process.log();
        assert_eq!(!log.contains("SIGHUP: log level was"), is_ignored, "{log}");
    }
}

/// Process 1 of a container inherits what its commands leave in the background, and a process that ends stays a zombie
/// until its parent reaps it. The dataplane's exit status counts as before.
#[test]
fn what_ends_below_process_1_is_reaped() {
    require!(Wgsep);
    // One child is of the launcher, which executes wgsep in its own place.
    let mut host = Host::new("sleep 1 &", &["env"]).started();
    let helper = host.helper();
    let file = format!("/proc/{helper}/task/{helper}/children");
    // Zombies are listed, too.
    let children = || std::fs::read_to_string(&file).unwrap().split_whitespace().count();
    // One is killed by a real-time signal.
    let orphans =
        "exec >/dev/null 2>&1; sh -c 'sleep 2; kill -37 $$' & sleep 3 & sleep 3 & sleep 3 &";
    process::run(host.command("sh").args(["-c", orphans]));
    assert!(children() >= 5, "those of the shell are process 1's now");
    wait::until("only the dataplane is left", LIMIT, || children() == 1);
    nix::sys::signal::kill(procfs::children(helper)[0], Signal::SIGSYS).unwrap();
    assert_eq!(host.process.exit_within(LIMIT).code(), Some(76), "{}", host.process.log());
}

/// As where an entrypoint starts something in the background and then executes wgsep.
#[test]
fn an_audit_finds_the_dataplane_among_other_children_of_the_launcher() {
    require!(Wgsep);
    for child in ["sleep 600 &", "true & sleep 0.1"] {
        let host = Host::new(child, &["env"]).started();
        let program = wgsep_program("wgsep");
        let mut audit = host.command(program.to_str().unwrap());
        let audited = process::output(audit.args(["audit", &host.interface]));
        let text = String::from_utf8_lossy(&audited.stdout).into_owned();
        let log = host.process.log();
        let dataplane = log.split_once("dataplane pid ").unwrap().1.split(' ').next().unwrap();
        let found = format!("{}: helper 1, dataplane {dataplane}\n", host.interface);
        assert!(text.starts_with(&found), "{child}: {audited:?}");
    }
}

/// The report is for the audit alone; the socket is what wg(8) needs.
#[test]
fn a_full_run_lacks_the_sandbox_report_the_status_and_the_upgrade_and_nothing_else() {
    require!(Wgsep);
    let full = "mkdir /run/wireguard; mount -t tmpfs -o mode=755,size=4k none /run/wireguard
        head -c 4096 /dev/zero >/run/wireguard/full";
    let no_inodes =
        "mkdir /run/wireguard; mount -t tmpfs -o mode=755,nr_inodes=2 none /run/wireguard";
    for script in [full, no_inodes] {
        let mut host = Host::new(script, &["env"]).started();
        host.opens("");
        host.wg(&format!("show {}", host.interface));
        let log = host.process.log();
        let report = format!("/var/run/wireguard/{}.sandbox", host.interface);
        // And without an inode, the sockets for the status and for an upgrade.
        let others = ["`wgsep upgrade", "there is no status socket"];
        let warnings = log.lines().filter(|line| line.contains(" WARN "));
        let warnings: Vec<_> =
            warnings.filter(|line| !others.iter().any(|other| line.contains(other))).collect();
        let [warning] = warnings[..] else { panic!("{script}: {log}") };
        for named in [&report, "(ENOSPC); free space", "wgsep audit"] {
            assert!(warning.contains(named), "{script}: {log}");
        }
        let program = wgsep_program("wgsep");
        let mut audit = host.command(program.to_str().unwrap());
        let audited = process::output(audit.args(["audit", &host.interface]));
        assert_eq!(audited.status.code(), Some(3), "{audited:?}");
        let text = String::from_utf8_lossy(&audited.stdout).into_owned();
        assert!(text.lines().any(|line| line.starts_with(&report)), "{text}");
        nix::sys::signal::kill(host.helper(), Signal::SIGTERM).unwrap();
        assert_eq!(host.process.exit_within(LIMIT).code(), Some(0));
        assert!(!host.process.log().contains("ERROR"), "{}", host.process.log());
    }
}

#[test]
fn what_a_host_lacks_is_named_and_not_to_be_reported() {
    require!(Wgsep);
    let full = |directory: &str| {
        format!("mkdir {directory}; mount -t tmpfs -o mode=755,nr_inodes=1 none {directory}")
    };
    for (script, arguments, named) in [
        (full("/run/wireguard"), &[][..], "ENOSPC"),
        (full("/run/logs"), &["--log-file", "/run/logs/log"], "free space or inodes"),
        ("true".to_owned(), &["--log-file", "/run"], "no directory"),
        ("true".to_owned(), &["--log-file", "/run/a/log"], "its directory is missing"),
    ] {
        let said = Host::with_arguments(&script, &["env"], arguments).refused();
        assert!(said.contains(named) && !said.contains("report it"), "{script}: {said}");
    }
}

#[test]
fn lines_that_a_full_disk_does_not_take_are_counted_once_there_is_space() {
    require!(Wgsep);
    let script = "mkdir /run/logs; mount -t tmpfs -o size=8k none /run/logs
        head -c 4096 /dev/zero >/run/logs/other";
    let host = Host::with_arguments(script, &["env"], &["--log-file", "/run/logs/log"]);
    let read = || {
        String::from_utf8_lossy(&process::output(host.command("cat").arg("/run/logs/log")).stdout)
            .into_owned()
    };
    wait::until("it has started", LIMIT, || {
        !procfs::children(host.process.pid()).is_empty() && read().contains("started: ")
    });
    let toggle = || {
        for state in ["up", "down"] {
            process::run(host.command("ip").args(["link", "set", &host.interface, state]));
        }
    };
    wait::until("the disk is full", LIMIT, || {
        toggle();
        read().len() >= 4096
    });
    toggle();
    process::run(host.command("rm").arg("/run/logs/other"));
    wait::until("the lost lines are counted", LIMIT, || {
        toggle();
        let count = format!(" ERROR wgsep[{}]: ", host.interface);
        read().lines().any(|line| {
            line.contains(&count) && line.contains(" lines could not be written to the log")
        })
    });
}

/// Nothing that the user makes there would have an owner.
#[test]
fn a_user_namespace_without_a_map_is_named() {
    require!(Wgsep);
    let script = "mount -t tmpfs none /run; exec \"$@\"";
    let around =
        ["unshare", "--user", "--keep-caps", "--net", "--mount", "sh", "-ec", script, "sh"];
    let said = Host::new("true", &around).refused();
    assert!(said.contains("(EOVERFLOW); give this user a number in its user namespace"), "{said}");
}

/// The kernel lets no process fork under SCHED_DEADLINE, whatever its limits are.
#[test]
fn a_scheduling_policy_that_forbids_to_fork_is_named_and_its_remedy_works() {
    require!(Wgsep);
    let deadline = |more: &[&'static str]| {
        let policy = ["--deadline", "--sched-runtime=10000000", "--sched-deadline=20000000"];
        [&["chrt"], more, &policy, &["--sched-period=20000000", "0"]].concat()
    };
    let named = "under SCHED_DEADLINE (EAGAIN); start wgsep under another scheduling policy";
    let said = Host::new("true", &deadline(&[])).refused();
    assert!(said.contains(named) && said.contains("chrt --reset-on-fork"), "{said}");
    // In the background it forks before anything else.
    let mut command = Netns::new().command("timeout");
    command.arg("20").args(deadline(&[])).arg(wgsep_program("wgsep")).arg(unique_interface());
    let refused = process::output(&mut command);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(1) && said.contains(named), "{said}");
    Host::new("true", &deadline(&["--reset-on-fork"])).started();
}

#[test]
fn what_is_in_the_place_of_the_report_or_the_upgrade_socket_is_named_and_left_alone() {
    require!(Wgsep);
    let report = "sandbox is a directory; move it away; until";
    let socket = "upgrade is a directory; move it away; without it";
    for (file, reason) in [("sandbox", report), ("upgrade", socket)] {
        let script = format!("for name; do :; done; mkdir -p /run/wireguard/$name.{file}");
        let host = Host::new(&script, &["env"]).started();
        let log = host.process.log();
        let named = format!("WARN wgsep[{0}]: /var/run/wireguard/{0}.{reason}", host.interface);
        assert!(log.contains(&named), "{log}");
        host.wg(&format!("show {}", host.interface));
    }
}

/// The unit's step: a peer's name that no resolver knows.
#[test]
fn an_endpoint_that_cannot_be_resolved_is_logged_at_once_and_fails_in_bounded_time() {
    require!(Wgsep);
    let configure = repository().join("bin/dist/wgsep-quick");
    let script = format!(
        "mkdir -p /etc/wireguard; mount -t tmpfs none /etc/wireguard
        printf '[Interface]\\nPrivateKey = %s\\n[Peer]\\nPublicKey = %s\\nEndpoint = %s:51820\\n[Peer]\\nPublicKey = %s\\nEndpoint = [fd00::1]:51820\\n' \
            $(wg genkey) $(wg genkey | wg pubkey) vpn.example.invalid $(wg genkey | wg pubkey) >/etc/wireguard/{{}}.conf
        exec env WGSEP_RESOLVE_SECONDS=2 {} apply {{}}",
        configure.display()
    );
    let (netns, interface) = (Netns::new(), unique_interface());
    let mut command = netns.command("timeout");
    command.args(["60", "unshare", "--mount", "--propagation", "private", "sh", "-ec"]);
    command.arg(script.replace("{}", &interface));
    let output = process::output(&mut command);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let [waiting, failed] = said.lines().collect::<Vec<_>>()[..] else { panic!("{said}") };
    assert!(
        waiting.contains("waiting until vpn.example.invalid, the Endpoint of a peer"),
        "{said}"
    );
    assert!(failed.contains("cannot resolve vpn.example.invalid"), "{said}");
    assert!(failed.contains("; check the name and the resolver"), "{said}");
}
