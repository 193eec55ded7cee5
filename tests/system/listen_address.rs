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

    // Made again, it has another index.
    netns.run("ip link del second");
    netns.run(format!("ip link set {} down", left.daemon.interface));
    netns.run(format!("ip link set {} up", left.daemon.interface));
    until_logged(&left.daemon, "there is no interface of the name in --bind-device");
    netns.run(format!(
        "ip link add second type veth peer name second netns {}",
        right.daemon.netns.name()
    ));
    for (netns, side) in [(&netns, Side::Left), (&right.daemon.netns, Side::Right)] {
        netns.run(format!("ip addr add 10.78.0.{}/24 dev second", side as u8));
        netns.run("ip link set second up");
    }
    wait::until("the port is open", LIMIT, || !listening(&left.daemon.netns, PORT).is_empty());
    until_ping(&left.daemon.netns, inner(&right));
}
