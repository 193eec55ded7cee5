//! TCP and UDP through the tunnel, all the time: a stream and datagrams from each end to the other.
//!
//! A stream that makes no progress for [`USER_TIMEOUT`] is given up and connected anew, as an
//! application would do; without that, the sender's own backoff would decide when it continues, and not
//! the tunnel.

use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use wgsep_tests::netns::Netns;

use crate::probe::PATTERN;

/// The receivers' port, of TCP and of UDP.
pub(crate) const PORT: u16 = 5300;
/// How long sent bytes may be without acknowledgement, in ms.
const USER_TIMEOUT: u32 = 2000;
const CONNECT_LIMIT: Duration = Duration::from_secs(1);
/// How often a thread that waits looks whether it is to end.
const TICK: Duration = Duration::from_millis(200);
/// Bytes in one write to a stream: large enough for segmentation offload to join them.
const CHUNK: usize = 64 * 1024;
/// The time between two writes: 2.6 MB/s.
const PACE: Duration = Duration::from_millis(25);
/// Bytes in a datagram.
const DATAGRAM: usize = 1000;
/// The time between two datagrams.
const DATAGRAM_PACE: Duration = Duration::from_millis(5);

/// Connections that a receiver keeps at once.
const MOST_STREAMS: usize = 8;

/// The receivers of both kinds in one namespace, and what they received; they end when dropped.
#[derive(Debug)]
pub(crate) struct Receivers {
    received: Arc<Received>,
    _threads: Threads,
}

/// Payload bytes.
#[derive(Debug, Default)]
struct Received {
    tcp: AtomicU64,
    udp: AtomicU64,
}

/// The senders of both kinds in one namespace; they end when dropped.
#[derive(Debug)]
pub(crate) struct Senders {
    _threads: Threads,
}

/// Threads that look at a flag, joined when dropped.
#[derive(Debug, Default)]
struct Threads {
    ending: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    fn spawn(&mut self, work: impl FnOnce(&AtomicBool) + Send + 'static) {
        let ending = Arc::clone(&self.ending);
        self.threads.push(thread::spawn(move || work(&ending)));
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn is_set(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}

impl Receivers {
    /// Receives on all addresses of a namespace, of those that it will have too.
    pub(crate) fn start(netns: &Netns) -> Self {
        let any = (Ipv6Addr::UNSPECIFIED, PORT);
        let open = || -> io::Result<_> {
            let (listener, socket) = (TcpListener::bind(any)?, UdpSocket::bind(any)?);
            listener.set_nonblocking(true)?;
            socket.set_read_timeout(Some(TICK))?;
            Ok((listener, socket))
        };
        let (listener, socket) = match netns.inside(open) {
            Ok(sockets) => sockets,
            Err(error) => panic!("cannot receive in {}: {error}", netns.name()),
        };
        let received = Arc::new(Received::default());
        let mut threads = Threads::default();
        let counted = Arc::clone(&received);
        threads.spawn(move |ending| accept(&listener, &counted, ending));
        let counted = Arc::clone(&received);
        threads.spawn(move |ending| {
            let mut buffer = [0; 2 * DATAGRAM];
            while !is_set(ending) {
                if let Ok((length, _sender)) = socket.recv_from(&mut buffer) {
                    counted.udp.fetch_add(length as u64, Ordering::Relaxed);
                }
            }
        });
        Self { received, _threads: threads }
    }

    /// Bytes received by TCP and by UDP so far.
    pub(crate) fn received(&self) -> [u64; 2] {
        [&self.received.tcp, &self.received.udp].map(|count| count.load(Ordering::Relaxed))
    }
}

/// Reads all connections in turn. A sender has only one that is alive.
fn accept(listener: &TcpListener, received: &Received, ending: &AtomicBool) {
    let mut streams: Vec<TcpStream> = Vec::new();
    let mut buffer = vec![0; CHUNK];
    while !is_set(ending) {
        if let Ok((stream, _sender)) = listener.accept() {
            if stream.set_nonblocking(true).is_ok() {
                streams.push(stream);
            }
            // The older ones were given up by their senders, though it may not be known here.
            let surplus = streams.len().saturating_sub(MOST_STREAMS);
            streams.drain(..surplus);
        }
        let mut progress = false;
        streams.retain_mut(|stream| match stream.read(&mut buffer) {
            Ok(0) => false,
            Ok(length) => {
                received.tcp.fetch_add(length as u64, Ordering::Relaxed);
                progress = true;
                true
            }
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        });
        if !progress {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Senders {
    /// Sends from a namespace: a stream to one address, datagrams to another.
    pub(crate) fn start(netns: &Arc<Netns>, tcp_to: SocketAddr, udp_to: SocketAddr) -> Self {
        let mut threads = Threads::default();
        let inside = Arc::clone(netns);
        threads.spawn(move |ending| inside.inside(|| stream(tcp_to, ending)));
        let inside = Arc::clone(netns);
        threads.spawn(move |ending| inside.inside(|| datagrams(udp_to, ending)));
        Self { _threads: threads }
    }
}

/// Bytes that a witness recognises.
fn payload(length: usize) -> Vec<u8> {
    PATTERN.iter().copied().cycle().take(length).collect()
}

fn stream(to: SocketAddr, ending: &AtomicBool) {
    let chunk = payload(CHUNK);
    while !is_set(ending) {
        // Whatever fails, the next connection may succeed.
        let _ = connect(to).and_then(|stream| send(stream, &chunk, ending));
        thread::sleep(TICK);
    }
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, CONNECT_LIMIT)?;
    setsockopt(&stream, sockopt::TcpUserTimeout, &USER_TIMEOUT)?;
    stream.set_write_timeout(Some(TICK))?;
    Ok(stream)
}

fn send(mut stream: TcpStream, chunk: &[u8], ending: &AtomicBool) -> io::Result<()> {
    let mut sent = 0;
    while !is_set(ending) {
        match stream.write(&chunk[sent..]) {
            Ok(length) => sent += length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if sent == chunk.len() {
            sent = 0;
            thread::sleep(PACE);
        }
    }
    Ok(())
}

fn datagrams(to: SocketAddr, ending: &AtomicBool) {
    let datagram = payload(DATAGRAM);
    let Ok(socket) = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)) else { return };
    // An IPv4 address by the socket of IPv6, which is then free to use any source address.
    let to = match to {
        SocketAddr::V4(v4) => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
        SocketAddr::V6(_) => to,
    };
    while !is_set(ending) {
        // The interface may not be there now.
        let _ = socket.send_to(&datagram, to);
        thread::sleep(DATAGRAM_PACE);
    }
}
