//! How one helper takes the place of another, which is of another build, without an interruption of the tunnel.
//!
//! The new helper announces itself to a socket that only the user of the running one can reach. It is given descriptors
//! and settings, starts a dataplane of its own and verifies it; then the two dataplanes pass the state between them
//! (`control/handover.rs` of the dataplane). Until the old dataplane says that it has given everything away, the running
//! helper goes on as before, whatever happens to the new one. [`Successors`] is the side of the helper that is replaced,
//! [`Predecessor`] that of the new one.
//!
//! No byte of a dataplane reaches this crate.

use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{Backlog, getsockopt, listen, sockopt};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use wgsep_host::{FAILURE, OwnFile, SocketFile, is_unread, poll};
use wgsep_ipc::upgrade::{FromPredecessor, FromSuccessor, LogSink, OpenUdp, Waiter, Welcome};
use wgsep_ipc::{Channel, Error, Received};
use wgsep_journal::{Format, Log, ServiceManager, Sink};

/// How long the hand-over from another dataplane may take: longer than each of the steps that have their own limit.
pub const TIMEOUT: Duration = Duration::from_secs(15);
/// How long the last message of the helper that is replaced may take: it is sent as soon as that has read its dataplane's.
const LAST_STEP: Duration = Duration::from_secs(5);
/// Without a limit, as far as the clock can count.
pub const UNLIMITED: Duration = Duration::from_secs(u32::MAX as u64);

/// What is kept for a helper that replaces this one, and how far that is.
pub struct Successors {
    /// Where such a helper announces itself.
    socket: Channel,
    /// The channel to it, or one without another end while there is none.
    channel: Channel,
    /// What this helper was started with. The rest is filled in when it is sent.
    settings: Welcome,
    /// The UAPI listener, the TUN queues, and the listeners of the status socket and of the one for preshared keys.
    kept: Vec<OwnedFd>,
    current: Option<Current>,
    /// This helper has everything that it would hand over.
    is_served: bool,
}

/// A helper that is about to replace this one.
struct Current {
    pid: i32,
    /// The old dataplane's end of the socket for the state, until the dataplane is asked to hand over. From then on it is
    /// the dataplane's answer that counts.
    state: Option<OwnedFd>,
}

/// What else the running helper has.
pub struct Have<'a> {
    /// Where its lines go.
    pub log: &'a Log,
    /// Who supervises it.
    pub manager: &'a ServiceManager,
    /// The helper that waits for its end, in the place of its launcher.
    pub waiter: Option<&'a Channel>,
    /// Its user.
    pub user: u32,
    /// The interface is that of a daemon that crashed.
    pub is_restored: bool,
}

impl Successors {
    /// Awaits a helper at `socket`. The channel is one whose other end is closed.
    #[must_use]
    pub const fn new(socket: OwnedFd, channel: Channel, settings: Welcome) -> Self {
        let socket = Channel::of_datagrams(socket);
        Self { socket, channel, settings, kept: Vec::new(), current: None, is_served: false }
    }

    /// The channel, whose number the filter names.
    #[must_use]
    pub fn channel(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// Keeps the listeners and the TUN queues of what the dataplane was granted, and closes the rest.
    pub fn keep(&mut self, granted: Vec<OwnedFd>) {
        let Welcome { tun_queues, status, psk, .. } = self.settings;
        let count = usize::from(tun_queues) + usize::from(status) + usize::from(psk);
        let (others, kept) = (2..2 + count, granted.into_iter().zip(0..));
        self.kept = kept
            .filter(|(_, number)| *number == 0 || others.contains(number))
            .map(|(descriptor, _)| descriptor)
            .collect();
    }

    /// From now on another helper may announce itself. A client of the UAPI socket learns from the kernel that it is
    /// this process's.
    pub fn begin(&mut self) {
        self.is_served = true;
        if let Some(listener) = self.kept.first() {
            // Only the audit depends on it.
            let _refused = listen(listener, Backlog::MAXCONN);
        }
    }

    /// What becomes readable when there is something to do, if there can be.
    #[must_use]
    pub fn source(&self) -> Option<BorrowedFd<'_>> {
        match &self.current {
            // The socket is shared with the helper that this one replaces.
            None => self.is_served.then(|| self.socket.as_fd()),
            Some(Current { state: Some(_), .. }) => Some(self.channel.as_fd()),
            Some(Current { state: None, .. }) => None,
        }
    }

    /// Deals with a helper that announces itself, or says something. Returns the socket by which the dataplane is to hand
    /// over, once that helper's dataplane is verified.
    pub fn serve(&mut self, have: &Have<'_>) -> Option<OwnedFd> {
        let Some(current) = &mut self.current else {
            let [channel, state] = self.socket.receive_hello()?;
            self.welcome(channel, state, have);
            return None;
        };
        match self.channel.receive_from_successor() {
            Ok(Received::Nothing) => None,
            Ok(Received::Message(FromSuccessor::HandOver, _)) => current.state.take(),
            _gone_or_nonsense => {
                self.kept_on();
                None
            }
        }
    }

    /// The dataplane goes on, and another helper may try again.
    pub fn kept_on(&mut self) {
        self.current = None;
    }

    /// The dataplane serves: if it was to hand over, it has not.
    pub fn dataplane_serves(&mut self) {
        if self.is_awaited() {
            self.kept_on();
        }
    }

    /// Whether the dataplane was asked to hand over, and has not answered.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        matches!(self.current, Some(Current { state: None, .. }))
    }

    /// Sends a helper that announces itself what it needs, if it is of the same user.
    fn welcome(&mut self, channel: OwnedFd, state: OwnedFd, have: &Have<'_>) {
        let Ok(peer) = getsockopt(&channel, sockopt::PeerCredentials) else { return };
        let Some((listener, others)) = self.kept.split_first() else { return };
        if ![0, have.user].contains(&peer.uid()) || self.channel.replace(channel).is_err() {
            return;
        }
        let (sink, format, log_level) = have.log.settings();
        let manager = have.manager.parts();
        let welcome = Welcome {
            log_level,
            log_json: format == Format::Json,
            log: match sink {
                Sink::Stream(_) => LogSink::Stream,
                Sink::Journal(_) => LogSink::Journal,
                Sink::Syslog(_) => LogSink::Syslog,
            },
            manager: manager.as_ref().map(|(_, watchdog)| {
                watchdog.map_or(0, |whole| u64::try_from(whole.as_micros()).unwrap_or(0))
            }),
            is_restored: have.is_restored,
            waiter: match have.waiter {
                Some(_) => Waiter::EarlierHelper,
                None => self.settings.waiter,
            },
            ..self.settings
        };
        let descriptors: Vec<_> = [listener.as_fd(), self.socket.as_fd()]
            .into_iter()
            .chain(others.iter().map(AsFd::as_fd))
            .chain([sink.as_fd()])
            .chain(manager.map(|(socket, _)| socket))
            .chain(have.waiter.map(AsFd::as_fd))
            .collect();
        let welcome = FromPredecessor::Welcome(welcome);
        if self.channel.send_to_successor(&welcome, &descriptors).is_ok() {
            self.current = Some(Current { pid: peer.pid(), state: Some(state) });
        }
    }

    /// Tells the helper of another pair that everything is its own, and sends it the UDP sockets with their port, mark and
    /// whether they receive datagrams many at a time.
    pub fn hand_over(&self, udp: Option<(u16, u32, bool)>, sockets: &[BorrowedFd<'_>]) {
        let count = sockets.len() as u8;
        let udp = udp.map(|(port, mark, joins)| OpenUdp { port, sockets: count, mark, joins });
        let _gone = self.channel.send_to_successor(&FromPredecessor::HandedOver(udp), sockets);
    }

    /// Notifies the service manager of the new helper; false if it has no space for that at present. To be called before
    /// [`Self::hand_over`]: from then on the new helper may be replaced, too, and the manager would be notified of that first.
    #[must_use]
    pub fn announce(&self, manager: &ServiceManager) -> bool {
        let waits = self.settings.waiter == Waiter::ThisHelper;
        let pid = self.current.as_ref().filter(|_| !waits).map(|current| current.pid);
        pid.is_none_or(|pid| manager.main_process(pid))
    }

    /// Everything belongs to another pair: its helper's process, and the channel to it if this process stays for a parent
    /// that waits for its end.
    #[must_use]
    pub fn retire(self) -> (i32, Option<Channel>) {
        let pid = self.current.map_or(0, |current| current.pid);
        (pid, (self.settings.waiter == Waiter::ThisHelper).then_some(self.channel))
    }
}

/// Waits until the service manager has received everything, for 15 s at most, and notifies it of the new helper if that is
/// still to be done. systemd makes no process that has ended the main one, and the message that makes this one so may be
/// unread; then the end of the one before would be the unit's.
pub fn wait_for_manager(manager: &ServiceManager, pid: i32, mut is_announced: bool) {
    let Some(socket) = manager.socket() else { return };
    for _ in 0..TIMEOUT.as_millis() / 5 {
        is_announced = is_announced || manager.main_process(pid);
        if is_announced && !is_unread(socket).unwrap_or(false) {
            return;
        }
        let _waited = poll([], Duration::from_millis(5));
    }
}

/// Stays in the place of a daemon for the parent of this process, which waits for its end: passes signals on to the new
/// helper, and returns its exit status.
pub fn stand_in(channel: &Channel, signals: &SignalFd, reap_orphans: impl Fn()) -> u8 {
    loop {
        let polled = poll([signals.as_fd(), channel.as_fd()], Duration::MAX);
        let Ok([signal, said]) = polled else { return FAILURE };
        if signal && let Ok(Some(info)) = signals.read_signal() {
            reap_orphans();
            let signal = FromPredecessor::Signal(info.ssi_signo.cast_signed());
            let _gone_is_seen_below = channel.tell_successor(&signal);
        }
        if said {
            match channel.receive_from_successor() {
                Ok(Received::Message(FromSuccessor::Ended(status), _)) => return status,
                Ok(Received::Nothing) => {}
                _gone => return FAILURE,
            }
        }
    }
}

/// The signal that a helper passes on that waits for the end of this one; an error if it is gone.
///
/// # Errors
/// As [`Channel::receive_from_predecessor`], and if it is closed.
pub fn passed_on(waiter: &Channel) -> Result<Option<i32>, Error> {
    match waiter.receive_from_predecessor()? {
        Received::Message(FromPredecessor::Signal(number), _) => Ok(Some(number)),
        Received::Message(FromPredecessor::HandedOver(_), _) | Received::Nothing => Ok(None),
        Received::Message(FromPredecessor::Welcome(_), _) | Received::Closed => {
            Err(Error::Unexpected)
        }
    }
}

/// The helper that this one replaces.
pub struct Predecessor {
    /// The channel to it.
    pub channel: Channel,
    /// The service manager, which this one notifies from then on.
    pub manager: ServiceManager,
    /// Whether it made the UAPI socket's file.
    pub made_socket: bool,
    /// Whether it waits for the end of this one.
    pub waits: bool,
    /// The channel to an earlier helper, which does.
    pub earlier: Option<Channel>,
    /// What the sandbox's report says of that pair; empty where there is none.
    pub claims: String,
    /// The sandbox's report, to be written anew.
    pub report: io::Result<(File, OwnFile)>,
    /// The files of the other sockets: of the status, for preshared keys, and that to which the next helper announces
    /// itself.
    pub beside: Vec<OwnFile>,
    /// The UDP sockets, once it has handed over.
    pub handed_over: Option<(Option<OpenUdp>, Vec<OwnedFd>)>,
}

impl Predecessor {
    /// Has it hand over.
    ///
    /// # Errors
    /// If it is gone.
    pub fn ask(&self) -> Result<(), Error> {
        self.channel.tell_predecessor(&FromSuccessor::HandOver)
    }

    /// Whether it has handed over within this time: this pair is then the only one.
    pub fn has_handed_over(&mut self, wait: Duration) -> bool {
        if self.handed_over.is_none()
            && poll([self.channel.as_fd()], wait).is_ok_and(|[said]| said)
            && let Ok(Received::Message(FromPredecessor::HandedOver(udp), sockets)) =
                self.channel.receive_from_predecessor()
        {
            self.handed_over = Some((udp, sockets));
        }
        self.handed_over.is_some()
    }

    /// The UDP sockets, if they are open. Where that helper has died, or is stopped, there are none: new ones are opened.
    pub fn udp(&mut self) -> Option<(OpenUdp, Vec<OwnedFd>)> {
        self.has_handed_over(LAST_STEP);
        self.handed_over.take().and_then(|(udp, sockets)| Some((udp?, sockets)))
    }

    /// Takes over its files, once everything is handed over. Returns the service manager, and the helper that waits for
    /// the end of this one, if any.
    pub fn replaced(self, socket_file: &mut SocketFile) -> (ServiceManager, Option<Channel>) {
        if self.made_socket {
            socket_file.take_over();
        }
        socket_file.set_report(self.report);
        socket_file.add(self.beside);
        (self.manager, self.earlier.or_else(|| self.waits.then_some(self.channel)))
    }
}
