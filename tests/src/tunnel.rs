//! A configured tunnel between two daemons, each in a namespace of its own.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use crate::daemon::Daemon;
use crate::implementation::Implementation;
use crate::link::{self, Family, Side};
use crate::netns::Netns;
use crate::wg::{KeyPair, preshared_key, with_input};

/// The port an end listens on, unless both are in one namespace.
pub const PORT: u16 = 51820;

/// What a tunnel is to be.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The daemon on the left.
    pub left: Implementation,
    /// The daemon on the right.
    pub right: Implementation,
    /// The family of the endpoints.
    pub outer: Family,
    /// Whether both share a preshared key.
    pub preshared: bool,
    /// Who knows the other's endpoint, and so can begin.
    pub knows_endpoint: Knows,
}

/// Which ends are configured with the other's endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Knows {
    /// Both.
    Both,
    /// Only this one; the other must learn it from the first handshake.
    Only(Side),
}

impl Plan {
    /// A tunnel over IPv4 without a preshared key, whose ends know each other's endpoint.
    #[must_use]
    pub fn new(left: Implementation, right: Implementation) -> Self {
        Self { left, right, outer: Family::V4, preshared: false, knows_endpoint: Knows::Both }
    }

    /// Starts and configures both ends.
    #[track_caller]
    #[must_use]
    pub fn build(&self) -> Tunnel {
        let (left, right) = link::joined();
        let left = End::new(Side::Left, Daemon::start(self.left, &left));
        let right = End::new(Side::Right, Daemon::start(self.right, &right));
        let psk = self.preshared.then(preshared_key);
        for (end, other) in [(&left, &right), (&right, &left)] {
            let known = matches!(self.knows_endpoint, Knows::Both)
                || self.knows_endpoint == Knows::Only(end.side);
            let endpoint = known.then(|| other.endpoint(self.outer));
            end.configure(&other.key.public, endpoint, psk.as_deref());
        }
        Tunnel { left, right }
    }
}

/// Two daemons of a kind whose sockets share the loopback device of one namespace, while each
/// interface has a namespace with nothing else in it: the network between them neither loses nor
/// delays. Both have keys, ports and each other as a peer; neither has an endpoint.
#[track_caller]
#[must_use]
pub fn over_loopback(implementation: Implementation) -> (Arc<Netns>, Tunnel) {
    let middle = Netns::new();
    let [left, right] = [Side::Left, Side::Right].map(|side| {
        let mut end = End::new(side, Daemon::start(implementation, &middle));
        end.port += side as u16;
        end.daemon.move_interface(&Netns::new());
        end
    });
    left.configure(&right.key.public, None, None);
    right.configure(&left.key.public, None, None);
    (middle, Tunnel { left, right })
}

/// Two daemons of a kind in two namespaces, each with key and port and the other as a peer, neither
/// with an endpoint.
#[track_caller]
#[must_use]
pub fn between(left: &Arc<Netns>, right: &Arc<Netns>, implementation: Implementation) -> Tunnel {
    let left = End::new(Side::Left, Daemon::start(implementation, left));
    let right = End::new(Side::Right, Daemon::start(implementation, right));
    left.configure(&right.key.public, None, None);
    right.configure(&left.key.public, None, None);
    Tunnel { left, right }
}

/// A tunnel between two daemons. Nothing has been sent through it yet.
#[derive(Debug)]
pub struct Tunnel {
    /// The end numbered 1.
    pub left: End,
    /// The end numbered 2.
    pub right: End,
}

impl Tunnel {
    /// Tells each end of a tunnel over loopback where the other is.
    #[track_caller]
    pub fn know_each_other(&self, outer: Family) {
        for (end, other) in self.directions() {
            end.set_peer(other, format!("endpoint {}", other.on_loopback(outer)));
        }
    }

    /// Both ends, each with the other.
    pub fn directions(&self) -> [(&End, &End); 2] {
        [(&self.left, &self.right), (&self.right, &self.left)]
    }
}

/// One end of a tunnel.
#[derive(Debug)]
pub struct End {
    /// Which of the two, and thereby its addresses.
    pub side: Side,
    /// Its static key.
    pub key: KeyPair,
    /// The daemon.
    pub daemon: Daemon,
    /// The port it listens on.
    pub port: u16,
}

impl End {
    /// An end with a fresh key and nothing configured.
    #[track_caller]
    #[must_use]
    pub fn new(side: Side, daemon: Daemon) -> Self {
        Self { side, key: KeyPair::generate(), daemon, port: PORT }
    }

    /// Where the other end finds this one.
    #[must_use]
    pub fn endpoint(&self, outer: Family) -> SocketAddr {
        SocketAddr::new(self.side.outer(outer), self.port)
    }

    /// Where the other end finds this one if both have their sockets in one namespace.
    #[must_use]
    pub fn on_loopback(&self, outer: Family) -> SocketAddr {
        let address = match outer {
            Family::V4 => Ipv4Addr::LOCALHOST.into(),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        };
        SocketAddr::new(address, self.port)
    }

    /// Sets key, port and the one peer, gives the interface its addresses and takes it up.
    #[track_caller]
    pub fn configure(&self, peer: &str, endpoint: Option<SocketAddr>, psk: Option<&str>) {
        self.set_keys(peer, endpoint, psk);
        self.take_up();
    }

    /// Sets key, port and the one peer.
    #[track_caller]
    pub fn set_keys(&self, peer: &str, endpoint: Option<SocketAddr>, psk: Option<&str>) {
        let other = if self.side == Side::Left { Side::Right } else { Side::Left };
        let mut text = format!(
            "[Interface]\nPrivateKey = {}\nListenPort = {}\n\
             [Peer]\nPublicKey = {peer}\nAllowedIPs = {}/32, {}/128\n",
            self.key.private,
            self.port,
            other.inner(Family::V4),
            other.inner(Family::V6),
        );
        if let Some(psk) = psk {
            text.push_str(&format!("PresharedKey = {psk}\n"));
        }
        if let Some(endpoint) = endpoint {
            text.push_str(&format!("Endpoint = {endpoint}\n"));
        }
        self.daemon.wg_conf("setconf", &text);
    }

    /// Gives the interface its addresses, takes it up, and waits until it listens.
    #[track_caller]
    pub fn take_up(&self) {
        let (netns, interface) = (&self.daemon.netns, &self.daemon.interface);
        let (v4, v6) = (self.side.inner(Family::V4), self.side.inner(Family::V6));
        netns.run(format!("ip addr add {v4}/24 dev {interface}"));
        netns.run(format!("ip addr add {v6}/64 dev {interface} nodad"));
        netns.run(format!("ip link set {interface} up"));
        // The port is open a moment after the command returns, and before wgsep answers wg(8).
        self.daemon.wg("show", "listen-port");
    }

    /// `wg set INTERFACE peer THE-OTHER ARGUMENTS`.
    #[track_caller]
    pub fn set_peer(&self, other: &End, arguments: impl AsRef<str>) {
        self.daemon.wg_set(format!("peer {} {}", other.key.public, arguments.as_ref()));
    }

    /// `wg set` of a peer's preshared key and allowed IPs.
    #[track_caller]
    pub fn set_peer_key(&self, peer: &str, psk: &str, allowed_ips: &str) {
        let interface = &self.daemon.interface;
        let peer = format!("peer {peer} preshared-key /dev/stdin allowed-ips {allowed_ips}");
        with_input(&format!("wg set {interface} {peer}"), psk);
    }
}
