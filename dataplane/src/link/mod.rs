//! The network interface as rtnetlink reports it: up or down, its MTU, and the names of the other interfaces.
//!
//! The helper opened the socket and subscribed it to link, route, rule and nexthop changes. This module
//! reads it, and requests dumps at the start and whenever messages were lost. Sources:
//! rtnetlink(7), linux/rtnetlink.h, linux/if_link.h, net/netlink/af_netlink.c.

mod dumps;
pub(crate) mod netlink;
pub(crate) mod routes;

use dumps::{Dumps, Outcome, Table};
use netlink::{NetlinkMessage, attribute, number, split_message, word};
use nix::libc;
use routes::{Query, RouteChanges, RouteMtus};
use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use wgsep_proto::Instant;
use wgsep_proto::invariant::part;

/// Length of struct ifinfomsg.
const IFINFO_LEN: usize = 16;
/// Length of struct fib_rule_hdr.
const RULE_LEN: usize = 12;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_GETRULE: u16 = 34;
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;
const NLMSG_ERROR: u16 = libc::NLMSG_ERROR as u16;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_NEW_NETNSID: u16 = 45;
const IFLA_NEW_IFINDEX: u16 = 49;
const FRA_UID_RANGE: u16 = 20;
/// The flags of a link that decide whether its routes are in use.
const ROUTING_FLAGS: i32 = libc::IFF_UP | libc::IFF_RUNNING | libc::IFF_LOWER_UP;
/// Most datagrams that are read before other events are handled, which takes a fraction of a millisecond.
/// Outside dumps each contains one message.
const DATAGRAMS_PER_ROUND: usize = 128;
/// Most bytes that are read before other events are handled.
const BYTES_PER_ROUND: usize = 256 * 1024;

/// A network namespace as seen from the socket's own, which is `None`.
pub(crate) type Namespace = Option<i32>;

/// The location of our interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Location {
    /// A namespace, and its index there.
    At(Namespace, u32),
    /// It left a namespace and has not been seen since: either that namespace and the socket's own have
    /// different numbers for the new one, or the socket receives no messages about the new one. It is
    /// recognised when an interface with this index and its name appears anywhere.
    Moving(u32),
}

/// The last reported state of our interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkState {
    /// IFF_UP.
    pub(crate) up: bool,
    /// In bytes.
    pub(crate) mtu: u32,
}

/// An interface of the socket's own namespace.
struct Link {
    name: String,
    /// Its flags and its master, as far as routes depend on them.
    routing: (u32, u32),
    /// The number of the last dump of all links that it was part of.
    refresh: u32,
}

/// The answer to a [`Query`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The datagram leaves by this interface, from this address where the kernel chooses it; or it is for this machine.
    Route { interface: u32, source: Option<IpAddr>, is_local: bool },
    /// This interface has the address.
    Address { interface: u32 },
    /// The datagram is not sent at all, or there is no such address; with the errno.
    Refused(i32),
}

/// The changes that a batch of messages reported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// The interface's new state, if it was reported.
    pub(crate) link: Option<LinkState>,
    /// It was down at some time, even if it is up again.
    pub(crate) was_down: bool,
    /// Routes, rules, links or addresses changed: datagrams may leave by another interface now, or from
    /// another address.
    pub(crate) routes: RouteChanges,
    /// A route, a rule or a link changed where the sockets are: a path may take longer segments now.
    pub(crate) paths: bool,
    /// Some route to our interface has another MTU now.
    pub(crate) route_mtus: bool,
    /// Answers to queries, with their sequence numbers, in the order of the queries.
    pub(crate) answers: Vec<(u32, Answer)>,
    /// Messages were lost.
    pub(crate) overrun: bool,
    /// No message is left to be read. A query without an answer will not be answered.
    pub(crate) drained: bool,
}

impl Changes {
    /// Adds a route that was added, replaced or removed.
    fn add_route(&mut self, message: &NetlinkMessage<'_>) {
        self.routes.add_route(message.kind, message.body);
        self.paths = true;
    }

    /// Any datagram may leave by another interface now, and any path may take longer segments.
    fn add_all_routes(&mut self) {
        self.routes.merge(RouteChanges::all());
        self.paths = true;
    }
}

/// The netlink socket, and the state that its messages reported.
pub(crate) struct LinkMonitor {
    socket: OwnedFd,
    location: Location,
    /// The interface may have changed state or moved unreported: messages about another namespace were
    /// lost, and only the socket's own can be dumped.
    uncertain: bool,
    name: String,
    links: HashMap<u32, Link>,
    /// The number of the last dump of all links.
    refresh: u32,
    /// Number of rules that select by the user of a datagram's socket, and how many of them the present dump
    /// has listed.
    uid_rules: (usize, usize),
    /// The socket receives messages about the interface in every namespace with a number.
    follows_moves: bool,
    route_mtus: RouteMtus,
    dumps: Dumps,
    /// Messages were lost. The kernel drops further ones until nothing is left to be read.
    overrun: bool,
    /// The last round read all messages.
    drained: bool,
    /// Number of the last request.
    sequence: u32,
    /// The socket's own address, as its first dump has it.
    port: Option<u32>,
    buffer: Vec<u8>,
}

impl LinkMonitor {
    /// Monitors the interface `name` of index `ifindex`, in the socket's own network namespace or one with a
    /// number there, and requests dumps of the present state.
    pub(crate) fn new(
        socket: OwnedFd,
        (namespace, ifindex): (Namespace, u32),
        follows_moves: bool,
        name: &str,
        now: Instant,
    ) -> Self {
        let mut monitor = Self {
            socket,
            location: Location::At(namespace, ifindex),
            // It may have been changed before the socket was subscribed.
            uncertain: namespace.is_some(),
            name: name.to_owned(),
            links: HashMap::new(),
            refresh: 0,
            uid_rules: (0, 0),
            follows_moves,
            route_mtus: RouteMtus::default(),
            dumps: Dumps::default(),
            overrun: false,
            drained: false,
            sequence: 0,
            port: None,
            buffer: vec![0; 64 * 1024],
        };
        monitor.dumps.require_all();
        monitor.request_dumps(now);
        monitor
    }

    /// Sends to the kernel, the default destination of a netlink socket. The helper made it non-blocking.
    fn send(&self, request: &[u8]) -> nix::Result<()> {
        nix::unistd::write(&self.socket, request).map(drop)
    }

    /// Reads a bounded number of messages. If more are left, the socket stays readable.
    pub(crate) fn read(&mut self, now: Instant) -> Changes {
        let mut changes = Changes::default();
        let mut buffer = core::mem::take(&mut self.buffer);
        self.drained = false;
        let mut read = 0;
        for _ in 0..DATAGRAMS_PER_ROUND {
            if read >= BYTES_PER_ROUND {
                break;
            }
            match crate::sys::receive_netlink(self.socket.as_fd(), &mut buffer) {
                Ok((len, namespace)) => {
                    read += len;
                    self.parse(part(&buffer, 0..len), namespace, now, &mut changes);
                }
                Err(nix::Error::ENOBUFS) => self.lost_messages(&mut changes),
                Err(nix::Error::EINTR) => {}
                Err(_) => {
                    self.read_everything(now, &mut changes);
                    break;
                }
            }
        }
        self.buffer = buffer;
        self.request_dumps(now);
        changes
    }

    /// Handles a full receive buffer: requires a dump of the links at once, as they matter most, and of the
    /// rest when the burst is over.
    fn lost_messages(&mut self, changes: &mut Changes) {
        self.overrun = true;
        self.dumps.require(Table::Links);
        self.uncertain |= matches!(self.location, Location::At(Some(_), _));
        changes.overrun = true;
        changes.add_all_routes();
    }

    /// Handles that no message is left to be read, so that the kernel stops dropping messages.
    fn read_everything(&mut self, now: Instant, changes: &mut Changes) {
        self.drained = true;
        changes.drained = true;
        self.dumps.drained(now);
        if core::mem::take(&mut self.overrun) {
            self.dumps.require_all_after_loss(now);
            changes.add_all_routes();
        }
    }

    /// Requests the next dump, if one is due.
    pub(crate) fn request_dumps(&mut self, now: Instant) {
        let sequence = self.next_sequence();
        while let Some(table) = self.dumps.start_next(sequence, now) {
            let request = match (table, self.location) {
                (Table::Links, _) => {
                    self.refresh = self.refresh.wrapping_add(1);
                    netlink::message(
                        libc::RTM_GETLINK,
                        netlink::DUMP,
                        sequence,
                        &[0; IFINFO_LEN],
                        &[],
                    )
                }
                (Table::Rules, _) => {
                    self.uid_rules.1 = 0;
                    let mut fixed = [0; RULE_LEN];
                    fixed[0] = libc::AF_INET as u8;
                    netlink::message(RTM_GETRULE, netlink::DUMP, sequence, &fixed, &[])
                }
                (Table::Routes(family), Location::At(None, interface)) => {
                    self.route_mtus.begin_refresh();
                    routes::dump_request(sequence, family, interface)
                }
                (Table::Routes(_), _) => {
                    // Only the socket's own namespace can be dumped without a capability.
                    self.dumps.skip();
                    continue;
                }
            };
            if self.send(&request).is_err() {
                self.dumps.drained(now);
            }
        }
    }

    /// When [`Self::request_dumps`] is due.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.dumps.next_timeout()
    }

    /// False while the interface may be in another state than last reported, because messages are queued or
    /// were lost.
    pub(crate) fn is_up_to_date(&self) -> bool {
        self.drained && !self.overrun && !self.dumps.is_pending(Table::Links)
    }

    /// True if the interface may be in a namespace from which the socket receives no messages, which is any
    /// without a number in the socket's own, or if such messages were lost.
    pub(crate) const fn is_unmonitored(&self) -> bool {
        match self.location {
            Location::At(None, _) => false,
            Location::At(Some(_), _) => !self.follows_moves || self.uncertain,
            Location::Moving(_) => true,
        }
    }

    /// Sends queries to the kernel. [`Self::read`] returns the answers, with sequence numbers from the returned
    /// one on.
    ///
    /// # Errors
    /// As write(2).
    pub(crate) fn ask(&mut self, queries: impl IntoIterator<Item = Query>) -> nix::Result<u32> {
        let mut requests = Vec::new();
        let first = self.sequence.wrapping_add(1);
        for query in queries {
            let sequence = self.next_sequence();
            requests.extend(routes::question(sequence, &query));
        }
        self.send(&requests).map(|()| first)
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// True if some rule selects by the user of a datagram's socket, which no query can specify.
    pub(crate) const fn has_uid_rules(&self) -> bool {
        self.uid_rules.0 > 0
    }

    /// The MTUs of routes to our interface.
    pub(crate) const fn route_mtus(&self) -> &RouteMtus {
        &self.route_mtus
    }

    fn parse(
        &mut self,
        mut bytes: &[u8],
        namespace: Namespace,
        now: Instant,
        changes: &mut Changes,
    ) {
        while let Some((message, rest)) = split_message(bytes) {
            bytes = rest;
            if self.port.is_none() && is_part_of_dump(&message) {
                self.port = Some(message.port).filter(|port| *port != 0);
            }
            match self.dumps.receive(&message, now) {
                Some(Outcome::Complete(table)) => self.dumped(table, changes),
                Some(Outcome::Failed) => {}
                None => self.receive(&message, namespace, changes),
            }
        }
    }

    fn receive(
        &mut self,
        message: &NetlinkMessage<'_>,
        namespace: Namespace,
        changes: &mut Changes,
    ) {
        match message.kind {
            NLMSG_ERROR => {
                let refused = Answer::Refused(netlink::errno(message.body));
                changes.answers.push((message.sequence, refused));
            }
            // The socket is not subscribed to changes of addresses: this is an answer.
            libc::RTM_NEWADDR => {
                let interface = word(message.body, 4).unwrap_or(0);
                changes.answers.push((message.sequence, Answer::Address { interface }));
            }
            libc::RTM_NEWLINK => self.link_changed(message.body, namespace, changes),
            libc::RTM_DELLINK => self.link_left(message.body, namespace, changes),
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE => {
                self.route_changed(message, namespace, changes);
            }
            // Like routes, rules and nexthops count only in the namespace of the sockets.
            RTM_NEWRULE | RTM_DELRULE if namespace.is_none() => {
                self.rule_changed(message, changes);
            }
            // The routes of a removed nexthop are removed without a message.
            RTM_NEWNEXTHOP | RTM_DELNEXTHOP if namespace.is_none() => {
                changes.add_all_routes();
            }
            _ => {}
        }
    }

    /// Handles a complete dump: removes the entries that it did not list.
    fn dumped(&mut self, table: Table, changes: &mut Changes) {
        match table {
            Table::Links => {
                self.links.retain(|_, link| link.refresh == self.refresh);
                if let Location::At(None, ifindex) = self.location
                    && !self.links.contains_key(&ifindex)
                {
                    // It was moved, and the message about that was lost.
                    self.location = Location::Moving(ifindex);
                    changes.route_mtus |= self.route_mtus.clear();
                }
            }
            Table::Rules => self.uid_rules.0 = self.uid_rules.1,
            Table::Routes(family) => changes.route_mtus |= self.route_mtus.end_refresh(family),
        }
    }

    fn route_changed(
        &mut self,
        message: &NetlinkMessage<'_>,
        namespace: Namespace,
        changes: &mut Changes,
    ) {
        let is_listed = is_part_of_dump(message);
        let is_ours = self.port == Some(message.port) && !is_listed;
        if is_ours || routes::is_cloned(message.body) {
            // A dump also lists cached routes to single destinations. A route without an interface prohibits.
            if !is_listed {
                let refused = Answer::Refused(libc::ENETUNREACH);
                let answer = routes::answer(message.body).unwrap_or(refused);
                changes.answers.push((message.sequence, answer));
            }
            return;
        }
        if namespace.is_none() && !is_listed {
            changes.add_route(message);
        }
        if let Location::At(ours, interface) = self.location
            && ours == namespace
        {
            changes.route_mtus |= self.route_mtus.changed(message.kind, message.body, interface);
        }
    }

    fn rule_changed(&mut self, message: &NetlinkMessage<'_>, changes: &mut Changes) {
        if !is_part_of_dump(message) {
            changes.add_all_routes();
        }
        let attributes = message.body.get(RULE_LEN..).unwrap_or_default();
        if attribute(attributes, FRA_UID_RANGE).is_none() {
            return;
        }
        if message.kind == RTM_DELRULE {
            self.dumps.require(Table::Rules);
        } else {
            let (known, listed) = &mut self.uid_rules;
            *listed += 1;
            *known += usize::from(!is_part_of_dump(message));
        }
    }

    fn link_changed(&mut self, body: &[u8], namespace: Namespace, changes: &mut Changes) {
        let (Some(ifindex), Some(flags)) = (word(body, 4), word(body, 8)) else { return };
        let attributes = body.get(IFINFO_LEN..).unwrap_or_default();
        let name = attribute(attributes, IFLA_IFNAME).unwrap_or_default();
        let name = String::from_utf8_lossy(name.strip_suffix(&[0]).unwrap_or(name));
        if self.is_found(ifindex, &name, namespace) {
            self.location = Location::At(namespace, ifindex);
            self.dumps.require(Table::Routes(libc::AF_INET));
            self.dumps.require(Table::Routes(libc::AF_INET6));
        }
        if self.location == Location::At(namespace, ifindex) {
            let mtu = number(attributes, IFLA_MTU).unwrap_or(0);
            let up = flags & libc::IFF_UP as u32 != 0;
            changes.link = Some(LinkState { up, mtu });
            changes.was_down |= !up;
            changes.route_mtus |= !up && self.route_mtus.clear();
            name.as_ref().clone_into(&mut self.name);
            self.uncertain = false;
        }
        if namespace.is_none() {
            changes.paths = true;
            let master = number(attributes, IFLA_MASTER).unwrap_or(0);
            let routing = (flags & ROUTING_FLAGS as u32, master);
            let link = Link { name: name.into_owned(), routing, refresh: self.refresh };
            let before = self.links.insert(ifindex, link);
            // The kernel does not report the IPv4 routes that are removed or restored with a link.
            if before.is_none_or(|before| before.routing != routing) {
                changes.add_all_routes();
            }
        }
    }

    /// True if this is our interface, whose location was unknown.
    fn is_found(&self, ifindex: u32, name: &str, namespace: Namespace) -> bool {
        let returned = || namespace.is_none() && !self.links.contains_key(&ifindex);
        let is_expected = match self.location {
            Location::At(None, _) => false,
            Location::At(Some(_), index) => index == ifindex && self.uncertain && returned(),
            Location::Moving(index) => index == ifindex,
        };
        is_expected && name == self.name
    }

    /// An interface was deleted, or moved to another namespace; ours is followed there.
    fn link_left(&mut self, body: &[u8], namespace: Namespace, changes: &mut Changes) {
        let Some(ifindex) = word(body, 4) else { return };
        if namespace.is_none() {
            self.links.remove(&ifindex);
            changes.add_all_routes();
        }
        if self.location != Location::At(namespace, ifindex) {
            return;
        }
        changes.route_mtus |= self.route_mtus.clear();
        let attributes = body.get(IFINFO_LEN..).unwrap_or_default();
        let Some(new_namespace) = number(attributes, IFLA_NEW_NETNSID) else { return };
        let new_ifindex = number(attributes, IFLA_NEW_IFINDEX).unwrap_or(ifindex);
        self.location = match namespace {
            None if self.follows_moves => {
                Location::At(Some(new_namespace.cast_signed()), new_ifindex)
            }
            _ => Location::Moving(new_ifindex),
        };
    }

    /// Whether an interface of this name exists, as far as is known.
    pub(crate) fn has_link_named(&self, name: &str) -> bool {
        self.links.values().any(|link| link.name == name)
    }

    /// The index of an interface of this name or number.
    pub(crate) fn index_of(&self, name: &str) -> Option<u32> {
        let named = self.links.iter().find(|(_, link)| link.name == name);
        // Digits alone: `parse` would also take a sign.
        let number = || name.bytes().all(|byte| byte.is_ascii_digit()).then(|| name.parse().ok());
        named.map(|(index, _)| *index).or_else(|| number().flatten())
    }
}

/// Whether a message lists what exists, and is no change.
const fn is_part_of_dump(message: &NetlinkMessage<'_>) -> bool {
    message.flags & libc::NLM_F_MULTI as u16 != 0
}

impl AsFd for LinkMonitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::routes::PrefixSet;
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
    use std::os::fd::AsRawFd;

    const NOW: Instant = Instant::from_nanos(1);
    const UP: u32 = libc::IFF_UP as u32;

    /// A monitor of an interface in a namespace, and the kernel's end of its socket.
    fn connected(namespace: Namespace) -> (LinkMonitor, OwnedFd) {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let (ours, kernels) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        (LinkMonitor::new(ours, (namespace, 7), true, "wg0", NOW), kernels)
    }

    /// A monitor that has read of its interface, which is down, and of nothing else.
    fn monitor() -> LinkMonitor {
        let (mut monitor, _kernels) = connected(None);
        monitor.dumps = Dumps::default();
        monitor.parse(&link_message(libc::RTM_NEWLINK, 7, 0), None, NOW, &mut Changes::default());
        monitor
    }

    /// The changes that messages bring.
    fn changes_by(monitor: &mut LinkMonitor, namespace: Namespace, bytes: &[u8]) -> Changes {
        let mut changes = Changes::default();
        monitor.parse(bytes, namespace, NOW, &mut changes);
        changes
    }

    fn link_message(kind: u16, ifindex: u32, flags: u32) -> Vec<u8> {
        moving_message(kind, ifindex, flags, &[])
    }

    fn moving_message(kind: u16, ifindex: u32, flags: u32, more: &[(u16, u32)]) -> Vec<u8> {
        let mut body = vec![0; IFINFO_LEN];
        body[4..8].copy_from_slice(&ifindex.to_ne_bytes());
        body[8..12].copy_from_slice(&flags.to_ne_bytes());
        for (kind, value) in
            [(IFLA_IFNAME, b"wg0\0\0\0\0\0".as_slice()), (IFLA_MTU, &1420u32.to_ne_bytes())]
        {
            let len = if kind == IFLA_IFNAME { 4 } else { value.len() };
            body.extend_from_slice(&((len + 4) as u16).to_ne_bytes());
            body.extend_from_slice(&kind.to_ne_bytes());
            body.extend_from_slice(&value[..len]);
        }
        for (kind, value) in more {
            body.extend_from_slice(&8u16.to_ne_bytes());
            body.extend_from_slice(&kind.to_ne_bytes());
            body.extend_from_slice(&value.to_ne_bytes());
        }
        netlink::message(kind, 0, 0, &body, &[])
    }

    /// The kernel's end of a monitor's socket, which answers requests for dumps.
    struct Kernel {
        socket: OwnedFd,
        /// The kinds of the requests so far.
        requests: Vec<u16>,
    }

    impl Kernel {
        /// Answers the next request, if there is one, with those of these messages that it asks for, and
        /// the end of the dump.
        fn answer(&mut self, messages: &[u8], end_flags: i32) -> bool {
            let mut request = [0; 64];
            let flags = MsgFlags::MSG_DONTWAIT;
            let Ok(len) = recv(self.socket.as_raw_fd(), &mut request, flags) else { return false };
            let (request, _) = split_message(&request[..len]).unwrap();
            self.requests.push(request.kind);
            let mut answer = Vec::new();
            let mut rest = messages;
            while let Some((message, left)) = split_message(rest) {
                let (kind, flags) = (message.kind, libc::NLM_F_MULTI as u16);
                // RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, and so on.
                if kind + 2 == request.kind {
                    let sequence = request.sequence;
                    answer.extend(netlink::message(kind, flags, sequence, message.body, &[]));
                }
                rest = left;
            }
            let flags = (libc::NLM_F_MULTI | end_flags) as u16;
            let done = libc::NLMSG_DONE as u16;
            answer.extend(netlink::message(done, flags, request.sequence, &[0; 4], &[]));
            send(self.socket.as_raw_fd(), &answer, MsgFlags::empty()).unwrap();
            true
        }
    }

    /// Answers dumps with these messages until the monitor requests none; what that brought.
    fn dump(monitor: &mut LinkMonitor, kernel: &mut Kernel, messages: &[u8]) -> Vec<Changes> {
        let (mut changes, mut now) = (Vec::new(), NOW);
        loop {
            now = now.max(monitor.next_timeout().unwrap_or(now));
            monitor.request_dumps(now);
            if !kernel.answer(messages, 0) {
                return changes;
            }
            changes.push(monitor.read(now));
        }
    }

    fn started(namespace: Namespace, links: &[u8]) -> (LinkMonitor, Kernel, Vec<Changes>) {
        let (mut monitor, socket) = connected(namespace);
        let mut kernel = Kernel { socket, requests: Vec::new() };
        let changes = dump(&mut monitor, &mut kernel, links);
        (monitor, kernel, changes)
    }

    fn lose_messages(monitor: &mut LinkMonitor) -> Changes {
        let mut changes = Changes::default();
        monitor.lost_messages(&mut changes);
        changes
    }

    #[test]
    fn at_the_start_everything_that_exists_is_read() {
        let (monitor, kernel, changes) = started(None, &link_message(libc::RTM_NEWLINK, 7, UP));
        let all = [libc::RTM_GETLINK, RTM_GETRULE, libc::RTM_GETROUTE, libc::RTM_GETROUTE];
        assert_eq!(kernel.requests, all);
        assert_eq!(changes[0].link, Some(LinkState { up: true, mtu: 1420 }));
        assert!(monitor.is_up_to_date() && !monitor.is_unmonitored());
    }

    #[test]
    fn after_a_loss_the_links_are_read_at_once_and_everything_when_nothing_waits() {
        let (mut monitor, mut kernel, _) = started(None, &link_message(libc::RTM_NEWLINK, 7, 0));
        kernel.requests.clear();
        let changes = lose_messages(&mut monitor);
        assert!(changes.overrun && changes.routes.v4 == PrefixSet::All);
        assert!(!monitor.is_up_to_date());
        let link = link_message(libc::RTM_NEWLINK, 7, UP);
        let changes = dump(&mut monitor, &mut kernel, &link);
        assert_eq!(changes[0].link, Some(LinkState { up: true, mtu: 1420 }));
        let (at_once, rest) = kernel.requests.split_at(1);
        assert_eq!(at_once, [libc::RTM_GETLINK]);
        let all = [libc::RTM_GETLINK, RTM_GETRULE, libc::RTM_GETROUTE, libc::RTM_GETROUTE];
        assert_eq!(rest, all);
    }

    #[test]
    fn a_loss_during_a_dump_is_followed_by_another() {
        let (mut monitor, mut kernel, _) = started(None, &link_message(libc::RTM_NEWLINK, 7, 0));
        lose_messages(&mut monitor);
        monitor.request_dumps(NOW);
        kernel.requests.clear();
        lose_messages(&mut monitor);
        dump(&mut monitor, &mut kernel, &link_message(libc::RTM_NEWLINK, 7, UP));
        let links = kernel.requests.iter().filter(|kind| **kind == libc::RTM_GETLINK).count();
        assert!(links >= 2, "{:?}", kernel.requests);
    }

    #[test]
    fn a_dump_that_was_interrupted_is_requested_again_later() {
        let (mut monitor, mut kernel, _) = started(None, &link_message(libc::RTM_NEWLINK, 7, UP));
        monitor.dumps.require(Table::Links);
        monitor.request_dumps(NOW);
        assert!(kernel.answer(&[], libc::NLM_F_DUMP_INTR));
        monitor.read(NOW);
        assert!(!monitor.is_unmonitored(), "an interrupted dump does not have everything");
        assert!(!kernel.answer(&[], 0), "it is not requested at once");
        let later = monitor.next_timeout().unwrap();
        monitor.request_dumps(later);
        assert!(kernel.answer(&link_message(libc::RTM_NEWLINK, 7, UP), 0));
    }

    #[test]
    fn what_was_renamed_deleted_or_moved_unreported_is_detected_by_the_next_dump() {
        let mut links = link_message(libc::RTM_NEWLINK, 7, UP);
        links.extend(link_message(libc::RTM_NEWLINK, 8, UP));
        let (mut monitor, mut kernel, _) = started(None, &links);
        assert!(monitor.links.contains_key(&8));
        lose_messages(&mut monitor);
        dump(&mut monitor, &mut kernel, &link_message(libc::RTM_NEWLINK, 9, UP));
        assert!(!monitor.links.contains_key(&8));
        assert_eq!(monitor.links[&9].name, "wg0");
        assert!(monitor.is_unmonitored(), "ours is not there");
        changes_by(&mut monitor, Some(3), &link_message(libc::RTM_NEWLINK, 7, UP));
        assert!(!monitor.is_unmonitored(), "it has appeared elsewhere");
    }

    #[test]
    fn what_was_lost_of_another_namespace_is_uncertain_until_the_interface_is_reported_again() {
        let (mut monitor, mut kernel, _) = started(Some(3), &[]);
        assert!(monitor.is_unmonitored(), "nothing was reported of it yet");
        let link = link_message(libc::RTM_NEWLINK, 7, UP);
        changes_by(&mut monitor, Some(3), &link);
        assert!(!monitor.is_unmonitored());
        lose_messages(&mut monitor);
        dump(&mut monitor, &mut kernel, &[]);
        assert!(monitor.is_unmonitored());
        changes_by(&mut monitor, Some(3), &link);
        assert!(!monitor.is_unmonitored());
        lose_messages(&mut monitor);
        dump(&mut monitor, &mut kernel, &link);
        assert!(!monitor.is_unmonitored(), "it has returned");
    }

    #[test]
    fn a_round_is_bounded_and_what_is_left_is_read_in_the_next() {
        let (mut monitor, kernel, _) = started(None, &link_message(libc::RTM_NEWLINK, 7, 0));
        let link = link_message(libc::RTM_NEWLINK, 7, UP);
        let flags = MsgFlags::MSG_DONTWAIT;
        let mut rounds = 0;
        for _ in 0..3 * DATAGRAMS_PER_ROUND {
            while send(kernel.socket.as_raw_fd(), &link, flags).is_err() {
                assert!(!monitor.read(NOW).drained);
                rounds += 1;
            }
        }
        while !monitor.read(NOW).drained {
            rounds += 1;
            assert!(!monitor.is_up_to_date());
        }
        assert!(rounds > 0 && monitor.is_up_to_date());
    }

    #[test]
    fn links_count_as_routes_when_their_flags_or_master_change() {
        let mut monitor = monitor();
        for (bytes, counts) in [
            (link_message(libc::RTM_NEWLINK, 8, UP), true),
            (link_message(libc::RTM_NEWLINK, 8, UP), false),
            (link_message(libc::RTM_NEWLINK, 8, UP | libc::IFF_PROMISC as u32), false),
            (link_message(libc::RTM_NEWLINK, 8, UP | libc::IFF_RUNNING as u32), true),
            (link_message(libc::RTM_NEWLINK, 8, UP), true),
            (moving_message(libc::RTM_NEWLINK, 8, UP, &[(IFLA_MASTER, 9)]), true),
            (link_message(libc::RTM_NEWLINK, 8, 0), true),
            (link_message(libc::RTM_DELLINK, 8, 0), true),
        ] {
            let changes = changes_by(&mut monitor, None, &bytes);
            assert_eq!(changes.routes.v4 == PrefixSet::All, counts, "{bytes:?}");
        }
        let elsewhere = changes_by(&mut monitor, Some(3), &link_message(libc::RTM_NEWLINK, 8, UP));
        assert!(!elsewhere.routes.is_any());
    }

    #[test]
    fn nexthops_count_as_routes() {
        for kind in [RTM_NEWNEXTHOP, RTM_DELNEXTHOP] {
            let changes = changes_by(&mut monitor(), None, &netlink::message(kind, 0, 0, &[], &[]));
            assert_eq!(changes.routes.v4, PrefixSet::All);
        }
    }

    #[test]
    fn rules_of_users_are_known_while_they_exist() {
        let rule = |kind| netlink::message(kind, 0, 0, &[0; RULE_LEN], &[(FRA_UID_RANGE, &[0; 8])]);
        let other = netlink::message(RTM_NEWRULE, 0, 0, &[0; RULE_LEN], &[]);
        let (mut monitor, mut kernel, _) = started(None, &link_message(libc::RTM_NEWLINK, 7, 0));
        changes_by(&mut monitor, None, &other);
        assert!(!monitor.has_uid_rules());
        changes_by(&mut monitor, None, &rule(RTM_NEWRULE));
        assert!(monitor.has_uid_rules());
        for (listed, expected) in
            [([rule(RTM_NEWRULE), other.clone()].concat(), true), (other, false)]
        {
            changes_by(&mut monitor, None, &rule(RTM_DELRULE));
            dump(&mut monitor, &mut kernel, &listed);
            assert_eq!(monitor.has_uid_rules(), expected);
        }
    }

    #[test]
    fn queries_are_answered_by_number() {
        let (mut monitor, kernel, _) = started(None, &link_message(libc::RTM_NEWLINK, 7, 0));
        let (from, to) = ("192.0.2.1".parse().ok(), "192.0.2.2:2".parse().unwrap());
        let flow = routes::Flow { from, from_port: 1, to, mark: 0 };
        let first = monitor.ask([Query::Route(flow); 2]).unwrap();
        let mut answer = routes::tests::route(1, 7, 0, 0);
        answer[8..12].copy_from_slice(&0x200u32.to_ne_bytes());
        let bytes = netlink::message(libc::RTM_NEWROUTE, 0, first, &answer, &[]);
        send(kernel.socket.as_raw_fd(), &bytes, MsgFlags::empty()).unwrap();
        let refused = (-libc::ENETUNREACH).to_ne_bytes();
        let bytes = netlink::message(NLMSG_ERROR, 0, first + 1, &refused, &[]);
        send(kernel.socket.as_raw_fd(), &bytes, MsgFlags::empty()).unwrap();
        let changes = monitor.read(NOW);
        let refused = Answer::Refused(libc::ENETUNREACH);
        let answer = Answer::Route { interface: 7, source: None, is_local: false };
        assert_eq!(changes.answers, [(first, answer), (first + 1, refused)]);
        assert!(changes.drained && !changes.routes.is_any());
    }

    /// What the kernel answers about IPv6, and about the route of an address, is marked as an answer by its recipient alone.
    #[test]
    fn a_route_that_is_sent_to_our_socket_is_an_answer_and_one_that_another_program_changed_is_not()
    {
        let mut monitor = monitor();
        let mut body = routes::tests::route(1, 4, 0, 0);
        body[7] = libc::RTN_LOCAL;
        let route = |port: u32, flags: u16, kind: u16| {
            let mut bytes = netlink::message(kind, flags, 3, &body, &[]);
            bytes[12..16].copy_from_slice(&port.to_ne_bytes());
            bytes
        };
        let listed = route(99, libc::NLM_F_MULTI as u16, libc::RTM_NEWROUTE);
        assert_eq!(changes_by(&mut monitor, None, &listed).answers, []);
        let changed = changes_by(&mut monitor, None, &route(98, 0, libc::RTM_NEWROUTE));
        assert!(changed.answers.is_empty() && changed.routes.is_any());
        let answered = changes_by(&mut monitor, None, &route(99, 0, libc::RTM_NEWROUTE));
        let answer = Answer::Route { interface: 4, source: None, is_local: true };
        assert_eq!((answered.answers, answered.routes.is_any()), (vec![(3, answer)], false));
    }

    #[test]
    fn our_links_state_and_every_links_name_are_read() {
        let mut monitor = monitor();
        let mut changes = Changes::default();
        let mut bytes = link_message(libc::RTM_NEWLINK, 7, libc::IFF_UP as u32);
        bytes.extend(link_message(libc::RTM_NEWLINK, 8, 0));
        monitor.parse(&bytes, None, NOW, &mut changes);
        assert_eq!(changes.link, Some(LinkState { up: true, mtu: 1420 }));
        assert_eq!(monitor.index_of("wg0").map(|index| index == 7 || index == 8), Some(true));
        assert_eq!(monitor.index_of("12"), Some(12));
        for odd in ["+3", "-3", "", "4294967296", "3 "] {
            assert_eq!(monitor.index_of(odd), None, "{odd:?}");
        }
        assert_eq!(monitor.links[&8].name, "wg0");
        monitor.parse(&link_message(libc::RTM_DELLINK, 8, 0), None, NOW, &mut changes);
        assert!(!monitor.links.contains_key(&8));
    }

    #[test]
    fn where_moves_are_not_followed_the_interface_is_unmonitored_until_it_returns() {
        let (mut monitor, mut changes) = (monitor(), Changes::default());
        monitor.follows_moves = false;
        let more = [(IFLA_NEW_NETNSID, 3), (IFLA_NEW_IFINDEX, 9)];
        monitor.parse(&moving_message(libc::RTM_DELLINK, 7, 0, &more), None, NOW, &mut changes);
        assert!(monitor.is_unmonitored());
        monitor.parse(&link_message(libc::RTM_NEWLINK, 9, 1), None, NOW, &mut changes);
        assert!(!monitor.is_unmonitored() && changes.link.is_some_and(|link| link.up));
    }

    #[test]
    fn a_short_while_down_is_not_missed() {
        let (mut monitor, mut changes) = (monitor(), Changes::default());
        let mut bytes = link_message(libc::RTM_NEWLINK, 7, 0);
        bytes.extend(link_message(libc::RTM_NEWLINK, 7, libc::IFF_UP as u32));
        monitor.parse(&bytes, None, NOW, &mut changes);
        assert!(changes.was_down && changes.link.is_some_and(|link| link.up));
    }

    #[test]
    fn the_same_index_in_another_namespace_is_another_interface() {
        let (mut monitor, mut changes) = (monitor(), Changes::default());
        monitor.parse(&link_message(libc::RTM_NEWLINK, 7, 1), Some(3), NOW, &mut changes);
        monitor.parse(&link_message(libc::RTM_NEWLINK, 8, 1), Some(3), NOW, &mut changes);
        let route =
            netlink::message(libc::RTM_NEWROUTE, 0, 0, &routes::tests::route(1, 8, 0, 0), &[]);
        monitor.parse(&route, Some(3), NOW, &mut changes);
        assert_eq!(changes, Changes::default());
        assert!(!monitor.links.contains_key(&8));
    }

    #[test]
    fn our_interface_is_followed_to_other_namespaces_and_back() {
        let (mut monitor, mut changes) = (monitor(), Changes::default());
        let leave = |ifindex, namespace, new_ifindex| {
            let more = [(IFLA_NEW_NETNSID, namespace), (IFLA_NEW_IFINDEX, new_ifindex)];
            moving_message(libc::RTM_DELLINK, ifindex, 0, &more)
        };
        monitor.parse(&leave(7, 3, 9), None, NOW, &mut changes);
        monitor.parse(&link_message(libc::RTM_NEWLINK, 7, 1), None, NOW, &mut changes);
        monitor.parse(&link_message(libc::RTM_NEWLINK, 9, 1), Some(4), NOW, &mut changes);
        assert_eq!(changes.link, None);
        monitor.parse(&link_message(libc::RTM_NEWLINK, 9, 1), Some(3), NOW, &mut changes);
        assert_eq!(changes.link, Some(LinkState { up: true, mtu: 1420 }));
        monitor.parse(&leave(9, 0, 7), Some(3), NOW, &mut changes);
        monitor.parse(&link_message(libc::RTM_NEWLINK, 7, 0), None, NOW, &mut changes);
        assert_eq!(changes.link, Some(LinkState { up: false, mtu: 1420 }));
    }

    #[test]
    fn an_mtu_of_a_route_counts_where_our_interface_is_and_while_it_is_up() {
        let (mut monitor, mut changes) = (monitor(), Changes::default());
        let body = routes::tests::route(1, 7, 0, 1299);
        let route = netlink::message(libc::RTM_NEWROUTE, 0, 0, &body, &[]);
        monitor.parse(&route, Some(3), NOW, &mut changes);
        assert_eq!(changes, Changes::default());
        monitor.parse(&route, None, NOW, &mut changes);
        assert!(changes.routes.is_any() && changes.route_mtus);
        let mut changes = Changes::default();
        monitor.parse(&link_message(libc::RTM_NEWLINK, 7, 1), None, NOW, &mut changes);
        assert!(!changes.route_mtus);
        monitor.parse(&link_message(libc::RTM_NEWLINK, 7, 0), None, NOW, &mut changes);
        assert!(changes.route_mtus, "the routes went with the link");
    }

    #[test]
    fn rules_count_as_routes() {
        let (mut monitor, mut changes) = (monitor(), Changes::default());
        monitor.parse(&netlink::message(RTM_NEWRULE, 0, 0, &[0; 12], &[]), None, NOW, &mut changes);
        assert_eq!(changes.routes.v4, PrefixSet::All);
    }

    #[test]
    fn cut_and_lying_messages_end_the_parse_without_harm() {
        let whole = link_message(libc::RTM_NEWLINK, 7, 1);
        for len in 0..whole.len() {
            monitor().parse(&whole[..len], None, NOW, &mut Changes::default());
        }
        for (at, byte) in (0..whole.len()).flat_map(|at| [(at, 0), (at, 1), (at, 0xff)]) {
            let mut bad = whole.clone();
            bad[at] = byte;
            monitor().parse(&bad, None, NOW, &mut Changes::default());
        }
    }
}
