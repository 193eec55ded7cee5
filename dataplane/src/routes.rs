//! Routes as rtnetlink tells of them: which lead to our interface with an MTU of their own, and by
//! which interface a datagram would leave (linux/rtnetlink.h).

use crate::netlink;
use nix::libc;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use wgsep_proto::allowed_ips::AllowedIps;
use wgsep_proto::config::AllowedIp;

/// Length of struct rtmsg.
const RTMSG_LEN: usize = 12;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_PRIORITY: u16 = 6;
const RTA_METRICS: u16 = 8;
const RTA_TABLE: u16 = 15;
const RTA_MARK: u16 = 16;
const RTAX_MTU: u16 = 2;
/// The answer to a question for a route, as opposed to a route that changed.
const RTM_F_CLONED: u32 = 0x200;

/// Table, priority and prefix: what tells one route from another.
type Key = (u32, u32, AllowedIp);

/// MTUs of those routes to our interface that have one.
#[derive(Default)]
pub(crate) struct RouteMtus(HashMap<Key, u32>);

impl RouteMtus {
    /// Takes note of a route that was added, replaced or removed; true if that changed an MTU.
    pub(crate) fn changed(&mut self, kind: u16, body: &[u8], interface: u32) -> bool {
        let attributes = body.get(RTMSG_LEN..).unwrap_or_default();
        if netlink::number(attributes, RTA_OIF) != Some(interface) {
            return false;
        }
        let Some(key) = key(body, attributes) else { return false };
        let metrics = netlink::attribute(attributes, RTA_METRICS).unwrap_or_default();
        match netlink::number(metrics, RTAX_MTU) {
            Some(mtu) if kind == libc::RTM_NEWROUTE => self.0.insert(key, mtu) != Some(mtu),
            _ => self.0.remove(&key).is_some(),
        }
    }

    /// Forgets all; true if there were any. The kernel does not tell of routes that go because the
    /// interface goes down.
    pub(crate) fn clear(&mut self) -> bool {
        let any = !self.0.is_empty();
        self.0.clear();
        any
    }

    /// Whether there are none, as there mostly are.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What holds for an address: the least of those of the longest prefix, in whatever table.
    pub(crate) fn by_prefix(&self) -> AllowedIps<u32> {
        let mut by_prefix = AllowedIps::default();
        let mut mtus: Vec<_> = self.0.iter().map(|((.., prefix), mtu)| (*mtu, *prefix)).collect();
        // The smallest comes last and stays.
        mtus.sort_unstable_by(|a, b| b.cmp(a));
        for (mtu, prefix) in mtus {
            by_prefix.insert(prefix, mtu);
        }
        by_prefix
    }
}

fn key(body: &[u8], attributes: &[u8]) -> Option<Key> {
    let [family, destination_len, _, _, table, ..] = *body.first_chunk::<RTMSG_LEN>()?;
    let destination = netlink::attribute(attributes, RTA_DST);
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
    let table = netlink::number(attributes, RTA_TABLE).unwrap_or(u32::from(table));
    let priority = netlink::number(attributes, RTA_PRIORITY).unwrap_or(0);
    Some((table, priority, AllowedIp::new(address, destination_len)?))
}

/// Asks by which interface a datagram with this source, destination and mark would leave.
pub(crate) fn question(sequence: u32, from: Ipv4Addr, to: Ipv4Addr, mark: u32) -> Vec<u8> {
    let mut fixed = [0; RTMSG_LEN];
    fixed[0] = libc::AF_INET as u8;
    fixed[1] = 32;
    fixed[2] = 32;
    let attributes =
        [(RTA_DST, to.octets()), (RTA_SRC, from.octets()), (RTA_MARK, mark.to_ne_bytes())];
    netlink::message(libc::RTM_GETROUTE, libc::NLM_F_REQUEST as u16, sequence, &fixed, &attributes)
}

/// The interface in the answer to a [`question`]; `None` if this is a route that changed.
pub(crate) fn answer(body: &[u8]) -> Option<u32> {
    let flags = netlink::word(body, 8)?;
    (flags & RTM_F_CLONED != 0)
        .then(|| netlink::number(body.get(RTMSG_LEN..).unwrap_or_default(), RTA_OIF))
        .flatten()
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
        let words = [(RTA_DST, [10, 0, destination, 0]), (RTA_OIF, interface.to_ne_bytes())];
        let priority = (RTA_PRIORITY, priority.to_ne_bytes());
        let whole = netlink::message(0, 0, 0, &body, &[words[0], words[1], priority]);
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
    fn the_answer_to_a_question_is_no_change() {
        let mut body = route(1, 7, 0, 0);
        assert_eq!(answer(&body), None);
        body[8..12].copy_from_slice(&RTM_F_CLONED.to_ne_bytes());
        assert_eq!(answer(&body), Some(7));
        for len in 0..body.len() {
            let _either = answer(&body[..len]);
            let _either = RouteMtus::default().changed(libc::RTM_NEWROUTE, &body[..len], 7);
        }
    }
}
