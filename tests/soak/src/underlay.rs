//! The network below the tunnel: a namespace for each node and a router between them.
//!
//! Each node has a main device with a network of its own, on which the router is the gateway to the
//! other node's, and may have a spare device with another network. What a node should have is kept
//! here, so that it can be restored after an event, as a network manager does on a real host.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use wgsep_tests::link::{Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::traffic::answers_at_once;
use wgsep_tests::wait;

/// A node's device towards the router.
pub(crate) const MAIN: &str = "main";
/// A node's second device towards the router.
pub(crate) const SPARE: &str = "spare";
/// The host part of a node's address before it is renumbered.
pub(crate) const FIRST_HOST: u8 = 1;
/// The host part of the router's addresses.
const ROUTER_HOST: u8 = 254;
/// The MTU of all devices where nothing is narrowed.
pub(crate) const MTU: u16 = 1500;

/// How long the addresses may take to be usable.
const REACH_LIMIT: Duration = Duration::from_secs(10);

/// Both families, for what is done to each.
pub(crate) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// The other one.
pub(crate) const fn opposite(side: Side) -> Side {
    match side {
        Side::Left => Side::Right,
        Side::Right => Side::Left,
    }
}

/// The option of ip(8) for a family.
pub(crate) const fn option(family: Family) -> &'static str {
    match family {
        Family::V4 => "-4",
        Family::V6 => "-6",
    }
}

/// Where a node is attached to the router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    Main,
    Spare,
}

impl Path {
    const fn device(self) -> &'static str {
        match self {
            Self::Main => MAIN,
            Self::Spare => SPARE,
        }
    }

    /// The name of the router's device at the other end.
    pub(crate) fn router_device(self, side: Side) -> String {
        let number = side as u8;
        format!("{}{number}", self.device())
    }

    const fn network(self, side: Side) -> u8 {
        match self {
            Self::Main => 70 + side as u8,
            Self::Spare => 80 + side as u8,
        }
    }

    fn address(self, side: Side, family: Family, host: u8) -> IpAddr {
        let network = self.network(side);
        match family {
            Family::V4 => [10, network, 0, host].into(),
            Family::V6 => {
                let first = 0xfd00 | u16::from(network);
                [first, 0, 0, 0, 0, 0, 0, u16::from(host)].into()
            }
        }
    }

    /// The network in which the addresses of a node are.
    pub(crate) fn prefix(self, side: Side, family: Family) -> String {
        let network = self.network(side);
        match family {
            Family::V4 => format!("10.{network}.0.0/24"),
            Family::V6 => format!("fd{network:02x}::/64"),
        }
    }

    /// The router's address, which is the node's gateway.
    pub(crate) fn gateway(self, side: Side, family: Family) -> IpAddr {
        self.address(side, family, ROUTER_HOST)
    }
}

fn with_length(address: IpAddr) -> String {
    let length = if address.is_ipv4() { 24 } else { 64 };
    format!("{address}/{length}")
}

/// The namespaces of one node and its place in the network.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) side: Side,
    pub(crate) netns: Arc<Netns>,
    /// The host part of its main addresses.
    pub(crate) host: u8,
    /// The MTU of its main device.
    pub(crate) mtu: u16,
    router: Arc<Netns>,
}

/// Two sites joined by a router.
pub(crate) fn joined() -> (Arc<Netns>, [Site; 2]) {
    let router = Netns::new();
    router.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
    let sites = [Side::Left, Side::Right].map(|side| {
        let netns = Netns::new();
        netns.run("sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0");
        // By default fragments of lost datagrams fill the kernel's memory for them, and keep it full
        // for 30 s (IPv4) and 60 s (IPv6), in which no large datagram arrives.
        netns.run("sysctl -qw net.ipv4.ipfrag_time=1 net.ipv6.ip6frag_time=1");
        let site = Site { side, netns, host: FIRST_HOST, mtu: MTU, router: Arc::clone(&router) };
        site.attach(Path::Main);
        site.restore();
        site
    });
    for family in FAMILIES {
        let to = sites[1].address(family);
        let what = format!("{to} is reached through the router");
        wait::until(&what, REACH_LIMIT, || answers_at_once(&sites[0].netns, to));
    }
    (router, sites)
}

impl Site {
    /// Its main address.
    pub(crate) fn address(&self, family: Family) -> IpAddr {
        Path::Main.address(self.side, family, self.host)
    }

    /// Makes the device of a path and the router's end of it.
    pub(crate) fn attach(&self, path: Path) {
        let (device, at_router) = (path.device(), path.router_device(self.side));
        let router = &self.router;
        self.netns.run(format!(
            "ip link add {device} type veth peer name {at_router} netns {}",
            router.name()
        ));
        // The kernel would use its own link-local addresses only after their detection.
        self.netns.run(format!("ip link set {device} addrgenmode none"));
        router.run(format!("ip link set {at_router} addrgenmode none"));
        router.run(format!("sysctl -qw net.ipv4.conf.{at_router}.rp_filter=0"));
        for family in FAMILIES {
            let address = with_length(path.gateway(self.side, family));
            router.run(format!("ip addr add {address} dev {at_router} {}", nodad(family)));
        }
        router.run(format!("ip link set {at_router} up"));
        add_link_local(router, &at_router, ROUTER_HOST);
    }

    /// Gives the main device all that it should have, whatever it has left.
    pub(crate) fn restore(&self) {
        let netns = &self.netns;
        netns.run(format!("ip link set {MAIN} mtu {} up", self.mtu));
        add_link_local(netns, MAIN, FIRST_HOST);
        for family in FAMILIES {
            let address = with_length(self.address(family));
            netns.run(format!("ip addr replace {address} dev {MAIN} {}", nodad(family)));
            self.route(Path::Main, family, "");
        }
    }

    /// Sets the MTU of the main link, at both of its ends: a veth loses what its other end cannot
    /// take. The other site learns of it from ICMP.
    pub(crate) fn set_mtu(&mut self, mtu: u16) {
        self.mtu = mtu;
        let at_router = Path::Main.router_device(self.side);
        self.router.run(format!("ip link set {at_router} mtu {mtu}"));
        self.restore();
    }

    /// Gives the main device other addresses; the old ones are removed first.
    pub(crate) fn renumber(&mut self, host: u8) {
        for family in FAMILIES {
            let old = with_length(self.address(family));
            self.netns.run(format!("ip addr del {old} dev {MAIN}"));
        }
        self.host = host;
        self.restore();
    }

    /// Makes the spare path for some families, and prefers it.
    pub(crate) fn prefer_spare(&self, families: &[Family]) {
        self.attach(Path::Spare);
        if families.contains(&Family::V6) {
            add_link_local(&self.netns, SPARE, FIRST_HOST);
        } else {
            self.netns.run(format!("sysctl -qw net.ipv6.conf.{SPARE}.disable_ipv6=1"));
        }
        self.netns.run(format!("ip link set {SPARE} up"));
        for family in families {
            let address = with_length(Path::Spare.address(self.side, *family, FIRST_HOST));
            self.netns.run(format!("ip addr add {address} dev {SPARE} {}", nodad(*family)));
            self.route(Path::Spare, *family, "metric 5");
        }
    }

    /// Adds a route to the other site, or replaces the one with these attributes.
    pub(crate) fn route(&self, path: Path, family: Family, attributes: &str) {
        let to = Path::Main.prefix(opposite(self.side), family);
        let via = path.gateway(self.side, family);
        let (ip, device) = (option(family), path.device());
        // The least preferred unless the attributes say otherwise.
        let metric = if attributes.contains("metric") { "" } else { "metric 50" };
        self.netns.run(format!(
            "ip {ip} route replace {to} via {via} dev {device} {metric} {attributes}"
        ));
    }
}

/// Without one, a router cannot ask for the neighbours of those that it forwards for.
fn add_link_local(netns: &Netns, device: &str, host: u8) {
    netns.run(format!("ip addr replace fe80::{host:x}/64 dev {device} nodad"));
}

/// What keeps an address of a family from being unusable until its duplicates are looked for.
pub(crate) const fn nodad(family: Family) -> &'static str {
    match family {
        Family::V4 => "",
        Family::V6 => "nodad",
    }
}
