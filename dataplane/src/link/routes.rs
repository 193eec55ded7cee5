//! The kernel's routes, from rtnetlink (linux/rtnetlink.h): which changed, the MTUs of those to our
//! interface, and the outgoing interface of a flow.

use crate::link::{Answer, netlink};
use nix::libc;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use wgsep_proto::AllowedIp;
use wgsep_proto::path::allowed_ips::AllowedIps;

/// Length of struct rtmsg.
const RTMSG_LEN: usize = 12;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_TABLE: u16 = 15;
const RTA_MARK: u16 = 16;
const RTA_IP_PROTO: u16 = 27;
const RTA_SPORT: u16 = 28;
const RTA_DPORT: u16 = 29;
const RTAX_MTU: u16 = 2;
/// Length of struct ifaddrmsg.
const IFADDRMSG_LEN: usize = 8;
const IFA_ADDRESS: u16 = 1;
/// Prefixes that are kept apart; if more changed, every route counts as changed.
const MAX_CHANGED_PREFIXES: usize = 1024;
/// Flag of the answer to a query for a route, as opposed to a route that changed.
const RTM_F_CLONED: u32 = 0x200;
/// Flag of a query for the route itself instead of what it means for a datagram, since Linux 4.13.
const RTM_F_FIB_MATCH: u32 = 0x2000;

/// The key of a route: table, priority and prefix.
type Key = (u32, u32, AllowedIp);

/// MTUs of those routes to our interface that have one.
#[derive(Default)]
pub(crate) struct RouteMtus {
    /// Each with the number of the last refresh that it was part of.
    mtus: HashMap<Key, (u32, u32)>,
    refresh: u32,
}

impl RouteMtus {
    /// Handles a route that exists, was added, replaced or removed; true if that changed an MTU.
    pub(crate) fn changed(&mut self, kind: u16, body: &[u8], interface: u32) -> bool {
        let attributes = body.get(RTMSG_LEN..).unwrap_or_default();
        if netlink::number(attributes, RTA_OIF) != Some(interface) {
            return false;
        }
        let Some(key) = key(body, attributes) else { return false };
        let metrics = netlink::attribute(attributes, RTA_METRICS).unwrap_or_default();
        match netlink::number(metrics, RTAX_MTU) {
            Some(mtu) if kind == libc::RTM_NEWROUTE => {
                let before = self.mtus.insert(key, (mtu, self.refresh));
                before.is_none_or(|(before, _)| before != mtu)
            }
            _ => self.mtus.remove(&key).is_some(),
        }
    }

    /// Starts a refresh of all routes of a family; the known ones are kept until it ends.
    pub(crate) fn begin_refresh(&mut self) {
        self.refresh = self.refresh.wrapping_add(1);
    }

    /// Ends a refresh: removes the routes of a family that no longer exist; true if there were any.
    pub(crate) fn end_refresh(&mut self, family: i32) -> bool {
        let (before, current) = (self.mtus.len(), self.refresh);
        self.mtus.retain(|(.., prefix), (_, refresh)| {
            prefix.address().is_ipv4() != (family == libc::AF_INET) || *refresh == current
        });
        self.mtus.len() < before
    }

    /// Removes all; true if there were any. The kernel does not report the routes that are removed because
    /// the interface goes down.
    pub(crate) fn clear(&mut self) -> bool {
        let any = !self.mtus.is_empty();
        self.mtus.clear();
        any
    }

    /// True if there are none, which is the usual case.
    pub(crate) fn is_empty(&self) -> bool {
        self.mtus.is_empty()
    }

    /// What holds for an address: the least of those of the longest prefix, in whatever table.
    pub(crate) fn by_prefix(&self) -> AllowedIps<u32> {
        let mut by_prefix = AllowedIps::default();
        let mut mtus: Vec<_> =
            self.mtus.iter().map(|((.., prefix), (mtu, _))| (*mtu, *prefix)).collect();
        // The smallest comes last and stays.
        mtus.sort_unstable_by(|a, b| b.cmp(a));
        for (mtu, prefix) in mtus {
            by_prefix.insert(prefix, mtu);
        }
        by_prefix
    }
}

fn key(body: &[u8], attributes: &[u8]) -> Option<Key> {
    let table = *body.get(4)?;
    let table = netlink::number(attributes, RTA_TABLE).unwrap_or(u32::from(table));
    let priority = netlink::number(attributes, RTA_PRIORITY).unwrap_or(0);
    Some((table, priority, prefix(body)?))
}

/// The destination of a route.
fn prefix(body: &[u8]) -> Option<AllowedIp> {
    let [family, destination_len, ..] = *body.first_chunk::<RTMSG_LEN>()?;
    let destination = netlink::attribute(body.get(RTMSG_LEN..)?, RTA_DST);
    let address = match libc::c_int::from(family) {
        libc::AF_INET => {
            let octets = destination.map_or(Some(&[0; 4]), <[u8]>::first_chunk)?;
            IpAddr::V4(Ipv4Addr::from(*octets))
        }
        libc::AF_INET6 => {
            let octets = destination.map_or(Some(&[0; 16]), <[u8]>::first_chunk)?;
            IpAddr::V6(Ipv6Addr::from(*octets))
        }
        _ => return None,
    };
    AllowedIp::new(address, destination_len)
}

/// The changes that may invalidate cached sources.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RouteChanges {
    /// IPv4 destinations that may be reached by another way than before. A cached IPv6 source does not depend
    /// on the route to the destination.
    pub(crate) v4: PrefixSet,
    /// As `v4`, of IPv6: of use only where sockets are bound to several addresses.
    pub(crate) v6: PrefixSet,
    /// IPv6 addresses that were removed from an interface; another one may still have them.
    pub(crate) removed_v6: PrefixSet,
}

impl RouteChanges {
    /// Adds a route that was added, replaced or removed.
    pub(crate) fn add_route(&mut self, kind: u16, body: &[u8]) {
        let is_local = body.get(7) == Some(&libc::RTN_LOCAL);
        let removes_address = is_local && kind == libc::RTM_DELROUTE;
        match prefix(body) {
            // Routes that prefer the address as their source are removed too, which older kernels do not
            // report.
            Some(prefix) if prefix.address().is_ipv4() && removes_address => {
                self.v4 = PrefixSet::All;
            }
            Some(prefix) if prefix.address().is_ipv4() => self.v4.add(prefix),
            Some(prefix) => {
                self.v6.add(prefix);
                if removes_address {
                    self.removed_v6.add(prefix);
                }
            }
            None => {}
        }
    }

    /// Adds the changes of another one.
    pub(crate) fn merge(&mut self, other: Self) {
        self.v4.merge(other.v4);
        self.v6.merge(other.v6);
        self.removed_v6.merge(other.removed_v6);
    }

    /// Every route may have changed.
    pub(crate) fn all() -> Self {
        Self { v4: PrefixSet::All, v6: PrefixSet::All, removed_v6: PrefixSet::Empty }
    }

    /// True if anything changed.
    pub(crate) const fn is_any(&self) -> bool {
        self.v4.is_any() || self.v6.is_any() || self.removed_v6.is_any()
    }
}

/// A set of prefixes of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum PrefixSet {
    /// None.
    #[default]
    Empty,
    /// These, of which there are not too many.
    Of(HashSet<AllowedIp>),
    /// All of them.
    All,
}

impl PrefixSet {
    /// Adds all addresses within a prefix.
    pub(crate) fn add(&mut self, prefix: AllowedIp) {
        match self {
            Self::All => {}
            _ if prefix.cidr() == 0 => *self = Self::All,
            Self::Empty => *self = Self::Of([prefix].into()),
            Self::Of(prefixes) => {
                prefixes.insert(prefix);
                if prefixes.len() > MAX_CHANGED_PREFIXES {
                    *self = Self::All;
                }
            }
        }
    }

    fn merge(&mut self, other: Self) {
        match (&mut *self, other) {
            (_, Self::Empty) | (Self::All, _) => {}
            (Self::Of(_), Self::Of(prefixes)) => {
                prefixes.into_iter().for_each(|prefix| self.add(prefix));
            }
            (_, other) => *self = other,
        }
    }

    const fn is_any(&self) -> bool {
        !matches!(self, Self::Empty)
    }

    /// A test of addresses that takes as long for many prefixes as for few.
    pub(crate) fn into_matcher(self) -> Matcher {
        match self {
            Self::All => Matcher(None),
            Self::Empty => Matcher(Some(AllowedIps::default())),
            Self::Of(prefixes) => {
                let mut within = AllowedIps::default();
                for prefix in prefixes {
                    within.insert(prefix, ());
                }
                Matcher(Some(within))
            }
        }
    }
}

/// Tests whether an address is within a [`PrefixSet`]; `None` for all.
pub(crate) struct Matcher(Option<AllowedIps<()>>);

impl Matcher {
    /// True if a prefix of the set contains this address.
    pub(crate) fn covers(&self, address: IpAddr) -> bool {
        self.0.as_ref().is_none_or(|within| within.lookup(address).is_some())
    }
}

/// The flow of a peer's datagrams, as the kernel's rules and routes see it. The user of
/// the socket is not part of it, as it cannot be specified from within the sandbox's user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flow {
    /// Our address; `None` where the route is to choose one.
    pub(crate) from: Option<IpAddr>,
    /// Our port.
    pub(crate) from_port: u16,
    /// The peer's address, of the same family, and port.
    pub(crate) to: SocketAddr,
    /// SO_MARK, 0 for none.
    pub(crate) mark: u32,
}

/// A query to the kernel about a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Query {
    /// The outgoing interface of a datagram of this flow, and the address that the kernel would give it.
    Route(Flow),
    /// The interface that has this address.
    Address(IpAddr),
}

/// The netlink request of a query.
pub(crate) fn question(sequence: u32, query: &Query) -> Vec<u8> {
    match query {
        Query::Route(flow) => route_question(sequence, flow),
        Query::Address(IpAddr::V4(address)) => local_route_question(sequence, address),
        Query::Address(IpAddr::V6(address)) => address_question(sequence, address),
    }
}

/// Of IPv4 the kernel has no query for one address, but each has a route of its own.
fn local_route_question(sequence: u32, address: &Ipv4Addr) -> Vec<u8> {
    let mut fixed = [0; RTMSG_LEN];
    fixed[0] = libc::AF_INET as u8;
    fixed[1] = 32;
    fixed[8..].copy_from_slice(&RTM_F_FIB_MATCH.to_ne_bytes());
    let attributes: [(u16, &[u8]); 1] = [(RTA_DST, &address.octets())];
    netlink::message(libc::RTM_GETROUTE, libc::NLM_F_REQUEST as u16, sequence, &fixed, &attributes)
}

/// An interface of index 0 means any.
fn address_question(sequence: u32, address: &Ipv6Addr) -> Vec<u8> {
    let mut fixed = [0; IFADDRMSG_LEN];
    fixed[0] = libc::AF_INET6 as u8;
    let attributes: [(u16, &[u8]); 1] = [(IFA_ADDRESS, &address.octets())];
    netlink::message(libc::RTM_GETADDR, libc::NLM_F_REQUEST as u16, sequence, &fixed, &attributes)
}

fn route_question(sequence: u32, flow: &Flow) -> Vec<u8> {
    let Flow { from, from_port, to, mark } = flow;
    let (family, len) = match to {
        SocketAddr::V4(_) => (libc::AF_INET, 32),
        SocketAddr::V6(_) => (libc::AF_INET6, 128),
    };
    let mut fixed = [0; RTMSG_LEN];
    (fixed[0], fixed[1]) = (family as u8, len);
    let (to_port, mark) = (to.port().to_be_bytes(), mark.to_ne_bytes());
    let (to, from) = (octets(to.ip()), from.map(octets));
    let from_port = from_port.to_be_bytes();
    let mut attributes: Vec<(u16, &[u8])> = vec![
        (RTA_DST, &to),
        (RTA_MARK, &mark),
        (RTA_IP_PROTO, &[libc::IPPROTO_UDP as u8]),
        (RTA_SPORT, &from_port),
        (RTA_DPORT, &to_port),
    ];
    if let Some(from) = &from {
        fixed[2] = len;
        attributes.push((RTA_SRC, from));
    }
    netlink::message(libc::RTM_GETROUTE, libc::NLM_F_REQUEST as u16, sequence, &fixed, &attributes)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The request for a dump of the routes of a family to an interface. A kernel before 4.20 lists the others too.
pub(crate) fn dump_request(sequence: u32, family: i32, interface: u32) -> Vec<u8> {
    let mut fixed = [0; RTMSG_LEN];
    fixed[0] = family as u8;
    let attributes: [(u16, &[u8]); 1] = [(RTA_OIF, &interface.to_ne_bytes())];
    netlink::message(libc::RTM_GETROUTE, netlink::DUMP, sequence, &fixed, &attributes)
}

/// Whether a message is an answer as an older kernel and IPv4 mark it.
pub(crate) fn is_cloned(body: &[u8]) -> bool {
    netlink::word(body, 8).is_some_and(|flags| flags & RTM_F_CLONED != 0)
}

/// What a route that is an answer says.
pub(crate) fn answer(body: &[u8]) -> Option<Answer> {
    let attributes = body.get(RTMSG_LEN..)?;
    let interface = netlink::number(attributes, RTA_OIF)?;
    let source = netlink::attribute(attributes, RTA_PREFSRC).and_then(address);
    let is_local = body.get(7) == Some(&libc::RTN_LOCAL);
    Some(Answer::Route { interface, source, is_local })
}

fn address(octets: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(octets).ok().map(IpAddr::from);
    v4().or_else(|| <[u8; 16]>::try_from(octets).ok().map(IpAddr::from))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The body of a route to `10.0.DST.0/24` by an interface, with an MTU unless that is 0.
    pub(crate) fn route(destination: u8, interface: u32, priority: u32, mtu: u32) -> Vec<u8> {
        let mut body = vec![0; RTMSG_LEN];
        body[0] = libc::AF_INET as u8;
        body[1] = 24;
        body[4] = 254;
        let attributes: [(u16, &[u8]); 3] = [
            (RTA_DST, &[10, 0, destination, 0]),
            (RTA_OIF, &interface.to_ne_bytes()),
            (RTA_PRIORITY, &priority.to_ne_bytes()),
        ];
        let whole = netlink::message(0, 0, 0, &body, &attributes);
        let mut body = whole[netlink::HEADER_LEN..].to_vec();
        if mtu != 0 {
            body.extend_from_slice(&12u16.to_ne_bytes());
            body.extend_from_slice(&RTA_METRICS.to_ne_bytes());
            body.extend_from_slice(&8u16.to_ne_bytes());
            body.extend_from_slice(&RTAX_MTU.to_ne_bytes());
            body.extend_from_slice(&mtu.to_ne_bytes());
        }
        body
    }

    fn mtu_of(mtus: &RouteMtus, address: [u8; 4]) -> Option<u32> {
        mtus.by_prefix().lookup(address.into()).copied()
    }

    #[test]
    fn the_mtu_of_a_route_holds_until_it_is_replaced_or_removed() {
        let mut mtus = RouteMtus::default();
        assert!(mtus.changed(libc::RTM_NEWROUTE, &route(1, 7, 0, 1299), 7));
        assert!(!mtus.changed(libc::RTM_NEWROUTE, &route(1, 7, 0, 1299), 7), "the same again");
        assert!(!mtus.changed(libc::RTM_NEWROUTE, &route(2, 8, 0, 1000), 7), "another interface");
        assert!(!mtus.changed(libc::RTM_NEWROUTE, &route(3, 7, 0, 0), 7), "no MTU");
        assert_eq!(mtu_of(&mtus, [10, 0, 1, 9]), Some(1299));
        assert_eq!(mtu_of(&mtus, [10, 0, 2, 9]), None);
        assert!(mtus.changed(libc::RTM_NEWROUTE, &route(1, 7, 5, 1200), 7), "another priority");
        assert_eq!(mtu_of(&mtus, [10, 0, 1, 9]), Some(1200));
        assert!(mtus.changed(libc::RTM_DELROUTE, &route(1, 7, 5, 1200), 7));
        assert!(mtus.changed(libc::RTM_NEWROUTE, &route(1, 7, 0, 0), 7), "replaced by one without");
        assert!(!mtus.clear());
    }

    #[test]
    fn a_refresh_forgets_the_routes_that_it_does_not_list() {
        let mut mtus = RouteMtus::default();
        for destination in [1, 2] {
            mtus.changed(libc::RTM_NEWROUTE, &route(destination, 7, 0, 1299), 7);
        }
        mtus.begin_refresh();
        assert!(!mtus.changed(libc::RTM_NEWROUTE, &route(2, 7, 0, 1299), 7), "known");
        assert!(mtus.changed(libc::RTM_NEWROUTE, &route(3, 7, 0, 1300), 7), "new");
        assert!(!mtus.end_refresh(libc::AF_INET6), "of the other family");
        assert!(mtus.end_refresh(libc::AF_INET));
        let found = [1, 2, 3].map(|destination| mtu_of(&mtus, [10, 0, destination, 9]));
        assert_eq!(found, [None, Some(1299), Some(1300)]);
        assert!(!mtus.end_refresh(libc::AF_INET));
    }

    fn changed(destinations: impl IntoIterator<Item = u8>) -> RouteChanges {
        let mut changes = RouteChanges::default();
        for destination in destinations {
            changes.add_route(libc::RTM_NEWROUTE, &route(destination, 7, 0, 0));
        }
        changes
    }

    #[test]
    fn a_changed_route_counts_for_the_destinations_within_it() {
        let mut changes = changed([1]);
        changes.merge(changed([]));
        changes.merge(changed([3]));
        let matcher = changes.v4.into_matcher();
        let covered = [1, 2, 3].map(|destination| matcher.covers([10, 0, destination, 9].into()));
        assert_eq!(covered, [true, false, true]);
        let nothing = changed([]);
        assert!(!nothing.is_any() && !nothing.v4.into_matcher().covers([10, 0, 1, 9].into()));
    }

    #[test]
    fn too_many_routes_a_default_route_or_a_removed_address_count_for_all_destinations() {
        let mut many = RouteChanges::default();
        for number in 0..=MAX_CHANGED_PREFIXES as u32 {
            assert_ne!(many.v4, PrefixSet::All);
            many.v4.add(AllowedIp::new(IpAddr::V4(number.into()), 32).unwrap());
        }
        let (mut default, mut removed) = (changed([]), changed([]));
        default.v4.add(AllowedIp::new(IpAddr::V4(0.into()), 0).unwrap());
        let mut local = route(1, 7, 0, 0);
        local[7] = libc::RTN_LOCAL;
        removed.add_route(libc::RTM_DELROUTE, &local);
        for all in [many, default, removed] {
            assert_eq!(all.v4, PrefixSet::All);
            let mut merged = changed([1]);
            merged.merge(all);
            merged.merge(changed([2]));
            assert!(merged.v4.into_matcher().covers([192, 0, 2, 1].into()));
        }
    }

    #[test]
    fn of_ipv6_routes_the_removed_addresses_of_ours_count_alone() {
        let address: Ipv6Addr = "fd07::1".parse().unwrap();
        for (kind, route_type, counts) in [
            (libc::RTM_DELROUTE, libc::RTN_LOCAL, true),
            (libc::RTM_NEWROUTE, libc::RTN_LOCAL, false),
            (libc::RTM_DELROUTE, libc::RTN_UNICAST, false),
        ] {
            let mut body = vec![0; RTMSG_LEN];
            (body[0], body[1], body[7]) = (libc::AF_INET6 as u8, 128, route_type);
            let route = netlink::message(0, 0, 0, &body, &[(RTA_DST, &address.octets())]);
            let mut changes = changed([]);
            changes.add_route(kind, &route[netlink::HEADER_LEN..]);
            assert_eq!(
                (changes.removed_v6.is_any(), changes.v4.is_any()),
                (counts, false),
                "{kind} {route_type}"
            );
            let matcher = changes.removed_v6.into_matcher();
            assert_eq!(matcher.covers(address.into()), counts);
            assert!(!matcher.covers("fd07::2".parse().unwrap()));
        }
    }

    #[test]
    fn a_question_has_the_whole_flow() {
        let (from, to) = ("192.0.2.1".parse().ok(), "192.0.2.2:7".parse().unwrap());
        let bytes = question(3, &Query::Route(Flow { from, from_port: 51820, to, mark: 5 }));
        let (message, _) = netlink::split_message(&bytes).unwrap();
        let attributes = &message.body[RTMSG_LEN..];
        for (kind, expected) in [
            (RTA_SRC, &[192, 0, 2, 1][..]),
            (RTA_DST, &[192, 0, 2, 2]),
            (RTA_MARK, &5u32.to_ne_bytes()),
            (RTA_IP_PROTO, &[17]),
            (RTA_SPORT, &[0xca, 0x6c]),
            (RTA_DPORT, &[0, 7]),
        ] {
            assert_eq!(netlink::attribute(attributes, kind), Some(expected), "{kind}");
        }
    }

    #[test]
    fn the_answer_to_a_question_is_no_change() {
        let mut body = route(1, 7, 0, 0);
        assert!(!is_cloned(&body));
        body[8..12].copy_from_slice(&RTM_F_CLONED.to_ne_bytes());
        assert!(is_cloned(&body));
        let expected = Answer::Route { interface: 7, source: None, is_local: false };
        assert_eq!(answer(&body), Some(expected));
        for len in 0..body.len() {
            let _either = answer(&body[..len]);
            let _either = RouteMtus::default().changed(libc::RTM_NEWROUTE, &body[..len], 7);
        }
    }
}
