//! A tunnel over UDP: lines of text in at one end, out at the other, as IPv4 packets.
//!
//! Shown with both ends in one process: `cargo run -p wgsep-proto --features getrandom --example udp_tunnel`.
//! Take the packets from a TUN device instead and `run` is a VPN.
#![allow(clippy::print_stdout)]

use std::net::UdpSocket;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use wgsep_proto::{Instant, Now, PrivateKey, SystemRandom, Tunnel};

/// Both clocks. A daemon reads CLOCK_BOOTTIME, which keeps counting in suspend; std's is only a substitute.
fn now(started: std::time::Instant) -> Now {
    let nanoseconds = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now { instant: Instant::from_nanos(nanoseconds), wall }
}

/// Runs one end until the channel of its packets is closed.
fn run(
    mut tunnel: Tunnel,
    socket: &UdpSocket,
    outbound: &Receiver<Vec<u8>>,
    inbound: &Sender<Vec<u8>>,
) -> std::io::Result<()> {
    const LOOK_FOR_PACKETS: Duration = Duration::from_millis(10);
    let started = std::time::Instant::now();
    let mut buffer = vec![0; 65_535];
    loop {
        match outbound.try_recv() {
            // A packet that cannot be sent is dropped, as on any network, and counted.
            Ok(packet) => drop(tunnel.encapsulate(&packet, now(started))),
            Err(TryRecvError::Disconnected) => return Ok(()),
            Err(TryRecvError::Empty) => {}
        }
        let current = now(started);
        let due = tunnel.next_timeout().map_or(LOOK_FOR_PACKETS, |at| at.since(current.instant));
        if due.is_zero() {
            tunnel.handle_timeout(current);
        }
        while let Some(transmit) = tunnel.poll_transmit() {
            // A datagram that the network does not take, as while there is none, is lost like any other.
            let _lost = socket.send_to(transmit.datagram, transmit.endpoint.destination);
        }
        socket.set_read_timeout(Some(due.clamp(Duration::from_millis(1), LOOK_FOR_PACKETS)))?;
        if let Ok((length, source)) = socket.recv_from(&mut buffer) {
            let packet = tunnel.decapsulate(source, &mut buffer[..length], now(started));
            if let Ok(Some(packet)) = packet
                && inbound.send(packet.to_vec()).is_err()
            {
                return Ok(());
            }
        }
    }
}

type Packets = (Sender<Vec<u8>>, Receiver<Vec<u8>>);

/// Starts an end on a thread; returns the channels for packets to send and received packets.
fn start(tunnel: Tunnel, socket: UdpSocket) -> Packets {
    let ((outbound, to_send), (received, inbound)) = (channel(), channel());
    std::thread::spawn(move || run(tunnel, &socket, &to_send, &received));
    (outbound, inbound)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Real keys come from `wg genkey`.
    let [client, server] = [1, 2].map(|byte| PrivateKey::from_bytes([byte; 32]));
    let (client, server) = client.zip(server).ok_or("all zeros is no key")?;
    let publics = (client.public_key(), server.public_key());
    let at_client = UdpSocket::bind("127.0.0.1:0")?;
    let at_server = UdpSocket::bind("127.0.0.1:0")?;
    let endpoint = Some(at_server.local_addr()?);
    let server = Tunnel::new(server, publics.0, None, None, Box::new(SystemRandom))?;
    let client = Tunnel::new(client, publics.1, None, endpoint, Box::new(SystemRandom))?;
    let (_replies, received) = start(server, at_server);
    let (send, _answers) = start(client, at_client);
    for line in ["one", "two", "three"] {
        let header = [0x45, 0, 0, 20 + u8::try_from(line.len())?];
        let packet = [&header[..], &[0; 16], line.as_bytes()].concat();
        send.send(packet)?;
        let packet = received.recv_timeout(Duration::from_secs(10))?;
        println!("through the tunnel: {}", String::from_utf8_lossy(&packet[20..]));
    }
    Ok(())
}
