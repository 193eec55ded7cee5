//! Keys as wg(8) sets and shows them: cleared, clamped, our own as a peer's, and those that no secret
//! comes of.

use std::net::UdpSocket;
use std::time::Duration;

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::{self, Boringtun, Wgsep};
use wgsep_tests::netns::Netns;
use wgsep_tests::require;
use wgsep_tests::wg::{KeyPair, preshared_key, with_input};

/// Points of small order (RFC 7748, section 6.1, and those with the unused bit set): whatever the
/// private key, the shared secret is zero.
const LOW_ORDER: [&str; 7] = [
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    "4Ot6fDtBuK4WVuP68Z/EatoJjeucMrH9hmIFFl9JuAA=",
    "X5yVvKNQjCSx0LFVnIPvWwREXMRYHI6G2CJO3dCfEVc=",
    "7P///////////////////////////////////////38=",
    "7f///////////////////////////////////////38=",
    "7v///////////////////////////////////////38=",
];

fn daemon(implementation: Implementation) -> Daemon {
    Daemon::start(implementation, &Netns::new())
}

/// `wg show INTERFACE FIELD`, without the end of its line.
fn shown(daemon: &Daemon, field: &str) -> String {
    daemon.wg("show", field).trim_end().to_owned()
}

#[test]
fn both_keys_are_set_shown_and_cleared() {
    require!(Wgsep);
    let (daemon, key, psk) = (daemon(Wgsep), KeyPair::generate(), preshared_key());
    let peer = KeyPair::generate().public;
    let set_psk = |text| {
        let line = format!("wg set {} peer {peer} preshared-key /dev/stdin", daemon.interface);
        with_input(&line, text);
    };
    daemon.set_private_key(&key.private);
    set_psk(&psk);
    assert_eq!(shown(&daemon, "private-key"), key.private);
    assert_eq!(shown(&daemon, "public-key"), key.public);
    assert_eq!(shown(&daemon, "preshared-keys"), format!("{peer}\t{psk}"));
    daemon.wg_set(format!("private-key /dev/null peer {peer} preshared-key /dev/null"));
    assert_eq!(shown(&daemon, "private-key"), "(none)");
    assert_eq!(shown(&daemon, "preshared-keys"), format!("{peer}\t(none)"));
}

#[test]
fn the_own_key_is_not_accepted_for_a_peer() {
    require!(Wgsep);
    let (daemon, own, other) = (daemon(Wgsep), KeyPair::generate(), KeyPair::generate());
    daemon.wg_set(format!("peer {}", own.public));
    daemon.set_private_key(&own.private);
    assert_eq!(shown(&daemon, "public-key"), own.public);
    assert_eq!(shown(&daemon, "peers"), "", "the peer that is now ourselves");
    daemon.wg_set(format!("peer {}", own.public));
    assert_eq!(shown(&daemon, "peers"), "", "added, without an error");
    daemon.set_private_key(&other.private);
    daemon.wg_set(format!("peer {}", own.public));
    assert_eq!(shown(&daemon, "peers"), own.public, "now somebody else's");
}

#[test]
fn a_private_key_is_shown_clamped() {
    require!(Wgsep);
    let daemon = daemon(Wgsep);
    let key = KeyPair::generate().private;
    // The first digit holds the high bits of the first byte, of which the lowest three are cleared.
    daemon.set_private_key(&format!("/{}", &key[1..]));
    assert_eq!(shown(&daemon, "private-key"), format!("+{}", &key[1..]));
}

#[test]
fn a_peer_of_low_order_may_be_configured_but_is_sent_nothing() {
    require!(Wgsep);
    let daemon = daemon(Wgsep);
    let silence = Duration::from_secs(2);
    assert_eq!(first_datagram_for(&daemon, &LOW_ORDER, silence), None);
    assert_eq!(daemon.peers().len(), LOW_ORDER.len());
    assert!(daemon.peers().iter().all(|peer| peer.sent == 0), "{:?}", daemon.peers());
    // And the socket does receive what is sent to a peer like any other.
    let peer = KeyPair::generate().public;
    assert_eq!(first_datagram_for(&daemon, &[&peer], Duration::from_secs(5)), Some(148));
}

#[test]
fn control_boringtun_sends_to_a_peer_of_low_order() {
    require!(Boringtun);
    let daemon = daemon(Boringtun);
    let first = first_datagram_for(&daemon, &LOW_ORDER[1..2], Duration::from_secs(5));
    assert_eq!(first, Some(148));
}

/// Has the daemon keep peers alive; the length of the first datagram that any of them is sent.
fn first_datagram_for(daemon: &Daemon, peers: &[&str], limit: Duration) -> Option<usize> {
    let socket = match daemon.netns.inside(|| UdpSocket::bind("127.0.0.1:0")) {
        Ok(socket) => socket,
        Err(error) => panic!("cannot bind: {error}"),
    };
    let (Ok(address), Ok(())) = (socket.local_addr(), socket.set_read_timeout(Some(limit))) else {
        panic!("cannot set the socket up");
    };
    daemon.set_private_key(&KeyPair::generate().private);
    for peer in peers {
        daemon.wg_set(format!("peer {peer} persistent-keepalive 1 endpoint {address}"));
    }
    daemon.netns.run(format!("ip link set {} up", daemon.interface));
    socket.recv(&mut [0; 256]).ok()
}
