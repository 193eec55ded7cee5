//! Replacing a running pair by this one, without an interruption of the tunnel (`wgsep upgrade IF`).
//!
//! [`await_successor`] is the start of a pair that may be replaced later; [`start`] is that of a pair that replaces
//! another. What the two helpers say is in `wgsep_ipc::upgrade`, and what the running one does in `monitor/upgrade.rs`.

use crate::background;
use crate::launcher::Launcher;
use crate::netns::Netns;
use crate::startup::{self, Inherited, open_path};
use crate::{
    Access, Grants, Offload, Options, generation, netlink, netns, spawn, tun, uapi_socket,
};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, bind, getsockopt,
    sendmsg, setsockopt, socket, socketpair, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::{Gid, Uid, getuid};
use std::fs::{read_link, read_to_string, remove_file};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;
use wgsep_ipc::upgrade::{FromPredecessor, HELLO, LogSink, Waiter, Welcome};
use wgsep_ipc::{Channel, Received, Reply};
use wgsep_journal::{Format, Log, ServiceManager, Sink};
use wgsep_monitor::{DIRECTORY, Error, Interface, OwnFile, Result, Step, UdpOptions, Unconfined};
use wgsep_policy::{Layer, filters, user};
use wgsep_upgrade::{Predecessor, Successors};

/// How long the running helper may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes that may wait between the two dataplanes: several records.
const STATE_BUFFER: usize = 1 << 20;

fn path(interface: &str) -> String {
    format!("{DIRECTORY}/{interface}.upgrade")
}

/// Makes the socket at which a helper that replaces this one announces itself, and its file, mode 0600.
///
/// # Errors
/// If it cannot be made. What is served does not depend on it.
pub fn await_successor(interface: &str, settings: Welcome) -> Result<(Successors, OwnFile)> {
    let path = path(interface);
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Datagram, flags, None).step(&path)?;
    // The UAPI socket of this name is this process's, so no other daemon has this one.
    let _seldom_there = remove_file(&path);
    let address = UnixAddr::new(&*path).step(&path)?;
    let in_the_way = format!("{path} is a directory; move it away");
    uapi_socket::with_umask(0o177, || bind(socket.as_raw_fd(), &address))
        .advise(&path, &[(&[Errno::EADDRINUSE], &in_the_way)])?;
    let file = own_file(interface).inspect_err(|_| drop(remove_file(&path))).step(&path)?;
    let (channel, _closed) = channel_pair()?;
    Ok((Successors::new(socket, channel, settings), file))
}

/// Moves a descriptor below the numbers of the queues, which this process can neither read nor write once it is locked
/// down.
fn within_reach(descriptor: OwnedFd) -> Result<OwnedFd> {
    if descriptor.as_raw_fd().cast_unsigned() < filters::FIRST_QUEUE {
        return Ok(descriptor);
    }
    descriptor.try_clone().step("move a descriptor")
}

fn own_file(interface: &str) -> io::Result<OwnFile> {
    OwnFile::new(format!("{interface}.upgrade"), open_path(path(interface), OFlag::empty())?)
}

fn channel_pair() -> Result<(Channel, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).step("socketpair")?;
    let channel = Channel::new(ours).map_err(|error| {
        Error::new(format!("channel: {error}; this is a bug, please report it"))
    })?;
    Ok((channel, theirs))
}

/// The settings that a helper with these options hands on.
pub fn settings(
    options: &Options,
    udp: UdpOptions,
    ids: Option<(Uid, Gid)>,
    granted: &Reply,
    waits: bool,
) -> Option<Welcome> {
    let &Reply::Granted { ifindex, netns, tun_queues, offload, status, psk, .. } = granted else {
        return None;
    };
    let without = Offload::ALL.iter().zip(0..).filter(|(one, _)| options.without.contains(one));
    Some(Welcome {
        ifindex,
        netns,
        tun_queues,
        offload,
        status,
        psk,
        ids: ids.map(|(uid, gid)| (uid.as_raw(), gid.as_raw())),
        workers: u8::try_from(options.workers).ok()?,
        strict: options.strict,
        listen: options.listen,
        port: options.grants.port,
        marks: options.grants.mark,
        low_ports: options.grants.low_ports,
        large_buffers: udp.large_buffers,
        without: without.fold(0, |bits, (_, number)| bits | 1 << number),
        log_level: options.log_level,
        log_json: options.log_format == Format::Json,
        log: LogSink::Stream,
        manager: None,
        is_restored: false,
        waiter: if waits { Waiter::ThisHelper } else { Waiter::None },
    })
}

/// What the running helper gave.
struct Given {
    channel: Channel,
    state: OwnedFd,
    welcome: Welcome,
    descriptors: Vec<OwnedFd>,
}

/// Announces this helper to the running one, and receives what that has.
fn announce(interface: &str) -> Result<Given> {
    let path = path(interface);
    let none = format!(
        "no wgsep that could be replaced serves {interface}: {path} is missing (an older wgsep has none, nor has one whose socket was renamed); restart that daemon; see: ls {DIRECTORY}"
    );
    let gone = format!(
        "no wgsep serves {interface}: {path} is of a daemon that was killed; start one: wgsep {interface}"
    );
    let denied =
        format!("no permission to reach {path}; run as the user that started wgsep, mostly root");
    let running = UnixDatagram::unbound().step("socket")?;
    running.connect(&path).advise(
        &format!("reach {path}"),
        &[(&[Errno::ENOENT], &none), (&[Errno::ECONNREFUSED], &gone), (&[Errno::EACCES], &denied)],
    )?;
    let (channel, theirs) = channel_pair()?;
    let (state, old_state) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .step("socketpair")?;
    for end in [&state, &old_state] {
        let patience = TimeVal::seconds(PATIENCE.as_secs().cast_signed());
        setsockopt(end, sockopt::SendTimeout, &patience).step("limit the hand-over")?;
        setsockopt(end, sockopt::ReceiveTimeout, &patience).step("limit the hand-over")?;
        let _smaller = setsockopt(end, sockopt::SndBuf, &STATE_BUFFER);
    }
    let raw = [theirs.as_raw_fd(), old_state.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&raw)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let hello = [IoSlice::new(&HELLO)];
    sendmsg::<UnixAddr>(running.as_raw_fd(), &hello, &rights, flags, None).step(&path)?;
    drop((theirs, old_state));
    let busy = || {
        Error::new(format!(
            "the wgsep that serves {interface} does not answer: it may be stopped, or another upgrade under way; try again, or restart it"
        ))
    };
    if !wgsep_monitor::poll([channel.as_fd()], PATIENCE).is_ok_and(|[answers]| answers) {
        return Err(busy());
    }
    match channel.receive_from_predecessor() {
        Ok(Received::Message(FromPredecessor::Welcome(welcome), descriptors)) => {
            Ok(Given { channel, state, welcome, descriptors })
        }
        // It closes the channel of one whose first message it does not understand.
        Ok(Received::Closed) | Err(_) => Err(Error::new(format!(
            "the wgsep that serves {interface} cannot be replaced by this one: it is of another version or user, or about to end; restart it"
        ))),
        Ok(_) => Err(busy()),
    }
}

/// Refuses to replace a helper of another PID namespace or user, by what the kernel has of it with its listener: this
/// pair would be outside of that container, and not end with it, or a user would command that of another. Nor one of another
/// time namespace: deadlines by its clocks would never come by these.
fn refuse_another_owner(listener: &OwnedFd, interface: &str) -> Result<()> {
    let owner = getsockopt(listener, sockopt::PeerCredentials).step("SO_PEERCRED")?;
    let (pid, user) = (owner.pid(), owner.uid());
    let status = read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    let is_below = numbers.is_some_and(|numbers| numbers.split_whitespace().count() > 1);
    let clocks = |process: &str| read_link(format!("/proc/{process}/ns/time")).ok();
    let has_others = clocks(&pid.to_string()).is_some_and(|theirs| Some(theirs) != clocks("self"));
    let elsewhere = "in another PID namespace or time namespace, as in a container or by PrivatePIDs= of a unit";
    let (why, how) = match pid {
        0 => (elsewhere, "there: docker exec CONTAINER".to_owned()),
        _ if is_below || has_others => {
            (elsewhere, format!("there: nsenter --target {pid} --pid --mount --net --time"))
        }
        _ if user != getuid().as_raw() => {
            ("of another user", format!("as that user: sudo -u '#{user}'"))
        }
        _ => return Ok(()),
    };
    Err(Error::new(format!(
        "the wgsep that serves {interface} is {why}; run it {how} wgsep upgrade {interface}"
    )))
}

/// The options that the running pair was started with.
fn options(version: &'static str, interface: &str, welcome: &Welcome) -> Options {
    let is_without = |number: u32| welcome.without & 1 << number != 0;
    Options {
        version,
        interface: interface.to_owned(),
        foreground: false,
        user: None,
        strict: welcome.strict,
        grants: Grants {
            port: welcome.port,
            mark: welcome.marks,
            low_ports: welcome.low_ports,
            first_unprivileged: None,
        },
        listen: welcome.listen,
        socket_netns: None,
        tun_netns: None,
        without: Offload::ALL
            .into_iter()
            .zip(0..)
            .filter_map(|(one, number)| is_without(number).then_some(one))
            .collect(),
        workers: usize::from(welcome.workers),
        log_level: welcome.log_level,
        log_format: if welcome.log_json { Format::Json } else { Format::Text },
        log_file: None,
        status: Access::default(),
        psk: Access::default(),
    }
}

/// Everything up to the moment when the new dataplane is there.
///
/// # Errors
/// If no pair can be replaced, or this one cannot be started. The running one then goes on.
pub fn start(
    version: &'static str,
    interface: &str,
    launcher: &mut Launcher,
) -> Result<Unconfined> {
    wgsep_policy::become_non_dumpable()?;
    startup::survive_file_limit()?;
    let handled = startup::signals_to_handle(false)?;
    handled.thread_block().step("block signals")?;
    crate::check_name(interface)?;
    startup::check_infallible_calls()?;
    startup::check_ids()?;
    let Inherited { is_file_capable, .. } = startup::clean_process()?;
    // Before the channel is made, by which the running helper knows this process.
    background::daemonize(launcher)?;
    // Before all that is received, so that its number is one that is read.
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&handled, flags).step("signalfd")?;
    let Given { channel, state, welcome, descriptors } =
        startup::with_callers_rights(is_file_capable, || announce(interface))??;
    let options = options(version, interface, &welcome);
    startup::set_limits(options.workers)?;

    let mut descriptors = descriptors.into_iter();
    let missing = || Error::new("the running wgsep sent too few descriptors; restart it");
    let mut next = || descriptors.next().ok_or_else(missing);
    let (listener, upgrade) = (next()?, next()?);
    refuse_another_owner(&listener, interface)?;
    let queues = (0..welcome.tun_queues).map(|_| next().and_then(tun::out_of_reach));
    let queues = queues.collect::<Result<Vec<_>>>()?;
    // The numbers that the queues had are free now.
    let mut next = || next().and_then(within_reach);
    let status = welcome.status.then(&mut next).transpose()?;
    let psk = welcome.psk.then(&mut next).transpose()?;
    let sink = match (welcome.log, next()?) {
        (LogSink::Stream, log) => Sink::Stream(log.into()),
        (LogSink::Journal, log) => Sink::Journal(log.into()),
        (LogSink::Syslog, log) => Sink::Syslog(log.into()),
    };
    let manager = match welcome.manager {
        Some(watchdog) => {
            let watchdog = Some(watchdog).filter(|watchdog| *watchdog > 0);
            ServiceManager::new(next()?.into(), watchdog.map(Duration::from_micros))
        }
        None => ServiceManager::default(),
    };
    let earlier = match welcome.waiter {
        Waiter::EarlierHelper => {
            let channel = Channel::new(next()?);
            Some(channel.map_err(|_| missing())?)
        }
        Waiter::None | Waiter::ThisHelper => None,
    };
    // The running pair may be in another network namespace than the caller.
    let home = Netns::of_socket(&upgrade)?;
    if home.number()?.is_some() {
        home.enter()?;
    }
    let first_unprivileged = netns::first_unprivileged_port();
    let grants = Grants { first_unprivileged, ..options.grants };
    let mut log = Log::new(sink, options.log_format, options.log_level);
    log.set_interface(interface);
    let is_dynamic = |uid: &u32| user::DYNAMIC_UIDS.contains(uid);
    let user = match welcome.ids {
        Some((uid, _)) if is_dynamic(&uid) => user::choose(None)?,
        Some((uid, gid)) => Some((Uid::from_raw(uid), Gid::from_raw(gid))),
        None => None,
    };
    let (socket_file, made_socket) = uapi_socket::of_running(&listener, interface)?;
    let (netlink, follows_moves) = netlink::subscribe(welcome.large_buffers)?;
    let mut dataplane = spawn::start(&options, &grants, interface, user)?;
    let refused = uapi_socket::refuse_descriptors([Some(&listener), status.as_ref(), psk.as_ref()]);
    dataplane.report.note(Layer::NoDescriptorsIn, refused);
    let files = [(&status, "status"), (&psk, "psk")].map(|(socket, suffix)| {
        uapi_socket::file_of(socket.as_ref()?, &format!("{interface}.{suffix}"))
    });

    let granted = Reply::Granted {
        ifindex: welcome.ifindex,
        netns: welcome.netns,
        follows_moves,
        tun_queues: welcome.tun_queues,
        offload: welcome.offload,
        status: welcome.status,
        psk: welcome.psk,
        take_over: true,
    };
    let ids = user.map(|(uid, gid)| (uid.as_raw(), gid.as_raw()));
    let settings = Welcome { manager: None, waiter: Waiter::None, ids, ..welcome };
    let (next_channel, _closed) = channel_pair()?;
    let report = uapi_socket::report_of_running(interface);
    let predecessor = Predecessor {
        channel,
        manager,
        made_socket,
        waits: welcome.waiter == Waiter::ThisHelper,
        earlier,
        claims: read_to_string(format!("{DIRECTORY}/{interface}.sandbox")).unwrap_or_default(),
        report,
        beside: own_file(interface).ok().into_iter().chain(files.into_iter().flatten()).collect(),
        handed_over: None,
    };
    let descriptors =
        [listener, netlink].into_iter().chain(queues).chain(status).chain(psk).chain([state]);
    Ok(Unconfined {
        version,
        dataplane,
        interface: Interface {
            name: interface.to_owned(),
            granted,
            descriptors: descriptors.collect(),
            missing: None,
        },
        grants,
        udp: crate::udp_options(&options, welcome.large_buffers),
        missing_gro: crate::offload::missing(Offload::UdpGro, &options.without),
        strict: options.strict,
        socket_file,
        signals,
        generation: generation::watch(),
        log,
        manager: ServiceManager::default(),
        is_restored: welcome.is_restored,
        successors: Some(Successors::new(upgrade, next_channel, settings)),
        predecessor: Some(predecessor),
    })
}
