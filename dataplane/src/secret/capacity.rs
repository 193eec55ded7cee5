//! How much secret memory a peer in use takes.

use super::heap::secret_bytes;
use super::tests::start;
use super::{Allocates, SECRET_MEMORY};
use crate::random::KernelRandom;
use std::net::SocketAddr;
use std::sync::mpsc::{self, Receiver, Sender};
use wgsep_proto::secret::in_ordinary_memory;
use wgsep_proto::{
    AllowedIp, AllowedIpChange, Configuration, Device, Ecn, Endpoint, Instant, Now,
    PeerConfiguration, PrivateKey, Tunnel,
};

/// Peers that can be in use at once with all keys in secret memory.
const PEERS: usize = 100_000;
const HUB: [u8; 32] = [1; 32];

type Datagram = (SocketAddr, Vec<u8>);

fn private_key(number: u32) -> PrivateKey {
    let mut key = [2; 32];
    key[1..5].copy_from_slice(&number.to_le_bytes());
    PrivateKey::from_bytes(key).unwrap()
}

fn address(number: u32) -> SocketAddr {
    ([10, 0, (number >> 8) as u8, number as u8], 51_820).into()
}

/// An IPv4 header from a peer, and nothing behind it.
fn packet(number: u32) -> [u8; 20] {
    let mut packet = [0; 20];
    (packet[0], packet[3], packet[8], packet[9]) = (0x45, 20, 64, 59);
    packet[12..16].copy_from_slice(&[10, 0, (number >> 8) as u8, number as u8]);
    packet[16..20].copy_from_slice(&[192, 0, 2, 1]);
    packet
}

fn now(seconds: u64) -> Now {
    let wall = core::time::Duration::from_secs(1_800_000_000 + seconds);
    Now { instant: Instant::from_nanos((1 + seconds) * 1_000_000_000), wall }
}

/// A hub of the control thread, which replies to what it receives and returns the bytes of secret memory that it has.
fn hub(peers: u32, received: &Receiver<(Datagram, Now)>, replies: &Sender<Vec<Vec<u8>>>) -> usize {
    let before = secret_bytes();
    let mut device = Device::new(Box::new(KernelRandom));
    let private_key_of_hub = Some(PrivateKey::from_bytes(HUB));
    let configuration =
        Configuration { private_key: private_key_of_hub, ..Configuration::default() };
    device.configure(configuration, now(0));
    device.set_up(true, now(0));
    for number in 0..peers {
        let mut peer = PeerConfiguration::new(private_key(number).public_key());
        let allowed_ip = AllowedIp::new(address(number).ip(), 32).unwrap();
        peer.allowed_ips.push(AllowedIpChange { allowed_ip, remove: false });
        device.configure(Configuration { peers: vec![peer], ..Configuration::default() }, now(0));
    }
    for ((source, mut datagram), now) in received {
        device.decapsulate(Endpoint::new(source), Ecn::NOT_CAPABLE, &mut datagram, now).unwrap();
        // Another thread frees them, so they do not count.
        in_ordinary_memory(|| {
            let mut sent = Vec::new();
            while let Some(transmit) = device.poll_transmit() {
                sent.push(transmit.datagram.to_vec());
            }
            replies.send(sent).unwrap();
        });
    }
    let used = device.peers().filter(|peer| peer.rx_bytes > 0).count();
    assert_eq!(used, peers as usize, "peers in use");
    secret_bytes() - before
}

/// Sends all that a spoke has to send, and gives it the replies, until neither has any.
fn exchange(
    (spoke, address): (&mut Tunnel, SocketAddr),
    sender: &Sender<(Datagram, Now)>,
    replies: &Receiver<Vec<Vec<u8>>>,
    now: Now,
) {
    loop {
        let mut sent = Vec::new();
        while let Some(transmit) = spoke.poll_transmit() {
            sent.push(transmit.datagram.to_vec());
        }
        if sent.is_empty() {
            return;
        }
        for datagram in sent {
            sender.send(((address, datagram), now)).unwrap();
            for mut reply in replies.recv().unwrap() {
                let hub = ([192, 0, 2, 1], 51_820).into();
                spoke.decapsulate(hub, &mut reply, now).unwrap();
            }
        }
    }
}

/// Bytes of secret memory of a hub whose peers have each completed two handshakes, so that they have two keypairs.
fn bytes_with(peers: u32) -> usize {
    let (sender, received) = mpsc::channel();
    let (answers, replies) = mpsc::channel();
    let measured = start(Allocates::Secrets, move || hub(peers, &received, &answers));
    let hub_key = PrivateKey::from_bytes(HUB).unwrap().public_key();
    let endpoint = Some(([192, 0, 2, 1], 51_820).into());
    for number in 0..peers {
        let random = Box::new(KernelRandom);
        let mut spoke = Tunnel::new(private_key(number), hub_key, None, endpoint, random).unwrap();
        for seconds in [0, 130] {
            spoke.encapsulate(&packet(number), now(seconds)).unwrap();
            exchange((&mut spoke, address(number)), &sender, &replies, now(seconds));
        }
    }
    drop(sender);
    measured.recv().unwrap().unwrap()
}

#[test]
fn the_keys_of_100_000_peers_in_use_fit_into_secret_memory() {
    const MORE: u32 = 200;
    let peer = (bytes_with(20 + MORE) - bytes_with(20)).div_ceil(MORE as usize);
    assert!(peer <= 1024 && peer * PEERS <= SECRET_MEMORY, "{peer} bytes a peer");
}
