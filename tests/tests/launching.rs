//! The three ways of launching, and machines that refuse a layer: what is served, what the log says
//! of each layer, and what strict mode refuses. Numbers are those of the attacks in SECURITY.md.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::Pid;
use wgsep_tests::daemon::unique_interface;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{self, Process};
use wgsep_tests::procfs::{self, namespace, threads};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::{require, tun_device, wait};

/// How long a start may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(20);
/// A uid that nobody has.
const USER: u32 = 61_001;
/// What a container with NET_ADMIN only leaves its root.
const CONTAINER: [&str; 3] = ["setpriv", "--bounding-set=-all,+net_admin", "--inh-caps=-all"];
/// Where user namespaces may not be made, which is set for the user namespace around it.
const NO_USER_NAMESPACES: &str = "echo 0 >/proc/sys/user/max_user_namespaces";

/// Both programs in a directory that everybody can reach.
struct Programs(Scratch);

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
        Self(directory)
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
            "mkdir -p /run/wireguard; mount -t tmpfs -o mode=0777 none /run/wireguard; {};
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
        wait::until("it has started", LIMIT, || {
            let ended = launched.process.try_exit();
            assert!(ended.is_none(), "it ended: {ended:?}\n{}", launched.process.log());
            launched.process.log().contains("started: ")
        });
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
    fn dataplane(&self) -> Pid {
        procfs::children(self.process.pid())[0]
    }

    /// The two reports of the log: the dataplane's and the helper's.
    fn reports(&self) -> [String; 2] {
        let log = self.process.log();
        let (_, reports) = log.split_once("dataplane's sandbox: ").unwrap();
        let (dataplane, helper) = reports.split_once("; helper's sandbox: ").unwrap();
        [dataplane, helper.lines().next().unwrap()].map(str::to_owned)
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
                // The bounding set is the launcher's where nobody may drop it.
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

fn launch_as_user(script: &str) -> Launch {
    let around = as_user();
    let around: Vec<_> = around.iter().map(String::as_str).collect();
    Launch::new(Programs::with_net_admin(), &around, &[], script)
}

#[test]
fn with_a_file_capability_a_user_serves_wg_and_hears_which_layers_are_not_its_own() {
    require!(Wgsep);
    let launched = launch_as_user("").start();
    launched.assert_serves_wg_with_fwmark();
    launched.assert_mandatory_layers();
    let [dataplane, helper] = launched.reports();
    assert_said(&dataplane, &["user=degraded(EPERM)", "empty-root=applied", "namespaces=applied"]);
    assert_said(&dataplane, &["bounding-set=applied", "landlock=applied", "seccomp=applied"]);
    assert_said(&dataplane, &["untraceable=applied"]);
    assert_said(&helper, &["bounding-set=degraded(EPERM)", "landlock=applied", "seccomp=applied"]);
    let (helper, dataplane) = (launched.process.pid(), launched.dataplane());
    for kind in ["user", "net", "mnt", "ipc", "uts"] {
        assert_ne!(namespace(helper, kind), namespace(dataplane, kind), "{kind}");
    }
    assert_eq!(fs::read_dir(format!("/proc/{dataplane}/root/")).unwrap().count(), 0);
}

/// Its program is as a package unpacked by hand may leave it.
#[test]
fn attack_06_a_program_that_can_be_read_lets_the_user_trace_it_which_is_told() {
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

    let mut audit = Command::new("nsenter");
    audit.args(["--mount", "--target", &launched.process.pid().to_string()]);
    audit.arg(launched._kept.1.helper()).args(["audit", &launched.interface]);
    let said = process::output(&mut audit);
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let line = said.lines().find(|line| line.contains("untraceable")).unwrap_or_default();
    assert!(line.contains("degraded"), "{said}");
    assert!(said.contains("chmod 711 wgsep-dataplane"), "{said}");
}

/// The dataplane is in a user namespace that the user made and has every capability over, but its
/// program cannot be read: the kernel then counts its memory as of the namespace around.
#[test]
fn attack_06_the_launching_user_can_neither_trace_nor_read_the_dataplane() {
    require!(Wgsep);
    let launched = launch_as_user("").start();
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
fn attack_06_keys_that_secret_memory_has_no_room_for_are_served_and_told_of_once() {
    require!(Wgsep);
    let launched = launch_with_locked_memory(1 << 20, "2").start();
    for high in 0..4 {
        let peers: Vec<_> = (0..250).map(|low| format!("peer {}", public_key(high, low))).collect();
        launched.wg(&format!("set {} {}", launched.interface, peers.join(" ")));
    }
    let shown = launched.wg(&format!("show {} peers", launched.interface));
    assert_eq!(shown.lines().count(), 1000);
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
}

#[test]
fn attack_13_where_user_namespaces_are_blocked_the_report_says_so_and_it_serves() {
    require!(Wgsep);
    // Its limit holds for the user namespace it is set in, so for nobody else.
    let unshared = ["--user", "--map-root-user", "--net"];
    let launched = Launch::new(Programs::new(), &CONTAINER, &unshared, NO_USER_NAMESPACES).start();
    launched.assert_serves_wg_with_fwmark();
    launched.assert_mandatory_layers();
    let [dataplane, _] = launched.reports();
    for layer in ["user-namespace", "namespaces", "empty-root"] {
        assert_said(&dataplane, &[&format!("{layer}=degraded(ENOSPC)")]);
    }
    let (helper, dataplane) = (launched.process.pid(), launched.dataplane());
    assert_eq!(namespace(helper, "net"), namespace(dataplane, "net"), "the report is wrong");
}

#[test]
fn attack_13_strict_mode_refuses_each_of_these_and_names_the_layers() {
    require!(Wgsep);
    let unshared = ["--user", "--map-root-user", "--net"];
    for (launch, named) in [
        (launch_as_user(""), "user degraded(EPERM)"),
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
