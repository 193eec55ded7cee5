//! Configuration: everything wg(8) does, and what it would never send.
#![allow(clippy::unwrap_used)]

use wgsep_tests::daemon::{Daemon, socket_path};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::link::Family;
use wgsep_tests::netns::Netns;
use wgsep_tests::process::run;
use wgsep_tests::require;
use wgsep_tests::traffic::{ping, until_ping};
use wgsep_tests::tunnel::{PORT, Plan, Tunnel};
use wgsep_tests::uapi::{Uapi, errno};
use wgsep_tests::wg::{KeyPair, hex, preshared_key};

use std::io::ErrorKind;
use std::process::Command;

/// A daemon with nothing configured.
fn daemon() -> Daemon {
    Daemon::start(Wgsep, &Netns::new())
}

/// The raw configuration, as the daemon tells it.
fn configuration(daemon: &Daemon) -> String {
    let answer = Uapi::connect(&daemon.interface).unwrap().transact("get=1\n\n").unwrap();
    assert_eq!(errno(&answer), Some(0), "{answer}");
    answer
}

/// A configuration that uses every key of wg(8)'s format.
fn full_configuration() -> String {
    let [us, first, second, third] = [(); 4].map(|()| KeyPair::generate());
    format!(
        "[Interface]\nPrivateKey = {}\nListenPort = {PORT}\nFwMark = 0xca6c\n\
         [Peer]\nPublicKey = {}\nPresharedKey = {}\nAllowedIPs = 10.1.0.0/16, 10.0.0.0/8, fd01::/64\n\
         Endpoint = 192.0.2.1:1234\nPersistentKeepalive = 25\n\
         [Peer]\nPublicKey = {}\nAllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = [2001:db8::1]:65535\n\
         [Peer]\nPublicKey = {}\n",
        us.private,
        first.public,
        preshared_key(),
        second.public,
        third.public,
    )
}

#[test]
fn showconf_and_setconf_round_trip_byte_for_byte() {
    require!(Wgsep);
    let (first, second) = (daemon(), daemon());
    first.wg_conf("setconf", &full_configuration());
    let shown = first.wg("showconf", "");
    assert!(shown.contains("AllowedIPs"), "{shown}");
    second.wg_conf("setconf", &shown);
    assert_eq!(second.wg("showconf", ""), shown);
    first.wg_conf("setconf", &shown);
    assert_eq!(first.wg("showconf", ""), shown);
}

#[test]
fn show_prints_what_setconf_set() {
    require!(Wgsep);
    let daemon = daemon();
    let text = full_configuration();
    daemon.wg_conf("setconf", &text);
    assert_eq!(daemon.listen_port(), PORT);
    assert_eq!(daemon.wg("show", "fwmark").trim(), "0xca6c");
    let private = daemon.wg("show", "private-key");
    assert!(text.contains(&format!("PrivateKey = {}", private.trim())), "{private}");
    let peers = daemon.peers();
    assert_eq!(peers.len(), 3);
    for peer in &peers {
        assert!(text.contains(&format!("PublicKey = {}", peer.public_key)), "{peer:?}");
        assert_eq!((peer.latest_handshake, peer.received, peer.sent), (0, 0, 0));
    }
    let of = |endpoint: &str| peers.iter().find(|peer| peer.endpoint == endpoint).unwrap();
    let full = of("192.0.2.1:1234");
    assert_eq!(full.keepalive, "25");
    assert!(text.contains(&format!("PresharedKey = {}", full.preshared_key)), "{full:?}");
    let mut allowed: Vec<_> = full.allowed_ips.split(',').collect();
    allowed.sort_unstable();
    assert_eq!(allowed, ["10.0.0.0/8", "10.1.0.0/16", "fd01::/64"]);
    let default = of("[2001:db8::1]:65535");
    assert_eq!((&*default.keepalive, &*default.preshared_key), ("off", "(none)"));
    assert_eq!(of("(none)").allowed_ips, "(none)");
}

#[test]
fn show_all_and_interfaces_name_the_daemon() {
    require!(Wgsep);
    let daemon = daemon();
    daemon.wg_conf("setconf", &full_configuration());
    let interfaces = daemon.netns.run("wg show interfaces");
    assert!(interfaces.split_whitespace().any(|name| name == daemon.interface), "{interfaces}");
    let dump = daemon.netns.run("wg show all dump");
    let ours = dump.lines().filter(|line| line.starts_with(&format!("{}\t", daemon.interface)));
    assert_eq!(ours.count(), 4, "a line for the interface and one a peer:\n{dump}");
}

#[test]
fn a_fresh_daemon_has_neither_key_nor_peers() {
    require!(Wgsep);
    let daemon = daemon();
    assert_eq!(daemon.wg("show", "private-key").trim(), "(none)");
    assert!(daemon.peers().is_empty());
}

#[test]
fn syncconf_keeps_the_sessions_of_peers_that_stay() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    let before = left.daemon.peer();
    assert_ne!(before.latest_handshake, 0);

    let newcomer = KeyPair::generate();
    let shown = left.daemon.wg("showconf", "");
    let text =
        format!("{shown}\n[Peer]\nPublicKey = {}\nAllowedIPs = 10.9.9.9/32\n", newcomer.public);
    left.daemon.wg_conf("syncconf", &text);
    let peers = left.daemon.peers();
    assert_eq!(peers.len(), 2);
    let kept = peers.iter().find(|peer| peer.public_key == before.public_key).unwrap();
    assert_eq!(kept.latest_handshake, before.latest_handshake);
    assert!(kept.received >= before.received && kept.sent >= before.sent, "{kept:?}");

    let pings = ping(&left.daemon.netns, right.side.inner(Family::V4), 3);
    assert_eq!(pings.received, 3, "{pings:?}");
    let after = left.daemon.peers();
    let kept = after.iter().find(|peer| peer.public_key == before.public_key).unwrap();
    assert_eq!(kept.latest_handshake, before.latest_handshake, "the session went on");
}

#[test]
fn addconf_adds_and_setconf_replaces() {
    require!(Wgsep);
    let daemon = daemon();
    daemon.wg_conf("setconf", &full_configuration());
    let newcomer = KeyPair::generate();
    let text = format!("[Peer]\nPublicKey = {}\n", newcomer.public);
    daemon.wg_conf("addconf", &text);
    assert_eq!(daemon.peers().len(), 4);
    daemon.wg_conf("setconf", &format!("[Interface]\n{text}"));
    assert_eq!(daemon.peer().public_key, newcomer.public);
}

#[test]
fn a_peer_is_removed_by_its_key() {
    require!(Wgsep);
    let daemon = daemon();
    daemon.wg_conf("setconf", &full_configuration());
    let peers = daemon.peers();
    daemon.wg_set(format!("peer {} remove", peers[1].public_key));
    let left = daemon.peers();
    assert_eq!(left.len(), 2);
    assert!(left.iter().all(|peer| peer.public_key != peers[1].public_key));
    // Removing what is not there is no error, in the kernel neither.
    daemon.wg_set(format!("peer {} remove", peers[1].public_key));
}

#[test]
fn an_allowed_ip_given_to_another_peer_moves() {
    require!(Wgsep);
    let daemon = daemon();
    let [first, second] = [(); 2].map(|()| KeyPair::generate().public);
    daemon.wg_set(format!("peer {first} allowed-ips 10.0.0.0/24,10.0.1.0/24"));
    daemon.wg_set(format!("peer {second} allowed-ips 10.0.0.0/24"));
    let of = |key: &str| {
        let peers = daemon.peers();
        peers.iter().find(|peer| peer.public_key == key).unwrap().allowed_ips.clone()
    };
    assert_eq!(of(&first), "10.0.1.0/24");
    assert_eq!(of(&second), "10.0.0.0/24");
    // An address is kept as its network.
    daemon.wg_set(format!("peer {second} allowed-ips 10.0.1.77/24"));
    assert_eq!(of(&first), "(none)");
    assert_eq!(of(&second), "10.0.1.0/24");
}

#[test]
fn a_peer_loses_its_psk_and_keepalive_on_request() {
    require!(Wgsep);
    let daemon = daemon();
    let key = KeyPair::generate().public;
    let text = format!(
        "[Peer]\nPublicKey = {key}\nPresharedKey = {}\nPersistentKeepalive = 65535\n",
        preshared_key()
    );
    daemon.wg_conf("addconf", &text);
    assert_eq!(daemon.peer().keepalive, "65535");
    assert_ne!(daemon.peer().preshared_key, "(none)");
    daemon.wg_set(format!("peer {key} preshared-key /dev/null persistent-keepalive off"));
    assert_eq!(daemon.peer().keepalive, "off");
    assert_eq!(daemon.peer().preshared_key, "(none)");
}

#[test]
fn update_only_does_not_make_a_peer() {
    require!(Wgsep);
    let daemon = daemon();
    let key = hex(&KeyPair::generate().public);
    let mut uapi = Uapi::connect(&daemon.interface).unwrap();
    let request = format!("set=1\npublic_key={key}\nupdate_only=true\nallowed_ip=10.0.0.0/24\n\n");
    assert_eq!(errno(&uapi.transact(&request).unwrap()), Some(0));
    assert!(daemon.peers().is_empty());
}

#[test]
fn several_transactions_fit_one_connection() {
    require!(Wgsep);
    let daemon = daemon();
    let mut uapi = Uapi::connect(&daemon.interface).unwrap();
    for mark in [1, 2, 3] {
        let answer = uapi.transact(&format!("set=1\nfwmark={mark}\n\n")).unwrap();
        assert_eq!(errno(&answer), Some(0), "{answer}");
        let answer = uapi.transact("get=1\n\n").unwrap();
        assert!(answer.lines().any(|line| line == format!("fwmark={mark}")), "{answer}");
    }
}

/// Each request begins with a change that is valid, and must leave no trace of it.
#[test]
fn a_malformed_set_is_refused_and_nothing_of_it_applied() {
    require!(Wgsep);
    let daemon = daemon();
    daemon.wg_conf("setconf", &full_configuration());
    let before = configuration(&daemon);
    let mut uapi = Uapi::connect(&daemon.interface).unwrap();
    for wrong in device_mistakes().into_iter().chain(peer_mistakes()) {
        let request = format!("set=1\nfwmark=77\nreplace_peers=true\n{wrong}\n\n");
        let answer = uapi.transact(&request);
        let answer = answer.unwrap_or_else(|error| panic!("after {wrong:?}: {error}"));
        let code = errno(&answer).unwrap_or_else(|| panic!("after {wrong:?}: {answer:?}"));
        assert!(code < 0, "{wrong:?} was answered with errno={code}");
        // The connection continues, and shows an unchanged configuration.
        assert_eq!(uapi.transact("get=1\n\n").unwrap(), before, "after {wrong:?}");
    }
}

fn device_mistakes() -> Vec<String> {
    let cases = [
        "private_key=00",
        "private_key=",
        "listen_port=65536",
        "listen_port=-1",
        "listen_port=",
        "listen_port=1e3",
        "fwmark=4294967296",
        "fwmark=-1",
        "replace_peers=false",
        "replace_peers=1",
        "no_such_key=1",
        "no equals sign",
        "=",
        "preshared_key=0000000000000000000000000000000000000000000000000000000000000000",
        "allowed_ip=10.0.0.0/8",
        "public_key=00",
    ];
    let nonhex = format!("private_key={}", "zz".repeat(32));
    let long = format!("private_key={}", "00".repeat(33));
    let shown = format!("public_key={}é", "00".repeat(31));
    cases.into_iter().map(str::to_owned).chain([nonhex, long, shown]).collect()
}

fn peer_mistakes() -> Vec<String> {
    let cases = [
        "preshared_key=00",
        "endpoint=192.0.2.1",
        "endpoint=192.0.2.1:",
        "endpoint=192.0.2.1:65536",
        "endpoint=192.0.2.256:1",
        "endpoint=host.invalid:1",
        "endpoint=2001:db8::1:1",
        "endpoint=[192.0.2.1]:1",
        "endpoint=[2001:db8::1]",
        "endpoint=",
        "persistent_keepalive_interval=65536",
        "persistent_keepalive_interval=-1",
        "persistent_keepalive_interval=off",
        "replace_allowed_ips=false",
        "allowed_ip=10.0.0.0",
        "allowed_ip=10.0.0.0/",
        "allowed_ip=10.0.0.0/33",
        "allowed_ip=10.0.0.0/-1",
        "allowed_ip=10.0.0/8",
        "allowed_ip=::/129",
        "allowed_ip=",
        "remove=1",
        "update_only=yes",
        "protocol_version=0",
        "protocol_version=2",
        "listen_port=1",
        "private_key=0000000000000000000000000000000000000000000000000000000000000001",
        "no_such_key=1",
    ];
    let key = hex(&KeyPair::generate().public);
    cases
        .into_iter()
        .map(|wrong| format!("public_key={key}\nallowed_ip=10.9.0.0/16\n{wrong}"))
        .collect()
}

#[test]
fn an_unfinished_set_changes_nothing() {
    require!(Wgsep);
    let daemon = daemon();
    let before = configuration(&daemon);
    for part in ["set=1\nfwmark=77\n", "set=1\nfwmark=77", "set=1\n", "se", ""] {
        let mut uapi = Uapi::connect(&daemon.interface).unwrap();
        uapi.send(part.as_bytes()).unwrap();
        drop(uapi);
        assert_eq!(configuration(&daemon), before, "after {part:?}");
    }
}

#[test]
fn an_unknown_operation_is_refused_and_harms_no_other_client() {
    require!(Wgsep);
    let daemon = daemon();
    let before = configuration(&daemon);
    for request in ["get=2\n\n", "set=0\nfwmark=77\n\n", "GET / HTTP/1.1\n\n", "\n\n", "\0\0\n\n"] {
        let mut uapi = Uapi::connect(&daemon.interface).unwrap();
        // A refusal and a closed connection are both answers; an acceptance is not.
        if let Ok(answer) = uapi.transact(request) {
            assert_ne!(errno(&answer), Some(0), "{request:?} was answered {answer:?}");
        }
        assert_eq!(configuration(&daemon), before, "after {request:?}");
    }
}

#[test]
fn a_line_without_end_is_refused() {
    require!(Wgsep);
    let daemon = daemon();
    let before = configuration(&daemon);
    let mut uapi = Uapi::connect(&daemon.interface).unwrap();
    let endless = vec![b'a'; 1 << 20];
    let sent = uapi.send(b"set=1\nfwmark=77\n").and_then(|()| uapi.send(&endless));
    let outcome = sent.and_then(|()| uapi.send(b"\n\n")).and_then(|()| uapi.receive());
    match outcome {
        Ok(answer) => assert_ne!(errno(&answer), Some(0), "{answer}"),
        Err(error) => assert_ne!(error.kind(), ErrorKind::WouldBlock, "neither read nor refused"),
    }
    assert_eq!(configuration(&daemon), before);
}

/// An idle client and one that stopped half-way must not keep others waiting.
#[test]
fn a_slow_client_stalls_no_other() {
    require!(Wgsep);
    let daemon = daemon();
    let _idle = Uapi::connect(&daemon.interface).unwrap();
    let mut slow = Uapi::connect(&daemon.interface).unwrap();
    slow.send(b"set=1\nfwma").unwrap();
    assert_eq!(errno(&configuration(&daemon)), Some(0));
    slow.send(b"rk=5\n\n").unwrap();
    assert_eq!(errno(&slow.receive().unwrap()), Some(0));
    assert!(configuration(&daemon).lines().any(|line| line == "fwmark=5"));
}

#[test]
fn a_large_peer_list_is_set_and_shown() {
    require!(Wgsep);
    let daemon = daemon();
    let base = hex(&KeyPair::generate().public);
    let mut request = String::from("set=1\n");
    for number in 0..1000_u32 {
        // Any 32 bytes are a key; these differ in their first four.
        request.push_str(&format!("public_key={number:08x}{}\n", &base[8..]));
        for part in 0..10_u32 {
            let [_, high, middle, low] = (number * 10 + part).to_be_bytes();
            request.push_str(&format!("allowed_ip=10.{high}.{middle}.{low}/32\n"));
        }
    }
    request.push('\n');
    let mut uapi = Uapi::connect(&daemon.interface).unwrap();
    assert_eq!(errno(&uapi.transact(&request).unwrap()), Some(0));
    let reported = uapi.transact("get=1\n\n").unwrap();
    assert_eq!(reported.matches("public_key=").count(), 1000);
    assert_eq!(reported.matches("allowed_ip=").count(), 10_000);
}

#[test]
fn attack_10_another_user_is_refused() {
    require!(Wgsep);
    let daemon = daemon();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=61000", "--regid=61000", "--clear-groups", "wg", "show"]);
    let output = command.arg(&daemon.interface).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(message.contains("Permission denied"), "wg(8) says: {message}");
    let mode =
        run(Command::new("stat").args(["-c", "%a %u %F"]).arg(socket_path(&daemon.interface)));
    assert_eq!(mode.trim(), "600 0 socket");
}

#[test]
fn wg_shows_both_ends_the_same_transfer() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    until_ping(&left.daemon.netns, right.side.inner(Family::V4));
    assert_eq!(ping(&left.daemon.netns, right.side.inner(Family::V4), 10).received, 10);
    let (left, right) = (left.daemon.peer(), right.daemon.peer());
    assert!(left.received > 0 && left.sent > 0, "{left:?}");
    // Nothing is lost on a veth, and a datagram counts alike at both ends.
    assert_eq!((left.received, left.sent), (right.sent, right.received));
}
