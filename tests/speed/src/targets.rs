//! What wgsep is to reach, and whether it did.

use crate::quantity::Quantity::{self, *};
use crate::results::Results;
use crate::statistics::Spread;

/// One line of the table of targets.
pub(crate) struct Target {
    /// What it is about.
    pub(crate) title: &'static str,
    goal: Goal,
}

enum Goal {
    /// wgsep's value over the forwarder's.
    OfForwarder { quantity: Quantity, bound: Bound, digits: usize },
    /// wgsep's value over that of the peer that does best.
    OfBestPeer { quantity: Quantity, bound: Bound },
    /// wgsep's value alone.
    Value { quantity: Quantity, bound: Bound, unit: &'static str },
}

#[derive(Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Bound {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(bound) => format!("≥ {bound}"),
            Self::AtMost(bound) => format!("≤ {bound}"),
        }
    }

    /// Which of two values is the better one.
    fn better(self, a: f64, b: f64) -> f64 {
        match self {
            Self::AtLeast(_) => a.max(b),
            Self::AtMost(_) => a.min(b),
        }
    }
}

/// How a target turned out.
pub(crate) struct Verdict {
    /// What was measured, with its spread and what it is relative to.
    pub(crate) found: String,
    /// What was wanted.
    pub(crate) wanted: String,
    pub(crate) met: bool,
}

use Bound::{AtLeast, AtMost};

/// All of them.
pub(crate) const TARGETS: [Target; 20] = [
    of_forwarder("TCP, 1 stream", TcpForth, AtLeast(0.65)),
    of_forwarder("TCP, 1 stream back", TcpBack, AtLeast(0.65)),
    of_forwarder("TCP, 4 streams", TcpFour, AtLeast(0.65)),
    of_best_peer("TCP, 1 stream", TcpForth, AtLeast(3.0)),
    of_best_peer("TCP, 4 streams", TcpFour, AtLeast(3.0)),
    of_forwarder("CPU of the daemons for a byte", DaemonCpu, AtMost(1.8)),
    of_best_peer("UDP 64 B, at most 1 % lost", SmallLossless, AtLeast(1.5)),
    of_best_peer("UDP 64 B, overload", SmallOverload, AtLeast(1.5)),
    of_best_peer("UDP 1372 B, overload", LargeOverload, AtLeast(2.0)),
    of_forwarder("UDP 1372 B, overload", LargeOverload, AtLeast(0.7)),
    value("UDP 64 B, overload, of the peak", SmallKept, AtLeast(90.0), " %"),
    of_best_peer("ping, idle", PingIdle, AtMost(1.0)),
    of_forwarder("ping under TCP", PingLoaded, AtMost(1.2)),
    value("memory of one end, peak", Memory, AtMost(24.0), " MiB"),
    value("initiations answered a core-second", Handshakes, AtLeast(6000.0), ""),
    value("TCP kept in a handshake flood", FloodKept, AtLeast(95.0), " %"),
    value("cost of a packet, 10,000 peers over 1", ScaleCost, AtMost(1.1), ""),
    value("memory of an idle peer", PeerMemory, AtMost(2048.0), " B"),
    value("processor's time lost to the filter", SandboxCost, AtMost(2.0), " %"),
    of_forwarder("UDP 64 B, at most 1 % lost", SmallLossless, AtLeast(1.0)),
];

const fn of_forwarder(title: &'static str, quantity: Quantity, bound: Bound) -> Target {
    Target { title, goal: Goal::OfForwarder { quantity, bound, digits: 2 } }
}

const fn of_best_peer(title: &'static str, quantity: Quantity, bound: Bound) -> Target {
    Target { title, goal: Goal::OfBestPeer { quantity, bound } }
}

const fn value(
    title: &'static str,
    quantity: Quantity,
    bound: Bound,
    unit: &'static str,
) -> Target {
    Target { title, goal: Goal::Value { quantity, bound, unit } }
}

impl Target {
    /// `None` if the run did not measure it.
    pub(crate) fn verdict(&self, results: &Results) -> Option<Verdict> {
        match self.goal {
            Goal::OfForwarder { quantity, bound, digits } => {
                let ratio = results.ratio("wgsep", "forwarder", quantity)?;
                Some(verdict(ratio, digits, " × forwarder", bound))
            }
            Goal::OfBestPeer { quantity, bound } => {
                let peer = best_peer(results, quantity, bound)?;
                let ratio = results.ratio("wgsep", peer, quantity)?;
                Some(verdict(ratio, 2, &format!(" × {peer}"), bound))
            }
            Goal::Value { quantity, bound, unit } => {
                let spread = results.spread("wgsep", quantity)?;
                Some(verdict(spread, quantity.digits(), unit, bound))
            }
        }
    }
}

fn verdict(spread: Spread, digits: usize, unit: &str, bound: Bound) -> Verdict {
    let found = format!("{}{unit}", spread.text(digits));
    Verdict { found, wanted: bound.text(), met: bound.is_met(spread.median) }
}

fn best_peer(results: &Results, quantity: Quantity, bound: Bound) -> Option<&str> {
    let medians = results.peers().filter_map(|peer| {
        let median = results.spread(peer, quantity)?.median;
        (median > 0.0).then_some((peer, median))
    });
    let best = medians.reduce(
        |best, next| {
            if bound.better(best.1, next.1) == best.1 { best } else { next }
        },
    );
    best.map(|(peer, _median)| peer)
}
