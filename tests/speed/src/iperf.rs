//! TCP streams by iperf3(1), as everybody measures them.

use std::time::Duration;

use serde_json::Value;
use wgsep_tests::process::Process;
use wgsep_tests::wait;

use crate::bed::Bed;

/// How long a server may take to listen, and a client to finish over its own seconds.
const LIMIT: Duration = Duration::from_secs(15);

/// What to send.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Streams {
    /// At once.
    pub(crate) count: u32,
    /// From right to left.
    pub(crate) back: bool,
    /// For how long.
    pub(crate) seconds: u64,
}

/// iperf3 at work.
pub(crate) struct Iperf {
    client: Process,
    _server: Process,
    seconds: u64,
}

/// What the receiver got.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    /// Of payload.
    pub(crate) bytes: f64,
    /// Of payload, a second.
    pub(crate) bits_per_second: f64,
}

impl Iperf {
    /// Starts sending.
    ///
    /// # Panics
    ///
    /// When the server does not listen.
    #[track_caller]
    pub(crate) fn start(bed: &Bed, streams: Streams) -> Self {
        let address = bed.right.inner;
        let server = bed.right.netns.spawn(format!("iperf3 -s -1 --forceflush -B {address}"));
        wait::until("iperf3 listens", LIMIT, || server.log().contains("Server listening"));
        let Streams { count, back, seconds } = streams;
        let direction = if back { "-R" } else { "" };
        let line = format!("iperf3 -c {address} -J -C cubic -t {seconds} -P {count} {direction}");
        Self { client: bed.left.netns.spawn(line), _server: server, seconds }
    }

    /// Waits for the end.
    ///
    /// # Panics
    ///
    /// When the client fails or takes too long.
    #[track_caller]
    pub(crate) fn finish(mut self) -> Transfer {
        let status = self.client.exit_within(LIMIT + Duration::from_secs(self.seconds));
        let report = self.client.log();
        let value: Value = serde_json::from_str(&report).unwrap_or_default();
        let sum = &value["end"]["sum_received"];
        match (sum["bytes"].as_f64(), sum["bits_per_second"].as_f64()) {
            (Some(bytes), Some(bits_per_second)) if status.success() => {
                Transfer { bytes, bits_per_second }
            }
            _ => panic!("iperf3: {status}: {}", value["error"]),
        }
    }
}

/// Starts, and waits for the end.
#[track_caller]
pub(crate) fn run(bed: &Bed, streams: Streams) -> Transfer {
    Iperf::start(bed, streams).finish()
}
