//! Echo requests through the tunnel, from both ends and in both families, all the time.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recv, sendto,
    socket,
};
use wgsep_tests::netns::Netns;

/// The time between two requests.
const INTERVAL: Duration = Duration::from_millis(50);

/// What every payload of the traffic consists of, for a witness on the underlay to look for.
pub(crate) const PATTERN: &[u8; 24] = b"plaintext of wgsep soak!";

/// An ICMP header for echoes.
const HEADER: usize = 8;
/// The header, the time of sending, and the pattern twice.
const LENGTH: usize = HEADER + 8 + 2 * PATTERN.len();
/// The longest header of IPv4, which a raw socket delivers with the reply.
const IP_HEADER: usize = 60;

/// Requests in one direction; they end when it is dropped.
#[derive(Debug)]
pub(crate) struct Probe {
    /// What the direction is called in messages.
    pub(crate) name: String,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    begin: Instant,
    /// When the latest request that was answered had been sent, in ns since the begin.
    answered: AtomicU64,
    ending: AtomicBool,
}

impl Probe {
    /// Starts to probe `to` from a namespace.
    pub(crate) fn start(name: String, from: &Arc<Netns>, to: IpAddr, identifier: u16) -> Self {
        let shared = Arc::new(Shared {
            begin: Instant::now(),
            answered: AtomicU64::new(0),
            ending: AtomicBool::new(false),
        });
        let socket = match from.inside(|| open(to)) {
            Ok(socket) => socket,
            Err(error) => panic!("cannot make a raw socket: {error}"),
        };
        let thread = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || Sender { socket, to, identifier, sequence: 0, shared }.run())
        };
        Self { name, shared, thread: Some(thread) }
    }

    /// Whether a request is answered that was sent at this time or later.
    pub(crate) fn is_answered_since(&self, time: Instant) -> bool {
        let time = time.saturating_duration_since(self.shared.begin).as_nanos();
        u128::from(self.shared.answered.load(Ordering::Relaxed)) >= time
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn open(to: IpAddr) -> io::Result<OwnedFd> {
    let (family, protocol) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(family, SockType::Raw, flags, protocol)?)
}

struct Sender {
    /// Not connected: it would keep the source address that it was connected with.
    socket: OwnedFd,
    to: IpAddr,
    identifier: u16,
    sequence: u16,
    shared: Arc<Shared>,
}

impl Sender {
    fn run(mut self) {
        let mut next = Instant::now();
        while !self.shared.ending.load(Ordering::Relaxed) {
            let now = Instant::now();
            if now >= next {
                next = now + INTERVAL;
                let request = self.request();
                let to = SockaddrStorage::from(SocketAddr::new(self.to, 0));
                // The interface may not be there now.
                let _ = sendto(self.socket.as_raw_fd(), &request, &to, MsgFlags::empty());
            }
            self.receive_until(next);
        }
    }

    fn receive_until(&self, deadline: Instant) {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let mut ready = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            if !matches!(poll(&mut ready, timeout), Ok(1)) {
                return;
            }
            let mut buffer = [0; IP_HEADER + LENGTH];
            // An error is one of the socket's, such as an ICMP error received for it.
            let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap_or(0);
            if let Some(sent) = buffer.get(..length).and_then(|packet| self.reply(packet)) {
                self.shared.answered.fetch_max(sent, Ordering::Relaxed);
            }
            if left.is_zero() {
                return;
            }
        }
    }

    const fn types(&self) -> (u8, u8) {
        match self.to {
            IpAddr::V4(_) => (8, 0),
            IpAddr::V6(_) => (128, 129),
        }
    }

    fn request(&mut self) -> [u8; LENGTH] {
        self.sequence = self.sequence.wrapping_add(1);
        let sent = u64::try_from(self.shared.begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let mut packet = Vec::with_capacity(LENGTH);
        packet.extend([self.types().0, 0, 0, 0]);
        packet.extend(self.identifier.to_be_bytes());
        packet.extend(self.sequence.to_be_bytes());
        packet.extend(sent.to_be_bytes());
        packet.extend(PATTERN);
        packet.extend(PATTERN);
        // The kernel fills in the checksum of ICMPv6.
        if self.to.is_ipv4() {
            let sum = checksum(&packet).to_be_bytes();
            packet[2..4].copy_from_slice(&sum);
        }
        packet.try_into().unwrap_or([0; LENGTH])
    }

    /// When the request was sent to which this packet is the reply.
    fn reply(&self, packet: &[u8]) -> Option<u64> {
        let header = if self.to.is_ipv4() { 4 * usize::from(packet.first()? & 0xf) } else { 0 };
        let message = packet.get(header..)?;
        let is_ours = *message.first()? == self.types().1
            && message.get(4..6)? == self.identifier.to_be_bytes()
            && message.get(HEADER + 8..)?.starts_with(PATTERN);
        let sent = message.get(HEADER..HEADER + 8)?.try_into().ok()?;
        is_ours.then_some(u64::from_be_bytes(sent))
    }
}

/// The Internet checksum of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks_exact(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}
