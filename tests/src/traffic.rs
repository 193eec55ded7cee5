//! Traffic through a tunnel, and what arrived of it.

use std::net::IpAddr;
use std::time::Duration;

use serde_json::Value;

use crate::netns::Netns;
use crate::process::Process;
use crate::wait;

/// The port of iperf3's servers.
const PORT: u16 = 5201;

/// How long an iperf3 server may take to listen, and a client to finish over its own seconds.
const IPERF_LIMIT: Duration = Duration::from_secs(15);

/// What ping(8) counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pings {
    /// Echo requests sent.
    pub sent: u32,
    /// Echo replies received.
    pub received: u32,
}

/// Sends `count` echo requests, 50 ms apart.
#[track_caller]
#[must_use]
pub fn ping(from: &Netns, to: IpAddr, count: u32) -> Pings {
    let output = from.output(format!("ping -n -q -c {count} -i 0.05 -W 2 {to}"));
    pings(&String::from_utf8_lossy(&output.stdout))
}

/// Waits until one echo request is answered, which for a new tunnel takes a handshake.
///
/// # Panics
///
/// When none is within 15 s: enough for two handshakes to get lost.
#[track_caller]
pub fn until_ping(from: &Netns, to: IpAddr) {
    wait::until(&format!("{to} answers a ping"), Duration::from_secs(15), || {
        from.output(format!("ping -n -q -c 1 -W 1 {to}")).status.success()
    });
}

/// Pings that run while a test does something else.
#[derive(Debug)]
pub struct Pinging {
    process: Process,
}

impl Pinging {
    /// Starts pinging, ten times a second.
    #[track_caller]
    #[must_use]
    pub fn start(from: &Netns, to: IpAddr) -> Self {
        Self { process: from.spawn(format!("ping -n -i 0.1 -W 2 {to}")) }
    }

    /// Replies received so far.
    #[must_use]
    pub fn replies(&self) -> usize {
        self.process.log().matches("bytes from").count()
    }

    /// Waits until `more` further replies have come.
    #[track_caller]
    pub fn until_more(&self, more: usize) {
        let before = self.replies();
        let limit = Duration::from_secs(15);
        wait::until("pings go on being answered", limit, || self.replies() >= before + more);
    }

    /// Ends the pinging and counts.
    #[track_caller]
    #[must_use]
    pub fn stop(mut self) -> Pings {
        self.process.signal(nix::sys::signal::Signal::SIGINT);
        self.process.exit_within(Duration::from_secs(5));
        pings(&self.process.log())
    }
}

/// Reads ping's summary: `3 packets transmitted, 3 received, …`.
#[track_caller]
fn pings(text: &str) -> Pings {
    let summary = text.lines().find(|line| line.contains(" packets transmitted, "));
    let numbers: Vec<_> = summary
        .into_iter()
        .flat_map(|line| line.split(", "))
        .filter_map(|part| part.split(' ').next()?.parse().ok())
        .collect();
    match numbers[..] {
        [sent, received, ..] => Pings { sent, received },
        _ => panic!("ping printed no summary: {text:?}"),
    }
}

/// What iperf3 is to send for one second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// One TCP stream as fast as it goes.
    Tcp,
    /// UDP datagrams of 1,200 bytes, at 5 Mbit/s.
    Udp,
}

/// What the receiver of an iperf3 run got.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Payload bytes.
    pub bytes: u64,
    /// UDP datagrams lost, in percent; 0 for TCP.
    pub lost_percent: f64,
}

/// Runs iperf3 for a second from one namespace to an address of another.
///
/// # Panics
///
/// When the server does not listen or the client fails.
#[track_caller]
#[must_use]
pub fn iperf(from: &Netns, to: &Netns, address: IpAddr, load: Load) -> Received {
    let server = to.spawn(format!("iperf3 -s -1 --forceflush -p {PORT}"));
    wait::until("iperf3 listens", IPERF_LIMIT, || server.log().contains("Server listening"));
    let kind = match load {
        Load::Tcp => "",
        Load::Udp => "-u -b 5M -l 1200",
    };
    let limit = IPERF_LIMIT.as_secs();
    let report = from.run(format!("timeout {limit} iperf3 -c {address} -p {PORT} -t 1 -J {kind}"));
    let report: Value = match serde_json::from_str(&report) {
        Ok(report) => report,
        Err(error) => panic!("iperf3 printed no JSON: {error}\n{report}"),
    };
    let end = &report["end"];
    let sum = if load == Load::Tcp { &end["sum_received"] } else { &end["sum"] };
    Received {
        bytes: sum["bytes"].as_u64().unwrap_or(0),
        lost_percent: sum["lost_percent"].as_f64().unwrap_or(0.0),
    }
}
