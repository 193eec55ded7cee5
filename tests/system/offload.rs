//! The kernel's offloads: with all of them, without each, and where the network refuses one, what is
//! sent arrives whole and in order; and whatever is done without is said once.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::panic::{catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::link::{self, DEVICE, Family, Side};
use wgsep_tests::netns::Netns;
use wgsep_tests::process::stop;
use wgsep_tests::require;
use wgsep_tests::traffic::until_ping;
use wgsep_tests::tunnel::{End, Tunnel};

/// Longer than any buffer on the way.
const STREAM_LEN: usize = 12 << 20;
/// How long one transfer may take.
const LIMIT: Duration = Duration::from_secs(30);

/// A tunnel whose left end has these options.
fn tunnel(left_options: &[&str], right_options: &[&str]) -> Tunnel {
    let (left, right) = link::joined();
    let start = |netns, options: &[&str]| {
        Daemon::start_with(Wgsep, netns, |command| {
            command.args(options);
        })
    };
    let tunnel = Tunnel {
        left: End::new(Side::Left, start(&left, left_options)),
        right: End::new(Side::Right, start(&right, right_options)),
    };
    for (end, other) in tunnel.directions() {
        end.configure(&other.key.public, Some(other.endpoint(Family::V4)), None);
    }
    until_ping(&tunnel.left.daemon.netns, tunnel.right.side.inner(Family::V4));
    tunnel
}

/// The byte at a place of the stream; no period of it divides a segment.
fn byte_at(place: usize) -> u8 {
    (place % 251) as u8 ^ (place >> 13) as u8
}

/// Sends a stream from one end to the other and looks at each byte.
#[track_caller]
fn assert_stream_arrives(from: &End, to: &End, family: Family) {
    let inner = to.side.inner(family);
    // Any port: the child of another test has the listener of the call before until it executes its program.
    let listener = to.daemon.netns.inside(|| TcpListener::bind((inner, 0))).unwrap();
    let address = listener.local_addr().unwrap();
    let mut sender =
        from.daemon.netns.inside(|| TcpStream::connect_timeout(&address, LIMIT)).unwrap();
    let (mut receiver, _) = listener.accept().unwrap();
    for stream in [&sender, &receiver] {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
    }
    thread::scope(|scope| {
        scope.spawn(move || {
            let bytes: Vec<u8> = (0..STREAM_LEN).map(byte_at).collect();
            sender.write_all(&bytes).unwrap();
        });
        let mut received = Vec::with_capacity(STREAM_LEN);
        receiver.read_to_end(&mut received).unwrap();
        assert_eq!(received.len(), STREAM_LEN);
        let wrong = received.iter().enumerate().find(|(place, byte)| **byte != byte_at(*place));
        assert_eq!(wrong, None);
    });
}

fn assert_streams_arrive(tunnel: &Tunnel) {
    for (from, to) in tunnel.directions() {
        for family in [Family::V4, Family::V6] {
            assert_stream_arrives(from, to, family);
        }
    }
}

#[track_caller]
fn assert_said(end: &End, line: &str, times: usize) {
    let log = end.daemon.process.log();
    assert_eq!(log.matches(line).count(), times, "{line:?} in:\n{log}");
}

#[test]
fn streams_arrive_whole_with_every_offload_of_this_kernel() {
    require!(Wgsep);
    let tunnel = tunnel(&[], &[]);
    assert_streams_arrive(&tunnel);
    assert_said(&tunnel.left, "going on without", 0);
    assert_said(&tunnel.left, "one by one", 0);
}

/// Both ends differ, so that each form of packet meets an end that sends others.
fn works_without(offload: &str) {
    let tunnel = tunnel(&["--without", offload], &[]);
    assert_streams_arrive(&tunnel);
    let said = usize::from(offload != "udp-gso");
    assert_said(&tunnel.left, &format!("going on without {offload}, more slowly"), said);
    assert_said(&tunnel.right, "going on without", 0);
}

#[test]
fn streams_arrive_whole_without_a_vnet_header() {
    require!(Wgsep);
    works_without("vnet-hdr");
}

#[test]
fn streams_arrive_whole_without_super_packets() {
    require!(Wgsep);
    works_without("tso");
    works_without("uso");
}

#[test]
fn streams_arrive_whole_by_way_of_a_single_queue() {
    require!(Wgsep);
    works_without("flow-queues");
}

#[test]
fn streams_arrive_whole_without_udp_offloads() {
    require!(Wgsep);
    works_without("udp-gso");
    works_without("udp-gro");
}

#[test]
fn streams_arrive_whole_without_vectors() {
    require!(Wgsep);
    works_without("avx512");
}

#[test]
fn a_path_too_narrow_for_segmentation_offload_is_noticed_once() {
    require!(Wgsep);
    let tunnel = tunnel(&[], &[]);
    for end in [&tunnel.left, &tunnel.right] {
        // Segments no longer fit, and the kernel refuses to make and to fragment them.
        end.daemon.netns.run(format!("ip link set {DEVICE} mtu 1300"));
    }
    assert_streams_arrive(&tunnel);
    for end in [&tunnel.left, &tunnel.right] {
        assert_said(end, "UDP segmentation offload refused", 1);
    }
}

/// Flows at once.
const FLOWS: u16 = 24;
/// Datagrams that have to arrive, of all flows and of each. What more is sent may be lost.
const ENOUGH: usize = 6000;
const ENOUGH_OF_EACH: usize = 20;

/// Sends the flows' numbered datagrams, each flow of a length of its own, from several threads at once, until
/// `enough` arrived.
fn send_flows(from: &Netns, source: IpAddr, destination: SocketAddr, enough: &AtomicBool) {
    thread::scope(|scope| {
        for senders in 0..4 {
            let flows = (0..FLOWS).filter(move |flow| flow % 4 == senders);
            let sockets: Vec<_> = from.inside(|| {
                flows.map(|flow| (flow, UdpSocket::bind((source, 8000 + flow)).unwrap())).collect()
            });
            scope.spawn(move || {
                let mut numbers = 0_u32..;
                while !enough.load(Ordering::Relaxed) {
                    let number = numbers.next().unwrap();
                    for (flow, socket) in &sockets {
                        let mut datagram = vec![0; 4 + usize::from(*flow) * 50];
                        datagram[..4].copy_from_slice(&number.to_be_bytes());
                        // A full queue is a loss like any other.
                        let _sent = socket.send_to(&datagram, destination);
                    }
                }
            });
        }
    });
}

/// Receives until enough arrived; the numbers of each flow, as they came. Each is answered: what comes the
/// other way must not move a flow.
fn receive_flows(socket: &UdpSocket) -> BTreeMap<u16, Vec<u32>> {
    let deadline = Instant::now() + LIMIT;
    let mut flows = BTreeMap::<_, Vec<_>>::new();
    let mut arrived = 0;
    let mut datagram = [0; 2048];
    while arrived < ENOUGH
        || flows.len() < FLOWS.into()
        || flows.values().any(|numbers| numbers.len() < ENOUGH_OF_EACH)
    {
        assert!(
            Instant::now() < deadline,
            "only {arrived} datagrams of {} flows arrived",
            flows.len()
        );
        let (_, sender) = socket.recv_from(&mut datagram).expect("a datagram within the limit");
        let number = u32::from_be_bytes(*datagram.first_chunk().unwrap());
        let _sent = socket.send_to(&number.to_be_bytes(), sender);
        flows.entry(sender.port()).or_default().push(number);
        arrived += 1;
    }
    flows
}

fn keeps_order_with(workers: &str) {
    let options = ["--workers", workers];
    let tunnel = tunnel(&options, &options);
    let Tunnel { left, right } = &tunnel;
    let source = left.side.inner(Family::V4);
    let destination = SocketAddr::new(right.side.inner(Family::V4), 9000);
    let receiver = right.daemon.netns.inside(|| UdpSocket::bind(destination)).unwrap();
    receiver.set_read_timeout(Some(LIMIT)).unwrap();
    let enough = AtomicBool::new(false);
    let flows = thread::scope(|scope| {
        scope.spawn(|| send_flows(&left.daemon.netns, source, destination, &enough));
        // Also when it panics: the scope waits for the senders.
        let received = catch_unwind(|| receive_flows(&receiver));
        enough.store(true, Ordering::Relaxed);
        received.unwrap_or_else(|panic| resume_unwind(panic))
    });
    for (port, numbers) in flows {
        let swapped = numbers.windows(2).find(|pair| pair[0] >= pair[1]);
        assert_eq!(swapped, None, "port {port} with {workers} workers");
    }
}

#[test]
fn no_flow_is_reordered_by_any_number_of_workers() {
    require!(Wgsep);
    for workers in ["1", "2", "4"] {
        keeps_order_with(workers);
    }
}

/// Datagrams that wait in the TUN device while no worker reads it: fewer than one queue holds.
const WAITING: u32 = 400;
/// Flows of a single datagram behind them.
const LATER_FLOWS: u16 = 40;
/// What they hold: no number of the long one.
const LATER: u32 = u32::MAX;

/// How many of the later flows came before most of the long one.
fn passed(left_options: &[&str]) -> usize {
    // The other end is to write them in the order in which they come, not put together.
    let tunnel = tunnel(left_options, &["--without", "uso"]);
    let Tunnel { left, right } = &tunnel;
    let source = left.side.inner(Family::V4);
    let destination = SocketAddr::new(right.side.inner(Family::V4), 9000);
    let receiver = right.daemon.netns.inside(|| UdpSocket::bind(destination)).unwrap();
    receiver.set_read_timeout(Some(LIMIT)).unwrap();
    let bind = |port| left.daemon.netns.inside(|| UdpSocket::bind((source, port))).unwrap();
    let long = bind(8000);
    let dataplane = left.daemon.dataplane();
    stop(dataplane);
    for number in 0..WAITING {
        long.send_to(&number.to_be_bytes(), destination).unwrap();
    }
    for later in 0..LATER_FLOWS {
        bind(8001 + later).send_to(&LATER.to_be_bytes(), destination).unwrap();
    }
    kill(dataplane, Signal::SIGCONT).unwrap();
    let mut passed = 0;
    loop {
        let mut datagram = [0; 4];
        receiver.recv_from(&mut datagram).expect("a datagram within the limit");
        match u32::from_be_bytes(datagram) {
            LATER => passed += 1,
            number if number > WAITING / 2 => return passed,
            _ => {}
        }
    }
}

#[test]
fn a_long_flow_does_not_delay_the_others() {
    require!(Wgsep);
    // One in 16 shares its queue with the long flow.
    let before = passed(&[]);
    assert!(before > usize::from(LATER_FLOWS / 2), "only {before} of {LATER_FLOWS} came before");
    assert_eq!(passed(&["--without", "flow-queues"]), 0);
}
