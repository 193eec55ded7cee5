//! Netlink messages that were lost: a dataplane that does not get the processor while a routing daemon
//! loads its table must find out by itself what became of the interface meanwhile.
#![allow(clippy::unwrap_used)]

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::sync::Arc;
use std::time::Duration;
use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::link::{self, DEVICE, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::nft::Counter;
use wgsep_tests::traffic::{answers_at_once, ping, until_ping};
use wgsep_tests::tunnel::{End, PORT, Plan, Tunnel, between};
use wgsep_tests::wg::{KeyPair, with_input};
use wgsep_tests::{require, wait};

const LIMIT: Duration = Duration::from_secs(3);
/// More messages than the socket's buffer holds.
const ROUTES: u32 = 20_000;
/// Datagram length less that of the padded packet: IPv4, UDP, transport header and tag.
const OVERHEAD: u32 = 60;
const PING_HEADERS: u32 = 28;

/// A dataplane that is stopped until this is dropped.
struct Stopped(Pid);

impl Stopped {
    fn new(daemon: &Daemon) -> Self {
        let dataplane = daemon.dataplane();
        kill(dataplane, Signal::SIGSTOP).unwrap();
        Self(dataplane)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _gone = kill(self.0, Signal::SIGCONT);
    }
}

/// Adds or deletes many routes, none of which leads to a peer.
fn many_routes(netns: &Netns, verb: &str) {
    let lines: String = (0..ROUTES)
        .map(|n| format!("route {verb} 100.0.{}.{}/32 dev lo\n", n >> 8, n & 255))
        .collect();
    with_input(&format!("ip -n {} -batch -", netns.name()), &lines);
}

/// Messages that sockets of a namespace have lost (the ninth column).
fn lost(netns: &Netns) -> u64 {
    let table = netns.run("cat /proc/net/netlink");
    let column = |line: &str| line.split_whitespace().nth(8)?.parse::<u64>().ok();
    table.lines().filter_map(column).sum()
}

/// Has a daemon lose what the `lines` cause in its namespace: it runs again when this returns.
#[track_caller]
fn unreported<'a>(daemon: &Daemon, sockets: &Netns, lines: impl IntoIterator<Item = &'a str>) {
    let before = lost(sockets);
    let stopped = Stopped::new(daemon);
    many_routes(sockets, "add");
    for line in lines {
        daemon.netns.run(line);
    }
    assert!(lost(sockets) > before, "nothing was lost");
    drop(stopped);
    many_routes(sockets, "del");
}

fn has_port(netns: &Netns, port: u16) -> bool {
    netns.run("ss -H -u -l -n").contains(&format!(":{port} "))
}

fn tunnel() -> Tunnel {
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    until_ping(&tunnel.left.daemon.netns, tunnel.right.side.inner(Family::V4));
    tunnel
}

/// How long a datagram is that an end sends for a packet of 1297 bytes.
#[track_caller]
fn until_padded_to(from: &End, to: &End, expected: u32) {
    let name = format!("of{expected}");
    let expression = format!("udp dport {PORT} ip length {}", expected + OVERHEAD);
    let counter = Counter::new(&from.daemon.netns, &name, "output", &expression);
    let (to, size) = (to.side.inner(Family::V4), 1297 - PING_HEADERS);
    wait::until(&format!("1297 bytes are padded to {expected}"), LIMIT, || {
        from.daemon.netns.output(format!("ping -n -c 1 -W 1 -s {size} {to}"));
        counter.packets() > 0
    });
}

#[test]
fn a_link_that_came_up_unreported_listens_and_has_its_mtu() {
    require!(Wgsep);
    let tunnel = tunnel();
    let Tunnel { left, right } = &tunnel;
    let (netns, interface) = (&left.daemon.netns, &left.daemon.interface);
    netns.run(format!("ip link set {interface} down"));
    wait::until("the port is closed", LIMIT, || !has_port(netns, PORT));
    let (mtu, up) =
        (format!("ip link set {interface} mtu 1300"), format!("ip link set {interface} up"));
    unreported(&left.daemon, netns, [mtu.as_str(), up.as_str()]);
    wait::until("the port is open", LIMIT, || has_port(netns, PORT));
    until_ping(netns, right.side.inner(Family::V4));
    until_padded_to(left, right, 1300);
    let log = left.daemon.process.log();
    assert_eq!(log.matches("netlink messages were lost").count(), 1, "{log}");
}

#[test]
fn a_link_that_went_down_unreported_closes_its_port() {
    require!(Wgsep);
    let tunnel = tunnel();
    let daemon = &tunnel.left.daemon;
    unreported(daemon, &daemon.netns, [format!("ip link set {} down", daemon.interface).as_str()]);
    wait::until("the port is closed", LIMIT, || !has_port(&daemon.netns, PORT));
}

#[test]
fn a_link_that_went_down_and_up_unreported_works() {
    require!(Wgsep);
    let tunnel = tunnel();
    let Tunnel { left, right } = &tunnel;
    let set = |state| format!("ip link set {} {state}", left.daemon.interface);
    unreported(&left.daemon, &left.daemon.netns, [set("down").as_str(), set("up").as_str()]);
    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    assert!(has_port(&left.daemon.netns, PORT));
}

/// A table that is loaded is no reason to lose keys.
#[test]
fn a_loss_that_concerns_nothing_of_ours_keeps_the_session() {
    require!(Wgsep);
    let tunnel = tunnel();
    let Tunnel { left, right } = &tunnel;
    let handshake = left.daemon.peer().latest_handshake;
    unreported(&left.daemon, &left.daemon.netns, []);
    let pings = ping(&left.daemon.netns, right.side.inner(Family::V4), 3);
    assert_eq!(pings.received, 3, "{pings:?}");
    assert_eq!(left.daemon.peer().latest_handshake, handshake);
}

#[test]
fn wg_set_opens_the_port_of_a_link_that_came_up_unreported() {
    require!(Wgsep);
    let tunnel = tunnel();
    let daemon = &tunnel.left.daemon;
    let (netns, interface) = (&daemon.netns, &daemon.interface);
    netns.run(format!("ip link set {interface} down"));
    wait::until("the port is closed", LIMIT, || !has_port(netns, PORT));
    let before = lost(netns);
    let stopped = Stopped::new(daemon);
    many_routes(netns, "add");
    netns.run(format!("ip link set {interface} up"));
    assert!(lost(netns) > before, "nothing was lost");
    // What wg(8) sends waits beside what is lost.
    let set = netns.spawn(format!("wg set {interface} listen-port 20820"));
    drop(stopped);
    let mut set = set;
    assert!(set.exit_within(LIMIT).success());
    assert!(has_port(netns, 20820), "wg set has returned, and nothing listens");
}

#[test]
fn the_mtu_of_a_route_is_followed_although_its_message_was_lost() {
    require!(Wgsep);
    let tunnel = tunnel();
    let Tunnel { left, right } = &tunnel;
    let (netns, interface) = (&left.daemon.netns, &left.daemon.interface);
    let route =
        |verb| format!("ip route {verb} {} dev {interface} mtu 1299", right.side.inner(Family::V4));
    until_padded_to(left, right, 1312);
    unreported(&left.daemon, netns, [route("add").as_str()]);
    until_padded_to(left, right, 1299);
    let again = Counter::new(netns, "again", "output", &format!("udp dport {PORT} ip length 1372"));
    unreported(&left.daemon, netns, [route("del").as_str()]);
    wait::until("the route's MTU is forgotten", LIMIT, || {
        let size = 1297 - PING_HEADERS;
        netns.output(format!("ping -n -c 1 -W 1 -s {size} {}", right.side.inner(Family::V4)));
        again.packets() > 0
    });
}

#[test]
fn an_interface_that_was_moved_unreported_works_where_it_is() {
    require!(Wgsep);
    let mut tunnel = tunnel();
    let (elsewhere, sockets) = (Netns::new(), Arc::clone(&tunnel.left.daemon.netns));
    let interface = tunnel.left.daemon.interface.clone();
    let moves = format!("ip link set {interface} netns {}", elsewhere.name());
    unreported(&tunnel.left.daemon, &sockets, [moves.as_str()]);
    wait::until("the port is closed", LIMIT, || !has_port(&sockets, PORT));
    tunnel.left.daemon.netns = Arc::clone(&elsewhere);
    elsewhere.run(format!("ip addr add {}/24 dev {interface}", Side::Left.inner(Family::V4)));
    elsewhere.run(format!("ip link set {interface} up"));
    wait::until("the port is open", LIMIT, || has_port(&sockets, PORT));
    until_ping(&elsewhere, tunnel.right.side.inner(Family::V4));
}

#[test]
fn an_interface_elsewhere_that_came_up_and_went_down_unreported_is_looked_at() {
    require!(Wgsep);
    let (sockets, right) = link::joined();
    let elsewhere = Netns::new();
    let mut daemon = Daemon::start(Wgsep, &sockets);
    daemon.wg_conf(
        "setconf",
        &format!(
            "[Interface]\nPrivateKey = {}\nListenPort = {PORT}\n",
            KeyPair::generate().private
        ),
    );
    daemon.move_interface(&elsewhere);
    for (state, listens) in [("up", true), ("down", false)] {
        let line = format!("ip link set {} {state}", daemon.interface);
        unreported(&daemon, &sockets, [line.as_str()]);
        wait::until(state, LIMIT, || has_port(&sockets, PORT) == listens);
    }
    drop(right);
}

#[test]
fn a_scope_may_be_the_name_that_an_interface_was_given_unreported() {
    require!(Wgsep);
    let tunnel = tunnel();
    let Tunnel { left, right } = &tunnel;
    let netns = &left.daemon.netns;
    netns.run("ip link add before type bridge");
    unreported(&left.daemon, netns, ["ip link set before name after"]);
    wait::until("the new name is known", LIMIT, || {
        let peer = &right.key.public;
        let set = left.daemon.try_wg_set(format!("peer {peer} endpoint [fe80::1%after]:7"));
        set.status.success() && left.daemon.peer().endpoint == "[fe80::1%after]:7"
    });
}

/// The source is cached for an interface that goes down, without a message about it.
#[test]
fn a_source_is_checked_although_the_message_about_its_link_was_lost() {
    require!(Wgsep);
    let tunnel = tunnel();
    let Tunnel { left, right } = &tunnel;
    let (near, far) = (&left.daemon.netns, &right.daemon.netns);
    near.run(format!("ip link add second type veth peer name second netns {}", far.name()));
    for netns in [near, far] {
        netns.run("ip link set second up");
        netns.run("sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.second.rp_filter=0");
        netns.run(format!("sysctl -qw net.ipv4.conf.{DEVICE}.rp_filter=0"));
    }
    near.run("ip addr add 10.77.0.30/32 dev second");
    near.run("ip route add 10.77.0.2/32 dev second src 10.77.0.30 metric 9");
    near.run(format!("ip route add 10.77.0.2/32 dev {DEVICE} metric 5"));
    assert!(answers_at_once(near, right.side.inner(Family::V4)));
    unreported(&left.daemon, near, [format!("ip link set {DEVICE} down").as_str()]);
    let expected = format!("10.77.0.30:{PORT}");
    wait::until("datagrams leave from the other address", LIMIT, || {
        near.output(format!("ping -n -c 1 -W 1 {}", right.side.inner(Family::V4)));
        right.daemon.peer().endpoint == expected
    });
}

#[test]
fn a_daemon_that_starts_in_a_burst_works() {
    require!(Wgsep);
    let (left, right) = link::joined();
    std::thread::scope(|scope| {
        let burst = scope.spawn(|| {
            for verb in ["add", "del", "add", "del"] {
                many_routes(&left, verb);
            }
        });
        let tunnel = between(&left, &right, Wgsep);
        let Tunnel { left, right } = &tunnel;
        left.set_peer(right, format!("endpoint {}", right.endpoint(Family::V4)));
        until_ping(&left.daemon.netns, right.side.inner(Family::V4));
        burst.join().unwrap();
        until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    });
}

/// As a quota of the processor does it: a little every now and then, while routes come and go.
#[test]
fn a_starved_daemon_recovers_during_the_burst_and_after_it() {
    require!(Wgsep);
    let tunnel = tunnel();
    let Tunnel { left, right } = &tunnel;
    let (netns, interface) = (&left.daemon.netns, &left.daemon.interface);
    let dataplane = left.daemon.dataplane();
    std::thread::scope(|scope| {
        let burst = scope.spawn(|| {
            for state in ["down", "up", "down", "up"] {
                many_routes(netns, "add");
                netns.run(format!("ip link set {interface} {state}"));
                many_routes(netns, "del");
            }
        });
        while !burst.is_finished() {
            for (signal, milliseconds) in [(Signal::SIGSTOP, 45), (Signal::SIGCONT, 5)] {
                kill(dataplane, signal).unwrap();
                std::thread::sleep(Duration::from_millis(milliseconds));
            }
        }
    });
    kill(dataplane, Signal::SIGCONT).unwrap();
    wait::until("the port is open", LIMIT, || has_port(netns, PORT));
    until_ping(netns, right.side.inner(Family::V4));
}
