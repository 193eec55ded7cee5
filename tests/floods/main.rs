//! A flood that is dropped takes no longer a turn than one that is kept: whatever comes faster than the
//! daemon can read it with the processor time that it gets, packets the other way go out at once.
//!
//! A program of its own: what is in time is compared with what was in time before, on a machine that is equally busy.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
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

/// The dataplane runs for so long, and is then stopped for so long, as with a tenth of a processor.
const RUNS: Duration = Duration::from_millis(2);
const STOPS: Duration = Duration::from_millis(18);
const PROBES: u32 = 40;
const PROBE_INTERVAL: Duration = Duration::from_millis(30);
/// A probe that takes longer was held up by more than the stops.
const PROMPT: Duration = Duration::from_millis(200);
/// How long the flood lasts before the first probe.
const HEAD_START: Duration = Duration::from_millis(300);

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

/// How many of [`PROBES`] datagrams get from one socket to another in time during a flood.
fn prompt_probes(
    sender: &UdpSocket,
    receiver: &UdpSocket,
    flood: impl FnOnce(&AtomicBool) + Send,
) -> u32 {
    let (began, ends) = (Instant::now(), AtomicBool::new(false));
    let to = receiver.local_addr().unwrap();
    receiver.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| flood(&ends));
        let received = scope.spawn(|| {
            let (mut prompt, mut sent_at) = (0, [0; 8]);
            while !ends.load(Ordering::Relaxed) {
                if receiver.recv(&mut sent_at).is_ok() {
                    let sent_at = Duration::from_nanos(u64::from_ne_bytes(sent_at));
                    prompt += u32::from(began.elapsed().saturating_sub(sent_at) < PROMPT);
                }
            }
            prompt
        });
        thread::sleep(HEAD_START);
        for _ in 0..PROBES {
            let now = began.elapsed().as_nanos() as u64;
            let _lost = sender.send_to(&now.to_ne_bytes(), to);
            thread::sleep(PROBE_INTERVAL);
        }
        thread::sleep(PROMPT);
        ends.store(true, Ordering::Relaxed);
        received.join().unwrap()
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
    let under = |source: u16, payload: &[u8]| {
        let datagram = datagram(source, PORT, payload);
        prompt_probes(&sender, &receiver, |ends| flood(&raw, to, &datagram, process, ends))
    };
    // What is kept until it turns out to be nothing bounds itself: how busy the machine is.
    let usual = under(40_000, b"x");
    assert!(usual > PROBES / 2, "the machine is too busy: {usual} of {PROBES} in time");
    for (what, source, payload) in [
        ("from port 0", 0, vec![b'x']),
        ("with nothing in them", 40_000, vec![]),
        ("from port 0 with nothing in them", 0, vec![]),
        ("of no known type", 40_000, message(9, 100)),
        ("of an unknown index", 40_000, message(4, 64)),
        ("of a handshake for another key", 40_000, message(1, 148)),
    ] {
        let prompt = under(source, &payload);
        assert!(
            prompt + PROBES / 4 >= usual,
            "under datagrams {what}, {prompt} of {PROBES} packets are in time, otherwise {usual}"
        );
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
    let under = |to: IpAddr| {
        let datagram = datagram(7, 7, b"x");
        prompt_probes(&sender, &receiver, |ends| flood(&raw, to, &datagram, process, ends))
    };
    let usual = under(theirs);
    assert!(usual > PROBES / 2, "the machine is too busy: {usual} of {PROBES} in time");
    let prompt = under(stranger);
    assert!(prompt + PROBES / 4 >= usual, "{prompt} of {PROBES} are in time, otherwise {usual}");
}
