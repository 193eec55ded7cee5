//! A thread taken over, as by an attacker who found a vulnerability in its code: what it runs from then on is the test's
//! choice, with all that the process holds and no more than it may. The program is the one that
//! ships, for it needs no part in this; root's ptrace(2) is the vulnerability.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test ends there")]

use nix::libc::{self, c_long, user_regs_struct};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::ffi::c_void;
use std::fs;
use std::time::Duration;

use crate::daemon::Daemon;
use crate::implementation::Implementation::Wgsep;
use crate::netns::Netns;
use crate::{descriptors, procfs, wait};

/// How long the end of it all may take on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(10);
/// Workers of [`serving`].
pub const WORKERS: usize = 2;
/// The exit status of a death by SIGSYS.
const BREACH: i32 = 76;
/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Protection of memory for data.
pub const READ_WRITE: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
/// Flags of memory for data.
pub const PRIVATE: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
/// -1, for memory that no file backs.
pub const NO_DESCRIPTOR: u64 = u64::MAX;

/// Instructions that enter the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// x86-64's own.
    Syscall,
    /// That of 32-bit programs.
    Int80,
}

/// What came of a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// What the kernel returned.
    Returned(i64),
    /// The thread died by this signal.
    Died(Signal),
}

/// A thread that runs nothing but what it is ordered to; released when dropped.
#[derive(Debug)]
pub struct Hijacked {
    process: Pid,
    thread: Pid,
    /// What it was about.
    before: user_regs_struct,
    /// Where the program began: code that no thread comes by again.
    code: u64,
    /// What stood there.
    original: c_long,
    dead: bool,
}

impl Hijacked {
    /// Stops a thread wherever it is. Only the test's thread that did so may use it.
    ///
    /// # Panics
    ///
    /// When the kernel does not let it be traced.
    #[track_caller]
    #[must_use]
    pub fn seize(process: Pid, thread: Pid) -> Self {
        expect("seize", ptrace::seize(thread, ptrace::Options::empty()));
        expect("interrupt", ptrace::interrupt(thread));
        wait_for(thread);
        let before = expect("read the registers", ptrace::getregs(thread));
        let code = entry_point(process);
        let original = expect("read the code", ptrace::read(thread, address(code)));
        Self { process, thread, before, code, original, dead: false }
    }

    /// Makes a system call.
    #[track_caller]
    pub fn call(&mut self, number: i64, arguments: &[u64]) -> Outcome {
        self.call_by(Entry::Syscall, number, arguments)
    }

    /// Makes a system call by one of the instructions for it. The arguments are in the registers of
    /// x86-64, or of i386.
    #[track_caller]
    pub fn call_by(&mut self, entry: Entry, number: i64, arguments: &[u64]) -> Outcome {
        let code = match entry {
            Entry::Syscall => 0x050f,
            Entry::Int80 => 0x80cd,
        };
        expect("write the code", ptrace::write(self.thread, address(self.code), code));
        let mut registers = self.before;
        registers.rip = self.code;
        registers.rax = number.cast_unsigned();
        // Whatever it was interrupted in is not gone on with.
        registers.orig_rax = u64::MAX;
        let places = match entry {
            Entry::Syscall => [
                &mut registers.rdi,
                &mut registers.rsi,
                &mut registers.rdx,
                &mut registers.r10,
                &mut registers.r8,
                &mut registers.r9,
            ],
            Entry::Int80 => [
                &mut registers.rbx,
                &mut registers.rcx,
                &mut registers.rdx,
                &mut registers.rsi,
                &mut registers.rdi,
                &mut registers.rbp,
            ],
        };
        for (place, argument) in places.into_iter().zip(arguments) {
            *place = *argument;
        }
        expect("set the registers", ptrace::setregs(self.thread, registers));
        expect("step", ptrace::step(self.thread, None));
        match wait_for(self.thread) {
            WaitStatus::Signaled(_, signal, _) => {
                self.dead = true;
                Outcome::Died(signal)
            }
            WaitStatus::Stopped(_, Signal::SIGTRAP) => {
                let registers = expect("read the registers", ptrace::getregs(self.thread));
                Outcome::Returned(registers.rax.cast_signed())
            }
            other => panic!("a system call ended in {other:?}"),
        }
    }

    /// Puts words into the process's memory.
    #[track_caller]
    pub fn write(&self, to: u64, words: &[u64]) {
        for (place, word) in (to..).step_by(size_of::<u64>()).zip(words) {
            let word = word.cast_signed();
            expect("write to memory", ptrace::write(self.thread, address(place), word));
        }
    }

    /// Words of the process's memory.
    #[track_caller]
    #[must_use]
    pub fn read(&self, from: u64, words: usize) -> Vec<u64> {
        let places = (from..).step_by(size_of::<u64>()).take(words);
        let word = |place| ptrace::read(self.thread, address(place)).map(i64::cast_unsigned);
        places.map(|place| expect("read memory", word(place))).collect()
    }

    /// Lets it go on at an address of its program, with the stack of whatever it was about.
    #[track_caller]
    pub fn go_on_at(mut self, link_address: u64) {
        let path = format!("/proc/{}/exe", self.process);
        let program = expect("read the program", fs::read(path));
        let bias = self.code - word_at(&program, 24);
        self.before.rip = bias + link_address;
        self.before.orig_rax = u64::MAX;
        // Below what the function may have beyond its stack's end, and aligned for a call.
        self.before.rsp = (self.before.rsp - 256) & !15;
    }
}

impl Drop for Hijacked {
    fn drop(&mut self) {
        if !self.dead {
            // It may have been killed meanwhile, with its process.
            let _ = ptrace::write(self.thread, address(self.code), self.original);
            let _ = ptrace::setregs(self.thread, self.before);
            if ptrace::detach(self.thread, None).is_err() {
                // Its end is the tracer's to see before the process can end.
                let _ = waitpid(self.thread, Some(WaitPidFlag::__WALL));
            }
        }
    }
}

fn address(at: u64) -> *mut c_void {
    at as *mut c_void
}

#[track_caller]
fn expect<T, E: std::fmt::Display>(step: &str, result: Result<T, E>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("cannot {step}: {error}"),
    }
}

#[track_caller]
fn wait_for(thread: Pid) -> WaitStatus {
    expect("wait for the thread", waitpid(thread, Some(WaitPidFlag::__WALL)))
}

/// A little-endian word of a file.
#[track_caller]
fn word_at(bytes: &[u8], offset: usize) -> u64 {
    match bytes.get(offset..).and_then(<[u8]>::first_chunk) {
        Some(word) => u64::from_le_bytes(*word),
        None => panic!("no word at {offset}"),
    }
}

/// Where a process's program began (AT_ENTRY).
#[track_caller]
fn entry_point(process: Pid) -> u64 {
    let vector = expect("read auxv", fs::read(format!("/proc/{process}/auxv")));
    let pairs = vector.chunks_exact(16);
    let entry = pairs.map(|pair| (word_at(pair, 0), word_at(pair, 8)));
    match entry.into_iter().find(|(kind, _)| *kind == libc::AT_ENTRY) {
        Some((_, entry)) => entry,
        None => panic!("process {process} has no entry point"),
    }
}

/// A daemon that serves: its interface is up, so that the dataplane holds all it ever does.
#[must_use]
pub fn serving() -> Daemon {
    let daemon = Daemon::start_with(Wgsep, &Netns::new(), |command| {
        command.args(["--workers", &WORKERS.to_string()]);
    });
    daemon.netns.run(format!("ip link set {} up", daemon.interface));
    daemon.wg("show", "listen-port");
    daemon
}

/// The threads of a process, the first first.
#[must_use]
pub fn threads(process: Pid) -> Vec<Pid> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let names = tasks.map(|task| task.unwrap().file_name().into_string().unwrap());
    let mut threads: Vec<_> = names.map(|name| Pid::from_raw(name.parse().unwrap())).collect();
    threads.sort_unstable();
    threads
}

/// Takes over the last thread, which is a worker.
#[must_use]
pub fn hijack(daemon: &Daemon) -> Hijacked {
    let process = daemon.dataplane();
    Hijacked::seize(process, *threads(process).last().unwrap())
}

/// The dataplane's descriptor of a kind.
#[track_caller]
#[must_use]
pub fn descriptor(daemon: &Daemon, kind: &str) -> u64 {
    let held = descriptors::kinds(daemon.dataplane(), daemon.process.pid());
    let found = held.iter().find(|(_, held)| *held == kind);
    u64::try_from(*found.unwrap_or_else(|| panic!("no {kind} in {held:?}")).0).unwrap()
}

/// The call ended the whole process, and with it the interface, the socket and the helper.
#[track_caller]
pub fn assert_ended_by(what: &str, outcome: Outcome, mut daemon: Daemon, dataplane: Pid) {
    assert_eq!(outcome, Outcome::Died(Signal::SIGSYS), "{what}");
    let status = daemon.process.exit_within(LIMIT);
    assert_eq!(status.code(), Some(BREACH), "{what}: {}", daemon.process.log());
    let log = daemon.process.log();
    assert!(log.contains("the dataplane was killed by SIGSYS, for a system call that its filter forbids; it may be under attack"), "{what}: {log}");
    assert!(!procfs::is_running(dataplane), "{what}: the dataplane lives");
    wait::until("the interface is gone", LIMIT, || !daemon.has_interface());
    assert!(!daemon.has_socket(), "{what}: the socket is left");
}

/// A page of memory for data.
#[track_caller]
pub fn map_page(worker: &mut Hijacked) -> u64 {
    let mapped = worker.call(libc::SYS_mmap, &[0, PAGE, READ_WRITE, PRIVATE, NO_DESCRIPTOR, 0]);
    let Outcome::Returned(memory) = mapped else { panic!("{mapped:?}") };
    memory.cast_unsigned()
}

/// Makes a call on a worker of a daemon of its own, that ends the daemon.
#[track_caller]
pub fn assert_fatal(
    what: &str,
    number: i64,
    arguments: impl FnOnce(&Daemon, &mut Hijacked) -> Vec<u64>,
) {
    let daemon = serving();
    let (dataplane, mut worker) = (daemon.dataplane(), hijack(&daemon));
    let arguments = arguments(&daemon, &mut worker);
    let outcome = worker.call(number, &arguments);
    assert_ended_by(what, outcome, daemon, dataplane);
}
