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
    /// Of the requests without a reply, those that may still get one: ping(8) waits for the last ones no longer than
    /// for twice the longest round trip, which a busy machine exceeds now and then.
    pub pending: u32,
}

impl Pings {
    /// Whether all were answered, except those that may still be.
    #[must_use]
    pub const fn were_answered(self) -> bool {
        self.received > 0 && self.received + self.pending >= self.sent
    }
}

/// Sends `count` echo requests, 50 ms apart.
#[track_caller]
#[must_use]
pub fn ping(from: &Netns, to: IpAddr, count: u32) -> Pings {
    let output = from.output(format!("ping -n -c {count} -i 0.05 -W 2 {to}"));
    pings(&String::from_utf8_lossy(&output.stdout))
}

/// Whether a single echo request is answered: whatever it takes, a handshake included, must work
/// the first time.
#[must_use]
pub fn answers_at_once(from: &Netns, to: IpAddr) -> bool {
    ping(from, to, 1).received == 1
}

/// Sends `count` echo requests, each as soon as the one before is answered or 10 ms old.
#[track_caller]
#[must_use]
pub fn flood(from: &Netns, to: IpAddr, count: u32) -> Pings {
    let output = from.output(format!("ping -n -q -f -c {count} -W 2 {to}"));
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

/// Most requests at the end whose replies ping(8) did not wait for.
const MAX_PENDING: u32 = 3;

/// Reads ping's summary, `3 packets transmitted, 3 received, …`, and the numbers of the requests that it says are answered.
#[track_caller]
fn pings(text: &str) -> Pings {
    let summary = text.lines().find(|line| line.contains(" packets transmitted, "));
    let numbers: Vec<u32> = summary
        .into_iter()
        .flat_map(|line| line.split(", "))
        .filter_map(|part| part.split(' ').next()?.parse().ok())
        .collect();
    match numbers[..] {
        [sent, received, ..] => {
            let replies = text.lines().filter(|line| line.contains(" bytes from "));
            let pending = match replies.filter_map(number).max() {
                Some(last) if last == received => sent.saturating_sub(last).min(MAX_PENDING),
                // Another one was answered after one that was not.
                Some(_) => 0,
                // A flood, of which ping prints no numbers.
                None => sent.saturating_sub(received).min(1),
            };
            Pings { sent, received, pending }
        }
        _ => panic!("ping printed no summary: {text:?}"),
    }
}

/// The number of the request that a line of ping(8) is about.
fn number(line: &str) -> Option<u32> {
    let (_, behind) = line.split_once("icmp_seq=")?;
    behind.split(' ').next()?.parse().ok()
}

/// What iperf3 is to send for one second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// One TCP stream as fast as it goes, sent without copying.
    Tcp,
    /// UDP datagrams of 1,200 bytes, at 5 Mbit/s.
    Udp,
    /// UDP datagrams as large as the path takes and as fast as they go, of which many will be lost.
    UdpFlood,
}

/// What the receiver of an iperf3 run got.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Payload bytes.
    pub bytes: u64,
    /// UDP datagrams lost, in percent; 0 for TCP.
    pub lost_percent: f64,
}

impl Load {
    fn arguments(self) -> &'static str {
        match self {
            Self::Tcp => "-Z",
            Self::Udp => "-u -b 5M -l 1200",
            Self::UdpFlood => "-u -b 0",
        }
    }
}

/// Runs iperf3 for a second from one namespace to an address of another.
///
/// # Panics
///
/// When the server does not listen or the client fails.
#[track_caller]
#[must_use]
pub fn iperf(from: &Netns, to: &Netns, address: IpAddr, load: Load) -> Received {
    iperf_at_once(from, to, address, load, 1).remove(0)
}

/// As [`iperf`], `count` times at once, each with a server and a connection of its own.
///
/// # Panics
///
/// When a server does not listen or a client fails.
#[track_caller]
#[must_use]
pub fn iperf_at_once(
    from: &Netns,
    to: &Netns,
    address: IpAddr,
    load: Load,
    count: u16,
) -> Vec<Received> {
    let ports = PORT..PORT + count;
    let serve = |port| to.spawn(format!("iperf3 -s -1 --forceflush -p {port}"));
    let servers: Vec<_> = ports.clone().map(serve).collect();
    let is_listening = |server: &Process| server.log().contains("Server listening");
    wait::until("iperf3 listens", IPERF_LIMIT, || servers.iter().all(is_listening));
    let kind = load.arguments();
    let limit = IPERF_LIMIT.as_secs();
    let send =
        |port| from.spawn(format!("timeout {limit} iperf3 -c {address} -p {port} -t 1 -J {kind}"));
    let clients: Vec<_> = ports.map(send).collect();
    clients.into_iter().map(|client| received(client, load)).collect()
}

/// Waits for an iperf3 client's end and reads its report.
#[track_caller]
fn received(mut client: Process, load: Load) -> Received {
    let status = client.exit_within(IPERF_LIMIT + Duration::from_secs(1));
    let report = client.log();
    assert!(status.success(), "iperf3: {status}\n{report}");
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

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(replies: &[u32], sent: u32) -> Pings {
        let line =
            |number: &u32| format!("64 bytes from 10.0.0.1: icmp_seq={number} ttl=64 time=1 ms\n");
        let lines: String = replies.iter().map(line).collect();
        let received = replies.len();
        pings(&format!(
            "{lines}\n{sent} packets transmitted, {received} received, 0% packet loss\n"
        ))
    }

    #[test]
    fn replies_may_be_missing_at_the_end_only() {
        for replies in [&[1, 2, 3, 4, 5][..], &[1, 2, 3, 4], &[1, 2]] {
            assert!(printed(replies, 5).were_answered(), "{replies:?}");
        }
        for replies in [&[][..], &[1], &[1, 2, 3, 5], &[2, 3, 4, 5]] {
            assert!(!printed(replies, 5).were_answered(), "{replies:?}");
        }
        assert!(pings("9 packets transmitted, 8 received, 11% packet loss").were_answered());
        assert!(!pings("9 packets transmitted, 7 received, 22% packet loss").were_answered());
    }
}
