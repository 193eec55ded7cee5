//! What a flood of initiations that no peer can have sent takes from a TCP stream.
//!
//! The flood never stops: half of the time it goes to a port where it is not read, so that what
//! is compared differs in nothing but the daemon's own work. Its mac1 is right, as anybody can make
//! it who knows the public key. After each change some time is not counted, in which what came before
//! is worked off; that a daemon is still under load in the calm half is.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use wgsep_proto::wire::messages::INITIATION_LEN;
use wgsep_tests::wait;

use crate::bed::Place;
use crate::cpu::Meter;
use crate::handshakes::{macs, public_key};
use crate::iperf::{Iperf, Streams};
use crate::quantity::Quantity::FloodKept;
use crate::round::{Context, Measured};

/// Initiations a second.
const RATE: f64 = 10_000.0;
/// How long each half lasts: the shorter, the less of the machine's own ups and downs falls on one of
/// them; a flood has its full effect after some milliseconds.
const PHASE: Duration = Duration::from_millis(100);
const PAUSE: Duration = Duration::from_micros(200);
/// After a change: half as long again as it takes to answer all of one half's initiations.
const GAP: Duration = Duration::from_millis(30);
/// Bytes out of the tunnel that a stream is past its start with.
const UNDER_WAY: f64 = 1e6;
const START_LIMIT: Duration = Duration::from_secs(15);
/// Different ones.
const DATAGRAMS: u16 = 512;

/// The rate under the flood as a share of that without.
#[track_caller]
pub(crate) fn measure(context: &Context<'_>) -> Vec<Measured> {
    let bed = context.bed;
    let Some(end) = bed.right_end() else { return Vec::new() };
    let datagrams = initiations(&end.key.public);
    let bind = || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0));
    let (Ok(sender), Ok(sink)) = (bed.left.netns.inside(bind), bed.right.netns.inside(bind)) else {
        panic!("cannot bind a UDP socket");
    };
    let daemon = bed.right_endpoint();
    let elsewhere = SocketAddr::new(daemon.ip(), sink.local_addr().map_or(0, |at| at.port()));
    let phases = context.pace.flood_phases;
    // More than it takes to begin; what is left is not waited for.
    let seconds = (2 * phases * (GAP + PHASE)).as_secs() + 2;
    let stream = Iperf::start(bed, Streams { count: 1, back: false, seconds });
    let before = received(&bed.right);
    wait::until("a stream is under way", START_LIMIT, || received(&bed.right) > before + UNDER_WAY);
    let meter = Meter::start(bed);
    let (at_daemon, ends) = (AtomicBool::new(false), AtomicBool::new(false));
    let (mut calm, mut flooded) = (Vec::new(), Vec::new());
    thread::scope(|scope| {
        scope.spawn(|| {
            send(&sender, &datagrams, &ends, || {
                if at_daemon.load(Ordering::Relaxed) { daemon } else { elsewhere }
            });
        });
        for _ in 0..phases {
            for (floods, rates) in [(false, &mut calm), (true, &mut flooded)] {
                at_daemon.store(floods, Ordering::Relaxed);
                thread::sleep(GAP);
                rates.push(rate(&bed.right));
            }
        }
        ends.store(true, Ordering::Relaxed);
    });
    let usage = meter.stop();
    drop(stream);
    let (flooded, calm): (f64, f64) = (flooded.iter().sum(), calm.iter().sum());
    assert!(calm > 0.0, "nothing arrived");
    vec![Measured::new(FloodKept, 100.0 * flooded / calm, usage.disturbance)]
}

/// Initiations with a right mac1 and nothing else right.
fn initiations(responder: &str) -> Vec<[u8; INITIATION_LEN]> {
    let responder = public_key(responder);
    let initiation = |number: u16| {
        let mut datagram = [0x5a; INITIATION_LEN];
        datagram[..4].copy_from_slice(&[1, 0, 0, 0]);
        datagram[8..10].copy_from_slice(&number.to_le_bytes());
        macs(&responder, &mut datagram);
        datagram
    };
    (0..DATAGRAMS).map(initiation).collect()
}

fn send(
    socket: &UdpSocket,
    datagrams: &[[u8; INITIATION_LEN]],
    ends: &AtomicBool,
    destination: impl Fn() -> SocketAddr,
) {
    let (start, mut sent) = (Instant::now(), 0.0);
    let mut datagrams = datagrams.iter().cycle();
    while !ends.load(Ordering::Relaxed) {
        let due = start.elapsed().as_secs_f64() * RATE;
        while sent < due
            && let Some(datagram) = datagrams.next()
        {
            // What the kernel has no room for is lost.
            let _full = socket.send_to(datagram, destination());
            sent += 1.0;
        }
        thread::sleep(PAUSE);
    }
}

/// Bytes a second that come out of the tunnel for one phase.
#[track_caller]
fn rate(place: &Place) -> f64 {
    let read = || (received(place), Instant::now());
    let (before, start) = read();
    thread::sleep(PHASE);
    let (after, end) = read();
    (after - before) / end.duration_since(start).as_secs_f64()
}

/// Bytes that an interface has received, as the kernel counts them.
#[track_caller]
fn received(place: &Place) -> f64 {
    let table = place.netns.inside(|| fs::read_to_string("/proc/thread-self/net/dev"));
    let table = table.unwrap_or_default();
    let line = table.lines().find_map(|line| line.trim().strip_prefix(&place.interface));
    let first = line.and_then(|line| line.trim_start_matches(':').split_whitespace().next());
    match first.and_then(|bytes| bytes.parse().ok()) {
        Some(bytes) => bytes,
        None => panic!("{} is not in /proc/net/dev", place.interface),
    }
}
