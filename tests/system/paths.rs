//! What one network path refuses costs that path alone, and only for as long as it does: a hub with a
//! peer A behind a router, and a peer B beside it. What leaves the hub's veth for a peer is as long as
//! what was sent at once, so that the mean length tells whether the kernel segments it.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::Family;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::run;
use wgsep_tests::skip::skip;
use wgsep_tests::traffic::{Pings, ping, until_ping};
use wgsep_tests::tunnel::PORT;
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{require, wait};

const STREAM_LEN: usize = 4 << 20;
const LIMIT: Duration = Duration::from_secs(20);
/// Bytes in a packet on the veth, on average, that only several datagrams in one send can be.
const SEGMENTED: u64 = 3000;
const REFUSED: &str = "UDP segmentation offload refused";
const REGAINED: &str = "UDP segmentation offload is in use again on the path to";

/// The hub's devices towards A, by way of the router, and towards B.
const TO_A: &str = "to-a";
const TO_B: &str = "to-b";

/// One of the three ends.
struct Node {
    daemon: Daemon,
    key: KeyPair,
    outer: IpAddr,
    inner: IpAddr,
}

struct Hub {
    hub: Node,
    a: Node,
    b: Node,
    router: Arc<Netns>,
}

/// An address of one of the three networks: hub and router, router and A, hub and B.
fn address(family: Family, network: u16, number: u16) -> IpAddr {
    match family {
        Family::V4 => [10, 78, network as u8, number as u8].into(),
        Family::V6 => [0xfd08, 0, 0, network, 0, 0, 0, number].into(),
    }
}

fn add_address(netns: &Netns, device: &str, address: IpAddr) {
    let (length, nodad) = if address.is_ipv4() { (24, "") } else { (64, "nodad") };
    netns.run(format!("ip addr add {address}/{length} dev {device} {nodad}"));
}

fn join(left: (&Netns, &str, IpAddr), right: (&Netns, &str, IpAddr)) {
    let ((netns, device, _), (other, other_device, _)) = (left, right);
    let peer = format!("{other_device} netns {}", other.name());
    netns.run(format!("ip link add {device} type veth peer name {peer}"));
    for (netns, device, address) in [left, right] {
        add_address(netns, device, address);
        netns.run(format!("ip link set {device} up"));
    }
}

impl Node {
    fn new(netns: &Arc<Netns>, outer: IpAddr, inner: u8) -> Self {
        let (daemon, key) = (Daemon::start(Wgsep, netns), KeyPair::generate());
        Self { daemon, key, outer, inner: [192, 168, 78, inner].into() }
    }

    fn configure(&self, peers: &[(&Self, &str, IpAddr)]) {
        let mut text =
            format!("[Interface]\nPrivateKey = {}\nListenPort = {PORT}\n", self.key.private);
        for (peer, allowed_ips, endpoint) in peers {
            let endpoint = SocketAddr::new(*endpoint, PORT);
            text.push_str(&format!(
                "[Peer]\nPublicKey = {}\nAllowedIPs = {allowed_ips}\nEndpoint = {endpoint}\n",
                peer.key.public
            ));
        }
        let Daemon { netns, interface, .. } = &self.daemon;
        self.daemon.wg_conf("setconf", &text);
        netns.run(format!("ip addr add {}/24 dev {interface}", self.inner));
        netns.run(format!("ip link set {interface} mtu 1420 up"));
        self.daemon.wg("show", "listen-port");
    }
}

impl Hub {
    #[track_caller]
    fn new(family: Family) -> Self {
        let [hub, router, a, b] = [(); 4].map(|()| Netns::new());
        let at = |network, number| address(family, network, number);
        join((&hub, TO_A, at(1, 1)), (&router, "to-hub", at(1, 9)));
        join((&router, TO_A, at(2, 9)), (&a, "to-hub", at(2, 2)));
        join((&hub, TO_B, at(3, 1)), (&b, "to-hub", at(3, 2)));
        router.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        for (netns, via) in [(&hub, at(1, 9)), (&a, at(2, 9))] {
            netns.run(format!("ip route add default via {via}"));
        }
        let (hub, a, b) =
            (Node::new(&hub, at(1, 1), 1), Node::new(&a, at(2, 2), 2), Node::new(&b, at(3, 2), 3));
        hub.configure(&[(&a, "192.168.78.2/32", a.outer), (&b, "192.168.78.3/32", b.outer)]);
        a.configure(&[(&hub, "192.168.78.0/24", at(1, 1))]);
        b.configure(&[(&hub, "192.168.78.0/24", at(3, 1))]);
        for peer in [&a, &b] {
            until_ping(&hub.daemon.netns, peer.inner);
        }
        let hub = Self { hub, a, b, router };
        assert!(hub.is_segmented(&hub.a, TO_A) && hub.is_segmented(&hub.b, TO_B), "to begin with");
        assert_eq!(hub.offloads(), "all in use");
        hub
    }

    fn netns(&self) -> &Netns {
        &self.hub.daemon.netns
    }

    /// Sends a stream to a peer; whether the kernel segmented what left by the device for it.
    #[track_caller]
    fn is_segmented(&self, peer: &Node, device: &str) -> bool {
        let before = self.sent(device);
        send_stream(self.netns(), peer);
        let after = self.sent(device);
        let (bytes, packets) = (after.0 - before.0, after.1 - before.1);
        assert!(bytes > STREAM_LEN as u64, "only {bytes} bytes left by {device}");
        bytes / packets > SEGMENTED
    }

    fn sent(&self, device: &str) -> (u64, u64) {
        let text = self.netns().run(format!("ip -s -j link show {device}"));
        let links: serde_json::Value = serde_json::from_str(&text).unwrap();
        let tx = &links[0]["stats64"]["tx"];
        (tx["bytes"].as_u64().unwrap(), tx["packets"].as_u64().unwrap())
    }

    /// What `wgsep stats` says of offloads.
    fn offloads(&self) -> String {
        let mut stats = self.netns().command(wgsep_program("wgsep"));
        let text = run(stats.args(["stats", &self.hub.daemon.interface]));
        let (_, offloads) = text.lines().next().unwrap().split_once("offloads: ").unwrap();
        offloads.to_owned()
    }

    #[track_caller]
    fn assert_logged(&self, line: &str, times: usize) {
        let log = self.hub.daemon.process.log();
        assert_eq!(log.matches(line).count(), times, "{line:?} in:\n{log}");
    }

    /// A is refused, B is not, and what is said is that, and by what.
    #[track_caller]
    fn assert_only_a_is_refused(&self, by: &str) {
        assert!(!self.is_segmented(&self.a, TO_A), "A's path takes it");
        assert!(self.is_segmented(&self.b, TO_B), "B pays for A's path");
        assert!(!self.is_segmented(&self.a, TO_A), "what B's path takes is nothing of A's");
        assert_eq!(self.offloads(), "udp_gso for all but 1 peer; the log says why");
        self.assert_logged(
            &format!("{}: {REFUSED} {by}on the path to {}", self.a.key.name(), self.a.outer),
            1,
        );
        self.assert_logged(REFUSED, 1);
    }

    #[track_caller]
    fn assert_a_is_back(&self) {
        wait::until("A's path is tried again", LIMIT, || self.is_segmented(&self.a, TO_A));
        assert_eq!(self.offloads(), "all in use");
        self.assert_logged(&format!("{}: {REGAINED} {}", self.a.key.name(), self.a.outer), 1);
        self.assert_logged(REGAINED, 1);
    }
}

#[track_caller]
fn send_stream(from: &Netns, to: &Node) {
    // Any port: the child of another test has the listener of the call before until it executes its program.
    let listener = to.daemon.netns.inside(|| TcpListener::bind((to.inner, 0))).unwrap();
    let address = listener.local_addr().unwrap();
    let mut sender = from.inside(|| TcpStream::connect_timeout(&address, LIMIT)).unwrap();
    let (mut receiver, _) = listener.accept().unwrap();
    receiver.set_read_timeout(Some(LIMIT)).unwrap();
    sender.set_write_timeout(Some(LIMIT)).unwrap();
    thread::scope(|scope| {
        scope.spawn(move || sender.write_all(&vec![7; STREAM_LEN]).unwrap());
        let mut received = Vec::with_capacity(STREAM_LEN);
        receiver.read_to_end(&mut received).unwrap();
        assert_eq!(received.len(), STREAM_LEN);
    });
}

#[test]
fn a_narrow_path_over_ipv6_costs_its_peer_alone_and_until_it_is_wide_again() {
    require!(Wgsep);
    let hub = Hub::new(Family::V6);
    hub.router.run(format!("ip link set {TO_A} mtu 1480"));
    // The first datagram too long for it brings the router's message, and is lost with those behind it.
    send_stream(hub.netns(), &hub.a);
    hub.assert_only_a_is_refused("");
    hub.router.run(format!("ip link set {TO_A} mtu 1500"));
    hub.netns().run("ip -6 route flush cache");
    // Any route: which path it changes is not known.
    hub.netns().run("ip route add 2001:db8::/64 dev lo");
    hub.assert_a_is_back();
}

#[test]
fn a_narrow_device_costs_the_peers_behind_it_alone_and_until_it_is_wide_again() {
    require!(Wgsep);
    for family in [Family::V4, Family::V6] {
        let hub = Hub::new(family);
        hub.netns().run(format!("ip link set {TO_A} mtu 1400"));
        hub.assert_only_a_is_refused("");
        hub.netns().run(format!("ip link set {TO_A} mtu 1500"));
        hub.assert_a_is_back();
    }
}

/// Routers fragment what is sent over IPv4, as the bit that forbids it is not set.
#[test]
fn a_narrow_path_over_ipv4_costs_nothing() {
    require!(Wgsep);
    let hub = Hub::new(Family::V4);
    hub.router.run(format!("ip link set {TO_A} mtu 1400"));
    assert!(hub.is_segmented(&hub.a, TO_A) && hub.is_segmented(&hub.b, TO_B));
    hub.hub.daemon.netns.run(format!("ip link set {TO_A} mtu 1300"));
    // Narrower than the router's: what does not fit is fragmented here.
    assert!(!hub.is_segmented(&hub.a, TO_A));
    assert_eq!(hub.offloads(), "udp_gso for all but 1 peer; the log says why");
}

/// A send with UDP_SEGMENT passes the output hook as one long packet.
#[test]
fn a_filter_that_drops_long_packets_costs_the_peer_that_it_matches_segmentation_only() {
    require!(Wgsep);
    let hub = Hub::new(Family::V4);
    let rule = format!("ip daddr {} udp dport {PORT} meta length > 1500 drop", hub.a.outer);
    hub.netns().run("nft add table inet lengths");
    hub.netns().run("nft add chain inet lengths out { type filter hook output priority 0 ; }");
    hub.netns().run(format!("nft add rule inet lengths out {rule}"));
    hub.assert_only_a_is_refused("by a packet filter of this host ");
    hub.netns().run("nft delete table inet lengths");
    hub.netns().run("ip route add 198.51.100.0/24 dev lo");
    hub.assert_a_is_back();
}

/// As a policer does, or a rule that is in force for a moment.
#[test]
fn a_filter_that_drops_one_packet_in_fifty_costs_no_segmentation() {
    require!(Wgsep);
    let hub = Hub::new(Family::V4);
    hub.netns().run("nft add table inet some");
    hub.netns().run("nft add chain inet some out { type filter hook output priority 0 ; }");
    let rule = "meta length > 1500 numgen inc mod 50 == 0 counter drop";
    let added = hub.netns().output(format!("nft add rule inet some out {rule}"));
    if !added.status.success() {
        return skip("the kernel lacks nft_numgen");
    }
    let mut rounds = 0..20;
    let has_dropped = || !hub.netns().run("nft list table inet some").contains("packets 0 ");
    while rounds.next().is_some() && !has_dropped() {
        assert!(hub.is_segmented(&hub.a, TO_A));
    }
    assert!(has_dropped(), "the filter has dropped something");
    assert!(hub.is_segmented(&hub.a, TO_A));
    assert_eq!(hub.offloads(), "all in use");
    hub.assert_logged(REFUSED, 0);
}

/// What waits for the slow link is as much as its queue holds, and fits into the socket's send buffer
/// beside what goes to others.
#[test]
fn a_congested_link_keeps_no_datagrams_to_other_peers_out() {
    const LEN: usize = 1372;
    const QUEUED: usize = 32 << 20;
    require!(Wgsep);
    let hub = Hub::new(Family::V4);
    let netns = hub.netns();
    let queue = format!("tbf rate 2mbit burst 100k limit {QUEUED}");
    let shaped = netns.output(format!("tc qdisc add dev {TO_A} root {queue}"));
    if !shaped.status.success() {
        return skip("the kernel lacks sch_tbf");
    }
    let (sender, to) = (netns.inside(|| UdpSocket::bind("0.0.0.0:0")).unwrap(), hub.a.inner);
    let (is_full, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
    let dropped = || {
        let shown = netns.run(format!("tc -s qdisc show dev {TO_A}"));
        let (_, behind) = shown.split_once("dropped ").unwrap();
        behind.split(',').next().unwrap().parse::<u64>().unwrap()
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            let end = Instant::now() + 3 * LIMIT;
            while !is_over.load(Ordering::Relaxed) && Instant::now() < end {
                let _dropped_here = sender.send_to(&[0; LEN], (to, 9));
                if is_full.load(Ordering::Relaxed) {
                    // Three times the link's rate keep its queue full, and that of the TUN device empty.
                    thread::sleep(Duration::from_millis(2));
                }
            }
        });
        wait::until("the queue has dropped packets", LIMIT, || dropped() > 0);
        is_full.store(true, Ordering::Relaxed);
        // What was sent faster may still be in the queue of the TUN device, which the pings share.
        wait::until("20 pings of 20 are answered while the queue drops", LIMIT, || {
            let before = dropped();
            let Pings { sent, received, .. } = ping(netns, hub.b.inner, 20);
            received == sent && dropped() > before
        });
        is_over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_forged_packet_too_big_changes_nothing_over_ipv4() {
    require!(Wgsep);
    let hub = Hub::new(Family::V4);
    for peer in [&hub.a, &hub.b] {
        forge_packet_too_big(&hub, peer.outer);
    }
    for (peer, device) in [(&hub.a, TO_A), (&hub.b, TO_B)] {
        assert!(hub.is_segmented(peer, device), "{} pays for a forged message", peer.outer);
    }
    assert_eq!(hub.offloads(), "all in use");
    hub.assert_logged(REFUSED, 0);
}

#[test]
fn a_forged_packet_too_big_costs_one_destination_over_ipv6_for_a_while() {
    require!(Wgsep);
    let hub = Hub::new(Family::V6);
    forge_packet_too_big(&hub, hub.a.outer);
    hub.assert_only_a_is_refused("");
    // As after the ten minutes for which the kernel believes it, and the two for which we do.
    hub.netns().run("ip -6 route flush cache");
    hub.netns().run("ip route add 2001:db8::/64 dev lo");
    hub.assert_a_is_back();
}

/// The router says of a datagram from the hub to `destination` that it is longer than 1300 bytes. That
/// takes no key: addresses and ports are all that it quotes.
#[track_caller]
fn forge_packet_too_big(hub: &Hub, destination: IpAddr) {
    let believed = || hub.netns().run(format!("ip route get {destination}")).contains("mtu 1300");
    let mut quoted_udp = [PORT.to_be_bytes(); 2].concat();
    quoted_udp.extend([5, 0xb4, 0, 0]);
    let (family, protocol, message, to) = match (hub.hub.outer, destination) {
        (IpAddr::V4(to), IpAddr::V4(destination)) => {
            let source = if destination.octets()[2] == 3 { [10, 78, 3, 1] } else { to.octets() };
            // Type 3, code 4, and the MTU in the last two bytes.
            let mut message = vec![3, 4, 0, 0, 0, 0, 5, 0x14];
            message.extend([0x45, 0, 5, 0xc8, 0, 1, 0, 0, 64, 17, 0, 0]);
            message.extend(source.into_iter().chain(destination.octets()).chain(quoted_udp));
            let sum = checksum(&message);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
            (AddressFamily::Inet, SockProtocol::Icmp, message, to.into())
        }
        (IpAddr::V6(to), IpAddr::V6(destination)) => {
            // Type 2, code 0; the kernel adds the checksum.
            let mut message = vec![2, 0, 0, 0, 0, 0, 5, 0x14];
            message.extend([0x60, 0, 0, 0, 5, 0xb4, 17, 64]);
            message.extend(to.octets().into_iter().chain(destination.octets()).chain(quoted_udp));
            (AddressFamily::Inet6, SockProtocol::IcmpV6, message, IpAddr::V6(to))
        }
        _ => panic!("two families"),
    };
    let received = icmp_received(hub.netns(), family);
    hub.router.inside(|| {
        let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).unwrap();
        let to = SockaddrStorage::from(SocketAddr::new(to, 0));
        sendto(socket.as_raw_fd(), &message, &to, MsgFlags::empty()).unwrap();
    });
    wait::until("the message has arrived", LIMIT, || icmp_received(hub.netns(), family) > received);
    if family == AddressFamily::Inet6 {
        wait::until("the kernel believes it", LIMIT, believed);
    }
}

/// How many messages of this kind the namespace has received.
fn icmp_received(netns: &Netns, family: AddressFamily) -> u64 {
    let counter =
        if family == AddressFamily::Inet { "IcmpInDestUnreachs" } else { "Icmp6InPktTooBigs" };
    let text = netns.run(format!("nstat -asz {counter}"));
    let line = text.lines().find(|line| line.starts_with(counter)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or_default()));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}
