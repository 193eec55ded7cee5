//! Two peers that talk over channels in memory: a handshake, a packet each way.
//!
//! Run with `cargo run -p wgsep-proto --features getrandom --example two_peers`.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use wgsep_proto::{DropCause, Instant, Now, PrivateKey, SystemRandom, Tunnel};

/// One end: the tunnel, and the channels that represent the network.
struct End {
    tunnel: Tunnel,
    to_other: Sender<Vec<u8>>,
    from_other: Receiver<Vec<u8>>,
    other: SocketAddr,
}

impl End {
    /// Receives the datagrams that have arrived, and returns the packets in them.
    fn receive(&mut self, now: Now) -> Result<Vec<Vec<u8>>, DropCause> {
        let mut packets = Vec::new();
        while let Ok(mut datagram) = self.from_other.try_recv() {
            let packet = self.tunnel.decapsulate(self.other, &mut datagram, now)?;
            packets.extend(packet.map(|packet| packet.to_vec()));
            self.transmit();
        }
        Ok(packets)
    }

    fn send(&mut self, packet: &[u8], now: Now) -> Result<(), DropCause> {
        self.tunnel.encapsulate(packet, now)?;
        self.transmit();
        Ok(())
    }

    fn transmit(&mut self) {
        while let Some(transmit) = self.tunnel.poll_transmit() {
            println!("  {} bytes to {}", transmit.datagram.len(), transmit.endpoint.destination);
            // A datagram to an end that has exited is lost, as on a network.
            let _lost = self.to_other.send(transmit.datagram.to_vec());
        }
    }
}

/// The least that counts as an IPv4 packet: a header with its length, and a payload.
fn ipv4_packet(payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; 20];
    packet.extend(payload);
    packet[0] = 0x45;
    let length = u16::try_from(packet.len()).unwrap_or(u16::MAX);
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    packet
}

fn main() -> Result<(), Box<dyn Error>> {
    let keys = [(); 2].map(|()| PrivateKey::generate(&mut SystemRandom));
    let publics = [keys[0].public_key(), keys[1].public_key()];
    let [alice_key, bob_key] = keys;
    // No datagram is sent to these addresses here; over a real network they would be the endpoints.
    let alice_at = SocketAddr::from(([192, 0, 2, 1], 51820));
    let bob_at = SocketAddr::from(([192, 0, 2, 2], 51820));
    let (to_bob, from_alice) = channel();
    let (to_alice, from_bob) = channel();
    let mut alice = End {
        tunnel: Tunnel::new(alice_key, publics[1], None, Some(bob_at), Box::new(SystemRandom))?,
        to_other: to_bob,
        from_other: from_bob,
        other: bob_at,
    };
    let mut bob = End {
        // Bob has no endpoint until the first authentic message, from which he learns Alice's.
        tunnel: Tunnel::new(bob_key, publics[0], None, None, Box::new(SystemRandom))?,
        to_other: to_alice,
        from_other: from_alice,
        other: alice_at,
    };

    // Time is an argument too: of day for the handshake, since boot for everything else.
    let now = Now { instant: Instant::from_nanos(1), wall: Duration::from_secs(1_800_000_000) };
    let hello = ipv4_packet(b"hello, bob");
    println!("alice says hello, which takes a handshake first:");
    alice.send(&hello, now)?;
    let mut received = Vec::new();
    while received.is_empty() {
        received = bob.receive(now)?;
        alice.receive(now)?;
    }
    assert_eq!(received, [hello]);
    println!("bob received it, and answers:");
    let answer = ipv4_packet(b"hello, alice");
    bob.send(&answer, now)?;
    assert_eq!(alice.receive(now)?, [answer]);
    println!("alice received the answer");
    Ok(())
}
