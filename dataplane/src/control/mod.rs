//! The control thread, which handles everything but transport packets.
//!
//! It alone owns the [`ControlPlane`]. It waits for clients of the UAPI, of the status socket and of the one for preshared
//! keys, the helper, the interface's state, the earliest timer and the peers that workers mark as dirty, and after each round sends what that caused.
//! What may need the helper is an action; actions run one after the other, and nothing else waits for
//! them. The helper answers each request at once.
//!
//! # The walk of `wg set wg0 listen-port 51821`
//!
//! 1. `uapi/server.rs` accepts the client and `uapi/inbox.rs` buffers its text, which `uapi/parse.rs` turns into one
//!    operation for each line. `control/mod.rs` takes some of them each round.
//! 2. `control/actions.rs`, `start_configure`: with the link down, the port is only stored. With the link up,
//!    `helper.rs` sends `Request::OpenUdp` (`ipc/src/message.rs`).
//! 3. The helper (`privileged/monitor/src/requests.rs`) checks the phase (`permit`), what the operator allows
//!    (`policy/src/grants.rs`) and the rate of new ports (`policy/src/new_ports.rs`). Then `privileged/monitor/src/udp.rs`
//!    opens the new sockets, makes the old ones useless and replies with the descriptors (`ipc/src/reply.rs`). A new port
//!    that may be opened only later is refused with EAGAIN; the `set` is put off (`control/put_off.rs`), and the port is
//!    requested again each second.
//! 4. `control/actions.rs`, `finish_configure`: `workers/shared.rs` publishes the new sockets and wakes the workers, each
//!    of which switches to them (`Worker::refresh`). The protocol forgets the source addresses of the peers
//!    (`ControlPlane::set_listen_port`).
//! 5. The client is answered when the old sockets are closed, so that the old port is free.
//!
//! # The life of a source address
//!
//! The address and interface at which a peer's datagram arrived are read with it (`sys.rs`), stored as the source of
//! the peer's endpoint (`path/inbound/accept.rs` of the protocol), and used for what is sent to that peer
//! (`packets/udp.rs`). `control/sources.rs` clears a source after a change of routes, rules or links, and a send that the
//! kernel refuses with it clears it too. Without a source the kernel chooses the address.

mod actions;
mod events;
mod handover;
mod port;
mod preshared_keys;
mod probe;
mod put_off;
mod sources;
mod status;

use self::events::{Reporter, Unsent};
use self::port::PortRetry;
use self::probe::{LinkProbe, PROBE_INTERVAL};
use self::put_off::PutOff;
use self::sources::{Binding, SourceCheck};
use self::status::Status;
use crate::clock;
use crate::helper::Helper;
use crate::line_limit::LineLimit;
use crate::link::{LinkMonitor, LinkState};
use crate::packets::gso::Gso;
use crate::packets::udp::{self, SourceOutcome};
use crate::random::KernelRandom;
use crate::secret;
use crate::uapi::{self, Access, ClientId, Operation, Server};
use crate::vm_clock::VmClock;
use crate::workers::shared::{QueuedHandshake, Shared};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;
use wgsep_ipc::{Request, Startup};
use wgsep_proto::device::control_plane::{
    ControlPlane, CryptoJob, HandshakeDatagram, HandshakeTransmit, JobRunner,
    MAX_QUEUED_HANDSHAKES, PEERS_PER_ROUND,
};
use wgsep_proto::invariant::{part, present};
use wgsep_proto::secret::in_ordinary_memory;
use wgsep_proto::wire::messages::TRANSPORT_OVERHEAD;
use wgsep_proto::{Configuration, Instant};
use wgsep_status::Source as _;

/// Tokens of epoll events; those of UAPI descriptors follow, and far behind those of the other two sockets, as no number of
/// a client is used twice.
const WORKERS: u64 = 0;
const TIMER: u64 = 1;
const HELPER: u64 = 2;
const LINK: u64 = 3;
const FIRST_UAPI: u64 = 16;
const FIRST_PSK: u64 = 1 << 61;
const FIRST_STATUS: u64 = 1 << 62;

/// Handshake messages consumed at once: each is answered when the Diffie-Hellmans of all are done.
const HANDSHAKES_AT_ONCE: usize = 16;
/// Batches of handshake messages consumed before other events are handled: about 10 ms of work.
const BATCHES_PER_ROUND: usize = 4;
/// UAPI transactions and actions executed before other events are handled.
const STEPS_PER_ROUND: usize = 16;
/// Peers of a `set` that count as one of them: one to two milliseconds of work.
const PEERS_PER_STEP: usize = 256;
/// Milliseconds between two polls of the handshake queue under load, so that a flood does not wake the
/// control thread for each message and preempt a worker each time.
const LOAD_INTERVAL: u16 = 2;
/// Least time between two wipes of all stacks, so that a flood of handshakes, each of which replaces a
/// keypair, does not wake the workers for each.
const WIPE_INTERVAL: Duration = Duration::from_millis(100);
/// Time after which another loss of netlink messages is logged.
const OVERRUN_REPORT_INTERVAL: Duration = Duration::from_secs(3600);
/// Bytes of the longest packet that goes over IPv4, where the MTU bounds its padding.
const LONGEST_PACKET: usize = udp::MAX_SEND - TRANSPORT_OVERHEAD;

/// Why the daemon exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The helper requested it, or the interface was deleted.
    Orderly,
    /// The helper exited or violated the protocol.
    HelperLost,
    /// The kernel refused something essential.
    Failed,
}

/// An action of the control thread, which may need the helper. A configuration is boxed, because memory is erased when it is
/// freed, but not when a value is moved out of a queue.
enum Action {
    Configure(ClientId, Box<Configuration>),
    /// Try again to apply the first `set` that was put off.
    ConfigureAgain,
    /// A `set` that opened a port has taken effect, and the old port is free.
    Configured(ClientId),
    LinkUp,
    /// Try again to open the port of an interface that is up.
    OpenPort,
    /// Replace sockets that are of no use any more.
    ReopenPort(Useless),
    LinkDown,
    /// A `get` that was received while the link changed.
    Get(ClientId),
    /// Hand everything over by this socket.
    HandOver(OwnedFd),
}

/// Why sockets are of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Useless {
    /// The kernel has destroyed them.
    Destroyed,
    /// The interface that they are bound to is not the one of `--bind-device` any more.
    OtherDevice,
}

/// Listeners on which no client is accepted yet.
struct Listeners {
    uapi: OwnedFd,
    status: Option<OwnedFd>,
    psk: Option<OwnedFd>,
}

/// The action that continues with the helper's reply.
enum Awaiting {
    LockedDown,
    /// A `set` that opened a port or moved the mark; it takes effect only now.
    Configure(ClientId, Box<Configuration>),
    LinkUp,
    LinkDown,
}

/// The control thread's state. It is on the heap, because the frame of [`Control::run`] is never wiped and a
/// value that is moved into it may bring parts of a key in its padding.
pub(crate) struct Control {
    shared: Arc<Shared>,
    workers: usize,
    device: Box<ControlPlane>,
    /// Handshake messages that are being consumed.
    handshakes: VecDeque<QueuedHandshake>,
    epoll: Epoll,
    timer: TimerFd,
    armed: Option<Instant>,
    helper: Helper,
    uapi: Server,
    psk: Server,
    status: Status,
    interface: String,
    /// Ports that the helper opens.
    ports: RangeInclusive<u16>,
    /// Whether the UDP sockets are on every address and interface.
    listens_everywhere: bool,
    /// The only interface that the UDP sockets are bound to, empty for none; and its index.
    bind_device: String,
    /// The interface of the sockets was seen under that name.
    device_had_name: bool,
    gso: Arc<Gso>,
    link: Option<LinkMonitor>,
    link_state: LinkState,
    port_retry: PortRetry,
    probe: LinkProbe,
    source_check: SourceCheck,
    actions: VecDeque<Action>,
    /// Each `set` that waits for a new port; boxed for the same reason as in [`Action`].
    put_off: PutOff<(ClientId, Box<Configuration>)>,
    /// Sockets that were replaced, until they are closed: a worker may still hold them.
    retiring: Weak<()>,
    awaiting: Option<Awaiting>,
    /// It has the state of another dataplane, and is about to get its sockets. Nothing is sent until then.
    awaits_sockets: bool,
    /// When the processes of the pair that this one has replaced, which have its sockets open until they end, have ended.
    predecessor_ends: Option<Instant>,
    /// What clients connect to meanwhile, who are answered when the sockets are there.
    listeners: Option<Listeners>,
    end: Option<End>,
    reporter: Reporter,
    refusals: LineLimit,
    psk_refusals: LineLimit,
    /// When all stacks were wiped last, and when they must be wiped next.
    wiped: Option<Instant>,
    wipe_due: Option<Instant>,
    overrun_reported: Option<Instant>,
}

impl Control {
    /// Creates a device on which only port and mark are configured, and the descriptors the thread waits for.
    ///
    /// # Errors
    /// If the kernel refuses an epoll instance, a timer or an eventfd.
    pub(crate) fn new(
        helper: Helper,
        startup: Startup,
        vm_clock: Option<VmClock>,
    ) -> nix::Result<Box<Self>> {
        let mut device = Box::new(ControlPlane::new(Box::new(KernelRandom)));
        let initial = Configuration {
            listen_port: Some(startup.listen_port),
            fwmark: Some(startup.fwmark),
            ..Configuration::default()
        };
        device.configure(initial);
        if let Some(vm_clock) = vm_clock {
            device.data_path().watch_generation(Box::new(vm_clock));
        }
        // Buffers for packets, which are not secrets of ours.
        let (shared, handshakes) = in_ordinary_memory(|| {
            let shared = Shared::new(Arc::clone(device.data_path()), startup.workers);
            (shared.map(Arc::new), VecDeque::with_capacity(MAX_QUEUED_HANDSHAKES))
        });
        let shared = shared?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let timer = TimerFd::new(
            ClockId::CLOCK_BOOTTIME,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )?;
        epoll.add(&shared.control, EpollEvent::new(EpollFlags::EPOLLIN, WORKERS))?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        epoll.add(&helper, EpollEvent::new(EpollFlags::EPOLLIN, HELPER))?;
        // A container's filter may refuse epoll_wait, on which every thread depends, the timer, or to accept UAPI clients;
        // fails early if so.
        epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::ZERO)?;
        timer.unset()?;
        uapi::probe_accept()?;
        let [uapi_clients, status_clients, psk_clients] =
            wgsep_policy::limits::max_clients(startup.workers);
        Ok(Box::new(Self {
            shared,
            workers: startup.workers,
            device,
            handshakes,
            epoll,
            timer,
            armed: None,
            helper,
            uapi: Server::new(Access::Everything, FIRST_UAPI, uapi_clients),
            psk: Server::new(Access::PresharedKeys, FIRST_PSK, psk_clients),
            status: Status::new(FIRST_STATUS, status_clients),
            interface: startup.interface,
            ports: startup.lowest_port..=startup.highest_port,
            listens_everywhere: startup.listens_everywhere,
            bind_device: startup.bind_device,
            device_had_name: false,
            gso: Arc::new(Gso::new(startup.udp_gso)),
            link: None,
            link_state: LinkState::default(),
            port_retry: PortRetry::default(),
            probe: LinkProbe::new()?,
            source_check: SourceCheck::default(),
            actions: VecDeque::new(),
            put_off: PutOff::new(),
            retiring: Weak::new(),
            awaiting: None,
            awaits_sockets: false,
            predecessor_ends: None,
            listeners: None,
            end: None,
            reporter: Reporter::default(),
            refusals: LineLimit::default(),
            psk_refusals: LineLimit::default(),
            wiped: None,
            wipe_due: None,
            overrun_reported: None,
        }))
    }

    /// The state that the workers share.
    pub(crate) const fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Reports to the helper that the process is locked down, and serves until the daemon exits.
    ///
    /// Its own frame is never wiped, so no function that handles peers or keys may be inlined here. Even the copy of
    /// an absent value may bring a key: the bytes of an `Option` that is `None` are copied too, and hold what was in
    /// their place on the stack when it was made.
    pub(crate) fn run(mut self: Box<Self>, report: wgsep_ipc::SandboxReport) -> End {
        self.request(&Request::LockedDown(report), Awaiting::LockedDown);
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let (more, under_load) = self.catch_up();
            if let Some(end) = self.end {
                return end;
            }
            self.wipe_stacks();
            let timeout = self.timeout(more, under_load);
            let ready = match self.epoll.wait(&mut events, timeout) {
                Ok(ready) => ready,
                Err(nix::Error::EINTR) => 0,
                Err(error) => {
                    tracing::error!("epoll_wait: {error}; {}", wgsep_policy::remedy(error));
                    return End::Failed;
                }
            };
            self.handle(part(&events, 0..ready));
        }
    }

    /// Does the pending work before a wait. Returns whether more is left, and whether the device is under load.
    /// It is never inlined, as [`Self::handle`].
    #[inline(never)]
    fn catch_up(&mut self) -> (bool, bool) {
        let mut more = self.consume_handshakes();
        self.follow_routes();
        let under_load = self.device.is_under_load(clock::instant());
        more |= self.shared.poll_handshakes(under_load);
        more |= self.uapi.is_runnable() || self.psk.is_runnable() || self.can_run_actions();
        (more, under_load)
    }

    /// Handles the events and their consequences. It is never inlined, so that what it leaves on the stack is
    /// below its caller, which wipes it.
    #[inline(never)]
    fn handle(&mut self, events: &[EpollEvent]) {
        for event in events {
            self.dispatch(event);
        }
        self.uapi.handle_timeout(&self.epoll);
        self.psk.handle_timeout(&self.epoll);
        self.handle_status_timeout();
        self.probe_link();
        if self.port_retry.take_due(clock::instant()) {
            self.actions.push_back(Action::OpenPort);
        }
        if self.put_off.take_due(clock::instant()) {
            self.actions.push_back(Action::ConfigureAgain);
        }
        self.take_preshared_keys();
        let mut steps = STEPS_PER_ROUND;
        self.take_operations(&mut steps);
        while self.run_actions(&mut steps) {
            self.take_operations(&mut steps);
        }
        self.flush();
    }

    /// Erases copies of keys from this thread's stack, and from the workers' shortly after a keypair was
    /// released. It is inlined, so that only its caller's frame is above what is wiped.
    #[inline(always)]
    fn wipe_stacks(&mut self) {
        secret::wipe_stack(secret::USUAL_DEPTH);
        if self.device.data_path().index_table.take_keypair_released() && self.wipe_due.is_none() {
            let earliest = self.wiped.map(|at| at.after(WIPE_INTERVAL));
            self.wipe_due = Some(clock::instant().max(earliest.unwrap_or_default()));
        }
        if self.wipe_due.is_some_and(|due| due <= clock::instant()) {
            (self.wipe_due, self.wiped) = (None, Some(clock::instant()));
            self.shared.request_wipes();
            secret::wipe_stack(secret::WHOLE_STACK);
        }
    }

    /// How long to wait for events. It is never inlined, as [`Self::handle`].
    #[inline(never)]
    fn timeout(&self, more: bool, under_load: bool) -> EpollTimeout {
        if more {
            return EpollTimeout::ZERO;
        }
        let interval = match (under_load, self.must_probe()) {
            (true, _) => Some(LOAD_INTERVAL),
            (false, true) => Some(PROBE_INTERVAL),
            (false, false) => None,
        };
        let link = self.link.as_ref().and_then(LinkMonitor::next_timeout);
        let timeouts = [
            link,
            self.source_check.next_timeout(),
            self.uapi.next_timeout(),
            self.psk.next_timeout(),
            self.status.next_timeout(),
            self.wipe_due,
        ];
        let due = timeouts.into_iter().flatten().min();
        let until_due = due.map(|at| {
            // Rounded up: a wait that ends too early would be repeated many times.
            let wait = at.since(clock::instant()).as_micros().div_ceil(1000);
            u16::try_from(wait).unwrap_or(u16::MAX)
        });
        [interval, until_due].into_iter().flatten().min().map_or(EpollTimeout::NONE, Into::into)
    }

    fn dispatch(&mut self, event: &EpollEvent) {
        match event.data() {
            WORKERS => {
                let _count = self.shared.control.read();
                if self.shared.is_device_gone() {
                    tracing::info!("the interface was deleted");
                    self.bye();
                }
                if self.shared.take_sockets_destroyed() {
                    self.actions.push_back(Action::ReopenPort(Useless::Destroyed));
                }
            }
            TIMER => {
                let _expirations = self.timer.wait();
                self.armed = None;
            }
            HELPER => self.receive_from_helper(),
            LINK => self.read_link(),
            FIRST_STATUS.. => self.serve_status(event),
            FIRST_PSK.. => self.psk.handle(event, &self.device, &self.epoll),
            _ => self.uapi.handle(event, &self.device, &self.epoll),
        }
    }

    // ------------------------------------------------------------ the protocol

    /// Consumes handshake messages the workers queued; true if more may be left.
    fn consume_handshakes(&mut self) -> bool {
        for batch in 0..BATCHES_PER_ROUND {
            let queued = self.shared.take_handshakes(&mut self.handshakes);
            if self.handshakes.is_empty() {
                if batch > 0 {
                    self.flush();
                }
                return false;
            }
            self.consume_batch(queued);
            self.wipe_stacks();
        }
        self.flush();
        true
    }

    /// Consumes some of the handshake messages that were taken, while `queued` more wait. It is never inlined,
    /// as [`Self::handle`].
    #[inline(never)]
    fn consume_batch(&mut self, queued: usize) {
        let Self { shared, device, handshakes, .. } = self;
        let (left, at_once) = (handshakes.len(), HANDSHAKES_AT_ONCE.min(handshakes.len()));
        let datagrams = handshakes.range(..at_once).enumerate().map(|(index, message)| {
            let waiting = queued + left - 1 - index;
            let (endpoint, datagram) = (message.endpoint, message.datagram());
            HandshakeDatagram { endpoint, datagram, waiting }
        });
        device.receive_handshakes(datagrams, &**shared, clock::now());
        handshakes.drain(..at_once);
        self.transmit();
    }

    /// Handles some of the peers that are due, and sends and logs what this round caused. More of them are due at
    /// once. It is never inlined, as [`Self::handle`].
    #[inline(never)]
    pub(super) fn flush(&mut self) {
        if self.awaits_sockets {
            return;
        }
        let now = clock::now();
        let mut most = PEERS_PER_ROUND;
        self.device.handle_dirty_peers(&mut most, now);
        self.device.handle_timeout(now);
        self.transmit();
        let device = &mut self.device;
        self.shared.request_send_staged(std::iter::from_fn(|| device.poll_staged()));
        while let Some(event) = self.device.poll_event() {
            self.reporter.report(event, now.instant);
            self.status.observe(&event, &self.device, &self.epoll, now);
        }
        if secret::overflowed() {
            tracing::warn!(
                "secret memory is full: root can read the keys that are set or agreed from now on; \
                 raise RLIMIT_MEMLOCK"
            );
        }
        self.arm_timer();
    }

    /// Sends handshake messages. One that the network refuses is not repeated here: the timers do that.
    fn transmit(&mut self) {
        let shared = Arc::clone(&self.shared);
        let sockets = shared.sockets.reader();
        while let Some(transmit) = self.device.poll_transmit() {
            let HandshakeTransmit { endpoint, traffic_class, datagram, .. } = &transmit;
            if let Some(link) = &mut self.link
                && self.source_check.ask_for(endpoint, &self.device, link)
            {
                // The kernel answers before the call returns.
                self.read_link();
            }
            match sockets.value().send_from_cached_source(endpoint, *traffic_class, datagram, None)
            {
                Ok(SourceOutcome::Kept) => {}
                Ok(SourceOutcome::Refused) => self.device.source_failed(&transmit),
                Err(error) => {
                    self.shared.drops().add(udp::cause_of(&error), 1);
                    let has_scope =
                        matches!(endpoint.destination, SocketAddr::V6(to) if to.scope_id() != 0);
                    let device_is_gone = error.raw_os_error() == Some(nix::libc::ENODEV)
                        && !self.bind_device.is_empty();
                    if device_is_gone && !has_scope {
                        self.reopen_on_device();
                    }
                    // The helper has replaced these sockets, and the descriptors of the new ones are on their
                    // way.
                    let is_replaced = error.kind() == ErrorKind::BrokenPipe;
                    // Without any, the line about the port has said why.
                    let is_closed = self.lacks_port();
                    let peer = transmit.peer.filter(|_| !is_replaced && !is_closed);
                    if let Some(peer) = peer.and_then(|id| self.device.public_key(id)) {
                        let to = endpoint.destination;
                        let mark = self.device.fwmark();
                        let mut missing = self.source_check.missing();
                        let missing = missing.find(|one| one.is_ipv4() == to.is_ipv4());
                        let of = Unsent { peer, to, mark, missing };
                        self.reporter.unsent(&of, &error, clock::instant());
                        self.status.unsent(peer, to, &self.epoll);
                    }
                    self.device.transmit_failed(transmit.peer, transmit.datagram.len());
                }
            }
        }
    }

    fn arm_timer(&mut self) {
        let timeouts = [
            self.device.next_timeout(),
            self.port_retry.next_timeout(),
            self.put_off.next_timeout(),
        ];
        let due = timeouts.into_iter().flatten().min();
        if due == self.armed {
            return;
        }
        self.armed = due;
        // An absolute time of 0 disarms the timer, with the only flags that the filter allows.
        let nanoseconds =
            due.map_or(0, |at| i64::try_from(at.as_nanos()).unwrap_or(i64::MAX).max(1));
        let expiration = Expiration::OneShot(TimeSpec::nanoseconds(nanoseconds));
        let set = self.timer.set(expiration, TimerSetTimeFlags::TFD_TIMER_ABSTIME);
        if let Err(error) = set {
            tracing::error!("timerfd_settime: {error}; {}", wgsep_policy::remedy(error));
            self.end = Some(End::Failed);
        }
    }

    // ------------------------------------------------------------ the interface

    fn read_link(&mut self) {
        let link = present(self.link.as_mut(), "the event is of its socket");
        let Some(link) = link else { return };
        let now = clock::instant();
        let changes = link.read(now);
        if changes.overrun {
            self.report_overrun(now);
        }
        for answer in changes.answers {
            self.source_check.answered(&self.device, answer, now);
        }
        if changes.drained {
            self.source_check.start_over();
        }
        self.source_check.routes_changed(changes.routes, now);
        self.follow_device(now);
        if changes.route_mtus
            && let Some(link) = &self.link
        {
            let mtus = link.route_mtus();
            self.device.data_path().set_route_mtus(mtus.by_prefix(), !mtus.is_empty());
        }
        if changes.paths {
            self.gso.forget_paths();
        }
        let Some(state) = changes.link else { return };
        if state.mtu != self.link_state.mtu {
            self.device.data_path().set_mtu(state.mtu);
            tracing::debug!("MTU is {}", state.mtu);
            if state.mtu as usize > LONGEST_PACKET {
                tracing::warn!(
                    "MTU is {}: packets of more than {} bytes are padded to more than an IPv4 datagram can carry, and are dropped; ip link set dev {} mtu {LONGEST_PACKET}",
                    state.mtu,
                    LONGEST_PACKET - LONGEST_PACKET % 16,
                    self.interface
                );
            }
        }
        // Down and up again between two reads counts as both.
        if self.link_state.up && (changes.was_down || !state.up) {
            push_link_action(&mut self.actions, Action::LinkDown);
        }
        if state.up && (changes.was_down || !self.link_state.up) {
            push_link_action(&mut self.actions, Action::LinkUp);
        }
        self.link_state = state;
    }

    /// Has the port opened anew if the interface that the sockets are bound to is gone, or if another one has its name.
    fn follow_device(&mut self, now: Instant) {
        if self.bind_device.is_empty() {
            return;
        }
        let Some(link) = &self.link else { return };
        let is_there = link.has_link_named(&self.bind_device);
        if self.lacks_port() {
            if is_there && self.port_retry.errno() == nix::libc::ENODEV {
                self.port_retry.hasten(now);
            }
            return;
        }
        let sockets = self.shared.sockets.reader();
        let Some(socket) = sockets.value().bound().first() else { return };
        // The kernel binds to the interface, whatever its name becomes.
        match getsockopt(&socket.socket, sockopt::BindToDevice) {
            Ok(name) if name == *self.bind_device => self.device_had_name = true,
            Ok(_) if is_there => self.reopen_on_device(),
            Ok(name) => self.report_renamed(&name),
            Err(nix::Error::ENODEV) => self.reopen_on_device(),
            Err(_) => {}
        }
    }

    /// Whether the interface that a socket is bound to has the name in --bind-device.
    fn is_named_as_bound(&self, socket: &OwnedFd) -> bool {
        getsockopt(socket, sockopt::BindToDevice).is_ok_and(|name| name == *self.bind_device)
    }

    /// Logs that the interface of the sockets has another name now. One that it never had may be an alternative name.
    fn report_renamed(&mut self, name: &OsStr) {
        if core::mem::take(&mut self.device_had_name) {
            let (before, now) = (&self.bind_device, name.display());
            tracing::warn!(
                "the interface of --bind-device, {before}, is named {now} now; the UDP sockets stay there until another one is named {before}"
            );
        }
    }

    fn reopen_on_device(&mut self) {
        let reopen = Action::ReopenPort(Useless::OtherDevice);
        let is_under_way =
            self.actions.iter().any(|action| matches!(action, Action::ReopenPort(_)));
        if !is_under_way {
            self.actions.push_back(reopen);
        }
    }

    /// Logs a loss of messages, at most once an hour.
    fn report_overrun(&mut self, now: Instant) {
        if self.overrun_reported.is_some_and(|at| now.since(at) < OVERRUN_REPORT_INTERVAL) {
            return;
        }
        self.overrun_reported = Some(now);
        tracing::warn!(
            "netlink messages were lost: links and routes changed faster than they could be read; reading all of them again"
        );
    }

    fn must_probe(&self) -> bool {
        self.link.as_ref().is_some_and(LinkMonitor::is_unmonitored)
    }

    /// Polls whether the interface is up, if it is unmonitored or if a UAPI client is waiting while messages
    /// about the interface are queued or were lost: the answer must describe its present state.
    fn probe_link(&mut self) {
        let is_stale = self.link.as_ref().is_some_and(|link| !link.is_up_to_date());
        let must_look = self.must_probe() || (is_stale && self.uapi.has_runnable());
        if !must_look {
            return;
        }
        let up = self.probe.is_up();
        if up != self.link_state.up {
            push_link_action(&mut self.actions, if up { Action::LinkUp } else { Action::LinkDown });
            self.link_state.up = up;
        }
    }

    /// Requests dumps that failed before, and checks some of the cached source addresses that may be out of date.
    fn follow_routes(&mut self) {
        let Some(link) = &mut self.link else { return };
        let now = clock::instant();
        link.request_dumps(now);
        self.source_check.check(&self.device, link, now);
    }

    // ------------------------------------------------------------ UAPI

    /// Takes complete transactions, each of which takes one of `steps` or, if it has many peers, more.
    fn take_operations(&mut self, steps: &mut usize) {
        loop {
            let Self { uapi, link, epoll, .. } = self;
            let Some((client, operation)) =
                uapi.next_operation(&Scopes(link.as_ref()), epoll, steps)
            else {
                return;
            };
            match operation {
                Operation::Get if self.link_is_changing() => {
                    self.actions.push_back(Action::Get(client));
                }
                Operation::Get => self.get(client),
                Operation::Statistics => self.get_statistics(client),
                Operation::Set(configuration) => {
                    count_peers(steps, configuration.peers.len());
                    self.actions.push_back(Action::Configure(client, Box::new(configuration)));
                }
            }
        }
    }

    /// True while the link goes up or down; a `get` then waits, so that it shows the result.
    fn link_is_changing(&self) -> bool {
        matches!(self.awaiting, Some(Awaiting::LinkUp | Awaiting::LinkDown))
            || self.actions.iter().any(|action| matches!(action, Action::LinkUp | Action::LinkDown))
    }

    pub(super) fn get(&mut self, client: ClientId) {
        let Self { uapi, device, epoll, .. } = self;
        uapi.reply_get(client, device, self.shared.drops(), epoll);
    }

    fn get_statistics(&mut self, client: ClientId) {
        let counters = in_ordinary_memory(|| self.reported().counters());
        self.uapi.reply_statistics(client, &counters, &self.epoll);
    }
}

/// Subtracts the steps that the peers of a `set` take; as many as there are for one that is longer than a
/// round.
const fn count_peers(steps: &mut usize, peers: usize) {
    *steps = steps.saturating_sub(peers / PEERS_PER_STEP);
}

/// Queues that the link went up or down. Down, up and down again before the first is executed is merged to
/// down, so that a flapping link does not make the queue grow.
fn push_link_action(actions: &mut VecDeque<Action>, action: Action) {
    let before_last = actions.len().checked_sub(2).and_then(|index| actions.get(index));
    match (before_last, actions.back(), &action) {
        (Some(Action::LinkDown), Some(Action::LinkUp), Action::LinkDown) => {
            actions.pop_back();
        }
        _ => actions.push_back(action),
    }
}

impl JobRunner for Shared {
    fn run(&self, jobs: Vec<CryptoJob>) -> Vec<CryptoJob> {
        self.crypto.run(&self.leader, jobs)
    }
}

/// Interface names and indices, from the link monitor.
struct Scopes<'a>(Option<&'a LinkMonitor>);

impl crate::uapi::Scopes for Scopes<'_> {
    fn index_of(&self, name: &str) -> Option<u32> {
        self.0.and_then(|link| link.index_of(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_of_many_peers_takes_the_rest_of_the_round() {
        for (peers, left) in [(0, 16), (255, 16), (512, 14), (20_000, 0)] {
            let mut steps = STEPS_PER_ROUND;
            count_peers(&mut steps, peers);
            assert_eq!(steps, left, "{peers} peers");
        }
    }

    #[test]
    fn a_link_that_flaps_does_not_make_the_queue_grow() {
        let mut actions = VecDeque::new();
        for _ in 0..1000 {
            push_link_action(&mut actions, Action::LinkUp);
            push_link_action(&mut actions, Action::LinkDown);
        }
        assert!(matches!(actions.make_contiguous(), [Action::LinkUp, Action::LinkDown]));
        push_link_action(&mut actions, Action::LinkUp);
        assert!(matches!(
            actions.make_contiguous(),
            [Action::LinkUp, Action::LinkDown, Action::LinkUp]
        ));
    }
}
