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
//! The kernel reports some changes before they take effect: a route before it is removed, a link that goes down
//! before its routes and addresses do. So each change is checked twice more, a tenth of a second and two seconds later.

use crate::link::routes::{Flow, Matcher, Query, RouteChanges};
use crate::link::{Answer, LinkMonitor};
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::time::Duration;
use wgsep_proto::device::control_plane::ControlPlane;
use wgsep_proto::invariant::present;
use wgsep_proto::{AllowedIp, Endpoint, Instant, PeerId, Source};

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

/// One pass over all peers.
struct Pass {
    /// IPv4 destinations and sources to query.
    concerned: Matcher,
    /// IPv6 sources to query.
    removed: Matcher,
    /// The last peer that was checked.
    last: Option<PeerId>,
}

impl Pass {
    /// The query about a peer's source, if the change concerns it.
    fn query(&self, endpoint: &Endpoint, device: &ControlPlane) -> Option<Query> {
        if let IpAddr::V6(address) = endpoint.source?.address {
            return self.removed.covers(address.into()).then_some(Query::Address(address));
        }
        let flow = cached_flow(endpoint, device)?;
        let ends = [*flow.to.ip(), *flow.from.ip()];
        let concerned = ends.into_iter().any(|address| self.concerned.covers(address.into()));
        concerned.then_some(Query::Route(flow))
    }
}

/// A query that has no answer yet.
struct PendingQuery {
    sequence: u32,
    peer: PeerId,
    endpoint: Endpoint,
}

/// The state of the checks.
pub(super) struct SourceCheck {
    changes: RouteChanges,
    again: [Recheck; 2],
    pass: Option<Pass>,
    asked: VecDeque<PendingQuery>,
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
            paid_at: Instant::default(),
        }
    }
}

impl SourceCheck {
    /// Adds routes and addresses that changed.
    pub(super) fn routes_changed(&mut self, changes: RouteChanges, now: Instant) {
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
            let RouteChanges { v4, removed_v6 } = core::mem::take(&mut self.changes);
            let (concerned, removed) = (v4.into_matcher(), removed_v6.into_matcher());
            self.pass = Some(Pass { concerned, removed, last: None });
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
        let pass = present(self.pass.as_mut(), "the caller has started it");
        let Some(pass) = pass else { return (Vec::new(), 0) };
        let (mut queries, mut checked) = (Vec::new(), 0);
        let mut peers = device.endpoints(pass.last).take(PEERS_PER_ROUND);
        loop {
            let Some((peer, endpoint)) = peers.next() else {
                if checked < PEERS_PER_ROUND {
                    self.pass = None;
                }
                break;
            };
            checked += 1;
            pass.last = Some(peer);
            let Some(endpoint) = endpoint else { continue };
            let Some(query) = pass.query(&endpoint, device) else { continue };
            if uid_rules && matches!(query, Query::Route(_)) {
                // The answer would apply to datagrams of another user. Without a source, the route decides.
                device.clear_source(peer, &endpoint);
                continue;
            }
            queries.push(query);
            self.asked.push_back(PendingQuery { sequence: 0, peer, endpoint });
            if queries.len() == QUERIES_PER_ROUND {
                break;
            }
        }
        (queries, checked as u32)
    }

    /// Clears the source that an answer is about, unless the route still leads to the interface by which the
    /// peer's datagrams arrived, or some interface has the address. If there is no route, the kernel keeps
    /// the source except for EINVAL; an address that is no longer ours is detected by the next send.
    pub(super) fn answered(&mut self, device: &ControlPlane, sequence: u32, answer: Answer) {
        let Some(index) = self.asked.iter().position(|asked| asked.sequence == sequence) else {
            return;
        };
        let query = present(self.asked.remove(index), "it was found at this position");
        let Some(PendingQuery { peer, endpoint, .. }) = query else { return };
        let spoken_by = endpoint.source.map(|source| source.interface);
        let holds = match answer {
            Answer::Interface(interface) => spoken_by == Some(interface),
            Answer::AddressExists => true,
            Answer::Refused(errno) => {
                !matches!(errno, nix::libc::EINVAL | nix::libc::EADDRNOTAVAIL)
            }
        };
        if !holds {
            device.clear_source(peer, &endpoint);
        }
    }

    /// Starts over after answers were lost.
    pub(super) fn start_over(&mut self) {
        for PendingQuery { endpoint, .. } in self.asked.drain(..) {
            let Some(Source { address, .. }) = endpoint.source else { continue };
            match (address, endpoint.destination.ip()) {
                (IpAddr::V4(_), to) => {
                    AllowedIp::new(to, 32).into_iter().for_each(|to| self.changes.v4.add(to));
                }
                (IpAddr::V6(_), _) => {
                    let removed = AllowedIp::new(address, 128);
                    removed.into_iter().for_each(|removed| self.changes.removed_v6.add(removed));
                }
            }
        }
    }
}

fn earlier(now: Instant, by: Duration) -> Instant {
    Instant::default().after(now.since(Instant::default()).saturating_sub(by))
}

/// The flow of a peer's datagrams, if it has a cached IPv4 source.
fn cached_flow(endpoint: &Endpoint, device: &ControlPlane) -> Option<Flow> {
    match (endpoint.source?.address, endpoint.destination) {
        (IpAddr::V4(from), SocketAddr::V4(to)) => {
            let from = SocketAddrV4::new(from, device.listen_port());
            Some(Flow { from, to, mark: device.fwmark() })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::routes::PrefixSet;
    use crate::random::KernelRandom;
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
    use std::os::fd::{AsRawFd, OwnedFd};
    use wgsep_proto::{AllowedIpChange, Configuration, PeerConfiguration, PublicKey};

    const START: Instant = Instant::from_nanos(3_600_000_000_000);
    const INTERFACE: u32 = 3;

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
                            self.check.answered(&self.device, message.sequence, answer);
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
        assert_eq!(bed.run(Some(Answer::Interface(9))), 0);
        bed.change([10, 0, 1, 0], 24);
        assert_eq!(bed.run(Some(Answer::Interface(9))), 256);
        assert_eq!(bed.sources(), 3000 - 256);
        bed.cache_sources();
        bed.change([192, 0, 2, 0], 24);
        bed.now = bed.now.after(Duration::from_secs(60));
        assert_eq!(bed.run(Some(Answer::Interface(INTERFACE))), 3000, "our own address");
        assert_eq!(bed.sources(), 3000);
    }

    #[test]
    fn a_source_is_kept_where_the_kernel_keeps_it() {
        for (answer, kept) in [
            (Answer::Interface(INTERFACE), true),
            (Answer::Interface(INTERFACE + 1), false),
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
            (Some(Answer::AddressExists), 1, 2),
            (None, 1, 2),
            (Some(Answer::Refused(nix::libc::EADDRNOTAVAIL)), 1, 1),
            (Some(Answer::Refused(nix::libc::EADDRNOTAVAIL)), 0, 1),
        ] {
            bed.check.routes_changed(changes.clone(), bed.now);
            assert_eq!((bed.run(answer), bed.sources()), (questions, sources), "{answer:?}");
        }
    }

    #[test]
    fn a_question_whose_answer_was_lost_is_asked_again() {
        let mut bed = Bed::new(1);
        bed.change([10, 0, 0, 0], 8);
        assert_eq!(bed.run(None), 1);
        assert_eq!(bed.sources(), 1);
        bed.now = bed.now.after(Duration::from_secs(1));
        assert_eq!(bed.run(Some(Answer::Interface(9))), 1);
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
            bed.run(Some(Answer::Interface(INTERFACE)));
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
            if bed.run(Some(Answer::Interface(INTERFACE))) > 0 {
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
            assert_eq!(bed.run(Some(Answer::Interface(INTERFACE))), 100);
        }
    }
}
