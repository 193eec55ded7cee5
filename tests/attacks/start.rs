//! Attack 11: starts, many and in a hurry, and where others could replace the socket. Names and socket paths
//! are in `system/bad_input`.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::hint;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use wgsep_tests::daemon::{Daemon, socket_path, unique_interface};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::launched_as::LaunchedAs;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::{self, Process};
use wgsep_tests::scratch::Scratch;
use wgsep_tests::{procfs, require, tun_device, uapi, wait};

/// How often to start; more by the variable, which finds rarer races.
const STARTS: usize = 20;
const STARTS_VARIABLE: &str = "WGSEP_STARTS";
/// Of the daemon, each of which one call is to lock down, and of the load.
const WORKERS: &str = "16";
const BUSY: usize = 4;

/// A thread that is still starting when the filter closes over all of them would be killed by it.
#[test]
fn attack_11_many_starts_under_load_are_locked_down_without_a_race() {
    require!(Wgsep);
    let starts = env::var(STARTS_VARIABLE).map_or(STARTS, |text| text.parse().unwrap());
    let (netns, ended) = (Netns::new(), AtomicBool::new(false));
    thread::scope(|scope| {
        for _ in 0..BUSY {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    hint::spin_loop();
                }
            });
        }
        let failed = (0..starts).find_map(|start| {
            let started = std::panic::catch_unwind(|| {
                Daemon::start_with(Wgsep, &netns, |command| {
                    command.args(["--workers", WORKERS]);
                })
            });
            started.err().map(|_| start)
        });
        ended.store(true, Ordering::Relaxed);
        assert_eq!(failed, None, "a start failed");
    });
}

/// A start that is traced from its first instruction on, by the thread that calls.
struct Traced {
    helper: Pid,
    /// Those that run, and may stop.
    running: BTreeSet<Pid>,
}

impl Traced {
    fn spawn(mut command: Command) -> Self {
        command.stderr(Stdio::null());
        // SAFETY: a bare system call between fork and exec, on no memory.
        unsafe { command.pre_exec(|| ptrace::traceme().map_err(io::Error::from)) };
        let helper = Pid::from_raw(command.spawn().unwrap().id().cast_signed());
        // It stops when it has executed its program.
        waitpid(helper, Some(WaitPidFlag::__WALL)).unwrap();
        let options = ptrace::Options::PTRACE_O_TRACEFORK
            | ptrace::Options::PTRACE_O_TRACECLONE
            | ptrace::Options::PTRACE_O_EXITKILL;
        ptrace::setoptions(helper, options).unwrap();
        ptrace::cont(helper, None).unwrap();
        Self { helper, running: BTreeSet::from([helper]) }
    }

    /// Lets all run, and those that they make, until one has made a thread, in which it is held. That one,
    /// and the new one, which has not begun.
    fn until_a_thread_is_made(&mut self) -> (Pid, Pid) {
        wait::poll(LIMIT, || {
            self.running.clone().into_iter().find_map(|traced| self.follow(traced))
        })
        .expect("a thread")
    }

    /// Lets all go on, those that have made a thread, too.
    fn go_on(&mut self) {
        for traced in self.running.clone() {
            if let Some((maker, made)) = self.follow(traced) {
                ptrace::cont(maker, None).unwrap();
                self.running.extend([maker, made]);
            }
        }
    }

    /// Lets one that has stopped go on, unless it has made a thread.
    fn follow(&mut self, traced: Pid) -> Option<(Pid, Pid)> {
        let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
        match waitpid(traced, Some(flags)).unwrap() {
            WaitStatus::StillAlive => return None,
            WaitStatus::PtraceEvent(_, _, event) => {
                let made = ptrace::getevent(traced).unwrap();
                let made = Pid::from_raw(i32::try_from(made).unwrap());
                if event == libc::PTRACE_EVENT_CLONE {
                    self.running.remove(&traced);
                    return Some((traced, made));
                }
                self.running.insert(made);
                ptrace::cont(traced, None).unwrap();
            }
            // A new one begins with SIGSTOP; one that executes a program stops with SIGTRAP.
            WaitStatus::Stopped(_, Signal::SIGSTOP | Signal::SIGTRAP) => {
                ptrace::cont(traced, None).unwrap();
            }
            WaitStatus::Stopped(_, signal) => ptrace::cont(traced, signal).unwrap(),
            _ended => {
                self.running.remove(&traced);
            }
        }
        None
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        let _ended = kill(self.helper, Signal::SIGKILL);
        let _reaped = waitpid(self.helper, Some(WaitPidFlag::__WALL));
    }
}

/// The C library restores the caller's signals after it has made a thread, by a call that the filter does not
/// allow. Here the first thread is held up before that, for as long as the new one runs without it.
#[test]
fn attack_11_a_start_is_not_locked_down_before_the_first_thread_waits() {
    require!(Wgsep);
    let (netns, interface) = (Netns::new(), unique_interface());
    let prefix = LaunchedAs::this_run().prefix();
    let mut command = netns.command(&prefix[0]);
    command.args(&prefix[1..]).arg(wgsep_program("wgsep"));
    command.args(["-f", &interface, "--workers", "1"]);
    let mut traced = Traced::spawn(command);
    let (first, control) = traced.until_a_thread_is_made();
    traced.running.insert(control);
    let (mut switches, mut since) = (String::new(), Instant::now());
    wait::until("the control thread waits", LIMIT, || {
        traced.go_on();
        let threads = procfs::threads(first);
        let status =
            threads.iter().find(|thread| thread.ids("Pid") == [control.as_raw().cast_unsigned()]);
        let Some(status) = status else { return false };
        let now = status.text("voluntary_ctxt_switches").to_owned();
        if now != switches || !status.text("State").starts_with('S') {
            (switches, since) = (now, Instant::now());
        }
        since.elapsed() > Duration::from_millis(200)
    });
    let first_status = &procfs::threads(first)[0];
    assert_eq!(
        first_status.text("Seccomp"),
        "0",
        "locked down while the first thread was in clone3(2)"
    );
    ptrace::cont(first, None).unwrap();
    traced.running.insert(first);
    // From then on no process or thread is made, and none stops.
    wait::until("the helper is locked down", LIMIT, || {
        traced.go_on();
        procfs::threads(traced.helper)[0].text("Seccomp") == "2"
    });
    wait::until("it serves", LIMIT, || uapi::is_answering(&interface));
    drop(traced);
    for left in ["sock", "sandbox"] {
        fs::remove_file(socket_path(&interface).with_extension(left)).unwrap();
    }
}

/// How long a start may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(20);
/// An unused uid; 61002 is another.
const USER: u32 = 61_001;

/// Both programs where every user can execute them, the helper with the capability that it needs.
fn programs() -> Scratch {
    let programs = Scratch::new();
    fs::set_permissions(&*programs, fs::Permissions::from_mode(0o755)).unwrap();
    for program in ["wgsep", "wgsep-dataplane"] {
        programs.install(program, program);
    }
    let capable = programs.join("wgsep");
    process::run(Command::new("setcap").arg("cap_net_admin+ep").arg(capable));
    programs
}

/// A command that starts wgsep as a user in mounts of its own, where `script` has made /run.
fn start_where(
    script: &str,
    user: u32,
    programs: &Scratch,
    netns: &Netns,
    interface: &str,
) -> Command {
    let open = tun_device::OPEN_TO_EVERY_USER;
    let empty = format!("mkdir /run/wireguard; {open}; rmdir /run/wireguard");
    let script = format!("mount -t tmpfs -o mode=0755 none /run; {empty}; {script}; exec \"$@\"");
    let mut command = netns.command("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-ec", &script, "sh"]);
    if user != 0 {
        let ids = [format!("--reuid={user}"), format!("--regid={user}")];
        command.arg("setpriv").args(ids).arg("--clear-groups");
    }
    command.arg(programs.join("wgsep")).args(["-f", interface]);
    command
}

/// Whoever may replace the socket is talked to by root's wg(8), which sends the private key.
#[test]
fn attack_11_a_socket_that_others_could_replace_is_not_made_and_the_error_has_the_remedy() {
    require!(Wgsep);
    let programs = programs();
    for (user, script, remedy) in [
        (0, "install -d -m 0770 -g 61002 /run/wireguard", "chmod 1770 /var/run/wireguard"),
        (0, "install -d -m 2775 -g 61002 /run/wireguard", "chmod 3775 /var/run/wireguard"),
        (0, "install -d -m 0777 /run/wireguard", "chmod 1775 /var/run/wireguard"),
        (0, "install -d -m 0757 /run/wireguard", "chmod 0755 /var/run/wireguard"),
        (0, "install -d -m 1770 -o 61002 /run/wireguard", "chown root /var/run/wireguard"),
        (0, "mkdir /run/wireguard; chmod 0775 /run", "chmod 1775 /run"),
        (0, "chown 61002 /run", "chown root /run"),
        (
            0,
            "mount -t tmpfs -o mode=0755 none /var; mkdir -p /var/x/y; chmod 0777 /var/x; ln -s x/y /var/run",
            "chmod 1775 /var/x",
        ),
        (
            0,
            "mount -t tmpfs -o mode=0755 none /var; ln -s ../run /var/run; chown -h 61002 /var/run",
            "chown -h root /var/run",
        ),
        (USER, "install -d -m 0770 -g 61001 /run/wireguard", "chmod 1770 /var/run/wireguard"),
        (USER, "install -d -m 1777 -o 61002 /run/wireguard", "chown root /var/run/wireguard"),
    ] {
        let (netns, interface) = (Netns::new(), unique_interface());
        let start = |script: &str| start_where(script, user, &programs, &netns, &interface);
        // What it leaves in the directory goes to stdout.
        let refusing = "timeout 10 \"$@\" || code=$?; ls -A /run/wireguard 2>&- || :; exit $code";
        let mut command = start(&format!("{script}; {refusing}"));
        let refused = process::output(&mut command);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{script}: {said}");
        // But for the warning that every user may execute the program.
        let errors = said.lines().filter(|line| !line.contains(" WARN ")).count();
        assert!(errors == 1 && said.trim_end().ends_with(remedy), "{script}: {said}");
        assert!(refused.stdout.is_empty(), "{script}: {refused:?}");
        assert!(!netns.run("ip -o link").contains(&interface), "{script}: the interface is left");
        assert!(procfs::with_argument(&interface).is_empty(), "{script}: a process is left");
        // The remedy is one.
        assert_serves(start(&format!("{script}; {remedy}")), &format!("{script}; {remedy}"));
    }
}

#[test]
fn a_user_serves_in_a_directory_of_its_own_or_of_roots_that_is_sticky() {
    require!(Wgsep);
    let programs = programs();
    for script in [
        "install -d -m 0755 -o 61001 /run/wireguard",
        "install -d -m 1770 -g 61001 /run/wireguard",
        "install -d -m 1777 /run/wireguard",
    ] {
        let (netns, interface) = (Netns::new(), unique_interface());
        assert_serves(start_where(script, USER, &programs, &netns, &interface), script);
    }
}

#[track_caller]
fn assert_serves(command: Command, what: &str) {
    let mut daemon = Process::spawn(command, "wgsep where others may write");
    wait::until("it has started", LIMIT, || {
        assert_eq!(daemon.try_exit(), None, "{what}: {}", daemon.log());
        daemon.log().contains("started: ")
    });
}
