//! The three ways of launching, and machines that refuse a layer: what is served, what the log says
//! of each layer, and what strict mode refuses. Numbers are those of the attacks in SECURITY.md.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::libc;
use nix::sys::ptrace;
use nix::unistd::Pid;
use wgsep_tests::daemon::unique_interface;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{self, Process};
use wgsep_tests::procfs::{self, namespace, threads};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::service_manager::{self, QUEUE, ServiceManager};
use wgsep_tests::skip::skip;
use wgsep_tests::{descriptors, repository, require, tun_device, wait};

/// How long a start may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(20);
/// An unallocated uid.
const USER: u32 = 61_001;
/// Starts during which a tracer tries to attach.
const TRACED_STARTS: usize = 100;
/// What a container with NET_ADMIN only leaves its root.
const CONTAINER: [&str; 3] = ["setpriv", "--bounding-set=-all,+net_admin", "--inh-caps=-all"];
/// Where user namespaces may not be made, which is set for the user namespace around it.
const NO_USER_NAMESPACES: &str = "echo 0 >/proc/sys/user/max_user_namespaces";

/// Both programs in a directory that everybody can reach.
#[derive(Clone)]
struct Programs(Arc<Scratch>);

impl Programs {
    fn new() -> Self {
        let directory = Scratch::new();
        fs::set_permissions(&*directory, fs::Permissions::from_mode(0o755)).unwrap();
        for program in ["wgsep", "wgsep-dataplane"] {
            directory.install(program, program);
        }
        // As `make install` has it.
        let mode = fs::Permissions::from_mode(0o711);
        fs::set_permissions(directory.join("wgsep-dataplane"), mode).unwrap();
        Self(Arc::new(directory))
    }

    fn with_net_admin() -> Self {
        let programs = Self::new();
        let helper = programs.0.join("wgsep");
        process::run(Command::new("setcap").arg("cap_net_admin+ep").arg(helper));
        programs
    }

    fn helper(&self) -> String {
        self.0.join("wgsep").display().to_string()
    }
}

/// A launch in mounts of its own, in which /run/wireguard is empty and the user's.
struct Launch {
    command: Command,
    interface: String,
    netns: Arc<Netns>,
    programs: Programs,
}

impl Launch {
    /// `around` is what starts wgsep; `unshared` more namespaces; `script` what root does before.
    fn new(programs: Programs, around: &[&str], unshared: &[&str], script: &str) -> Self {
        let (netns, interface) = (Netns::new(), unique_interface());
        let script = format!(
            "mkdir -p /run/wireguard; mount -t tmpfs -o mode=1777 none /run/wireguard; {};
            {script}
            exec \"$@\"",
            tun_device::OPEN_TO_EVERY_USER
        );
        let mut command = netns.command("unshare");
        command.args(unshared).args(["--mount", "--propagation", "private"]);
        command.args(["sh", "-ec", &script, "sh"]).args(around);
        command.args([&programs.helper(), "-f", &interface]);
        Self { command, interface, netns, programs }
    }

    fn start(self) -> Launched {
        let process = Process::spawn(self.command, "wgsep, launched");
        let mut launched =
            Launched { process, interface: self.interface, _kept: (self.netns, self.programs) };
        launched.wait_until_started();
        launched
    }

    /// What it says when it refuses to run.
    #[track_caller]
    fn refused(mut self) -> String {
        self.command.args(["--sandbox", "strict"]);
        let mut process = Process::spawn(self.command, "wgsep, strict");
        assert_eq!(process.exit_within(LIMIT).code(), Some(1), "{}", process.log());
        assert!(procfs::with_argument(&self.interface).is_empty());
        process.log()
    }
}

struct Launched {
    process: Process,
    interface: String,
    _kept: (Arc<Netns>, Programs),
}

impl Launched {
    #[track_caller]
    fn wait_until_started(&mut self) {
        wait::until("it has started", LIMIT, || {
            let ended = self.process.try_exit();
            assert!(ended.is_none(), "it ended: {ended:?}\n{}", self.process.log());
            self.process.log().contains("started: ")
        });
    }

    fn dataplane(&self) -> Pid {
        procfs::children(self.process.pid())[0]
    }

    /// The layers of both processes that the log reports as degraded.
    fn degraded(&self) -> Vec<String> {
        let reports = self.reports().concat();
        let words = reports.split([' ', ',', ';', '\n']);
        let degraded = words.filter_map(|word| Some(word.split_once("=degraded")?.0.to_owned()));
        degraded.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The two reports that the audit reads: the dataplane's and the helper's.
    fn reports(&self) -> [String; 2] {
        let (pid, interface) = (self.process.pid(), &self.interface);
        let path = format!("/proc/{pid}/root/run/wireguard/{interface}.sandbox");
        let text = fs::read_to_string(path).unwrap();
        let report = |process: &str| text.lines().find_map(|line| line.strip_prefix(process));
        ["dataplane: ", "helper: "].map(|process| report(process).unwrap().to_owned())
    }

    /// What `wgsep audit` says of it.
    fn audit(&self) -> String {
        let mut audit = Command::new("nsenter");
        audit.args(["--mount", "--target", &self.process.pid().to_string()]);
        audit.arg(self._kept.1.helper()).args(["audit", &self.interface]);
        let said = process::output(&mut audit);
        String::from_utf8_lossy(&said.stdout).into_owned()
    }

    /// Descriptors that wait in the helper's unix sockets to be received.
    fn in_flight(&self) -> u64 {
        let sockets = fs::read_dir(format!("/proc/{}/fdinfo", self.process.pid())).unwrap();
        let files = sockets.map(|file| fs::read_to_string(file.unwrap().path()).unwrap());
        let count = |text: String| -> Option<u64> {
            text.lines().find_map(|line| line.strip_prefix("scm_fds:")?.trim().parse().ok())
        };
        files.filter_map(count).sum()
    }

    /// wg(8) where it finds the socket and the interface: in the mounts of the helper.
    #[track_caller]
    fn wg(&self, arguments: &str) -> String {
        let target = self.process.pid().to_string();
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--net", "--target", &target, "wg"]);
        process::run(command.args(arguments.split_whitespace()))
    }

    #[track_caller]
    fn assert_serves_wg_with_fwmark(&self) {
        let name = &self.interface;
        for mark in ["51820", "0"] {
            self.wg(&format!("set {name} fwmark {mark}"));
            let shown = self.wg(&format!("show {name} fwmark"));
            let expected = if mark == "0" { "off" } else { "0xca6c" };
            assert_eq!(shown.trim(), expected);
        }
    }

    /// What no way of launching may lack, as the kernel shows it.
    #[track_caller]
    fn assert_mandatory_layers(&self) {
        for pid in [self.process.pid(), self.dataplane()] {
            for thread in threads(pid) {
                assert_eq!(thread.text("NoNewPrivs"), "1");
                assert_eq!(thread.text("Seccomp"), "2");
            }
        }
        for thread in threads(self.dataplane()) {
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                // The bounding set is the launcher's where no process may drop it.
                let may_stay =
                    set == "CapBnd" && self.reports()[0].contains("bounding-set=degraded");
                assert!(may_stay || thread.capabilities(set) == 0, "{set}");
            }
        }
    }
}

#[track_caller]
fn assert_said(report: &str, layers: &[&str]) {
    for layer in layers {
        assert!(report.split(' ').any(|said| said == *layer), "no {layer} in {report}");
    }
}

fn as_user() -> Vec<String> {
    let (uid, gid) = (format!("--reuid={USER}"), format!("--regid={USER}"));
    vec!["setpriv".to_owned(), uid, gid, "--clear-groups".to_owned()]
}

fn launch_as_user() -> Launch {
    launch_as_user_with(Programs::with_net_admin())
}

fn launch_as_user_with(programs: Programs) -> Launch {
    let around = as_user();
    let around: Vec<_> = around.iter().map(String::as_str).collect();
    Launch::new(programs, &around, &[], "")
}

#[test]
fn with_a_file_capability_a_user_serves_wg_and_the_log_names_the_layers_that_are_not_its_own() {
    require!(Wgsep);
    let launched = launch_as_user().start();
    launched.assert_serves_wg_with_fwmark();
    launched.assert_mandatory_layers();
    let [dataplane, helper] = launched.reports();
    assert_said(&dataplane, &["user=degraded(EPERM)", "empty-root=applied", "namespaces=applied"]);
    assert_said(&dataplane, &["bounding-set=applied", "landlock=applied", "seccomp=applied"]);
    assert_said(&dataplane, &["untraceable=applied", "user-namespace=applied"]);
    assert_said(&dataplane, &["no-fd-out=degraded(EPERM)"]);
    assert_said(&helper, &["bounding-set=degraded(EPERM)", "landlock=applied", "seccomp=applied"]);
    // As wgsep(8) has them, "Without root".
    assert_eq!(launched.degraded(), ["bounding-set", "no-fd-out", "securebits", "user"]);
    let (helper, dataplane) = (launched.process.pid(), launched.dataplane());
    for kind in ["user", "net", "mnt", "ipc", "uts"] {
        assert_ne!(namespace(helper, kind), namespace(dataplane, kind), "{kind}");
    }
    assert_eq!(fs::read_dir(format!("/proc/{dataplane}/root/")).unwrap().count(), 0);
}

/// Its program is as a package unpacked by hand may leave it.
#[test]
fn attack_06_a_program_that_can_be_read_lets_the_user_trace_it_which_is_logged() {
    require!(Wgsep);
    let programs = Programs::with_net_admin();
    let readable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(programs.0.join("wgsep-dataplane"), readable).unwrap();
    let around = as_user();
    let around: Vec<_> = around.iter().map(String::as_str).collect();
    let launched = Launch::new(programs, &around, &[], "").start();
    assert_said(&launched.reports()[0], &["non-dumpable=applied", "untraceable=degraded(EPERM)"]);
    // The control of the test below: this is what the mode of the file prevents.
    let mut reader = Command::new(around[0]);
    reader.args(&around[1..]).arg("readlink");
    process::run(reader.arg(format!("/proc/{}/root", launched.dataplane())));

    let said = launched.audit();
    let line = said.lines().find(|line| line.contains("untraceable")).unwrap_or_default();
    assert!(line.contains("degraded"), "{said}");
    assert!(said.contains("chmod a-r wgsep-dataplane"), "{said}");
}

/// The dataplane is in a user namespace that the user made and has every capability over, but its
/// program cannot be read: the kernel then counts its memory as of the namespace around.
#[test]
fn attack_06_the_launching_user_can_neither_trace_nor_read_the_dataplane() {
    require!(Wgsep);
    let launched = launch_as_user().start();
    let dataplane = launched.dataplane();
    assert_eq!(threads(dataplane)[0].ids("Uid"), [USER; 4], "the uid is shared with the user");
    for (reader, file) in
        [("cat", "mem"), ("cat", "maps"), ("cat", "environ"), ("ls", "fd"), ("ls", "root/")]
    {
        let around = as_user();
        let mut command = Command::new(&around[0]);
        command.args(&around[1..]).args([reader, &format!("/proc/{dataplane}/{file}")]);
        let said = process::output(&mut command);
        let said = String::from_utf8_lossy(&said.stderr);
        assert!(said.contains("Permission denied"), "{file}: {said}");
    }
}

/// Drops this thread's user and groups to those of a normal user. The C library's functions would do so
/// on every thread of the process.
fn become_user_on_this_thread() {
    let user = libc::c_long::from(USER);
    for (call, arguments) in [
        (libc::SYS_setgroups, [0; 3]),
        (libc::SYS_setresgid, [user; 3]),
        (libc::SYS_setresuid, [user; 3]),
    ] {
        let [first, second, third] = arguments;
        // SAFETY: setgroups(2) reads no list of length 0, and the others take plain integers.
        let result = unsafe { libc::syscall(call, first, second, third) };
        assert_eq!(result, 0, "call {call}");
    }
}

/// Tries to trace a helper and each child of it, as the user who started it, until `is_over`. Returns
/// the processes that it traces, and how many tries to trace a child were refused.
fn trace(helper: Pid, is_over: &AtomicBool) -> (BTreeSet<Pid>, usize) {
    become_user_on_this_thread();
    let (mut traced, mut refused) = (BTreeSet::new(), 0);
    while !is_over.load(Ordering::Relaxed) {
        let children = fs::read_to_string(format!("/proc/{helper}/task/{helper}/children"));
        let children = children.unwrap_or_default();
        let children = children.split_whitespace().map(|pid| Pid::from_raw(pid.parse().unwrap()));
        for pid in children.chain([helper]) {
            if traced.contains(&pid) {
                continue;
            }
            match ptrace::seize(pid, ptrace::Options::empty()) {
                Ok(()) => _ = traced.insert(pid),
                Err(_) => refused += usize::from(pid != helper),
            }
        }
    }
    (traced, refused)
}

/// Who is attached before the program is executed stays attached, whatever the process does later.
#[test]
fn attack_06_the_launching_user_cannot_attach_at_any_moment_of_a_start() {
    require!(Wgsep);
    let programs = Programs::with_net_admin();
    let mut tries = 0;
    for start in 1..=TRACED_STARTS {
        let launch = launch_as_user_with(programs.clone());
        let (launched, (traced, refused)) = thread::scope(|scope| {
            let is_over = Ending::default();
            let process = Process::spawn(launch.command, "wgsep, to be traced");
            let helper = process.pid();
            let tracer = scope.spawn({
                let is_over = Arc::clone(&is_over.0);
                move || trace(helper, &is_over)
            });
            let kept = (launch.netns, launch.programs);
            let mut launched = Launched { process, interface: launch.interface, _kept: kept };
            launched.wait_until_started();
            drop(is_over);
            (launched, tracer.join().unwrap())
        });
        assert!(traced.is_empty(), "start {start}: attached to {traced:?}");
        assert_said(&launched.reports()[0], &["untraceable=applied"]);
        for thread in threads(launched.dataplane()) {
            assert_eq!(thread.text("TracerPid"), "0");
        }
        tries += refused;
    }
    assert!(tries > TRACED_STARTS, "only {tries} tries met a child, so this shows nothing");
}

/// Set when it is dropped, so that a thread ends with a test that fails.
#[derive(Default)]
struct Ending(Arc<AtomicBool>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Root's strace(1), which is attached from the first instruction of the helper on.
#[test]
fn attack_06_a_tracer_is_reported_and_strict_mode_refuses_it() {
    require!(Wgsep);
    if Command::new("strace").arg("-V").output().is_err() {
        return skip("strace is missing: install it to trace a start");
    }
    let launch = || {
        let tracer = ["strace", "--follow-forks", "--quiet=all", "--output=/dev/null"];
        Launch::new(Programs::new(), &tracer, &[], "")
    };
    let launched = launch().start();
    assert_said(&launched.reports()[0], &["non-dumpable=applied", "untraceable=degraded(EPERM)"]);
    let tracer = format!("process {} traces the dataplane", launched.process.pid());
    wait::until("the tracer is logged", LIMIT, || launched.process.log().contains(&tracer));
    let refused = launch().refused();
    assert!(refused.contains("untraceable degraded(EPERM)"), "{refused}");
}

/// The new pair has the layers and the identity of a start, and as little more.
#[track_caller]
fn assert_upgrades(launched: &Launched, around: &[&str]) {
    let (old, name) = (launched.dataplane(), &launched.interface);
    let degraded = launched.degraded();
    let ids = |pid| ["Uid", "Gid"].map(|kind| threads(pid)[0].ids(kind));
    let [helpers, dataplanes] = [launched.process.pid(), old].map(ids);
    let mut upgrade = Command::new("nsenter");
    upgrade.args(["--mount", "--net", "--target", &launched.process.pid().to_string()]);
    process::run(upgrade.args(around).args([&launched._kept.1.helper(), "upgrade", name]));
    wait::until("the old pair serves no longer", LIMIT, || {
        !procfs::is_running(old) && procfs::with_argument(name).len() == 3
    });
    launched.assert_serves_wg_with_fwmark();
    let log = launched.process.log();
    assert_eq!(log.matches("started: ").count(), 2, "{log}");
    assert_eq!(launched.degraded(), degraded, "{log}");
    let is_helper = |pid: &Pid| ids(*pid) == helpers;
    let expected = if dataplanes == helpers { 3 } else { 2 };
    let all = procfs::with_argument(name);
    assert_eq!(all.iter().filter(|pid| is_helper(pid)).count(), expected, "of {all:?}");
}

/// The program has the capability again; the user has none.
#[test]
fn with_a_file_capability_its_user_upgrades_the_daemon() {
    require!(Wgsep);
    let around = as_user();
    let around: Vec<_> = around.iter().map(String::as_str).collect();
    assert_upgrades(&launch_as_user().start(), &around);
}

/// Everybody who may execute the file can set these to what they like.
#[test]
fn attack_15_with_a_file_capability_descriptors_of_the_caller_are_refused() {
    require!(Wgsep);
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.join("socket")).unwrap();
    for variable in ["WG_TUN_FD", "WG_UAPI_FD"] {
        let mut launch = launch_as_user();
        let number = descriptors::give(&mut launch.command, &listener);
        launch.command.env(variable, number.to_string());
        let netns = Arc::clone(&launch.netns);
        let said = launch.refused();
        assert!(said.contains(&format!("{variable} is refused, because ")), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert_eq!(netns.run("ip -o link").lines().count(), 1, "an interface was left behind");
    }
    let mut launch = launch_as_user();
    service_manager::listen(&mut launch.command, &launch.netns, &[listener.into()], &[QUEUE]);
    let said = launch.refused();
    assert!(said.contains("LISTEN_FDS is refused, because "), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

/// Whoever names the socket would have the interface.
#[test]
fn attack_15_with_a_file_capability_the_callers_socket_gets_no_descriptors() {
    require!(Wgsep);
    let manager = ServiceManager::default();
    let mut launch = launch_as_user();
    manager.supervise(&mut launch.command, 32);
    let _launched = launch.start();
    manager.until_message("READY=1");
    assert!(manager.stored().is_empty(), "{:?}", manager.messages());
}

/// A service of systemd with AmbientCapabilities= has the word of root.
#[test]
fn with_an_ambient_capability_descriptors_of_the_caller_are_taken() {
    require!(Wgsep);
    let around = as_user();
    let mut around: Vec<_> = around.iter().map(String::as_str).collect();
    around.extend(["--inh-caps=+net_admin", "--ambient-caps=+net_admin"]);
    let mut launch = Launch::new(Programs::new(), &around, &[], "");
    launch.command.env("WG_UAPI_FD", "77");
    let said = launch.refused();
    assert!(said.contains("WG_UAPI_FD must be the number of an open descriptor"), "{said}");
}

#[test]
fn attack_15_with_a_file_capability_buffers_stay_within_the_limits_of_the_system() {
    require!(Wgsep);
    let launched = launch_as_user().start();
    let netns = &launched._kept.0;
    netns.run(format!("ip link set {} up", launched.interface));
    let sockets = || netns.run("ss -H -u -a -n -m");
    wait::until("the UDP sockets are open", LIMIT, || sockets().contains("skmem:"));
    for (mark, limit) in [("rb", "rmem_max"), ("tb", "wmem_max")] {
        let limit = fs::read_to_string(format!("/proc/sys/net/core/{limit}")).unwrap();
        // The kernel doubles what is asked for.
        let most = 2 * limit.trim().parse::<u64>().unwrap();
        let sockets = sockets();
        let buffers: Vec<u64> = sockets
            .split([',', '(', ')'])
            .filter_map(|field| field.strip_prefix(mark)?.parse().ok())
            .collect();
        assert!(!buffers.is_empty() && buffers.iter().all(|len| *len <= most), "{sockets}");
    }
}

/// Only CAP_NET_ADMIN of the first user namespace gets what it asks for. What a warning advises is that.
#[test]
fn a_send_buffer_that_one_congested_link_can_fill_is_warned_of_with_the_limit_to_raise() {
    require!(Wgsep);
    let limit = fs::read_to_string("/proc/sys/net/core/wmem_max").unwrap();
    let limit = 2 * limit.trim().parse::<u64>().unwrap();
    let unshared = ["--user", "--map-root-user", "--net"];
    let contained = || Launch::new(Programs::new(), &CONTAINER, &unshared, "");
    for (launch, is_limited) in [
        (Launch::new(Programs::new(), &["env"], &[], ""), false),
        (launch_as_user(), true),
        (contained(), true),
    ] {
        let launched = launch.start();
        let log = launched.process.log();
        let warning = log.lines().find(|line| line.contains("all peers share a send buffer"));
        if is_limited && limit < 65_536_000 {
            let warning = warning.unwrap();
            assert!(warning.contains(" WARN ") && warning.contains(&format!("only {limit} bytes")));
            assert!(warning.ends_with("sysctl net.core.wmem_max=67108864"), "{warning}");
            continue;
        }
        assert_eq!(warning, None);
        if !is_limited {
            let target = launched.process.pid().to_string();
            let inside = |words: &str| {
                let mut command = Command::new("nsenter");
                command.args(["--net", "--target", &target]).args(words.split(' '));
                process::run(&mut command)
            };
            inside(&format!("ip link set {} up", launched.interface));
            wait::until("its sockets have that buffer", LIMIT, || {
                inside("ss -H -u -a -n -m").contains(",tb134217728,")
            });
        }
    }
}

/// CAP_NET_ADMIN would suffice to put an interface into any namespace that has a name.
#[test]
fn attack_15_with_a_file_capability_nothing_is_done_to_a_namespace_that_the_caller_may_not_enter() {
    require!(Wgsep);
    for option in ["--tun-netns", "--socket-netns"] {
        let other = Netns::new();
        let mut launch = launch_as_user();
        launch.command.args([option, other.name()]);
        let netns = Arc::clone(&launch.netns);
        let said = launch.refused();
        assert!(said.contains("CAP_SYS_ADMIN is missing"), "{said}");
        for (netns, other) in [(&netns, &other), (&other, &netns)] {
            assert_eq!(netns.run("ip -o link").lines().count(), 1, "an interface was left behind");
            let numbered = netns.run("ip netns list-id");
            assert!(numbered.is_empty(), "{} was numbered: {numbered}", other.name());
        }
    }
}

#[test]
fn attack_15_a_setuid_or_setgid_program_is_refused() {
    require!(Wgsep);
    for mode in [0o4755, 0o2755] {
        let programs = Programs::with_net_admin();
        let permissions = fs::Permissions::from_mode(mode);
        fs::set_permissions(programs.0.join("wgsep"), permissions).unwrap();
        let said = launch_as_user_with(programs).refused();
        assert!(said.contains("the program is setuid or setgid"), "{mode:o}: {said}");
    }
}

#[test]
fn attack_15_a_file_capability_of_everybody_is_warned_of_and_that_of_a_group_is_the_groups() {
    require!(Wgsep);
    const WARNING: &str = "every user of this machine may execute this program";
    let launched = launch_as_user().start();
    assert!(launched.process.log().contains(WARNING), "{}", launched.process.log());

    let programs = Programs::new();
    let helper = programs.0.join("wgsep");
    std::os::unix::fs::chown(&helper, Some(0), Some(USER)).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o750)).unwrap();
    process::run(Command::new("setcap").arg("cap_net_admin+ep").arg(&helper));
    let launched = launch_as_user_with(programs.clone()).start();
    launched.assert_serves_wg_with_fwmark();
    assert!(!launched.process.log().contains(WARNING), "{}", launched.process.log());

    let other = USER + 1;
    let mut stranger = Command::new("setpriv");
    stranger.args([&format!("--reuid={other}"), &format!("--regid={other}"), "--clear-groups"]);
    // By a shell: setpriv itself has root's capabilities until it executes a program.
    let said = process::output(stranger.args(["sh", "-c", "exec \"$0\" --version"]).arg(&helper));
    assert!(String::from_utf8_lossy(&said.stderr).contains("Permission denied"), "{said:?}");
}

/// CAP_NET_ADMIN gives any user the owner's rights on the settings of a network namespace.
#[test]
fn attack_15_a_log_is_opened_without_the_capability_of_the_program() {
    require!(Wgsep);
    let setting = "/proc/sys/net/ipv4/route/flush";
    let mut launch = launch_as_user();
    launch.command.args(["--log-file", setting]);
    let said = launch.refused();
    let expected = format!("cannot log to {setting}: it or its directory is missing, read-only");
    assert!(said.contains(&expected), "{said}");
    // Root may write it, but it is no log.
    let mut launch = Launch::new(Programs::new(), &["env"], &[], "");
    launch.command.args(["--log-file", setting]);
    let said = launch.refused();
    let expected = format!("cannot log to {setting}: it must be a file with a single name");
    assert!(said.contains(&expected), "{said}");
}

/// A user who cannot raise the limit on locked memory.
fn launch_with_locked_memory(bytes: u32, workers: &str) -> Launch {
    let mut around = vec!["prlimit".to_owned(), format!("--memlock={bytes}:{bytes}")];
    around.extend(as_user());
    let around: Vec<_> = around.iter().map(String::as_str).collect();
    let mut launch = Launch::new(Programs::with_net_admin(), &around, &[], "");
    launch.command.args(["--workers", workers]);
    launch
}

#[test]
fn attack_06_without_locked_memory_keys_are_in_ordinary_memory_and_the_report_says_so() {
    require!(Wgsep);
    for (bytes, state) in [(0, "degraded(EPERM)"), (100_000, "degraded(ENOMEM)")] {
        let launched = launch_with_locked_memory(bytes, "2").start();
        launched.assert_serves_wg_with_fwmark();
        launched.assert_mandatory_layers();
        assert_said(&launched.reports()[0], &[&format!("secret-memory={state}")]);
        let log = launched.process.log();
        assert!(log.contains("keys are in ordinary memory"), "{log}");
        let refused = launch_with_locked_memory(bytes, "2").refused();
        assert!(refused.contains(&format!("secret-memory {state}")), "{refused}");
    }
}

#[test]
fn attack_06_whatever_locked_memory_there_is_is_used_for_the_stacks_of_all_workers_and_some_keys() {
    require!(Wgsep);
    for (bytes, workers) in [(1 << 20, "2"), (8 << 20, "4"), (8 << 20, "64")] {
        let launched = launch_with_locked_memory(bytes, workers).start();
        launched.assert_serves_wg_with_fwmark();
        assert_said(&launched.reports()[0], &["secret-memory=applied"]);
        assert!(!launched.process.log().contains("secret memory is full"));
    }
}

#[test]
fn attack_06_keys_that_secret_memory_has_no_room_for_are_served_and_logged_once() {
    require!(Wgsep);
    let launched = launch_with_locked_memory(1 << 20, "2").start();
    for high in 0..12 {
        let peers: Vec<_> = (0..250).map(|low| format!("peer {}", public_key(high, low))).collect();
        launched.wg(&format!("set {} {}", launched.interface, peers.join(" ")));
    }
    let shown = launched.wg(&format!("show {} peers", launched.interface));
    assert_eq!(shown.lines().count(), 3000);
    let log = launched.process.log();
    assert_eq!(log.matches("secret memory is full").count(), 1, "{log}");
    assert!(log.contains("raise RLIMIT_MEMLOCK"), "{log}");
}

/// Some public key, in base64; any 32 bytes are one.
fn public_key(high: u8, low: u8) -> String {
    let digit = |number: u8| char::from(b'A' + number % 26);
    format!("{}{}{}{}A=", "A".repeat(39), digit(high), digit(low / 26), digit(low))
}

#[test]
fn a_container_with_net_admin_only_serves_wg() {
    require!(Wgsep);
    let launched = Launch::new(Programs::new(), &CONTAINER, &[], "").start();
    launched.assert_serves_wg_with_fwmark();
    launched.assert_mandatory_layers();
    let [dataplane, helper] = launched.reports();
    assert_said(&dataplane, &["user=degraded(EPERM)", "empty-root=applied", "seccomp=applied"]);
    assert_said(&helper, &["bounding-set=degraded(EPERM)", "landlock=applied", "seccomp=applied"]);
    // As SECURITY.md has them, "In a container"; the last is because the program's owner may read it.
    let stated = ["bounding-set", "no-fd-out", "securebits", "untraceable", "user"];
    assert_eq!(launched.degraded(), stated);
    assert_upgrades(&launched, &CONTAINER);
    let document = fs::read_to_string(repository().join("SECURITY.md")).unwrap();
    let row = document.lines().find(|line| line.starts_with("| CAP_NET_ADMIN |")).unwrap();
    assert!(stated.iter().all(|layer| row.contains(&format!("`{layer}`"))), "{row}");

    let programs = Programs::new();
    let unreadable = fs::Permissions::from_mode(0o111);
    fs::set_permissions(programs.0.join("wgsep-dataplane"), unreadable).unwrap();
    let launched = Launch::new(programs, &CONTAINER, &[], "").start();
    assert_eq!(launched.degraded(), ["bounding-set", "no-fd-out", "securebits", "user"]);
}

/// The capabilities that the recipes for Kubernetes grant, as setpriv(1) names them.
fn granted_by(recipe: &str) -> String {
    let path = repository().join("bin/dist/container").join(recipe);
    let text = fs::read_to_string(path).unwrap();
    let lists =
        text.lines().filter_map(|line| line.trim().strip_prefix("add: [")?.strip_suffix("]"));
    let most = lists.max_by_key(|list| list.len()).unwrap();
    format!("-all,+{}", most.to_lowercase().replace(", ", ",+"))
}

/// And the program cannot be read, even by its owner, who is root there without another privilege.
#[test]
fn a_container_of_the_recipes_has_every_layer() {
    require!(Wgsep);
    let granted = granted_by("sidecar.yaml");
    assert_eq!(granted, granted_by("gateway.yaml"));
    assert_eq!(granted, "-all,+net_admin,+kill,+setuid,+setgid,+setpcap");
    let programs = Programs::new();
    let unreadable = fs::Permissions::from_mode(0o111);
    fs::set_permissions(programs.0.join("wgsep-dataplane"), unreadable).unwrap();
    let bounding = format!("--bounding-set={granted}");
    let container = ["setpriv", &bounding, "--inh-caps=-all", "--no-new-privs"];
    let mut launch = Launch::new(programs, &container, &[], "");
    launch.command.args(["--sandbox", "strict"]);
    let launched = launch.start();
    launched.assert_serves_wg_with_fwmark();
    launched.assert_mandatory_layers();
    assert!(!launched.reports().concat().contains("degraded"), "{:?}", launched.reports());
    assert_upgrades(&launched, &container);
}

#[test]
fn attack_13_where_user_namespaces_are_blocked_the_report_says_so_and_it_serves() {
    require!(Wgsep);
    // Its limit holds for the user namespace it is set in, so for no other.
    let unshared = ["--user", "--map-root-user", "--net"];
    let launched = Launch::new(Programs::new(), &CONTAINER, &unshared, NO_USER_NAMESPACES).start();
    launched.assert_serves_wg_with_fwmark();
    launched.assert_mandatory_layers();
    let [dataplane, _] = launched.reports();
    for layer in ["user-namespace", "namespaces", "empty-root"] {
        assert_said(&dataplane, &[&format!("{layer}=degraded(ENOSPC)")]);
    }
    // Its user is the launcher's, who may read its program.
    assert_said(&dataplane, &["untraceable=degraded(EPERM)"]);
    let (helper, dataplane) = (launched.process.pid(), launched.dataplane());
    assert_eq!(namespace(helper, "net"), namespace(dataplane, "net"), "the report is wrong");
}

#[test]
fn attack_13_where_one_kind_of_namespace_is_blocked_the_others_are_made_in_a_user_namespace() {
    require!(Wgsep);
    let unshared = ["--user", "--map-root-user", "--net"];
    let none = "echo 0 >/proc/sys/user/max_uts_namespaces";
    let launched = Launch::new(Programs::new(), &CONTAINER, &unshared, none).start();
    launched.assert_serves_wg_with_fwmark();
    launched.assert_mandatory_layers();
    let [dataplane, _] = launched.reports();
    assert_said(
        &dataplane,
        &["user-namespace=applied", "namespaces=degraded(ENOSPC:uts)", "empty-root=applied"],
    );
    let (helper, dataplane) = (launched.process.pid(), launched.dataplane());
    assert_ne!(namespace(helper, "net"), namespace(dataplane, "net"), "the report is wrong");
    assert_eq!(namespace(helper, "uts"), namespace(dataplane, "uts"), "the report is wrong");
}

#[test]
fn attack_13_strict_mode_refuses_each_of_these_and_names_the_layers() {
    require!(Wgsep);
    let unshared = ["--user", "--map-root-user", "--net"];
    for (launch, named) in [
        (launch_as_user(), "user degraded(EPERM)"),
        (Launch::new(Programs::new(), &CONTAINER, &[], ""), "user degraded(EPERM)"),
        (
            Launch::new(Programs::new(), &CONTAINER, &unshared, NO_USER_NAMESPACES),
            "empty-root degraded(ENOSPC)",
        ),
    ] {
        let said = launch.refused();
        assert!(said.contains("--sandbox strict") && said.contains(named), "{said}");
    }
}

/// The quota of descriptors in flight is the account's, and what a daemon has of it ends with that daemon. So each
/// has as many in flight as its own dataplane takes. Without either capability none exceeds the quota.
#[test]
fn attack_05_daemons_that_share_an_account_each_keep_the_dataplane_from_sending_descriptors() {
    require!(Wgsep);
    let around = ["setpriv", "--bounding-set=-sys_admin,-sys_resource"];
    let launch = || {
        let mut launch = Launch::new(Programs::new(), &around, &[], "ulimit -n 600");
        launch.command.args(["--user", "daemon"]);
        launch
    };
    let launched: Vec<_> = std::iter::repeat_with(|| launch().start()).take(3).collect();
    for launched in &launched {
        assert_said(&launched.reports()[0], &["user=applied", "no-fd-out=applied"]);
        let (limit, in_flight) = (descriptor_limit(launched.dataplane()), launched.in_flight());
        assert!(in_flight > limit, "{in_flight} in flight, with a limit of {limit}");
    }
    // There is no room for a fourth.
    let one_more = launch().start();
    assert_said(&one_more.reports()[0], &["no-fd-out=degraded(ETOOMANYREFS)"]);
    let said = one_more.audit();
    assert!(said.contains("dataplane no-fd-out: too many daemons share"), "{said}");
    let mut strict = launch();
    strict.command.args(["--sandbox", "strict"]);
    let said = strict.refused();
    assert!(said.contains("no-fd-out degraded(ETOOMANYREFS); too many daemons share"), "{said}");
}

/// RLIMIT_NOFILE of a process, as it can be raised.
fn descriptor_limit(pid: Pid) -> u64 {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    line.split_whitespace().nth(4).unwrap().parse().unwrap()
}

/// As in a container that has no file but the two programs.
#[test]
fn without_a_list_of_accounts_the_dataplane_gets_an_unallocated_uid() {
    require!(Wgsep);
    let empty = "mount -t tmpfs none /etc;";
    let launched = Launch::new(Programs::new(), &["env"], &[], empty).start();
    launched.assert_mandatory_layers();
    assert!(launched.reports()[0].contains(" user=applied "), "{:?}", launched.reports());
}

#[test]
fn strict_mode_runs_as_root() {
    require!(Wgsep);
    let mut launch = Launch::new(Programs::new(), &["env"], &[], "");
    launch.command.args(["--sandbox", "strict"]);
    let launched = launch.start();
    launched.assert_mandatory_layers();
    assert!(!launched.reports().concat().contains("degraded"), "{:?}", launched.reports());
}
