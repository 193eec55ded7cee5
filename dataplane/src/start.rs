//! The start of the dataplane up to the lock-down; the order of the steps matters.

use crate::control::{Control, End};
use crate::helper::Helper;
use crate::secret::{self, Allocates, Stacks};
use crate::vm_clock::VmClock;
use crate::workers::worker::Worker;
use crate::{log, sys};
use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Barrier};
use wgsep_ipc::Channel;
use wgsep_policy::{Layer, Sandbox, described, remedy};

/// What a worker uses of its stack at most, in bytes: its buffers are on the heap.
const WORKER_STACK: usize = 64 * 1024;

/// What the control thread uses of its stack at most, in bytes.
const CONTROL_STACK: usize = 256 * 1024;

/// The verbosity at which only errors are logged.
const ERRORS: u8 = 1;

/// The helper's command line for the dataplane.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Name of the interface, for the log and to follow it.
    pub(crate) interface: String,
    /// Worker threads.
    pub(crate) workers: usize,
    /// Whether to send many datagrams at once.
    pub(crate) udp_gso: bool,
    /// As `log::set_verbosity` takes it.
    pub(crate) verbosity: u8,
    /// UDP port to start with, 0 for any.
    pub(crate) listen_port: u16,
    /// Ports that the helper opens. It refuses others only when asked to open them.
    pub(crate) ports: RangeInclusive<u16>,
    /// Mark to start with, 0 for none.
    pub(crate) fwmark: u32,
}

impl Default for Arguments {
    fn default() -> Self {
        Self {
            interface: String::new(),
            workers: 1,
            udp_gso: true,
            verbosity: 3,
            listen_port: 0,
            ports: 1..=u16::MAX,
            fwmark: 0,
        }
    }
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut arguments = Self::default();
        while let Some(option) = words.next() {
            let value = words
                .next()
                .ok_or(format!("{option} needs a value; install both programs from one build"))?;
            let bad =
                || format!("{option}: bad value {value:?}; install both programs from one build");
            match option.as_str() {
                "--interface" => arguments.interface = value,
                "--workers" => arguments.workers = value.parse().map_err(|_| bad())?,
                "--udp-gso" => arguments.udp_gso = parse_switch(&value).ok_or_else(bad)?,
                "--log-level" => arguments.verbosity = log::verbosity(&value).ok_or_else(bad)?,
                "--listen-port" => arguments.listen_port = value.parse().map_err(|_| bad())?,
                "--ports" => arguments.ports = parse_ports(&value).ok_or_else(bad)?,
                "--fwmark" => arguments.fwmark = value.parse().map_err(|_| bad())?,
                _ => {
                    return Err(format!(
                        "unknown option {option}; install both programs from one build"
                    ));
                }
            }
        }
        Ok(arguments)
    }
}

/// Refuses a helper of another build than `version`: an update that was interrupted or that replaced
/// one program only. The same options and messages may have another meaning there.
fn check_build(version: &str, words: &mut impl Iterator<Item = String>) -> Result<(), String> {
    let helper = match (words.next().as_deref(), words.next()) {
        (Some("--build"), Some(helper)) => helper,
        _ => "unknown".to_owned(),
    };
    if helper == version {
        return Ok(());
    }
    Err(format!(
        "wgsep-dataplane is version {version}, but wgsep is version {helper}; install both programs from one build"
    ))
}

/// The error line of a step that the kernel refused, with its remedy.
fn refused(step: &str, errno: nix::Error) -> String {
    format!("{step}: {}; {}", described(errno), remedy(errno))
}

/// The error line of a thread that cannot be started.
fn no_thread(step: &str, errno: nix::Error) -> String {
    match errno {
        nix::Error::EAGAIN => format!(
            "{step}: {}; raise the limit on threads: ulimit -u, TasksMax= of a unit, --pids-limit of a container",
            described(errno)
        ),
        _ => refused(step, errno),
    }
}

fn parse_ports(value: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = value.split_once('-')?;
    Some(first.parse().ok()?..=last.parse().ok()?)
}

fn parse_switch(value: &str) -> Option<bool> {
    match value {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    }
}

/// Runs the dataplane of this version: locks the process down, then serves until it exits.
pub fn run(version: &str, arguments: impl Iterator<Item = String>) -> ! {
    if let Err(line) = start(version, arguments) {
        finish(Err(line));
    }
    // The control thread ends the process.
    loop {
        std::thread::park();
    }
}

/// Exits the process. Threads never exit on their own, which would take more system calls.
fn finish(outcome: Result<End, String>) -> ! {
    wgsep_policy::exit(match outcome {
        Ok(End::Orderly) => 0,
        Ok(End::HelperLost | End::Failed) => 1,
        Err(line) => {
            tracing::error!("{line}");
            1
        }
    })
}

/// The steps that need a single thread; the control thread continues.
fn start(version: &str, mut arguments: impl Iterator<Item = String>) -> Result<(), String> {
    sys::share_one_heap();
    log::start(3);
    let channel = sys::take_channel()
        .and_then(|socket| Channel::new(socket).ok())
        .ok_or("wgsep-dataplane is started by wgsep; run: wgsep INTERFACE --foreground")?;
    // Mapped before the lockdown, after which no descriptor can be; this one is closed again.
    let vm_clock = sys::take_vm_clock().and_then(|device| VmClock::map(&device));
    let helper = sys::peer_pid(&channel).map_err(|errno| refused("who is the helper", errno))?;
    let mut sandbox = Sandbox::enter(helper).map_err(|refused| refused.to_string())?;
    check_build(version, &mut arguments)?;
    let arguments = Arguments::parse(arguments)?;
    // Errors of the start are logged at every level, because the helper's own line includes them.
    log::set_verbosity(arguments.verbosity.max(ERRORS));
    let stacks_len =
        Stacks::len_for(CONTROL_STACK) + arguments.workers * Stacks::len_for(WORKER_STACK);
    let reserved =
        secret::reserve(stacks_len).map_err(|errno| refused("reserve secret memory", errno))?;
    sandbox.note(Layer::SecretMemory, reserved.state);
    match reserved.shortfall {
        Some(line) => tracing::warn!("{line}"),
        None => tracing::debug!("secret memory: {} KiB for keys", reserved.heap_len / 1024),
    }

    let mut stacks = reserved.stacks;
    let failed = "start the control thread";
    let stack = stacks.take(CONTROL_STACK).map_err(|errno| refused(failed, errno))?;
    let mapped = reserved.mapped;
    // With musl, std makes a key for what a thread drops at its end when the first one needs it, and one of two that
    // do so at once deletes its own by calls that the filter does not allow. So it is made here.
    let _makes_the_key = std::thread::current();
    let is_started = Arc::new(Barrier::new(2));
    let first_waits = Arc::clone(&is_started);
    let body = move || {
        // The call that started this thread restores the first one's signals before it returns, which the
        // filter does not allow.
        is_started.wait();
        finish(control(channel, sandbox, arguments, vm_clock, stacks, &mapped));
    };
    secret::spawn(c"control", stack, Allocates::Secrets, body)
        .map_err(|errno| no_thread(failed, errno))?;
    first_waits.wait();
    Ok(())
}

/// The body of the control thread: starts the workers, locks the process down, and serves until the exit.
fn control(
    channel: Channel,
    sandbox: Sandbox,
    arguments: Arguments,
    vm_clock: Option<VmClock>,
    stacks: Stacks,
    mapped: &[Range<usize>],
) -> Result<End, String> {
    let (workers, verbosity) = (arguments.workers, arguments.verbosity);
    let control = Control::new(Helper::new(channel), arguments, vm_clock)
        .map_err(|errno| refused("set up the control thread", errno))?;
    secret::with_system_allocator(|| start_workers(&control, workers, stacks))?;
    sys::set_nice();
    // The pages below the stacks have their protection by now.
    let report = sandbox.lock_down(mapped).map_err(|refused| refused.to_string())?;
    log::set_verbosity(verbosity);
    Ok(control.run(report.to_bytes()))
}

/// Starts the workers and waits until all of them run: a thread that is still starting would be
/// killed by the filter.
fn start_workers(control: &Control, workers: usize, mut stacks: Stacks) -> Result<(), String> {
    let all_run = Arc::new(Barrier::new(workers + 1));
    for number in 0..workers {
        let worker = Worker::new(number, Arc::clone(control.shared()));
        let runs = Arc::clone(&all_run);
        let body = move || {
            runs.wait();
            worker.run();
        };
        stacks
            .take(WORKER_STACK)
            .and_then(|stack| secret::spawn(c"worker", stack, Allocates::Packets, body))
            .map_err(|errno| no_thread(&format!("start worker {number}"), errno))?;
    }
    all_run.wait();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        Arguments::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn arguments_are_what_the_helper_passes() {
        let line = "--interface wg0 --workers 2 --udp-gso off --log-level debug --listen-port 7 --ports 7-8 --fwmark 9";
        let expected = Arguments {
            interface: "wg0".to_owned(),
            workers: 2,
            udp_gso: false,
            verbosity: 4,
            listen_port: 7,
            ports: 7..=8,
            fwmark: 9,
        };
        assert_eq!(parse(line), Ok(expected));
        for bad in [
            "--workers",
            "--workers x",
            "--log-level loud",
            "--fwmark -1",
            "--udp-gso 1",
            "--ports 7",
            "wg0 x",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_helper_of_another_build_is_refused() {
        let check = |line: &str| check_build("2", &mut line.split(' ').map(str::to_owned));
        assert_eq!(check("--build 2 --interface wg0"), Ok(()));
        for other in ["--build 1 --interface wg0", "--interface 2", "--build", ""] {
            let error = check(other).unwrap_err();
            assert!(error.ends_with("install both programs from one build"), "{error}");
        }
    }
}
