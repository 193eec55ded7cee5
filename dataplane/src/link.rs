//! The network interface as rtnetlink reports it: up or down, its MTU, the names of its neighbours.
//!
//! The helper opened the socket and subscribed it to link and route changes; here it is only read,
//! and asked once for what there is. Sources: rtnetlink(7), linux/rtnetlink.h, linux/if_link.h.

use crate::netlink::{self, Message, attribute, number, split_message, word};
use crate::routes::{self, RouteMtus};
use nix::libc;
use nix::sys::socket::{MsgFlags, send};
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Length of struct ifinfomsg.
const IFINFO_LEN: usize = 16;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_NEW_NETNSID: u16 = 45;
const IFLA_NEW_IFINDEX: u16 = 49;

/// A network namespace as seen from the socket's own, which is `None`.
pub(crate) type Namespace = Option<i32>;

/// Where our interface is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Its index in a namespace.
    At(Namespace, u32),
    /// Nobody knows: the namespace that it left has another number for the new one than the socket's
    /// own, or the new one is not heard of. It is the next interface that appears anywhere with this
    /// index and its own name.
    OnTheMove(u32),
}

/// Our interface as last heard of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkState {
    /// IFF_UP.
    pub(crate) up: bool,
    /// In bytes.
    pub(crate) mtu: u32,
}

/// What a batch of messages brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// The interface's new state, if it was mentioned.
    pub(crate) link: Option<LinkState>,
    /// It was down meanwhile, whatever it is now.
    pub(crate) was_down: bool,
    /// Some route or rule changed: datagrams may leave by another interface now.
    pub(crate) routes: bool,
    /// Some link where the sockets are is another: its MTU, or what its device can do.
    pub(crate) links: bool,
    /// Some route to our interface has another MTU now.
    pub(crate) route_mtus: bool,
}

/// The netlink socket, and what it said so far.
pub(crate) struct LinkMonitor {
    socket: OwnedFd,
    place: Place,
    name: String,
    names: HashMap<u32, String>,
    /// The socket hears of the interface wherever it is moved to.
    follows_moves: bool,
    route_mtus: RouteMtus,
    /// The last question's number, and the interface that was the answer.
    question: (u32, Option<u32>),
    /// What came along with an answer, and is yet to be told.
    untold: Changes,
    buffer: Vec<u8>,
}

impl LinkMonitor {
    /// Watches the interface `name` of index `ifindex`, in the socket's own network namespace or one
    /// that it knows by number, and asks for all there are.
    ///
    /// # Errors
    /// As send(2).
    pub(crate) fn new(
        socket: OwnedFd,
        (namespace, ifindex): (Namespace, u32),
        follows_moves: bool,
        name: &str,
    ) -> nix::Result<Self> {
        let monitor = Self {
            socket,
            place: Place::At(namespace, ifindex),
            name: name.to_owned(),
            names: HashMap::new(),
            follows_moves,
            route_mtus: RouteMtus::default(),
            question: (0, None),
            untold: Changes::default(),
            buffer: vec![0; 64 * 1024],
        };
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
        monitor.send(&netlink::message(libc::RTM_GETLINK, flags, 0, &[0; IFINFO_LEN], &[]))?;
        Ok(monitor)
    }

    fn send(&self, request: &[u8]) -> nix::Result<()> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        send(self.socket.as_raw_fd(), request, flags).map(drop)
    }

    /// Reads everything that waits.
    pub(crate) fn read(&mut self) -> Changes {
        let mut changes = core::mem::take(&mut self.untold);
        let mut buffer = core::mem::take(&mut self.buffer);
        loop {
            match crate::sys::receive_netlink(self.socket.as_fd(), &mut buffer) {
                Ok((len, namespace)) => {
                    self.parse(buffer.get(..len).unwrap_or_default(), namespace, &mut changes);
                }
                // Overrun: something was lost, so whatever depends on routes starts anew.
                Err(nix::Error::ENOBUFS) => (changes.routes, changes.links) = (true, true),
                Err(nix::Error::EINTR) => {}
                Err(_) => break,
            }
        }
        self.buffer = buffer;
        changes
    }

    /// True if the interface may be where the socket hears nothing of it: a namespace that has no number
    /// in the socket's own is not heard of.
    pub(crate) const fn is_out_of_hearing(&self) -> bool {
        match self.place {
            Place::At(None, _) => false,
            Place::At(Some(_), _) => !self.follows_moves,
            Place::OnTheMove(_) => true,
        }
    }

    /// The interface by which a datagram with this source, destination and mark leaves; `None` if
    /// there is no way from there. The kernel answers at once.
    pub(crate) fn leaves_by(&mut self, from: Ipv4Addr, to: Ipv4Addr, mark: u32) -> Option<u32> {
        let number = self.question.0.wrapping_add(1).max(1);
        self.question = (number, None);
        self.send(&routes::question(number, from, to, mark)).ok()?;
        self.untold = self.read();
        self.question.1
    }

    /// Whether an answer brought along something that only [`Self::read`] tells.
    pub(crate) fn has_untold(&self) -> bool {
        self.untold != Changes::default()
    }

    /// The MTUs of routes to our interface.
    pub(crate) const fn route_mtus(&self) -> &RouteMtus {
        &self.route_mtus
    }

    fn parse(&mut self, mut bytes: &[u8], namespace: Namespace, changes: &mut Changes) {
        while let Some((message, rest)) = split_message(bytes) {
            bytes = rest;
            let Message { kind, body, .. } = message;
            match kind {
                libc::RTM_NEWLINK => self.link_changed(body, namespace, changes),
                libc::RTM_DELLINK => self.link_left(body, namespace, changes),
                libc::RTM_NEWROUTE | libc::RTM_DELROUTE => {
                    self.route_changed(&message, namespace, changes);
                }
                // Rules and routes count where the sockets are.
                RTM_NEWRULE | RTM_DELRULE if namespace.is_none() => changes.routes = true,
                _ => {}
            }
        }
    }

    fn route_changed(
        &mut self,
        message: &Message<'_>,
        namespace: Namespace,
        changes: &mut Changes,
    ) {
        if let Some(interface) = routes::answer(message.body) {
            if message.sequence == self.question.0 {
                self.question.1 = Some(interface);
            }
            return;
        }
        changes.routes |= namespace.is_none();
        if let Place::At(ours, interface) = self.place
            && ours == namespace
        {
            changes.route_mtus |= self.route_mtus.changed(message.kind, message.body, interface);
        }
    }

    fn link_changed(&mut self, body: &[u8], namespace: Namespace, changes: &mut Changes) {
        let (Some(ifindex), Some(flags)) = (word(body, 4), word(body, 8)) else { return };
        let attributes = body.get(IFINFO_LEN..).unwrap_or_default();
        let name = attribute(attributes, IFLA_IFNAME).unwrap_or_default();
        let name = String::from_utf8_lossy(name.strip_suffix(&[0]).unwrap_or(name));
        if self.place == Place::OnTheMove(ifindex) && name == self.name {
            self.place = Place::At(namespace, ifindex);
        }
        if self.place == Place::At(namespace, ifindex) {
            let mtu = number(attributes, IFLA_MTU).unwrap_or(0);
            let up = flags & libc::IFF_UP as u32 != 0;
            changes.link = Some(LinkState { up, mtu });
            changes.was_down |= !up;
            changes.route_mtus |= !up && self.route_mtus.clear();
            name.as_ref().clone_into(&mut self.name);
        }
        if namespace.is_none() {
            changes.links = true;
            self.names.insert(ifindex, name.into_owned());
        }
    }

    /// An interface was deleted, or moved to another namespace; ours is followed there.
    fn link_left(&mut self, body: &[u8], namespace: Namespace, changes: &mut Changes) {
        let Some(ifindex) = word(body, 4) else { return };
        if namespace.is_none() {
            changes.links = true;
            self.names.remove(&ifindex);
        }
        if self.place != Place::At(namespace, ifindex) {
            return;
        }
        changes.route_mtus |= self.route_mtus.clear();
        let attributes = body.get(IFINFO_LEN..).unwrap_or_default();
        let Some(new_namespace) = number(attributes, IFLA_NEW_NETNSID) else { return };
        let new_ifindex = number(attributes, IFLA_NEW_IFINDEX).unwrap_or(ifindex);
        self.place = match namespace {
            None if self.follows_moves => Place::At(Some(new_namespace.cast_signed()), new_ifindex),
            _ => Place::OnTheMove(new_ifindex),
        };
    }

    /// The index of an interface of this name or number.
    pub(crate) fn index_of(&self, name: &str) -> Option<u32> {
        let named = self.names.iter().find(|(_, known)| known.as_str() == name);
        // Digits alone: `parse` would also take a sign.
        let number = || name.bytes().all(|byte| byte.is_ascii_digit()).then(|| name.parse().ok());
        named.map(|(index, _)| *index).or_else(|| number().flatten())
    }

    /// The name of the interface with this index.
    #[cfg(test)]
    pub(crate) fn name_of(&self, ifindex: u32) -> Option<String> {
        self.names.get(&ifindex).cloned()
    }
}

impl AsFd for LinkMonitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    fn monitor() -> LinkMonitor {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let (ours, _kernels) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        LinkMonitor {
            socket: ours,
            place: Place::At(None, 7),
            name: "wg0".to_owned(),
            names: HashMap::new(),
            follows_moves: true,
            route_mtus: RouteMtus::default(),
            question: (0, None),
            untold: Changes::default(),
            buffer: Vec::new(),
        }
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

    #[test]
    fn our_links_state_and_every_links_name_are_read() {
        let mut monitor = monitor();
        let mut changes = Changes::default();
        let mut bytes = link_message(libc::RTM_NEWLINK, 7, libc::IFF_UP as u32);
        bytes.extend(link_message(libc::RTM_NEWLINK, 8, 0));
        monitor.parse(&bytes, None, &mut changes);
        assert_eq!(changes.link, Some(LinkState { up: true, mtu: 1420 }));
        assert!(!changes.routes);
        assert_eq!(monitor.index_of("wg0").map(|index| index == 7 || index == 8), Some(true));
        assert_eq!(monitor.index_of("12"), Some(12));
        for odd in ["+3", "-3", "", "4294967296", "3 "] {
            assert_eq!(monitor.index_of(odd), None, "{odd:?}");
        }
        assert_eq!(monitor.name_of(8).as_deref(), Some("wg0"));
        monitor.parse(&link_message(libc::RTM_DELLINK, 8, 0), None, &mut changes);
        assert_eq!(monitor.name_of(8), None);
        monitor.parse(&link_message(libc::RTM_NEWROUTE, 0, 0), None, &mut changes);
        assert!(changes.routes);
    }

    #[test]
    fn where_moves_are_not_followed_the_interface_is_out_of_hearing_until_it_returns() {
        let (mut monitor, mut changes) = (monitor(), Changes::default());
        monitor.follows_moves = false;
        let more = [(IFLA_NEW_NETNSID, 3), (IFLA_NEW_IFINDEX, 9)];
        monitor.parse(&moving_message(libc::RTM_DELLINK, 7, 0, &more), None, &mut changes);
        assert!(monitor.is_out_of_hearing());
        monitor.parse(&link_message(libc::RTM_NEWLINK, 9, 1), None, &mut changes);
        assert!(!monitor.is_out_of_hearing() && changes.link.is_some_and(|link| link.up));
    }

    #[test]
    fn a_short_while_down_is_not_missed() {
        let (mut monitor, mut changes) = (monitor(), Changes::default());
        let mut bytes = link_message(libc::RTM_NEWLINK, 7, 0);
        bytes.extend(link_message(libc::RTM_NEWLINK, 7, libc::IFF_UP as u32));
        monitor.parse(&bytes, None, &mut changes);
        assert!(changes.was_down && changes.link.is_some_and(|link| link.up));
    }

    #[test]
    fn the_same_index_in_another_namespace_is_another_interface() {
        let (mut monitor, mut changes) = (monitor(), Changes::default());
        monitor.parse(&link_message(libc::RTM_NEWLINK, 7, 1), Some(3), &mut changes);
        monitor.parse(&link_message(libc::RTM_NEWROUTE, 0, 0), Some(3), &mut changes);
        assert_eq!(changes, Changes::default());
        assert_eq!(monitor.name_of(7), None);
    }

    #[test]
    fn our_interface_is_followed_to_other_namespaces_and_back() {
        let (mut monitor, mut changes) = (monitor(), Changes::default());
        let leave = |ifindex, namespace, new_ifindex| {
            let more = [(IFLA_NEW_NETNSID, namespace), (IFLA_NEW_IFINDEX, new_ifindex)];
            moving_message(libc::RTM_DELLINK, ifindex, 0, &more)
        };
        monitor.parse(&leave(7, 3, 9), None, &mut changes);
        monitor.parse(&link_message(libc::RTM_NEWLINK, 7, 1), None, &mut changes);
        monitor.parse(&link_message(libc::RTM_NEWLINK, 9, 1), Some(4), &mut changes);
        assert_eq!(changes.link, None);
        monitor.parse(&link_message(libc::RTM_NEWLINK, 9, 1), Some(3), &mut changes);
        assert_eq!(changes.link, Some(LinkState { up: true, mtu: 1420 }));
        monitor.parse(&leave(9, 0, 7), Some(3), &mut changes);
        monitor.parse(&link_message(libc::RTM_NEWLINK, 7, 0), None, &mut changes);
        assert_eq!(changes.link, Some(LinkState { up: false, mtu: 1420 }));
    }

    #[test]
    fn an_mtu_of_a_route_counts_where_our_interface_is_and_while_it_is_up() {
        let (mut monitor, mut changes) = (monitor(), Changes::default());
        let body = routes::tests::route(1, 7, 0, 1299);
        let route = netlink::message(libc::RTM_NEWROUTE, 0, 0, &body, &[]);
        monitor.parse(&route, Some(3), &mut changes);
        assert_eq!(changes, Changes::default());
        monitor.parse(&route, None, &mut changes);
        assert!(changes.routes && changes.route_mtus);
        let mut changes = Changes::default();
        monitor.parse(&link_message(libc::RTM_NEWLINK, 7, 1), None, &mut changes);
        assert!(!changes.route_mtus);
        monitor.parse(&link_message(libc::RTM_NEWLINK, 7, 0), None, &mut changes);
        assert!(changes.route_mtus, "the routes went with the link");
    }

    #[test]
    fn rules_count_as_routes() {
        let (mut monitor, mut changes) = (monitor(), Changes::default());
        monitor.parse(&netlink::message(RTM_NEWRULE, 0, 0, &[0; 12], &[]), None, &mut changes);
        assert!(changes.routes);
    }

    #[test]
    fn cut_and_lying_messages_end_the_parse_without_harm() {
        let whole = link_message(libc::RTM_NEWLINK, 7, 1);
        for len in 0..whole.len() {
            monitor().parse(&whole[..len], None, &mut Changes::default());
        }
        for (at, byte) in (0..whole.len()).flat_map(|at| [(at, 0), (at, 1), (at, 0xff)]) {
            let mut bad = whole.clone();
            bad[at] = byte;
            monitor().parse(&bad, None, &mut Changes::default());
        }
    }
}
