//! A server of many peers, without a TUN device or any privilege: packets of one peer go on to another, by their
//! destination, and pings of the hub's own addresses are answered.
//!
//! ```text
//! hub FILE
//! ```
//!
//! FILE is one for wg-quick(8), with a `[Peer]` for each. Every peer has the others' addresses among its allowed IPs.
#![allow(clippy::print_stdout)]

mod common;

use std::net::IpAddr;
use wgsep_tokio::{MAX_DATAGRAM, UdpDevice};

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::process::ExitCode {
    common::exit(run().await)
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    let common::Tunnel { addresses, bind, configuration } = common::read(1)?;
    let mut udp = UdpDevice::bind(configuration, bind).await?;
    udp.set_mtu(common::MTU.into());
    println!("listening on {}", udp.local_addr()?);
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        let packet = udp.recv(&mut buffer).await?.packet;
        let Some(destination) = destination(packet) else { continue };
        let is_ours = addresses.iter().any(|(address, _)| *address == destination);
        // The source is one of the peer's allowed IPs: otherwise the packet had been dropped.
        if if is_ours { answer_ping(packet) } else { forward(packet) } {
            // There may be no peer of that address.
            let _dropped = udp.send(packet).await;
        }
    }
}

/// The destination of an IP packet.
fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => <[u8; 4]>::try_from(packet.get(16..20)?).ok().map(IpAddr::from),
        6 => <[u8; 16]>::try_from(packet.get(24..40)?).ok().map(IpAddr::from),
        _ => None,
    }
}

/// Takes one from the hops that a packet may take; false if none is left.
fn forward(packet: &mut [u8]) -> bool {
    let is_v4 = packet[0] >> 4 == 4;
    let hops = &mut packet[if is_v4 { 8 } else { 7 }];
    if *hops <= 1 {
        return false;
    }
    *hops -= 1;
    if is_v4 {
        let header = usize::from(packet[0] & 15) * 4;
        rewrite_checksum(&mut packet[..header], 10, 0);
    }
    true
}

/// Makes an echo request the reply to it; false if it is something else.
fn answer_ping(packet: &mut [u8]) -> bool {
    let is_v4 = packet[0] >> 4 == 4;
    let (header, protocol, request, reply) =
        if is_v4 { (usize::from(packet[0] & 15) * 4, 9, 8, 0) } else { (40, 6, 128, 129) };
    let icmp = if is_v4 { 1 } else { 58 };
    let is_request = packet[protocol] == icmp && packet.get(header) == Some(&request);
    if !is_request || packet.len() < header + 8 {
        return false;
    }
    let (addresses, len) = if is_v4 { (12, 4) } else { (8, 16) };
    let (source, destination) = packet[addresses..].split_at_mut(len);
    source.swap_with_slice(&mut destination[..len]);
    packet[header] = reply;
    // ICMPv6 sums a pseudo-header too: addresses, length and protocol.
    let pseudo_header = if is_v4 {
        0
    } else {
        sum(&packet[8..40]) + u32::try_from(packet.len() - header).unwrap_or(0) + u32::from(icmp)
    };
    rewrite_checksum(&mut packet[header..], 2, pseudo_header);
    true
}

/// Writes the Internet checksum of `bytes`, in which it is at `at`.
fn rewrite_checksum(bytes: &mut [u8], at: usize, pseudo_header: u32) {
    bytes[at..at + 2].fill(0);
    let mut total = sum(bytes) + pseudo_header;
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    let folded = !u16::try_from(total).unwrap_or(0);
    bytes[at..at + 2].copy_from_slice(&folded.to_be_bytes());
}

/// The sum of 16-bit words; of a packet it fits.
fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2).map(|word| [word[0], word.get(1).copied().unwrap_or(0)]);
    words.map(|word| u32::from(u16::from_be_bytes(word))).sum()
}
