//! A flood that is dropped takes no longer a turn than one that is kept: whatever comes faster than the
//! daemon can read it with the processor time that it gets, packets the other way go out at once.
//!
//! The measure is the number of packets of the flood that the daemon reads meanwhile, not the time: on a busy machine
//! a packet takes longer, but the daemon reads no more.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};
use nix::unistd::Pid;

use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::link::Family;
use wgsep_tests::netns::Netns;
use wgsep_tests::require;
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::{PORT, Plan, Tunnel};
use wgsep_tests::wait;

/// The dataplane runs for so long, and is then stopped for so long, as with a tenth of a processor.
const RUNS: Duration = Duration::from_millis(2);
const STOPS: Duration = Duration::from_millis(18);
const PROBES: usize = 21;
/// How long a probe is waited for.
const PROBE_LIMIT: Duration = Duration::from_secs(2);
/// Packets of the flood that may be read while a probe is under way: some hundred usually are, and all that arrive
/// in [`PROBE_LIMIT`] when a turn of the flood has no end.
const MOST_READ: u64 = 10_000;
/// What the daemon has read of a flood before the first probe.
const HEAD_START: u64 = 2_000;
const LIMIT: Duration = Duration::from_secs(20);

/// A UDP header, and what is behind it.
fn datagram(source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    let length = 8 + payload.len() as u16;
    let mut datagram: Vec<u8> =
        [source, destination, length, 0].into_iter().flat_map(u16::to_be_bytes).collect();
    datagram.extend_from_slice(payload);
    datagram
}

/// A message of a type, zeros behind it.
fn message(kind: u8, len: usize) -> Vec<u8> {
    let mut message = vec![0; len];
    message[0] = kind;
    message
}

/// A number in a table of a namespace, which is read without starting a program.
struct Counter {
    table: File,
    row: String,
    column: usize,
}

impl Counter {
    /// Datagrams that programs have read from their UDP sockets.
    fn datagrams_read(netns: &Netns) -> Self {
        // The first row that begins so has the names of the columns.
        Self::new(netns, "snmp", "Udp: ", 0)
    }

    /// Packets that programs have read from a TUN device.
    fn packets_read(netns: &Netns, interface: &str) -> Self {
        Self::new(netns, "dev", &format!("{interface}: "), 9)
    }

    fn new(netns: &Netns, table: &str, row: &str, column: usize) -> Self {
        // The process's own is that of its first thread.
        let path = format!("/proc/thread-self/net/{table}");
        let table = netns.inside(|| File::open(path)).unwrap();
        Self { table, row: row.to_owned(), column }
    }

    fn read(&self) -> u64 {
        let mut text = [0; 16_384];
        let len = self.table.read_at(&mut text, 0).unwrap();
        let text = str::from_utf8(&text[..len]).unwrap();
        let mut rows = text.lines().filter_map(|line| line.trim_start().strip_prefix(&self.row));
        let row = rows.next_back().unwrap();
        row.split_whitespace().nth(self.column).unwrap().parse().unwrap()
    }
}

/// A socket that takes datagrams with their headers.
fn raw_socket(netns: &Netns) -> OwnedFd {
    netns.inside(|| {
        let (kind, flags) = (SockType::Raw, SockFlag::SOCK_CLOEXEC);
        socket(AddressFamily::Inet, kind, flags, SockProtocol::Udp).unwrap()
    })
}

/// Sends a datagram over and over, and gives the process only part of the time, until it is stopped.
fn flood(from: &OwnedFd, to: IpAddr, datagram: &[u8], process: Pid, ends: &AtomicBool) {
    let to = SockaddrStorage::from(SocketAddr::new(to, 0));
    let (start, mut stopped) = (Instant::now(), false);
    while !ends.load(Ordering::Relaxed) {
        for _ in 0..16 {
            // A full buffer is a loss like any other.
            let _sent = sendto(from.as_raw_fd(), datagram, &to, MsgFlags::MSG_DONTWAIT);
        }
        let into_cycle = start.elapsed().as_micros() % (RUNS + STOPS).as_micros();
        let stop = into_cycle >= RUNS.as_micros();
        if stop != stopped {
            kill(process, if stop { Signal::SIGSTOP } else { Signal::SIGCONT }).unwrap();
            stopped = stop;
        }
    }
    kill(process, Signal::SIGCONT).unwrap();
}

/// How many packets of a flood a daemon reads while a datagram goes from one socket to another: the median
/// of [`PROBES`].
fn read_meanwhile(
    sender: &UdpSocket,
    receiver: &UdpSocket,
    flood: impl FnOnce(&AtomicBool) + Send,
    read: &Counter,
) -> u64 {
    let ends = AtomicBool::new(false);
    let to = receiver.local_addr().unwrap();
    receiver.set_read_timeout(Some(PROBE_LIMIT)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| flood(&ends));
        let before = read.read();
        wait::until("the flood arrives", LIMIT, || read.read() > before + HEAD_START);
        let mut counts: Vec<u64> = (0..PROBES as u64)
            .map(|probe| {
                let before = read.read();
                sender.send_to(&probe.to_ne_bytes(), to).unwrap();
                let mut received = [0; 8];
                // Another that is here was too late.
                while receiver.recv(&mut received).is_ok() && u64::from_ne_bytes(received) != probe
                {
                }
                read.read() - before
            })
            .collect();
        ends.store(true, Ordering::Relaxed);
        counts.sort_unstable();
        counts[PROBES / 2]
    })
}

/// Datagrams that are dropped at the latest when their message has been looked at.
#[test]
fn packets_leave_at_once_under_a_flood_of_whatever_is_dropped() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    let [ours, theirs] = [left, right].map(|end| end.side.inner(Family::V4));
    until_ping(&left.daemon.netns, theirs);
    let sender = left.daemon.netns.inside(|| UdpSocket::bind((ours, 0))).unwrap();
    let receiver = right.daemon.netns.inside(|| UdpSocket::bind((theirs, 9000))).unwrap();
    let raw = raw_socket(&right.daemon.netns);
    let (to, process) = (left.side.outer(Family::V4), left.daemon.dataplane());
    let read = Counter::datagrams_read(&left.daemon.netns);
    for (what, source, payload) in [
        ("from port 0", 0, vec![b'x']),
        ("with nothing in them", 40_000, vec![]),
        ("from port 0 with nothing in them", 0, vec![]),
        ("of no known type", 40_000, message(9, 100)),
        ("of an unknown index", 40_000, message(4, 64)),
        ("of a handshake for another key", 40_000, message(1, 148)),
    ] {
        let datagram = datagram(source, PORT, &payload);
        let flood = |ends: &AtomicBool| flood(&raw, to, &datagram, process, ends);
        let count = read_meanwhile(&sender, &receiver, flood, &read);
        assert!(count < MOST_READ, "a packet waits for {count} datagrams {what}");
    }
}

#[test]
fn packets_arrive_at_once_under_a_flood_of_those_that_no_peer_has_the_address_of() {
    require!(Wgsep);
    let tunnel = Plan::new(Wgsep, Wgsep).build();
    let Tunnel { left, right } = &tunnel;
    let [ours, theirs] = [left, right].map(|end| end.side.inner(Family::V4));
    until_ping(&left.daemon.netns, theirs);
    let sender = right.daemon.netns.inside(|| UdpSocket::bind((theirs, 0))).unwrap();
    let receiver = left.daemon.netns.inside(|| UdpSocket::bind((ours, 9000))).unwrap();
    let stranger: IpAddr = [192, 168, 77, 200].into();
    let raw = raw_socket(&left.daemon.netns);
    let process = left.daemon.dataplane();
    let datagram = datagram(7, 7, b"x");
    let flood = |ends: &AtomicBool| flood(&raw, stranger, &datagram, process, ends);
    let read = Counter::packets_read(&left.daemon.netns, &left.daemon.interface);
    let count = read_meanwhile(&sender, &receiver, flood, &read);
    assert!(count < MOST_READ, "a datagram waits for {count} packets");
}
