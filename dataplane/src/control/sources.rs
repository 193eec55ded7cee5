//! After a change of routes, rules or links: which peers' cached source addresses still hold.
//!
//! The kernel's WireGuard keeps the address that a peer spoke to for as long as the route to the peer
//! leads to the interface it spoke by (kernel socket.c, send4). It looks at each packet; we ask after a
//! change, and only about the peers that it concerns. For IPv6 a source holds for as long as it is an
//! address of ours (send6), which the kernel checks with each send of ours.
//!
//! 1. `routes_changed` collects what changed.
//! 2. `check` starts a pass over the peers, some a round, and asks about those concerned.
//! 3. `answered` forgets the sources that do not hold. Answers that were lost start over.
//!
//! The first change is looked at right away. The next pass then waits for as long as the pass before
//! took, many times over, and takes on all changes since: however many routes change, and however many peers there
//! are, it is a small part of a processor.

use crate::link::{Answer, LinkMonitor};
use crate::routes::{Flow, Matcher, RouteChanges};
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::time::Duration;
use wgsep_proto::config::AllowedIp;
use wgsep_proto::device::Device;
use wgsep_proto::peer::{Endpoint, PeerId};
use wgsep_proto::time::Instant;

/// Peers looked at in a round, and questions asked in one: each about 0.2 ms of work.
const PEERS_PER_ROUND: usize = 1024;
const QUESTIONS_PER_ROUND: usize = 64;
/// From the start of a pass to that of the next, at least; and more for each peer looked at and each
/// question, thirty times what it takes.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(50);
const INTERVAL_PER_PEER: Duration = Duration::from_micros(5);
const INTERVAL_PER_QUESTION: Duration = Duration::from_micros(150);

/// One look at all peers.
struct Pass {
    concerned: Matcher,
    /// The last peer looked at.
    last: Option<PeerId>,
}

/// A question that has no answer yet.
struct Question {
    sequence: u32,
    peer: PeerId,
    endpoint: Endpoint,
}

/// What is still to be looked at.
#[derive(Default)]
pub(super) struct SourceCheck {
    changes: RouteChanges,
    pass: Option<Pass>,
    asked: VecDeque<Question>,
    /// When the next pass may start.
    not_before: Instant,
}

impl SourceCheck {
    /// Some routes are others.
    pub(super) fn routes_changed(&mut self, changes: RouteChanges) {
        self.changes.merge(changes);
    }

    /// When [`Self::check`] has something to do; `None` if only an answer or a change gives it that.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        match (&self.pass, self.asked.is_empty()) {
            (_, false) => None,
            (Some(_), true) => Some(Instant::default()),
            (None, true) => self.changes.is_any().then_some(self.not_before),
        }
    }

    /// Looks at the next peers, if it is time.
    pub(super) fn check(&mut self, device: &Device, link: &mut LinkMonitor, now: Instant) {
        if self.next_timeout().is_none_or(|at| now < at) {
            return;
        }
        if self.pass.is_none() {
            let concerned = core::mem::take(&mut self.changes).into_matcher();
            self.pass = Some(Pass { concerned, last: None });
            self.not_before = now.after(SHORTEST_INTERVAL);
        }
        let (flows, looked_at) = self.next_flows(device);
        let cost = INTERVAL_PER_PEER * looked_at + INTERVAL_PER_QUESTION * flows.len() as u32;
        self.not_before = self.not_before.after(cost);
        if link.has_uid_rules() {
            // The answers would hold for datagrams of another user. Without a source, the route decides.
            self.asked.drain(..).for_each(|Question { peer, endpoint, .. }| {
                device.clear_source(peer, &endpoint);
            });
        } else if !flows.is_empty() {
            match link.ask(flows) {
                Ok(first) => {
                    for (question, number) in self.asked.iter_mut().zip(0..) {
                        question.sequence = first.wrapping_add(number);
                    }
                }
                Err(_) => self.start_over(),
            }
        }
    }

    /// The flows of the next peers concerned, and how many peers were looked at for that.
    fn next_flows(&mut self, device: &Device) -> (Vec<Flow>, u32) {
        let Some(pass) = &mut self.pass else { return (Vec::new(), 0) };
        let (mut flows, mut looked_at) = (Vec::new(), 0);
        let mut peers = device.endpoints(pass.last).take(PEERS_PER_ROUND);
        loop {
            let Some((peer, endpoint)) = peers.next() else {
                if looked_at < PEERS_PER_ROUND {
                    self.pass = None;
                }
                break;
            };
            looked_at += 1;
            pass.last = Some(peer);
            let Some(endpoint) = endpoint else { continue };
            let Some(flow) = cached_flow(&endpoint, device).filter(|flow| {
                pass.concerned.covers(*flow.to.ip()) || pass.concerned.covers(*flow.from.ip())
            }) else {
                continue;
            };
            flows.push(flow);
            self.asked.push_back(Question { sequence: 0, peer, endpoint });
            if flows.len() == QUESTIONS_PER_ROUND {
                break;
            }
        }
        (flows, looked_at as u32)
    }

    /// Forgets the source that an answer is about, unless the datagram still leaves by the interface
    /// where the peer spoke to it. If it does not leave at all, the kernel keeps the source but for
    /// EINVAL; one that is no address of ours any more is noticed when it is sent from.
    pub(super) fn answered(&mut self, device: &Device, sequence: u32, answer: Answer) {
        let Some(place) = self.asked.iter().position(|asked| asked.sequence == sequence) else {
            return;
        };
        let Some(Question { peer, endpoint, .. }) = self.asked.remove(place) else { return };
        let spoken_by = endpoint.source.map(|source| source.interface);
        let holds = match answer {
            Answer::Interface(interface) => spoken_by == Some(interface),
            Answer::Refused(errno) => errno != nix::libc::EINVAL,
        };
        if !holds {
            device.clear_source(peer, &endpoint);
        }
    }

    /// Answers that did not come were lost: asks again later.
    pub(super) fn start_over(&mut self) {
        for Question { endpoint, .. } in self.asked.drain(..) {
            let destination = endpoint.destination.ip();
            let length = if destination.is_ipv4() { 32 } else { 128 };
            if let Some(prefix) = AllowedIp::new(destination, length) {
                self.changes.add(prefix);
            }
        }
    }
}

/// The flow of a peer's datagrams, if it has a cached IPv4 source.
fn cached_flow(endpoint: &Endpoint, device: &Device) -> Option<Flow> {
    match (endpoint.source?.address, endpoint.destination) {
        (IpAddr::V4(from), SocketAddr::V4(to)) => {
            let from = SocketAddrV4::new(from, device.listen_port());
            Some(Flow { from, to, mark: device.fwmark() })
        }
        _ => None,
    }
}
