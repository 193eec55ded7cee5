//! The helper: the only part of wgsep with privileges. It opens descriptors, starts the dataplane,
//! verifies that it is confined, hands the descriptors over, and answers four requests.
//!
//! It holds no key and sees no packet. Read it in the order in which it runs: [`run`], `startup`,
//! `netns`, `tun`, `uapi_socket`, `spawn`, `monitor`, `requests`,
//! `udp`; `sys` has all the unsafe code.

mod error;
mod log;
mod monitor;
mod netlink;
mod netns;
mod notify;
mod offload;
mod poll;
mod requests;
mod spawn;
mod startup;
mod sys;
mod tun;
mod uapi_socket;
mod udp;

pub use error::Error;
pub use log::{Format, Level};
pub use offload::Offload;
#[cfg(feature = "fuzzing")]
pub use requests::{Requests, Served};
pub use startup::complain;
pub use tun::check_name;
pub use wgsep_policy::Grants;

use error::{Result, Step};
use log::Log;
use monitor::{End, Monitor};
use netns::Netns;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use spawn::Dataplane;
use startup::{Inherited, Launcher};
use std::os::fd::AsFd;
use std::path::PathBuf;
use tun::TunDevice;
use uapi_socket::UapiSocket;
use wgsep_ipc::Reply;
use wgsep_policy::{Layer, Report};

/// What an operator asked for.
pub struct Options {
    /// Name of the interface, or a template such as `wg%d`.
    pub interface: String,
    /// Stay in the foreground and log to standard error.
    pub foreground: bool,
    /// Account of the dataplane.
    pub user: Option<String>,
    /// Refuse to run with any layer of the sandbox degraded.
    pub strict: bool,
    /// What the dataplane may ask for.
    pub grants: Grants,
    /// Name of the network namespace that the UDP sockets live in.
    pub socket_netns: Option<String>,
    /// Name of the network namespace that the interface is created in; else in the launcher's.
    pub tun_netns: Option<String>,
    /// Offloads not to use.
    pub without: Vec<Offload>,
    /// Worker threads.
    pub workers: usize,
    /// As the dataplane is told.
    pub log_level: String,
    /// Of the helper's own lines; none with `silent`.
    pub log_most: Option<Level>,
    /// How lines look.
    pub log_format: Format,
    /// Instead of standard error or syslog.
    pub log_file: Option<PathBuf>,
}

/// Runs the daemon to its end; true if that was an orderly one.
pub fn run(options: &Options) -> bool {
    let mut launcher = Launcher::default();
    match start(options, &mut launcher) {
        Ok(monitor) => matches!(monitor.serve(), End::Orderly(_)),
        Err(error) => {
            launcher.failed(&error);
            false
        }
    }
}

/// Everything up to the moment when the dataplane serves: the order of these lines is the design.
fn start(options: &Options, launcher: &mut Launcher) -> Result<Monitor> {
    check_name(&options.interface)?;
    let user = wgsep_policy::user::choose(options.user.as_deref())?;
    let Inherited { tun, uapi, manager } = startup::clean_process()?;
    let mut log = open_log(options)?;
    if !options.foreground {
        startup::daemonize(launcher)?;
    }
    let handled = startup::handled_signals();
    handled.thread_block().step("block signals")?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&handled, flags).step("signalfd")?;

    let without = &options.without;
    let adopted = tun.map(|queue| TunDevice::adopt(queue, without)).transpose()?;
    let tun_netns = match &options.tun_netns {
        Some(_) if adopted.is_some() => {
            return Err(Error::new(
                "--tun-netns does not go with WG_TUN_FD; leave one of them out",
            ));
        }
        Some(name) => Netns::open(name)?,
        None => Netns::current()?,
    };
    if let Some(name) = &options.socket_netns {
        // For good: UDP sockets are opened later, too.
        Netns::open(name)?.enter()?;
    }
    let number = tun_netns.number()?;
    let tun = match (adopted, number) {
        (Some(device), _) => device,
        (None, None) => TunDevice::create(&options.interface, without)?,
        (None, Some(_)) => TunDevice::create_in(&tun_netns, &options.interface, without)?,
    };
    // Or it would keep the namespace alive.
    drop(tun_netns);
    log.set_interface(&tun.name);
    let uapi = match uapi {
        Some(listener) => UapiSocket::adopt(listener, &tun.name)?,
        None => UapiSocket::bind(&tun.name)?,
    };
    let (netlink, follows_moves) = tun::open_netlink()?;
    let Dataplane { channel, process, pid, uid, mut report } =
        spawn::start(options, &tun.name, user)?;
    let requests =
        requests::Requests::new(channel, options.grants, !without.contains(&Offload::UdpGro));
    let (without, told_gro) = (without.clone(), false);
    let mut monitor = Monitor { process, requests, uapi, signals, log, manager, without, told_gro };
    let helper_report = wgsep_policy::drop_helper_privileges(options.grants.low_ports)?;

    let (sequence, sealed) = monitor.wait_for_seal()?;
    let sealed = Report::from_bytes(&sealed).ok_or_else(|| {
        Error::new("the seal report makes no sense; install both programs from one build")
    })?;
    report.merge(&sealed);
    // The workers, the control thread, and the first one, which waits for it.
    wgsep_policy::verify(pid, uid, options.workers + 2, &report)?;
    report.note(Layer::Untraceable, wgsep_policy::untraceable(pid));
    let helper_report = wgsep_policy::seal_helper(helper_report, monitor.uapi.directory())?;
    if options.strict {
        refuse_degraded("dataplane", &report, Layer::DATAPLANE)?;
        refuse_degraded("helper", &helper_report, Layer::HELPER)?;
    }

    let queues = tun.queues();
    let reply = Reply::Granted {
        ifindex: tun.ifindex,
        netns: number,
        follows_moves,
        tun_queues: queues.len() as u8,
        offload: tun.offload,
    };

    // Before anybody can be served, so that whoever is finds it.
    let claims = format!("helper: {helper_report}\ndataplane: {report}\n");
    monitor.uapi.write_report(&claims)?;
    let listener = monitor.uapi.take_listener().ok_or_else(|| {
        Error::new("no UAPI socket to hand over; this is a fault, please report it")
    })?;
    let descriptors = [&[listener.as_fd(), netlink.as_fd()], &queues[..]].concat();
    monitor.requests.grant(sequence, &reply, &descriptors).map_err(|error| {
        Error::new(format!("hand over the interface: {error}; see the dataplane's lines above"))
    })?;
    monitor.log.info(&format!(
        "started: dataplane pid {pid} uid {uid}; dataplane's sandbox: {report}; helper's sandbox: {helper_report}"
    ));
    if let Some(missing) = tun.missing() {
        monitor.log.info(&offload::missing(missing, &options.without));
    }
    launcher.ready();
    monitor.manager.ready(&format!("serving {}", tun.name));
    // Our own copies of the TUN queues close here, so that the interface goes with the dataplane.
    Ok(monitor)
}

fn open_log(options: &Options) -> Result<Log> {
    let (format, most) = (options.log_format, options.log_most);
    match &options.log_file {
        Some(path) => Log::to_file(path, format, most),
        None if options.foreground => Log::to_stderr(format, most),
        None => Log::to_system(&options.interface, format, most),
    }
}

fn refuse_degraded(process: &str, report: &Report, layers: &'static [Layer]) -> Result<()> {
    let degraded: Vec<_> =
        report.degraded(layers).map(|(layer, state)| format!("{} {state}", layer.name())).collect();
    if degraded.is_empty() {
        return Ok(());
    }
    Err(Error::new(format!(
        "--sandbox strict, and of the {process}'s sandbox: {}; run as root on a kernel with Landlock, or without the option",
        degraded.join(", ")
    )))
}
