//! `--listen-address` and `--bind-device`: where the UDP sockets are, after each opening of them.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::{Wgsep, WireguardGo};
use wgsep_tests::implementation::wgsep_program;
use wgsep_tests::link::{self, DEVICE, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::traffic::{answers_at_once, until_ping};
use wgsep_tests::tunnel::{End, PORT};
use wgsep_tests::wg::KeyPair;
use wgsep_tests::{require, wait};

const LIMIT: Duration = Duration::from_secs(20);
/// Further addresses of the left end.
const SECOND: &str = "10.77.0.11";
const THIRD: &str = "10.77.0.12";

/// Two linked namespaces, of which the left one has three IPv4 addresses.
fn host() -> (Arc<Netns>, Arc<Netns>) {
    let (left, right) = link::joined();
    for address in [SECOND, THIRD] {
        left.run(format!("ip addr add {address}/24 dev {DEVICE}"));
    }
    (left, right)
}

fn serve(netns: &Arc<Netns>, options: &[&str]) -> Daemon {
    Daemon::start_with(Wgsep, netns, |command| {
        command.args(options);
    })
}

/// The local addresses of UDP sockets on the port, as ss(8) writes them, sorted.
fn listening(netns: &Netns, port: u16) -> Vec<String> {
    let sockets = netns.run("ss -H -u -l -n");
    let local = sockets.lines().filter_map(|line| line.split_whitespace().nth(3));
    let suffix = format!(":{port}");
    let mut found: Vec<_> =
        local.filter_map(|one| one.strip_suffix(&suffix)).map(str::to_owned).collect();
    found.sort();
    found
}

/// Another daemon, on the right, with a tunnel to `address` of the one on the left.
fn peer_of(left: &End, right: &Arc<Netns>, address: &str) -> End {
    let right = End::new(Side::Right, Daemon::start(Wgsep, right));
    let address: IpAddr = address.parse().unwrap();
    right.configure(&left.key.public, Some(SocketAddr::new(address, PORT)), None);
    left.configure(&right.key.public, None, None);
    right
}

fn until_logged(daemon: &Daemon, text: &str) {
    wait::until(text, LIMIT, || daemon.process.log().contains(text));
}

fn inner(end: &End) -> IpAddr {
    end.side.inner(Family::V4)
}

#[test]
fn only_the_address_listens_and_replies_leave_from_it_however_often_it_is_opened() {
    require!(Wgsep);
    let (netns, right) = host();
    let left = End::new(Side::Left, serve(&netns, &["--listen-address", SECOND]));
    let right = peer_of(&left, &right, SECOND);
    until_ping(&right.daemon.netns, inner(&left));
    assert_eq!(listening(&netns, PORT), [SECOND]);
    let elsewhere = netns.inside(|| UdpSocket::bind((THIRD, PORT)).map(drop));
    assert!(elsewhere.is_ok(), "the port of other addresses is free: {elsewhere:?}");

    let other = PORT + 1;
    left.daemon.wg_set(format!("listen-port {other} fwmark 7"));
    assert_eq!(
        (listening(&netns, other), left.daemon.listen_port()),
        (vec![SECOND.to_owned()], other)
    );
    left.daemon.wg_set(format!("listen-port {PORT}"));
    netns.run(format!("ip link set {} down", left.daemon.interface));
    wait::until("the port is closed", LIMIT, || listening(&netns, PORT).is_empty());
    netns.run(format!("ip link set {} up", left.daemon.interface));
    wait::until("it is open again", LIMIT, || listening(&netns, PORT) == [SECOND]);
    // The other end still has a session, which this one has dropped.
    until_ping(&netns, inner(&right));

    let mut upgrade = netns.command(wgsep_program("wgsep"));
    upgrade.args(["upgrade", &left.daemon.interface]);
    assert!(upgrade.status().unwrap().success());
    assert!(answers_at_once(&right.daemon.netns, inner(&left)));
    left.daemon.wg_set(format!("listen-port {other}"));
    assert_eq!(listening(&netns, other), [SECOND], "the new pair has it too");
}

#[test]
fn of_several_addresses_each_peer_is_answered_from_the_one_it_sent_to() {
    require!(Wgsep);
    require!(WireguardGo);
    let (netns, right) = host();
    let list = format!("{SECOND},{THIRD},{}", Side::Left.outer(Family::V6));
    let left = End::new(Side::Left, serve(&netns, &["--listen-address", &list]));
    left.daemon.set_private_key(&left.key.private);
    left.daemon.wg_set(format!("listen-port {PORT}"));
    left.take_up();
    let v6 = Side::Left.outer(Family::V6).to_string();
    assert_eq!(listening(&netns, PORT), [SECOND, THIRD, &format!("[{v6}]")]);
    for (number, address) in [(21, THIRD), (22, SECOND), (23, &*v6)] {
        let inside = format!("192.168.77.{number}");
        let peer = Daemon::start(WireguardGo, &right);
        let key = KeyPair::generate();
        peer.set_private_key(&key.private);
        let endpoint = SocketAddr::new(address.parse().unwrap(), PORT);
        peer.wg_set(format!(
            "peer {} endpoint {endpoint} allowed-ips {}/32",
            left.key.public,
            inner(&left)
        ));
        left.daemon.wg_set(format!("peer {} allowed-ips {inside}/32", key.public));
        right.run(format!("ip addr add {inside}/32 dev {}", peer.interface));
        right.run(format!("ip link set {} up", peer.interface));
        right.run(format!("ip route replace {} dev {}", inner(&left), peer.interface));
        until_ping(&right, inner(&left));
        // It would have followed the address of an answer from elsewhere.
        assert_eq!(peer.peer().endpoint, endpoint.to_string());
    }
}

#[test]
fn an_address_that_is_missing_is_said_and_listened_on_once_it_is_there() {
    require!(Wgsep);
    let (netns, right) = host();
    netns.run(format!("ip addr del {THIRD}/24 dev {DEVICE}"));
    let left = End::new(Side::Left, serve(&netns, &["--listen-address", THIRD]));
    let right = peer_of(&left, &right, THIRD);
    until_logged(&left.daemon, "no interface has one of the addresses of --listen-address");
    assert!(listening(&netns, PORT).is_empty());
    let refused = left.daemon.try_wg_set(format!("listen-port {}", PORT + 1));
    assert!(!refused.status.success(), "a set that opens nothing says so");
    netns.run(format!("ip addr add {THIRD}/24 dev {DEVICE}"));
    wait::until("it listens", LIMIT, || listening(&netns, PORT) == [THIRD]);
    until_ping(&right.daemon.netns, inner(&left));
}

/// The second link leads to the same addresses, as in a VRF or with two providers; the route leads through the first.
#[test]
fn datagrams_leave_and_arrive_by_the_bound_device_only() {
    require!(Wgsep);
    let (netns, right) = host();
    right.run(format!("ip link add second type veth peer name second netns {}", netns.name()));
    for (netns, side) in [(&netns, Side::Left), (&right, Side::Right)] {
        netns.run(format!("ip addr add 10.78.0.{}/24 dev second", side as u8));
        netns.run("ip link set second up");
    }
    let left = End::new(Side::Left, serve(&netns, &["--bind-device", "second"]));
    let right = peer_of(&left, &right, "10.78.0.1");
    until_ping(&right.daemon.netns, inner(&left));
    assert_eq!(listening(&netns, PORT), ["0.0.0.0%second", "[::]%second"]);
    // What arrives by the first link is not this daemon's.
    right.daemon.wg_set(format!(
        "peer {} endpoint {}:{PORT}",
        left.key.public,
        Side::Left.outer(Family::V4)
    ));
    let received = left.daemon.peer().received;
    assert!(!answers_at_once(&right.daemon.netns, inner(&left)));
    assert_eq!(left.daemon.peer().received, received);
    right.daemon.wg_set(format!("peer {} endpoint 10.78.0.1:{PORT}", left.key.public));
    until_ping(&right.daemon.netns, inner(&left));

    // Made again, it has another index: after a while, and before the daemon has read that it is gone.
    let made_anew = format!(
        "ip link add second type veth peer name second netns {}",
        right.daemon.netns.name()
    );
    netns.run("ip link del second");
    until_logged(&left.daemon, "there is no interface of the name in --bind-device");
    // What is not sent meanwhile is laid to no route.
    let peer = format!("peer {}", right.key.public);
    left.daemon.wg_set(format!("{peer} remove"));
    left.daemon
        .wg_set(format!("{peer} endpoint 10.78.0.2:{PORT} allowed-ips {}/32", inner(&right)));
    let stats = format!("{} stats {}", wgsep_program("wgsep").display(), left.daemon.interface);
    wait::until("an initiation is not sent", LIMIT, || {
        let _no_answer = netns.output(format!("ping -c 1 -W 1 {}", inner(&right)));
        netns.run(&stats).contains("out: the UDP port was closed, or no route")
    });
    let log = left.daemon.process.log();
    assert!(!log.contains("no route to") && !log.contains("cannot send"), "{log}");
    netns.run(&made_anew);
    until_served(&left, &right);
    netns.run("ip link del second");
    netns.run(&made_anew);
    until_served(&left, &right);

    // Renamed, it is still there; the next one of that name takes its place, also after an upgrade in between.
    for (renamed, is_upgraded) in [("third", false), ("fourth", true)] {
        for end in [&left, &right] {
            end.daemon.netns.run("ip addr flush dev second");
            end.daemon.netns.run(format!("ip link set second down name {renamed}"));
        }
        until_logged(&left.daemon, &format!("--bind-device, second, is named {renamed} now"));
        let of_renamed = [format!("0.0.0.0%{renamed}"), format!("[::]%{renamed}")];
        assert_eq!(listening(&netns, PORT), of_renamed);
        if is_upgraded {
            netns.run(format!(
                "{} upgrade {}",
                wgsep_program("wgsep").display(),
                left.daemon.interface
            ));
            assert_eq!(listening(&netns, PORT), of_renamed);
        }
        netns.run(&made_anew);
        until_served(&left, &right);
    }
}

/// Gives the second link its addresses, and waits until the tunnel works over it.
#[track_caller]
fn until_served(left: &End, right: &End) {
    for end in [left, right] {
        end.daemon.netns.run(format!("ip addr add 10.78.0.{}/24 dev second", end.side as u8));
        end.daemon.netns.run("ip link set second up");
    }
    until_ping(&left.daemon.netns, inner(right));
    assert_eq!(listening(&left.daemon.netns, PORT), ["0.0.0.0%second", "[::]%second"]);
}

/// Two links to the right end, which has an address behind both.
struct Uplinks {
    family: Family,
    left: Arc<Netns>,
    right: Arc<Netns>,
}

impl Uplinks {
    fn new(family: Family) -> Self {
        let (left, right) = link::joined();
        right.run(format!("ip link add second type veth peer name second netns {}", left.name()));
        let uplinks = Self { family, left, right };
        for (netns, side) in [(&uplinks.left, Side::Left), (&uplinks.right, Side::Right)] {
            netns.run("ip link set second up");
            uplinks.add(netns, &uplinks.second(side), "second");
        }
        uplinks.right.run(format!("ip addr add {} dev lo", uplinks.behind()));
        uplinks
    }

    fn first(&self, side: Side) -> String {
        side.outer(self.family).to_string()
    }

    fn second(&self, side: Side) -> String {
        match self.family {
            Family::V4 => format!("10.78.0.{}", side as u8),
            Family::V6 => format!("fd78::{}", side as u8),
        }
    }

    const fn behind(&self) -> &str {
        match self.family {
            Family::V4 => "203.0.113.5",
            Family::V6 => "2001:db8::5",
        }
    }

    fn add(&self, netns: &Netns, address: &str, device: &str) {
        match self.family {
            Family::V4 => netns.run(format!("ip addr add {address}/24 dev {device}")),
            Family::V6 => netns.run(format!("ip addr add {address}/64 dev {device} nodad")),
        };
    }

    fn remove(&self, address: &str, device: &str) {
        let len = if self.family == Family::V4 { 24 } else { 64 };
        self.left.run(format!("ip addr del {address}/{len} dev {device}"));
    }

    fn route_by(&self, gateway: &str) {
        self.left.run(format!("ip route replace {} via {gateway}", self.behind()));
    }

    /// A tunnel to the address behind; the left end listens on these.
    fn tunnel(&self, listed: &str) -> (End, End) {
        let left = End::new(Side::Left, serve(&self.left, &["--listen-address", listed]));
        let right = End::new(Side::Right, Daemon::start(Wgsep, &self.right));
        right.configure(&left.key.public, None, None);
        let behind = SocketAddr::new(self.behind().parse().unwrap(), PORT);
        left.configure(&right.key.public, Some(behind), None);
        (left, right)
    }
}

/// The ends reach each other, and the right one sees the left one at this address.
#[track_caller]
fn assert_seen_at(left: &End, right: &End, address: &str) {
    until_ping(&left.daemon.netns, inner(right));
    let seen: SocketAddr = right.daemon.peer().endpoint.parse().unwrap();
    assert_eq!(seen.ip().to_string(), address);
}

#[test]
fn of_several_addresses_that_which_the_route_gives_is_used_when_one_is_gone_or_its_link_is_down() {
    require!(Wgsep);
    for family in [Family::V4, Family::V6] {
        let uplinks = Uplinks::new(family);
        let [first, second] = [uplinks.first(Side::Left), uplinks.second(Side::Left)];
        let [by_first, by_second] = [uplinks.first(Side::Right), uplinks.second(Side::Right)];
        uplinks.route_by(&by_second);
        let (left, right) = uplinks.tunnel(&format!("{first},{second}"));
        // It has sent nothing yet, and nothing else says which address.
        assert_seen_at(&left, &right, &second);
        let handshake = right.daemon.peer().latest_handshake;

        uplinks.remove(&second, "second");
        uplinks.route_by(&by_first);
        assert_seen_at(&left, &right, &first);

        uplinks.add(&uplinks.left, &second, "second");
        until_logged(&left.daemon, &format!("{second} of --listen-address is there again"));
        uplinks.remove(&first, DEVICE);
        uplinks.route_by(&by_second);
        assert_seen_at(&left, &right, &second);

        uplinks.add(&uplinks.left, &first, DEVICE);
        uplinks.left.run("ip link set second down");
        uplinks.route_by(&by_first);
        assert_seen_at(&left, &right, &first);
        assert_eq!(right.daemon.peer().latest_handshake, handshake, "the session went on");
    }
}

/// The kernel would give the interface's first address.
#[test]
fn a_listed_address_of_the_interface_is_used_where_the_route_gives_one_that_is_not_listed() {
    require!(Wgsep);
    let uplinks = Uplinks::new(Family::V4);
    let [first, listed] = [uplinks.first(Side::Left), "10.78.0.11".to_owned()];
    uplinks.add(&uplinks.left, &listed, "second");
    uplinks.route_by(&uplinks.first(Side::Right));
    let (left, right) = uplinks.tunnel(&format!("{first},{listed}"));
    assert_seen_at(&left, &right, &first);
    uplinks.left.run(format!("ip link set {DEVICE} down"));
    uplinks.route_by(&uplinks.second(Side::Right));
    assert_seen_at(&left, &right, &listed);
}

#[test]
fn a_listed_address_that_is_gone_is_named_by_the_log_and_stats_until_it_is_back() {
    require!(Wgsep);
    for family in [Family::V4, Family::V6] {
        let uplinks = Uplinks::new(family);
        let [first, second] = [uplinks.first(Side::Left), uplinks.second(Side::Left)];
        uplinks.route_by(&uplinks.first(Side::Right));
        let (left, right) = uplinks.tunnel(&format!("{first},{second}"));
        let names_it = || {
            let mut stats = uplinks.left.command(wgsep_program("wgsep"));
            let shown = stats.args(["stats", &left.daemon.interface]).output().unwrap();
            assert!(shown.status.success());
            String::from_utf8_lossy(&shown.stdout)
                .contains(&format!(", no interface has {second};"))
        };
        assert!(!names_it());
        uplinks.remove(&second, "second");
        wait::until("stats names it", LIMIT, names_it);
        until_logged(&left.daemon, &format!("no interface has {second} of --listen-address"));
        assert_seen_at(&left, &right, &first);
        // Before the link is used, another pair says so, too.
        let mut upgrade = uplinks.left.command(wgsep_program("wgsep"));
        assert!(upgrade.args(["upgrade", &left.daemon.interface]).status().unwrap().success());
        wait::until("stats names it", LIMIT, names_it);
        uplinks.add(&uplinks.left, &second, "second");
        wait::until("stats names it no more", LIMIT, || !names_it());
    }
}
