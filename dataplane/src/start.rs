//! The start of the dataplane up to the lock-down; the order of the steps matters.

use crate::control::{Control, End};
use crate::helper::Helper;
use crate::secret::{self, Allocates, Stacks};
use crate::vm_clock::VmClock;
use crate::workers::worker::Worker;
use crate::{log, sys};
use std::ops::Range;
use std::sync::{Arc, Barrier};
use wgsep_ipc::{Channel, LogLevel, Offload, Startup};
use wgsep_policy::{Layer, Sandbox, described, remedy};
use wgsep_proto::secret::in_ordinary_memory;

/// What a worker uses of its stack at most, in bytes: its buffers are on the heap.
const WORKER_STACK: usize = 64 * 1024;

/// What the control thread uses of its stack at most, in bytes.
const CONTROL_STACK: usize = 256 * 1024;

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
fn start(version: &str, arguments: impl Iterator<Item = String>) -> Result<(), String> {
    sys::share_one_heap();
    log::start(LogLevel::Info);
    let channel = sys::take_channel()
        .and_then(|socket| Channel::new(socket).ok())
        .ok_or("wgsep-dataplane is started by wgsep; run: wgsep INTERFACE --foreground")?;
    // Mapped before the lockdown, after which no descriptor can be; this one is closed again.
    let vm_clock = sys::take_vm_clock().and_then(|device| VmClock::map(&device));
    let helper = sys::peer_pid(&channel).map_err(|errno| refused("who is the helper", errno))?;
    let mut sandbox = Sandbox::enter(helper).map_err(|refused| refused.to_string())?;
    let startup = Startup::parse(version, arguments)?;
    // Errors of the start are logged at every level, because the helper's own line includes them.
    log::set_level(startup.log_level.max(LogLevel::Error));
    if !startup.avx512 {
        wgsep_aead::disable_vectors();
        tracing::info!(
            "going on without {}, more slowly, as --without says",
            Offload::Avx512.name()
        );
    }
    let stacks_len =
        Stacks::len_for(CONTROL_STACK) + startup.workers * Stacks::len_for(WORKER_STACK);
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
        finish(control(channel, sandbox, startup, vm_clock, stacks, &mapped));
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
    startup: Startup,
    vm_clock: Option<VmClock>,
    stacks: Stacks,
    mapped: &[Range<usize>],
) -> Result<End, String> {
    let (workers, log_level) = (startup.workers, startup.log_level);
    let control = Control::new(Helper::new(channel), startup, vm_clock)
        .map_err(|errno| refused("set up the control thread", errno))?;
    in_ordinary_memory(|| start_workers(&control, workers, stacks))?;
    sys::set_nice();
    // The pages below the stacks have their protection by now.
    let report = sandbox.lock_down(mapped).map_err(|refused| refused.to_string())?;
    log::set_level(log_level);
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
