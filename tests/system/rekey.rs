//! One real renewal of session keys, two minutes after the first handshake (REKEY_AFTER_TIME):
//! slow, and run always, because the virtual clock of the simulation cannot vouch for the real one.

use std::sync::Arc;
use std::time::Duration;

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::{Wgsep, WireguardGo};
use wgsep_tests::kernel::{self, Join, KernelPeer};
use wgsep_tests::link::{Family, Side};
use wgsep_tests::traffic::{Pinging, until_ping};
use wgsep_tests::tunnel::{End, Knows, Plan, Tunnel};
use wgsep_tests::{require, wait};

/// A little over REKEY_AFTER_TIME: the next packet sent begins the handshake.
const LIMIT: Duration = Duration::from_secs(140);

/// Replies that may go missing; a renewal itself drops nothing, a busy machine might.
const TOLERATED: u32 = 2;

/// All pairs wait at the same time, so the test takes two minutes and not eight.
#[test]
fn sessions_are_renewed_after_two_minutes_and_no_ping_is_lost() {
    require!(Wgsep, WireguardGo);
    let begin = Knows::Only(Side::Left);
    let pairs = [(Wgsep, Wgsep), (Wgsep, WireguardGo), (WireguardGo, Wgsep)];
    let renewals: Vec<_> = pairs
        .iter()
        .map(|&(left, right)| {
            Renewal::begin(&Plan { knows_endpoint: begin, ..Plan::new(left, right) })
        })
        .collect();
    for renewal in renewals {
        renewal.complete();
    }
}

/// A tunnel with traffic whose left end, having begun, must begin again.
struct Renewal {
    tunnel: Tunnel,
    pinging: Pinging,
    first: u64,
    pair: String,
}

impl Renewal {
    fn begin(plan: &Plan) -> Self {
        let tunnel = plan.build();
        let (netns, address) = (&tunnel.left.daemon.netns, tunnel.right.side.inner(Family::V4));
        until_ping(netns, address);
        let pinging = Pinging::start(netns, address);
        let first = handshake_time(&tunnel.left);
        assert_ne!(first, 0);
        Self { first, pinging, tunnel, pair: format!("{:?} to {:?}", plan.left, plan.right) }
    }

    fn complete(self) {
        for end in [&self.tunnel.left, &self.tunnel.right] {
            let what = format!("{}: a second handshake on the {:?}", self.pair, end.side);
            // The ends count whole seconds and may see the first one a second apart.
            wait::until(&what, LIMIT, || handshake_time(end) > self.first + 100);
        }
        let age = handshake_time(&self.tunnel.left) - self.first;
        assert!((119..=LIMIT.as_secs()).contains(&age), "{}: renewed after {age} s", self.pair);
        // Traffic on the new keys, not only a handshake.
        self.pinging.until_more(5);
        let pings = self.pinging.stop();
        let lost = pings.sent.saturating_sub(pings.received);
        assert!(lost <= TOLERATED, "{}: {pings:?}", self.pair);
    }
}

/// In a machine each, because one is a side of a link.
#[test]
fn sessions_with_the_kernel_are_renewed_by_either_side() {
    require!(Wgsep);
    if !kernel::is_available_or_skips() {
        return;
    }
    let pairs = [Join::DAEMON_BEGINS, Join::KERNEL_BEGINS].map(|join| {
        let mut kernel = KernelPeer::boot();
        let end = End::new(Side::Left, Daemon::start(Wgsep, &kernel.netns));
        kernel.join(&end, join);
        let (left, right) = (Side::Left.inner(Family::V4), Side::Right.inner(Family::V4));
        let netns = Arc::clone(&end.daemon.netns);
        if join.daemon_begins {
            until_ping(&netns, right);
        } else {
            kernel.until_ping(left);
        }
        let pinging = Pinging::start(&netns, right);
        let first = handshake_time(&end);
        (kernel, end, pinging, first)
    });
    for (mut kernel, end, pinging, first) in pairs {
        wait::until("a second handshake with the kernel", LIMIT, || {
            handshake_time(&end) > first + 100
        });
        let age = handshake_time(&end) - first;
        assert!((119..=LIMIT.as_secs()).contains(&age), "renewed after {age} s");
        assert!(kernel.latest_handshake() > first + 100);
        pinging.until_more(5);
        let pings = pinging.stop();
        assert!(pings.sent.saturating_sub(pings.received) <= TOLERATED, "{pings:?}");
    }
}

fn handshake_time(end: &End) -> u64 {
    end.daemon.peer().latest_handshake
}
