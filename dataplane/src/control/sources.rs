//! Checks cached source addresses of peers after a change of routes, rules or links.
//!
//! The kernel's WireGuard keeps the address that a peer sent to while the route to the peer leads to the
//! interface by which its datagrams arrived (kernel socket.c, send4). It checks each packet; this module
//! checks after a change, and only the peers that it concerns. An IPv6 source is valid while any interface
//! has the address (send6), so after an interface has lost it, a query asks whether another has it. The
//! kernel refuses to send from an address that no interface has, unless net.ipv6.ip_nonlocal_bind is 1.
//!
//! 1. `routes_changed` collects the changes.
//! 2. `check` starts a pass over the peers, some each round, and sends queries about those concerned.
//! 3. `answered` clears the sources that are no longer valid. If answers were lost, the pass starts over.
//!
//! A change is checked at once, unless there have been many: then a pass is delayed until the previous ones
//! amount to a fiftieth of the time, and covers all changes since. The passes never take more than that part
//! of a processor, however many routes change and however many peers there are.
//!
//! Where sockets are bound to several addresses of a family, the kernel chooses none of them for a datagram without a
//! source. So the route to each peer is asked which address it would give ([`RouteSources`]), and a source is cleared only
//! where the route no longer leads to its interface and gives another that is listened on.
//!
//! The kernel reports some changes before they take effect: a route before it is removed, a link that goes down
//! before its routes and addresses do. So each change is checked twice more, a tenth of a second and two seconds later.

use crate::line_limit::LineLimit;
use crate::link::routes::{Flow, Matcher, PrefixSet, Query, RouteChanges};
use crate::link::{Answer, LinkMonitor};
use crate::packets::udp::RouteSources;
use std::collections::{HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use wgsep_proto::device::control_plane::ControlPlane;
use wgsep_proto::invariant::present;
use wgsep_proto::session::peer::is_link_local;
use wgsep_proto::{AllowedIp, Endpoint, Instant, PeerId};

/// Peers checked and queries sent in a round: each about 0.3 ms of work.
const PEERS_PER_ROUND: usize = 1024;
const QUERIES_PER_ROUND: usize = 64;
/// Time that must pass for each pass, checked peer and query: fifty times the time it takes.
const INTERVAL_PER_PASS: Duration = Duration::from_millis(1);
const INTERVAL_PER_PEER: Duration = Duration::from_micros(20);
const INTERVAL_PER_QUERY: Duration = Duration::from_micros(250);
/// Most of that time that may be owed.
const MAX_OWED: Duration = Duration::from_millis(500);

/// Times after which a change is checked again; at most doubled.
const AGAIN_AFTER: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];

/// Changes that are checked again.
struct Recheck {
    after: Duration,
    recent: RouteChanges,
    earlier: RouteChanges,
    due: Option<Instant>,
}

impl Recheck {
    fn new(after: Duration) -> Self {
        Self { after, recent: RouteChanges::default(), earlier: RouteChanges::default(), due: None }
    }

    fn add(&mut self, changes: RouteChanges, now: Instant) {
        if changes.is_any() {
            self.recent.merge(changes);
            self.due.get_or_insert(now.after(self.after));
        }
    }

    /// Takes the changes that are due.
    fn take_due(&mut self, now: Instant) -> RouteChanges {
        if self.due.is_none_or(|due| now < due) {
            return RouteChanges::default();
        }
        let old = core::mem::replace(&mut self.earlier, core::mem::take(&mut self.recent));
        self.due = self.earlier.is_any().then(|| now.after(self.after));
        old
    }
}

/// Where the sockets are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Binding {
    /// On every address and interface.
    #[default]
    Everywhere,
    /// On these addresses only.
    Addresses,
    /// On one interface, whose routes no query knows.
    Device,
}

/// An address that a socket is bound to.
struct Listed {
    address: IpAddr,
    /// The interface that has it; `None` while none has, and before that is known.
    interface: Option<u32>,
    is_missing: bool,
}

/// One pass over all peers.
struct Pass {
    /// Destinations and sources to query: of IPv4, and of IPv6 where sockets are bound to several addresses.
    concerned: [Matcher; 2],
    /// IPv6 sources to query.
    removed: Matcher,
    /// Whether the addresses that are listened on were queried.
    has_listed: bool,
    /// The last peer that was checked.
    last: Option<PeerId>,
    /// The destinations of the peers that were checked.
    destinations: HashSet<SocketAddr>,
}

impl Pass {
    /// Whether a change concerns an address.
    fn covers(&self, address: IpAddr) -> bool {
        let [v4, v6] = &self.concerned;
        if address.is_ipv4() { v4.covers(address) } else { v6.covers(address) }
    }
}

/// What a query is about.
#[derive(Clone, Copy)]
enum Subject {
    /// The cached source of a peer.
    Peer(PeerId, Endpoint),
    /// The source that the route to a destination gives.
    RouteTo(SocketAddr),
    /// An address that is listened on.
    Listed(IpAddr),
}

/// A query that has no answer yet.
struct PendingQuery {
    sequence: u32,
    subject: Subject,
}

/// The state of the checks.
pub(super) struct SourceCheck {
    changes: RouteChanges,
    again: [Recheck; 2],
    pass: Option<Pass>,
    asked: VecDeque<PendingQuery>,
    binding: Binding,
    listed: Vec<Listed>,
    route_sources: Arc<RouteSources>,
    lines: LineLimit,
    /// The time until which the work so far is accounted for.
    paid_at: Instant,
}

impl Default for SourceCheck {
    fn default() -> Self {
        Self {
            changes: RouteChanges::default(),
            again: AGAIN_AFTER.map(Recheck::new),
            pass: None,
            asked: VecDeque::new(),
            binding: Binding::default(),
            listed: Vec::new(),
            route_sources: Arc::default(),
            lines: LineLimit::default(),
            paid_at: Instant::default(),
        }
    }
}

impl SourceCheck {
    /// Takes the addresses of new sockets, none if they were closed.
    pub(super) fn bound(&mut self, addresses: &[IpAddr], binding: Binding, now: Instant) {
        self.binding = binding;
        let listed = addresses.iter().filter(|address| !address.is_unspecified());
        let listed =
            listed.map(|address| Listed { address: *address, interface: None, is_missing: false });
        self.listed = listed.collect();
        self.route_sources.retain(|_| false);
        if !self.listed.is_empty() {
            self.routes_changed(RouteChanges::all(), now);
        }
    }

    /// By which of several sockets which destination is reached.
    pub(super) const fn route_sources(&self) -> &Arc<RouteSources> {
        &self.route_sources
    }

    /// The addresses that are listened on and that no interface has.
    pub(super) fn missing(&self) -> impl Iterator<Item = IpAddr> {
        self.listed.iter().filter(|one| one.is_missing).map(|one| one.address)
    }

    /// Whether one of several addresses must be chosen to send to a destination.
    fn chooses_for(&self, destination: &SocketAddr) -> bool {
        let is_of_link = matches!(destination, SocketAddr::V6(to) if is_link_local(to.ip()));
        let of_family =
            self.listed.iter().filter(|one| one.address.is_ipv4() == destination.is_ipv4());
        self.binding == Binding::Addresses && !is_of_link && of_family.count() > 1
    }

    /// Sends a query about the source to send from to a destination, if none is known; true if so.
    pub(super) fn ask_for(
        &mut self,
        endpoint: &Endpoint,
        device: &ControlPlane,
        link: &mut LinkMonitor,
    ) -> bool {
        let destination = endpoint.destination;
        if endpoint.source.is_some()
            || !self.chooses_for(&destination)
            || link.has_uid_rules()
            || self.route_sources.of(destination).is_some()
        {
            return false;
        }
        let Ok(sequence) = link.ask([Query::Route(flow(destination, None, device))]) else {
            return false;
        };
        self.asked.push_back(PendingQuery { sequence, subject: Subject::RouteTo(destination) });
        true
    }

    /// Adds routes and addresses that changed.
    pub(super) fn routes_changed(&mut self, mut changes: RouteChanges, now: Instant) {
        // Addresses and interface of the sockets choose the source, unless one of the addresses must be chosen.
        if self.binding != Binding::Everywhere && self.listed.is_empty() {
            changes.v4 = PrefixSet::default();
        }
        if self.listed.is_empty() {
            changes.v6 = PrefixSet::default();
        }
        for again in &mut self.again {
            again.add(changes.clone(), now);
        }
        self.changes.merge(changes);
    }

    /// When [`Self::check`] is due; `None` if that depends on an answer or a change.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let again = self.again.iter().filter_map(|again| again.due).min();
        [self.next_round(), again].into_iter().flatten().min()
    }

    /// When the next round may start, if anything is left to be checked and no answer is pending.
    fn next_round(&self) -> Option<Instant> {
        match (&self.pass, self.asked.is_empty()) {
            (_, false) => None,
            (Some(_), true) => Some(Instant::default()),
            (None, true) => self.changes.is_any().then_some(self.paid_at),
        }
    }

    /// Checks the next peers, if a round is due.
    pub(super) fn check(&mut self, device: &ControlPlane, link: &mut LinkMonitor, now: Instant) {
        for again in &mut self.again {
            self.changes.merge(again.take_due(now));
        }
        if self.next_round().is_none_or(|at| now < at) {
            return;
        }
        if self.pass.is_none() {
            let RouteChanges { v4, v6, removed_v6 } = core::mem::take(&mut self.changes);
            self.pass = Some(Pass {
                concerned: [v4.into_matcher(), v6.into_matcher()],
                removed: removed_v6.into_matcher(),
                has_listed: false,
                last: None,
                destinations: HashSet::new(),
            });
            self.paid_at = self.paid_at.max(earlier(now, MAX_OWED)).after(INTERVAL_PER_PASS);
        }
        let (queries, checked) = self.next_queries(device, link.has_uid_rules());
        let cost = INTERVAL_PER_PEER * checked + INTERVAL_PER_QUERY * queries.len() as u32;
        self.paid_at = self.paid_at.after(cost);
        if !queries.is_empty() {
            match link.ask(queries) {
                Ok(first) => {
                    for (question, number) in self.asked.iter_mut().zip(0..) {
                        question.sequence = first.wrapping_add(number);
                    }
                }
                Err(_) => self.start_over(),
            }
        }
    }

    /// Checks the next peers. Returns the queries about those concerned, and how many peers were checked.
    /// With `uid_rules` it clears the IPv4 sources of those concerned instead.
    fn next_queries(&mut self, device: &ControlPlane, uid_rules: bool) -> (Vec<Query>, u32) {
        let pass = present(self.pass.take(), "the caller has started it");
        let Some(mut pass) = pass else { return (Vec::new(), 0) };
        let (mut queries, mut checked) = (Vec::new(), 0);
        if !core::mem::replace(&mut pass.has_listed, true) {
            for Listed { address, .. } in &self.listed {
                queries.push((Query::Address(*address), Subject::Listed(*address)));
            }
        }
        let mut peers = device.endpoints(pass.last).take(PEERS_PER_ROUND);
        let is_last = loop {
            let Some((peer, endpoint)) = peers.next() else { break checked < PEERS_PER_ROUND };
            checked += 1;
            pass.last = Some(peer);
            let Some(endpoint) = endpoint else { continue };
            self.query_peer(&mut pass, peer, &endpoint, (device, uid_rules), &mut queries);
            if queries.len() >= QUERIES_PER_ROUND {
                break false;
            }
        };
        if is_last {
            self.route_sources.retain(|destination| pass.destinations.contains(destination));
        } else {
            self.pass = Some(pass);
        }
        let asked =
            queries.iter().map(|(_, subject)| PendingQuery { sequence: 0, subject: *subject });
        self.asked.extend(asked);
        (queries.into_iter().map(|(query, _)| query).collect(), checked as u32)
    }

    /// Adds the queries about a peer, if the change concerns it.
    fn query_peer(
        &self,
        pass: &mut Pass,
        peer: PeerId,
        endpoint: &Endpoint,
        (device, uid_rules): (&ControlPlane, bool),
        queries: &mut Vec<(Query, Subject)>,
    ) {
        let to = endpoint.destination;
        let from = endpoint.source.map(|source| source.address);
        let about_source = Subject::Peer(peer, *endpoint);
        if let Some(address @ IpAddr::V6(_)) = from
            && pass.removed.covers(address)
        {
            queries.push((Query::Address(address), about_source));
        }
        let chooses = self.chooses_for(&to);
        if chooses {
            pass.destinations.insert(to);
        }
        let checks = chooses || (self.binding == Binding::Everywhere && to.is_ipv4());
        let is_concerned = pass.covers(to.ip()) || from.is_some_and(|from| pass.covers(from));
        if !(checks && is_concerned) {
            return;
        }
        if uid_rules {
            // The answer would apply to datagrams of another user. Without a source, the route decides.
            if !chooses {
                device.clear_source(peer, endpoint);
            }
            return;
        }
        if chooses {
            queries.push((Query::Route(flow(to, None, device)), Subject::RouteTo(to)));
        }
        if from.is_some_and(|from| from.is_ipv4() == to.is_ipv4()) {
            queries.push((Query::Route(flow(to, from, device)), about_source));
        }
    }

    /// Handles the answer to a query.
    pub(super) fn answered(
        &mut self,
        device: &ControlPlane,
        (sequence, answer): (u32, Answer),
        now: Instant,
    ) {
        let Some(index) = self.asked.iter().position(|asked| asked.sequence == sequence) else {
            return;
        };
        let query = present(self.asked.remove(index), "it was found at this position");
        match query.map(|query| query.subject) {
            Some(Subject::Peer(peer, endpoint)) if !self.holds(&endpoint, answer) => {
                device.clear_source(peer, &endpoint);
            }
            Some(Subject::RouteTo(destination)) => {
                self.route_sources.set(destination, self.source_by(answer, &destination));
            }
            Some(Subject::Listed(address)) => self.listed_at(address, answer, now),
            Some(Subject::Peer(..)) | None => {}
        }
    }

    /// Whether a peer's source stays: if the route still leads to the interface by which the peer's datagrams arrived, or
    /// some interface has the address. If there is no route, the kernel keeps the source except for EINVAL; an address
    /// that is no longer ours is detected by the next send. One of several addresses stays, too, unless the route gives
    /// another.
    fn holds(&self, endpoint: &Endpoint, answer: Answer) -> bool {
        let Some(source) = endpoint.source else { return true };
        let is_missing = self.missing().any(|missing| missing == source.address);
        let holds = match answer {
            Answer::Route { interface, .. } => interface == source.interface && !is_missing,
            Answer::Address { .. } => return true,
            Answer::Refused(errno) => {
                !matches!(errno, nix::libc::EINVAL | nix::libc::EADDRNOTAVAIL)
            }
        };
        let given = self.route_sources.of(endpoint.destination);
        let is_given = given.is_none_or(|given| given == source.address);
        holds || (is_given && self.chooses_for(&endpoint.destination))
    }

    /// The address that a route gives, or another of its interface that is listened on.
    fn source_by(&self, answer: Answer, destination: &SocketAddr) -> Option<IpAddr> {
        let Answer::Route { interface, source, .. } = answer else { return None };
        let mut of_family =
            self.listed.iter().filter(|one| one.address.is_ipv4() == destination.is_ipv4());
        let is_given = |one: &&Listed| Some(one.address) == source;
        let given = of_family.clone().find(is_given);
        let given = given.or_else(|| of_family.find(|one| one.interface == Some(interface)));
        given.map(|given| given.address)
    }

    /// Stores which interface has an address that is listened on, and logs if there is none any more.
    fn listed_at(&mut self, address: IpAddr, answer: Answer, now: Instant) {
        let interface = match answer {
            Answer::Route { interface, is_local: true, .. } | Answer::Address { interface } => {
                Some(interface)
            }
            Answer::Route { is_local: false, .. } | Answer::Refused(_) => None,
        };
        let mut listed = self.listed.iter_mut();
        let Some(listed) = listed.find(|one| one.address == address) else { return };
        listed.interface = interface;
        let was_missing = core::mem::replace(&mut listed.is_missing, interface.is_none());
        match (was_missing, listed.is_missing) {
            (false, true) => {
                self.lines.write(now, || {
                    tracing::warn!(
                        "no interface has {address} of --listen-address: nothing is received at it until one has; add it: ip address"
                    );
                });
            }
            (true, false) => {
                self.lines.write(now, || {
                    tracing::info!("{address} of --listen-address is there again");
                });
            }
            _ => {}
        }
    }

    /// Starts over after answers were lost.
    pub(super) fn start_over(&mut self) {
        for PendingQuery { subject, .. } in self.asked.drain(..) {
            let concerned = match subject {
                Subject::Listed(address) => address,
                Subject::RouteTo(destination) => destination.ip(),
                Subject::Peer(_, endpoint) => {
                    let source = endpoint.source.map(|source| source.address);
                    if let Some(address @ IpAddr::V6(_)) = source {
                        let removed = AllowedIp::new(address, 128);
                        removed.into_iter().for_each(|one| self.changes.removed_v6.add(one));
                    }
                    endpoint.destination.ip()
                }
            };
            match AllowedIp::new(concerned, if concerned.is_ipv4() { 32 } else { 128 }) {
                Some(one) if concerned.is_ipv4() => self.changes.v4.add(one),
                Some(one) if !self.listed.is_empty() => self.changes.v6.add(one),
                _ => {}
            }
        }
    }
}

fn earlier(now: Instant, by: Duration) -> Instant {
    Instant::default().after(now.since(Instant::default()).saturating_sub(by))
}

/// The flow of datagrams to a destination.
fn flow(to: SocketAddr, from: Option<IpAddr>, device: &ControlPlane) -> Flow {
    Flow { from, from_port: device.listen_port(), to, mark: device.fwmark() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::KernelRandom;
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
    use std::os::fd::{AsRawFd, OwnedFd};
    use wgsep_proto::{AllowedIpChange, Configuration, PeerConfiguration, PublicKey, Source};

    const START: Instant = Instant::from_nanos(3_600_000_000_000);
    const INTERFACE: u32 = 3;

    const fn by(interface: u32) -> Answer {
        Answer::Route { interface, source: None, is_local: false }
    }

    /// Every IPv4 destination, and no IPv6 source.
    fn all() -> RouteChanges {
        RouteChanges { v4: PrefixSet::All, ..RouteChanges::default() }
    }

    /// A device whose peers were spoken to at 192.0.2.1, a check of their sources, and the kernel's end
    /// of the netlink socket.
    struct Bed {
        device: ControlPlane,
        check: SourceCheck,
        link: LinkMonitor,
        kernel: OwnedFd,
        now: Instant,
    }

    impl Bed {
        /// With this many peers, of which number N is at `10.0.N`, two bytes.
        fn new(peers: u16) -> Self {
            let mut device = ControlPlane::new(Box::new(KernelRandom));
            let peers = (0..peers).map(|number| {
                let mut key = [1; 32];
                key[..2].copy_from_slice(&number.to_be_bytes());
                let mut peer = PeerConfiguration::new(PublicKey::from_bytes(key));
                let [high, low] = number.to_be_bytes();
                peer.endpoint = Some(([10, 0, high, low], 7).into());
                let allowed_ip = AllowedIp::new([10, 0, high, low].into(), 32).unwrap();
                peer.allowed_ips.push(AllowedIpChange { allowed_ip, remove: false });
                peer
            });
            let listen_port = Some(51820);
            let configuration =
                Configuration { peers: peers.collect(), listen_port, ..Configuration::default() };
            device.configure(configuration);
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let (ours, kernel) =
                socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
            let link = LinkMonitor::new(ours, (None, 7), true, "wg0", START);
            let _dump_request = recv(kernel.as_raw_fd(), &mut [0; 64], MsgFlags::empty()).unwrap();
            let bed = Self { device, check: SourceCheck::default(), link, kernel, now: START };
            bed.cache_sources();
            bed
        }

        fn cache_sources(&self) {
            let source = Some(Source { address: [192, 0, 2, 1].into(), interface: INTERFACE });
            self.set_endpoints(|endpoint| Endpoint { source, ..endpoint });
        }

        /// Gives each peer another endpoint.
        fn set_endpoints(&self, mut next: impl FnMut(Endpoint) -> Endpoint) {
            let data_path = self.device.data_path();
            let mut allowed_ips = data_path.allowed_ips.reader();
            allowed_ips.refresh(&data_path.allowed_ips);
            for (_, endpoint) in self.device.endpoints(None) {
                let endpoint = endpoint.unwrap();
                let IpAddr::V4(to) = endpoint.destination.ip() else { continue };
                let mut packet = [0; 20];
                (packet[0], packet[3]) = (0x45, 20);
                packet[16..].copy_from_slice(&to.octets());
                let (peer, _) = data_path.route(allowed_ips.value(), &packet).ok().unwrap();
                peer.set_endpoint(next(endpoint));
            }
        }

        fn sources(&self) -> usize {
            let endpoints = self.device.endpoints(None);
            endpoints.filter(|(_, endpoint)| endpoint.is_some_and(|e| e.source.is_some())).count()
        }

        fn change(&mut self, prefix: [u8; 4], length: u8) {
            let mut changes = RouteChanges::default();
            changes.v4.add(AllowedIp::new(prefix.into(), length).unwrap());
            self.check.routes_changed(changes, self.now);
        }

        /// Makes rounds until nothing is left to be done now; each question gets this answer. How many
        /// there were.
        fn run(&mut self, answer: Option<Answer>) -> usize {
            let mut questions = 0;
            while self.check.next_timeout().is_some_and(|at| at <= self.now) {
                self.check.check(&self.device, &mut self.link, self.now);
                let mut buffer = vec![0; 1 << 16];
                while let Ok(len) = recv(self.kernel.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                    let mut rest = &buffer[..len];
                    while let Some((message, left)) = crate::link::netlink::split_message(rest) {
                        rest = left;
                        questions += 1;
                        if let Some(answer) = answer {
                            self.check.answered(&self.device, (message.sequence, answer), self.now);
                        }
                    }
                }
                if answer.is_none() {
                    self.check.start_over();
                    break;
                }
            }
            questions
        }
    }

    #[test]
    fn only_the_peers_that_a_changed_prefix_covers_are_asked_about() {
        let mut bed = Bed::new(3000);
        bed.change([10, 99, 0, 0], 16);
        assert_eq!(bed.run(Some(by(9))), 0);
        bed.change([10, 0, 1, 0], 24);
        assert_eq!(bed.run(Some(by(9))), 256);
        assert_eq!(bed.sources(), 3000 - 256);
        bed.cache_sources();
        bed.change([192, 0, 2, 0], 24);
        bed.now = bed.now.after(Duration::from_secs(60));
        assert_eq!(bed.run(Some(by(INTERFACE))), 3000, "our own address");
        assert_eq!(bed.sources(), 3000);
    }

    #[test]
    fn a_source_is_kept_where_the_kernel_keeps_it() {
        for (answer, kept) in [
            (by(INTERFACE), true),
            (by(INTERFACE + 1), false),
            (Answer::Refused(nix::libc::ENETUNREACH), true),
            (Answer::Refused(nix::libc::EINVAL), false),
        ] {
            let mut bed = Bed::new(1);
            bed.check.routes_changed(all(), bed.now);
            assert_eq!(bed.run(Some(answer)), 1);
            assert_eq!(bed.sources(), usize::from(kept), "{answer:?}");
        }
    }

    #[test]
    fn an_ipv6_source_is_forgotten_when_no_interface_has_its_address_any_more() {
        let mut bed = Bed::new(2);
        let addresses: [IpAddr; 2] = ["fd07::1", "fd07::2"].map(|address| address.parse().unwrap());
        let mut rest = addresses.into_iter();
        bed.set_endpoints(|_| {
            let source = Source { address: rest.next().unwrap(), interface: INTERFACE };
            Endpoint { destination: "[fd07::9]:7".parse().unwrap(), source: Some(source) }
        });
        bed.check.routes_changed(all(), bed.now);
        assert_eq!((bed.run(None), bed.sources()), (0, 2), "an IPv4 route");
        let mut changes = RouteChanges::default();
        changes.removed_v6.add(AllowedIp::new(addresses[0], 128).unwrap());
        for (answer, questions, sources) in [
            (Some(Answer::Address { interface: INTERFACE }), 1, 2),
            (None, 1, 2),
            (Some(Answer::Refused(nix::libc::EADDRNOTAVAIL)), 1, 1),
            (Some(Answer::Refused(nix::libc::EADDRNOTAVAIL)), 0, 1),
        ] {
            bed.check.routes_changed(changes.clone(), bed.now);
            assert_eq!((bed.run(answer), bed.sources()), (questions, sources), "{answer:?}");
        }
    }

    const OURS: [&str; 2] = ["192.0.2.1", "192.0.2.2"];

    /// A device whose sockets are bound to two addresses, and whose peers were spoken to at the first.
    fn bound_to_two() -> Bed {
        let mut bed = Bed::new(2);
        let addresses = OURS.map(|address| address.parse().unwrap());
        bed.check.bound(&addresses, Binding::Addresses, bed.now);
        bed
    }

    /// As [`Bed::run`], where the kernel answers as `of_address`, or with this interface and source.
    fn run_with(bed: &mut Bed, of_address: [Answer; 2], interface: u32, source: Option<&str>) {
        let source = source.map(|source| source.parse().unwrap());
        while bed.check.next_timeout().is_some_and(|at| at <= bed.now) {
            bed.check.check(&bed.device, &mut bed.link, bed.now);
            let asked: Vec<_> =
                bed.check.asked.iter().map(|one| (one.sequence, one.subject)).collect();
            for (sequence, subject) in asked {
                let route = |source| Answer::Route { interface, source, is_local: false };
                let answer = match subject {
                    Subject::Listed(address) => {
                        of_address[usize::from(address.to_string() == OURS[1])]
                    }
                    Subject::RouteTo(_) => route(source),
                    Subject::Peer(..) => route(None),
                };
                bed.check.answered(&bed.device, (sequence, answer), bed.now);
            }
        }
    }

    const fn at(interface: u32) -> Answer {
        Answer::Route { interface, source: None, is_local: true }
    }

    #[test]
    fn one_of_several_addresses_is_kept_unless_the_route_leads_elsewhere_and_gives_another() {
        let there = [at(INTERFACE), at(4)];
        for (of_address, interface, source, kept, given) in [
            (there, INTERFACE, Some(OURS[0]), true, Some(OURS[0])),
            // Its route stays, by a rule for instance.
            (there, INTERFACE, Some(OURS[1]), true, Some(OURS[1])),
            (there, 4, Some(OURS[1]), false, Some(OURS[1])),
            // The interface has another address first.
            (there, 4, Some("192.0.2.9"), false, Some(OURS[1])),
            (there, 5, Some("192.0.2.9"), true, None),
            // IPv6 would find a route from an address that no interface has.
            (
                [Answer::Refused(nix::libc::EADDRNOTAVAIL), at(4)],
                INTERFACE,
                Some(OURS[1]),
                false,
                Some(OURS[1]),
            ),
        ] {
            let mut bed = bound_to_two();
            run_with(&mut bed, of_address, interface, source);
            let to = "10.0.0.1:7".parse().unwrap();
            let found = bed.check.route_sources().of(to).map(|found| found.to_string());
            assert_eq!(
                (bed.sources() > 0, found.as_deref()),
                (kept, given),
                "{interface} {source:?}"
            );
        }
    }

    #[test]
    fn an_address_that_no_interface_has_is_missing_until_one_has() {
        let mut bed = bound_to_two();
        let gone = Answer::Route { interface: 4, source: None, is_local: false };
        for (second, missing) in [(at(4), 0), (gone, 1), (gone, 1), (at(4), 0)] {
            bed.check.routes_changed(all(), bed.now);
            run_with(&mut bed, [at(INTERFACE), second], INTERFACE, None);
            assert_eq!(bed.check.missing().count(), missing);
            assert!(bed.check.missing().all(|address| address.to_string() == OURS[1]));
            bed.now = bed.now.after(Duration::from_secs(60));
        }
        bed.check.bound(&[], Binding::Addresses, bed.now);
        assert_eq!(bed.check.missing().count(), 0);
    }

    #[test]
    fn what_is_known_of_destinations_that_no_peer_has_is_forgotten() {
        let mut bed = bound_to_two();
        let elsewhere = "10.9.9.9:7".parse().unwrap();
        bed.check.route_sources().set(elsewhere, OURS[0].parse().ok());
        run_with(&mut bed, [at(INTERFACE), at(4)], INTERFACE, Some(OURS[0]));
        assert_eq!(bed.check.route_sources().of(elsewhere), None);
        assert!(bed.check.route_sources().of("10.0.0.1:7".parse().unwrap()).is_some());
    }

    #[test]
    fn a_question_whose_answer_was_lost_is_asked_again() {
        let mut bed = Bed::new(1);
        bed.change([10, 0, 0, 0], 8);
        assert_eq!(bed.run(None), 1);
        assert_eq!(bed.sources(), 1);
        bed.now = bed.now.after(Duration::from_secs(1));
        assert_eq!(bed.run(Some(by(9))), 1);
        assert_eq!(bed.sources(), 0);
    }

    #[test]
    fn a_round_is_bounded() {
        let mut bed = Bed::new(3000);
        bed.check.routes_changed(all(), bed.now);
        bed.check.check(&bed.device, &mut bed.link, bed.now);
        assert_eq!(bed.check.asked.len(), QUERIES_PER_ROUND);
        assert_eq!(bed.check.next_round(), None, "the answers come first");
    }

    /// What is counted is work: peers looked at, of which each is some tenths of a microsecond.
    #[test]
    fn the_work_is_bounded_however_many_routes_change() {
        let mut bed = Bed::new(3000);
        let (mut passes, mut longest) = (0, Duration::ZERO);
        for _ in 0..10_000 {
            bed.change([100, 0, 0, 1], 32);
            passes += usize::from(bed.check.next_round().is_some_and(|at| at <= bed.now));
            bed.run(Some(by(INTERFACE)));
            longest = longest.max(bed.check.paid_at.since(bed.now));
            bed.now = bed.now.after(Duration::from_millis(1));
        }
        // 10 s at 61 ms each, and half a second that is made up for.
        assert!((160..=180).contains(&passes), "{passes} passes in 10 s");
        assert!(longest <= Duration::from_millis(65), "a change waited {longest:?}");
    }

    /// The kernel may not be done when it reports a change.
    #[test]
    fn each_change_is_looked_at_again_and_then_no_more() {
        let mut bed = Bed::new(1);
        let (start, mut checked) = (bed.now, Vec::new());
        bed.change([10, 0, 0, 0], 16);
        while let Some(next) = bed.check.next_timeout() {
            bed.now = bed.now.max(next);
            if bed.run(Some(by(INTERFACE))) > 0 {
                checked.push(bed.now.since(start).as_millis());
            }
        }
        assert_eq!(checked, [0, 100, 2000]);
    }

    #[test]
    fn a_few_changes_are_looked_at_at_once() {
        let mut bed = Bed::new(100);
        for _ in 0..5 {
            bed.change([10, 0, 0, 0], 16);
            assert_eq!(bed.run(Some(by(INTERFACE))), 100);
        }
    }
}
