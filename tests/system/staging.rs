//! Packets that wait for a peer who does not answer.
#![allow(clippy::unwrap_used)]

use std::net::UdpSocket;
use std::time::Duration;

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::netns::Netns;
use wgsep_tests::uapi::{Uapi, errno};
use wgsep_tests::{procfs, require, wait};

/// One line, however many packets and peers there are.
#[test]
fn the_first_packet_without_a_private_key_is_logged() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let (netns, interface) = (&daemon.netns, &daemon.interface);
    netns.run(format!("ip addr add 10.1.1.1/16 dev {interface}"));
    netns.run(format!("ip link set {interface} up"));
    let mut uapi = Uapi::connect(interface).unwrap();
    let peers = [1, 2].map(|number| {
        let peer = format!("public_key={number:064x}\nendpoint=127.0.0.1:9\n");
        format!("{peer}allowed_ip=10.1.0.{number}/32\n")
    });
    let request = format!("set=1\n{}\n", peers.concat());
    assert_eq!(errno(&uapi.transact(&request).unwrap()), Some(0));
    let sender = netns.inside(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    let line = "no private key is set, so no handshake begins: packets to peers wait for up to 90 s \
                and are dropped; wg set IF private-key FILE\n";
    wait::until("it is logged", Duration::from_secs(20), || {
        for number in [1, 2, 1] {
            sender.send_to(&[0; 10], format!("10.1.0.{number}:9")).unwrap();
        }
        daemon.process.log().contains(line)
    });
    // The answer comes after what the packets before it caused.
    assert_eq!(errno(&uapi.transact("get=1\n\n").unwrap()), Some(0));
    assert_eq!(daemon.process.log().matches("no private key").count(), 1);
}

/// Peers that are nowhere, and packets that wait for each of them at most.
const PEERS: u8 = 100;
const STAGED: u64 = 128;
/// Bytes of each packet.
const LEN: usize = 1300;

/// Workers allocate them and the control thread frees them: memory goes back to the kernel by no call
/// that the filter ends.
#[test]
fn packets_that_waited_without_success_are_freed_at_once_and_the_daemon_continues() {
    require!(Wgsep);
    let daemon = Daemon::start(Wgsep, &Netns::new());
    let (netns, interface) = (&daemon.netns, &daemon.interface);
    netns.run(format!("ip addr add 10.1.1.1/16 dev {interface}"));
    netns.run(format!("ip link set {interface} up"));
    let mut uapi = Uapi::connect(interface).unwrap();
    let mut request = format!("set=1\nprivate_key={:064x}\n", 1);
    for number in 1..=PEERS {
        let peer = format!("public_key={number:064x}\nendpoint=127.0.0.1:9\n");
        request.push_str(&format!("{peer}allowed_ip=10.1.0.{number}/32\n"));
    }
    assert_eq!(errno(&uapi.transact(&format!("{request}\n")).unwrap()), Some(0));

    let dataplane = daemon.dataplane();
    let memory = || procfs::memory(dataplane, "RssAnon").unwrap();
    let before = memory();
    let kept = u64::from(PEERS) * STAGED * LEN as u64 / 1024;
    let sender = netns.inside(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    wait::until("packets wait for every peer", Duration::from_secs(20), || {
        for number in (1..=PEERS).cycle().take(1000) {
            // A full queue of the interface is no reason to stop.
            let _full = sender.send_to(&[0; LEN], format!("10.1.0.{number}:9"));
        }
        memory() > before + kept
    });
    assert_eq!(errno(&uapi.transact("set=1\nreplace_peers=true\n\n").unwrap()), Some(0));
    wait::until("their memory is given back", Duration::from_secs(5), || {
        memory() < before + kept / 2
    });
    assert_eq!(errno(&uapi.transact("get=1\n\n").unwrap()), Some(0));
}
