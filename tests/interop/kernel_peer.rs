//! The kernel's own WireGuard at the other end, in a virtual machine.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use wgsep_simulation::dice::Dice;
use wgsep_simulation::oracle;
use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::kernel::{self, DEVICE, Join, KernelPeer};
use wgsep_tests::link::{Family, Side};
use wgsep_tests::nft::Counter;
use wgsep_tests::traffic::{ping, until_ping};
use wgsep_tests::tunnel::{End, PORT};
use wgsep_tests::wg::preshared_key;
use wgsep_tests::{require, wait};

/// Columns of `wg show dump`.
const ENDPOINT: usize = 2;
const RECEIVED: usize = 5;
const SENT: usize = 6;

/// The length that nft sees of a cookie reply: 64 bytes and the UDP header.
const COOKIE_REPLY: &str = "udp length 72";

/// A machine, and wgsep in its namespace.
fn machine() -> (KernelPeer, End) {
    let kernel = KernelPeer::boot();
    let end = End::new(Side::Left, Daemon::start(Wgsep, &kernel.netns));
    (kernel, end)
}

/// Takes wgsep away and starts another in its place.
fn again(end: End) -> End {
    let netns = Arc::clone(&end.daemon.netns);
    drop(end);
    End::new(Side::Left, Daemon::start(Wgsep, &netns))
}

#[test]
fn both_count_the_same_and_carry_traffic_both_ways() {
    require!(Wgsep);
    if !kernel::is_available_or_skips() {
        return;
    }
    let (mut kernel, mut end) = machine();
    let psk = preshared_key();
    let plan = |outer| {
        let psk = Some(psk.as_str());
        Join { outer, kernel_psk: psk, daemon_psk: psk, ..Join::DAEMON_BEGINS }
    };
    // All counting comes first: what TCP leaves behind would be counted too.
    for outer in [Family::V4, Family::V6] {
        kernel.join(&end, plan(outer));
        // An initiation and ten packets of 128 bytes; a response and as many.
        let pings = ping(&end.daemon.netns, Side::Right.inner(Family::V4), 10);
        assert!(pings.were_answered(), "{pings:?}");
        // ping(8) may end before the last reply has come.
        let mut counted = ((0, 0), (String::new(), String::new()));
        let same = wait::poll(Duration::from_secs(5), || {
            let peer = end.daemon.peer();
            let columns = [SENT, RECEIVED].map(|column| kernel.peer_column(column));
            counted = ((peer.received, peer.sent), columns.into());
            (counted == ((1372, 1428), ("1372".to_owned(), "1428".to_owned()))).then_some(())
        });
        assert!(
            same.is_some(),
            "received and sent by wgsep; sent and received by the kernel: {counted:?}"
        );
        end = again(end);
    }
    for outer in [Family::V4, Family::V6] {
        kernel.join(&end, plan(outer));
        until_ping(&end.daemon.netns, Side::Right.inner(Family::V6));
        for family in [Family::V4, Family::V6] {
            kernel.until_ping(Side::Left.inner(family));
            for direction in ["", "--reverse"] {
                carries_tcp(&mut kernel, &end, Side::Right.inner(family), direction);
            }
        }
        end = again(end);
    }
}

/// One second of TCP through the tunnel, by a server in the machine.
fn carries_tcp(kernel: &mut KernelPeer, end: &End, to: IpAddr, direction: &str) {
    let netns = &end.daemon.netns;
    let client = format!("timeout 20 iperf3 -c {to} -t 1 -J {direction}");
    let mut said = String::new();
    let received = wait::poll(Duration::from_secs(90), || {
        // Refused until the server listens, which is no failure to iperf3 when it writes JSON; a server has ended that has
        // served a client whose report is not whole.
        kernel.run("pidof iperf3 >/dev/null || iperf3 -s -1 >/tmp/iperf3.log 2>&1 &");
        said = String::from_utf8_lossy(&netns.output(&client).stdout).into_owned();
        let report: Value = serde_json::from_str(&said).ok()?;
        report["end"]["sum_received"]["bytes"].as_u64()
    });
    let Some(bytes) = received else {
        panic!("iperf3: {said}\nin the machine: {}", kernel.run("cat /tmp/iperf3.log"));
    };
    assert!(bytes > 100_000, "{bytes} bytes {direction} to {to}");
}

#[test]
fn either_side_begins_and_follows_the_other_when_it_roams() {
    require!(Wgsep);
    if !kernel::is_available_or_skips() {
        return;
    }
    let (mut kernel, mut end) = machine();
    kernel.join(&end, Join::KERNEL_BEGINS);
    kernel.until_ping(Side::Left.inner(Family::V4));
    assert_eq!(end.daemon.peer().endpoint, kernel.endpoint(Family::V4).to_string());
    assert_ne!(kernel.latest_handshake(), 0);

    // A key that only one side has keeps them apart.
    end = again(end);
    let (one, other) = (preshared_key(), preshared_key());
    let differing =
        Join { kernel_psk: Some(&one), daemon_psk: Some(&other), ..Join::KERNEL_BEGINS };
    kernel.join(&end, Join { daemon_begins: true, ..differing });
    assert_eq!(ping(&end.daemon.netns, Side::Right.inner(Family::V4), 3).received, 0);
    assert_eq!((kernel.latest_handshake(), end.daemon.peer().latest_handshake), (0, 0));

    end = again(end);
    kernel.join(&end, Join::DAEMON_BEGINS);
    let (netns, inner) = (Arc::clone(&end.daemon.netns), Side::Right.inner(Family::V4));
    until_ping(&netns, inner);
    assert_eq!(kernel.peer_column(ENDPOINT), format!("{}:{PORT}", Side::Left.outer(Family::V4)));
    let session = kernel.latest_handshake();

    netns.run(format!("ip addr del {}/24 dev {DEVICE}", Side::Left.outer(Family::V4)));
    netns.run(format!("ip addr add 10.77.0.11/24 dev {DEVICE}"));
    until_ping(&netns, inner);
    assert_eq!(kernel.peer_column(ENDPOINT), format!("10.77.0.11:{PORT}"));

    kernel.run(format!("ip addr del {}/24 dev eth0", Side::Right.outer(Family::V4)));
    kernel.run("ip addr add 10.77.0.12/24 dev eth0");
    kernel.until_ping(Side::Left.inner(Family::V4));
    assert_eq!(end.daemon.peer().endpoint, format!("10.77.0.12:{PORT}"));
    until_ping(&netns, inner);
    assert_eq!(kernel.latest_handshake(), session, "the session went on");
}

#[test]
fn under_load_either_side_gives_a_cookie_and_the_other_comes_through() {
    require!(Wgsep);
    if !kernel::is_available_or_skips() {
        return;
    }
    let (mut kernel, mut end) = machine();
    let netns = Arc::clone(&end.daemon.netns);

    let to_us = format!("udp sport {PORT} udp dport {PORT} {COOKIE_REPLY}");
    let to_us = Counter::new(&netns, "to_us", "input", &to_us);
    kernel.join(&end, Join::DAEMON_BEGINS);
    let flood = Flood::begin(&end, &kernel.key.public.clone(), kernel.endpoint(Family::V4));
    wait::until("a flooded kernel gives us a cookie", Duration::from_secs(60), || {
        let _answered = ping(&netns, Side::Right.inner(Family::V4), 1);
        to_us.packets() > 0
    });
    until_ping(&netns, Side::Right.inner(Family::V4));
    flood.end();

    end = again(end);
    let to_it = format!("udp sport {PORT} udp dport {PORT} {COOKIE_REPLY}");
    let to_it = Counter::new(&netns, "to_it", "output", &to_it);
    kernel.join(&end, Join::KERNEL_BEGINS);
    let ours = SocketAddr::new(Side::Left.outer(Family::V4), PORT);
    let flood = Flood::begin(&end, &end.key.public, ours);
    kernel.run(format!("ping -q -i 0.2 {} >/dev/null 2>&1 &", Side::Left.inner(Family::V4)));
    wait::until("flooded, we give the kernel a cookie", Duration::from_secs(60), || {
        to_it.packets() > 0
    });
    wait::until("its next initiation comes through", Duration::from_secs(30), || {
        end.daemon.peer().latest_handshake != 0
    });
    kernel.until_ping(Side::Left.inner(Family::V4));
    flood.end();
}

/// Initiations by strangers who know the public key: bursts, longer than the queue at which a
/// WireGuard is under load.
struct Flood {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<()>,
}

impl Flood {
    fn begin(end: &End, public_key: &str, to: SocketAddr) -> Self {
        let socket = end.daemon.netns.inside(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
        let key: [u8; 32] = hex_bytes(&wgsep_tests::wg::hex(public_key));
        let mut dice = Dice::new(23);
        let messages: Vec<[u8; 148]> = (0..1500)
            .map(|_| {
                let mut message: [u8; 148] = dice.bytes();
                message[..4].copy_from_slice(&[1, 0, 0, 0]);
                oracle::add_macs(&key, &mut message);
                message
            })
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for message in &messages {
                    // A full socket drops it, as a network would.
                    let _sent = socket.send_to(message, to);
                }
                thread::sleep(Duration::from_millis(200));
            }
        });
        Self { stop, thread }
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

fn hex_bytes(hex: &str) -> [u8; 32] {
    let bytes: Vec<u8> =
        (0..32).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap()).collect();
    bytes.try_into().unwrap()
}
