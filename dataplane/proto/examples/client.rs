//! The program of README.md, word for word: a tunnel to one peer, over a UDP socket.
#![allow(clippy::print_stdout)]

use std::io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
use std::net::UdpSocket;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use wgsep_proto::{Instant, Now, PrivateKey, PublicKey, SystemRandom, Tunnel};

/// Both clocks. Std's stops while the machine sleeps; read CLOCK_BOOTTIME where there is one.
fn now(started: std::time::Instant) -> Now {
    let instant = Instant::from_nanos(started.elapsed().as_nanos() as u64);
    Now { instant, wall: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // As `wg genkey` and `wg pubkey` print them, in base64, or in hexadecimal.
    let ours: PrivateKey = std::env::var("PRIVATE_KEY")?.parse()?;
    let peer: PublicKey = std::env::var("PEER")?.parse()?;
    let endpoint = std::env::var("ENDPOINT")?.parse()?;
    let mut tunnel = Tunnel::new(ours, peer, None, Some(endpoint), Box::new(SystemRandom))?;

    let started = std::time::Instant::now();
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let mut buffer = [0; 65_535];
    tunnel.start_handshake(now(started))?;
    loop {
        // 1. Timers that are due, before anything else: no other call expires them.
        let due = tunnel.next_timeout().map(|at| at.since(now(started).instant));
        if due == Some(Duration::ZERO) {
            tunnel.handle_timeout(now(started));
        }
        // 2. After every call: send what there is to send. What cannot be sent is lost, and sent anew when a timer expires.
        while let Some(transmit) = tunnel.poll_transmit() {
            let to = transmit.endpoint.destination;
            if let Err(error) = socket.send_to(transmit.datagram, to) {
                eprintln!("cannot send to {to}: {error}");
            }
        }
        while let Some(event) = tunnel.poll_event() {
            println!("{event}");
        }
        // 3. Wait for a datagram, until the tunnel wants to be called.
        socket.set_read_timeout(due.map(|due| due.max(Duration::from_millis(1))))?;
        match socket.recv_from(&mut buffer) {
            Ok((length, source)) => {
                match tunnel.decapsulate(source, &mut buffer[..length], now(started)) {
                    Ok(Some(packet)) => println!("an IP packet of {} bytes", packet.len()),
                    Ok(None) => {} // A handshake, or a keepalive.
                    Err(cause) => eprintln!("dropped: {cause}"),
                }
            }
            Err(error) if matches!(error.kind(), WouldBlock | TimedOut | Interrupted) => {}
            Err(error) => eprintln!("cannot receive: {error}"), // The network is down, for example.
        }
        // 4. A packet of yours: tunnel.encapsulate(&packet, now(started))
    }
}
