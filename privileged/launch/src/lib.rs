//! The helper before there is a dataplane: it opens what the dataplane is going to need, and starts it,
//! confined. Its only input is the operator's; once the dataplane runs, everything is up
//! to the crate `monitor`, and nothing here is called again.
//!
//! Read it in the order in which it runs: [`run`], `startup`, `background`, `netns`, `tun`,
//! `autoconf`, `uapi_socket`, `other_sockets`, `netlink`, `spawn`, `send_buffer`, `generation`; `sys` has all the unsafe code.

mod autoconf;
mod background;
mod generation;
mod launcher;
mod log;
mod netlink;
mod netns;
mod notify_socket;
mod offload;
mod other_sockets;
mod send_buffer;
mod spawn;
mod startup;
mod sys;
mod tun;
mod uapi_socket;
mod upgrade;

pub use launcher::print_error;
pub use other_sockets::Access;
pub use tun::check_name;
pub use wgsep_ipc::startup::{Listen, MAX_LISTEN_ADDRESSES};
pub use wgsep_ipc::{LogLevel, Offload};
pub use wgsep_journal::Format;
pub use wgsep_policy::Grants;

use launcher::Launcher;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::getpid;
use other_sockets::Sockets;
use startup::Inherited;
use std::path::PathBuf;
use tun::TunDevice;
use wgsep_ipc::Reply;
use wgsep_journal::{Level, Log};
use wgsep_monitor::{Interface, Result, Step, UdpOptions, Unconfined};
use wgsep_policy::Layer;

/// What an operator asked for.
pub struct Options {
    /// Of this build; the dataplane's must be the same.
    pub version: &'static str,
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
    /// Where the UDP sockets listen.
    pub listen: Listen,
    /// Name of the network namespace that the UDP sockets live in.
    pub socket_netns: Option<String>,
    /// Name of the network namespace that the interface is created in; else in the launcher's.
    pub tun_netns: Option<String>,
    /// Offloads not to use.
    pub without: Vec<Offload>,
    /// Worker threads.
    pub workers: usize,
    /// Of both processes' lines.
    pub log_level: LogLevel,
    /// How lines look.
    pub log_format: Format,
    /// Instead of standard error or syslog.
    pub log_file: Option<PathBuf>,
    /// Who may connect to the status socket.
    pub status: Access,
    /// Who may connect to the socket for preshared keys, which is made only if this is said.
    pub psk: Access,
}

/// Runs the daemon to its end; its exit status.
pub fn run(options: &Options) -> u8 {
    let mut launcher = Launcher::of_environment();
    let started = start(options, &mut launcher);
    serve(launcher, started)
}

/// Replaces the running pair of an interface by this one, which then serves to its end in the background; the exit
/// status of the process that waits until that is done.
pub fn upgrade(version: &'static str, interface: &str) -> u8 {
    let mut launcher = Launcher::of_environment();
    let started = upgrade::start(version, interface, &mut launcher);
    serve(launcher, started)
}

/// Serves to the end what was started, and reports the start to the launcher; the exit status.
fn serve(mut launcher: Launcher, started: Result<Unconfined>) -> u8 {
    match started.and_then(Unconfined::lock_down) {
        Ok(monitor) => {
            launcher.ready();
            monitor.serve()
        }
        Err(error) => {
            launcher.failed(&error);
            error.status
        }
    }
}

/// How UDP sockets are set up.
fn udp_options(options: &Options, large_buffers: bool) -> UdpOptions {
    let gro = !options.without.contains(&Offload::UdpGro);
    UdpOptions { listen: options.listen, gro, large_buffers }
}

/// Everything up to the moment when the dataplane is there.
fn start(options: &Options, launcher: &mut Launcher) -> Result<Unconfined> {
    wgsep_policy::become_non_dumpable()?;
    startup::survive_file_limit()?;
    // Before everything that takes time: from now on SIGTERM and SIGINT end the start as they end the daemon.
    let handled = startup::signals_to_handle(options.foreground)?;
    handled.thread_block().step("block signals")?;
    check_name(&options.interface)?;
    startup::check_infallible_calls()?;
    startup::check_ids()?;
    let user = wgsep_policy::user::choose(options.user.as_deref())?;
    let sockets = Sockets::of(options)?;
    let Inherited { tun, uapi, store, manager, unnotified, is_file_capable } =
        startup::clean_process()?;
    let large_buffers = !is_file_capable;
    startup::set_limits(options.workers)?;
    let open_log = || log::open(options, launcher.is_journal());
    let sink = startup::with_callers_rights(is_file_capable, open_log)??;
    if !options.foreground {
        background::daemonize(launcher)?;
    }
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&handled, flags).step("signalfd")?;

    let (name, opened) = match TunDevice::open(options, tun, store, &manager) {
        Ok((tun, number)) => (tun.name.clone(), Ok((tun.out_of_reach()?, number))),
        Err(deleted) if deleted.status == 0 => (options.interface.clone(), Err(deleted)),
        Err(error) => return Err(error),
    };
    // This process is where the UDP sockets live from now on.
    let first_unprivileged = netns::first_unprivileged_port();
    let grants = Grants { first_unprivileged, ..options.grants };
    let sink = sink.map_or_else(|| log::open_default(&name), Ok)?;
    let mut log = Log::new(sink, options.log_format, options.log_level);
    log.set_interface(&name);
    let (tun, netns) = opened.inspect_err(|deleted| log.info(&deleted.line))?;
    if let Some(line) = &unnotified {
        log.line(Level::Warn, line);
    }
    if let Some(line) = is_file_capable.then(startup::warn_of_a_grant_to_all).flatten() {
        log.line(Level::Warn, line);
    }
    for (level, line) in &tun.notes {
        log.line(*level, line);
    }
    let (listener, mut socket_file) = match uapi {
        Some(listener) => uapi_socket::adopt(listener, &name)?,
        None => uapi_socket::bind(&name)?,
    };
    let (netlink, follows_moves) = netlink::subscribe(large_buffers)?;
    let mut dataplane = spawn::start(options, &grants, &name, user)?;
    let [status, psk] = sockets.bind(&name, &mut socket_file, &mut log)?;
    let refused = uapi_socket::refuse_descriptors([Some(&listener), status.as_ref(), psk.as_ref()]);
    dataplane.report.note(Layer::NoDescriptorsIn, refused);

    if let Some(line) = send_buffer::warning(large_buffers) {
        log.line(Level::Warn, &line);
    }
    let line = |offload| offload::missing(offload, &options.without);
    let (missing, missing_gro) = (tun.missing().map(line), line(Offload::UdpGro));
    let is_restored = tun.is_restored;
    let (ifindex, offload, queues) = (tun.ifindex, tun.offload, tun.into_queues());
    let tun_queues = queues.len() as u8;
    let granted = Reply::Granted {
        ifindex,
        netns,
        follows_moves,
        tun_queues,
        offload,
        status: status.is_some(),
        psk: psk.is_some(),
        take_over: false,
    };
    // Whoever started this process in the foreground, or an init that is this process, waits for its end.
    let waits = options.foreground && (manager.parts().is_none() || getpid().as_raw() == 1);
    let udp = udp_options(options, large_buffers);
    let settings = upgrade::settings(options, udp, user, &granted, waits);
    let successors = match settings.map(|settings| upgrade::await_successor(&name, settings)) {
        Some(Ok((successors, file))) => {
            socket_file.add([file]);
            Some(successors)
        }
        Some(Err(error)) => {
            let lacks = format!("`wgsep upgrade {name}` cannot replace this daemon");
            log.line(Level::Warn, &format!("{error}; without it, {lacks}"));
            None
        }
        None => None,
    };
    let descriptors =
        [listener, netlink].into_iter().chain(queues).chain(status).chain(psk).collect();
    Ok(Unconfined {
        version: options.version,
        dataplane,
        interface: Interface { name, granted, descriptors, missing },
        grants,
        udp,
        missing_gro,
        strict: options.strict,
        socket_file,
        signals,
        generation: generation::watch(),
        log,
        manager,
        is_restored,
        successors,
        predecessor: None,
    })
}
