//! A client behind network address translation, and a server that translates for others.

use std::sync::Arc;
use std::time::Duration;

use wgsep_tests::implementation::Implementation::{self, Wgsep, WireguardGo};
use wgsep_tests::link::Family;
use wgsep_tests::netns::Netns;
use wgsep_tests::nft::Counter;
use wgsep_tests::traffic::answers_at_once;
use wgsep_tests::tunnel::{End, PORT, Tunnel, between};
use wgsep_tests::{require, wait};

/// The client's address, the translator's towards it, and its and the server's beyond.
const CLIENT: &str = "192.168.1.100";
const INSIDE: &str = "192.168.1.1";
const OUTSIDE: &str = "10.0.0.1";
const SERVER: &str = "10.0.0.100";

/// How long, in seconds, the translator remembers a silent flow.
const MEMORY: u32 = 2;

/// Client, translator and server; the client knows the server's endpoint.
struct Nat {
    translator: Arc<Netns>,
    tunnel: Tunnel,
}

impl Nat {
    fn new(implementation: Implementation) -> Self {
        let [client, translator, server] = [Netns::new(), Netns::new(), Netns::new()];
        wire(&client, "vethc", CLIENT, &translator, "vethrc", INSIDE);
        wire(&server, "veths", SERVER, &translator, "vethrs", OUTSIDE);
        client.run(format!("ip route add default via {INSIDE}"));
        translator.run("sysctl -qw net.ipv4.ip_forward=1");
        translator.run("nft add table ip nat");
        translator.run("nft add chain ip nat post { type nat hook postrouting priority 100 ; }");
        translator.run(format!(
            "nft add rule ip nat post ip saddr {CLIENT} oifname vethrs snat to {OUTSIDE}"
        ));
        for timeout in ["udp_timeout", "udp_timeout_stream"] {
            translator.run(format!("sysctl -qw net.netfilter.nf_conntrack_{timeout}={MEMORY}"));
        }
        let tunnel = between(&client, &server, implementation);
        tunnel.left.set_peer(&tunnel.right, format!("endpoint {SERVER}:{PORT}"));
        Self { translator, tunnel }
    }
}

/// A veth pair between two namespaces, an address on each end.
fn wire(left: &Netns, device: &str, address: &str, right: &Netns, peer: &str, gateway: &str) {
    left.run(format!("ip link add {device} type veth peer name {peer} netns {}", right.name()));
    for (netns, device, address) in [(left, device, address), (right, peer, gateway)] {
        netns.run(format!("ip addr add {address}/24 dev {device}"));
        netns.run(format!("ip link set {device} up"));
    }
}

#[track_caller]
fn assert_answers(from: &End, to: &End, when: &str) {
    let address = to.side.inner(Family::V4);
    assert!(
        answers_at_once(&from.daemon.netns, address),
        "{:?} to {:?}, {when}",
        from.side,
        to.side
    );
}

#[test]
fn keepalives_keep_the_way_back_through_the_translator_open() {
    require!(Wgsep);
    keepalives_keep_the_way_back_open(Wgsep);
}

#[test]
fn control_wireguard_go_keeps_the_way_back_open() {
    require!(WireguardGo);
    keepalives_keep_the_way_back_open(WireguardGo);
}

fn keepalives_keep_the_way_back_open(implementation: Implementation) {
    let nat = Nat::new(implementation);
    let Tunnel { left, right } = &nat.tunnel;
    left.set_peer(right, "persistent-keepalive 1");
    assert_answers(left, right, "at first");
    assert_answers(right, left, "at first");
    assert_eq!(right.daemon.peer().endpoint, format!("{OUTSIDE}:{PORT}"));

    // Twice as long as the translator remembers, by its own count of keepalives.
    let keepalives = Counter::new(&nat.translator, "keepalives", "forward", "udp length 40");
    let limit = Duration::from_secs(15);
    wait::until("four keepalives pass", limit, || keepalives.packets() >= u64::from(2 * MEMORY));
    assert_answers(right, left, "after a silence");
}

/// A server that stops having its client notifies the host that it translates for, through both translations.
#[test]
fn a_host_behind_the_servers_own_translation_is_notified_that_the_client_is_gone() {
    require!(Wgsep);
    let nat = Nat::new(Wgsep);
    let Tunnel { left, right } = &nat.tunnel;
    assert_answers(left, right, "at first");
    let (client, server) = (left.side.inner(Family::V4), right.side.inner(Family::V4));
    let netns = &right.daemon.netns;
    netns.run("sysctl -qw net.ipv4.ip_forward=1");
    netns.run("nft add table ip nat");
    netns.run("nft add chain ip nat post { type nat hook postrouting priority 100 ; }");
    netns.run(format!(
        "nft add rule ip nat post ip saddr {OUTSIDE} ip daddr {client} snat to {server}"
    ));
    nat.translator.run(format!("ip route add {client} via {SERVER}"));
    assert!(answers_at_once(&nat.translator, client), "while the client is there");

    right.daemon.wg_set(format!("peer {} remove", left.key.public));
    let output = nat.translator.output(format!("ping -n -c 1 -W 2 {client}"));
    let received = String::from_utf8_lossy(&output.stdout);
    assert!(received.contains("icmp_seq=1 Destination Host Unreachable"), "{received}");
}
