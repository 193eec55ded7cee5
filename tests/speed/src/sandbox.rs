//! What the system-call filter costs: one TCP stream through wgsep as it is and through the same
//! program with a filter that allows everything, turn by turn.
//!
//! The processors are what limits a stream here. Their time by the byte says what a filter takes from
//! its rate, and is disturbed by less than the rate itself is.

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;

use crate::bed::Bed;
use crate::cpu::Meter;
use crate::iperf::{self, Streams};
use crate::quantity::Quantity::SandboxCost;
use crate::round::{Common, Measured, PAIR_SECONDS};
use crate::unfiltered;

/// As many turns as elsewhere, so many times: what is looked for is small.
const TIMES: u32 = 3;

/// The loss of each turn, in percent.
#[track_caller]
pub(crate) fn measure(common: &Common) -> Vec<Measured> {
    let filtered = Bed::of_daemons(common.veth, &common.key, |netns| Daemon::start(Wgsep, netns));
    let unfiltered = Bed::of_daemons(common.veth, &common.key, unfiltered::start);
    let turn = |number: u32| {
        // Who goes first takes turns too.
        let ((with, first), (without, second)) = if number.is_multiple_of(2) {
            let with = cost(&filtered);
            (with, cost(&unfiltered))
        } else {
            let without = cost(&unfiltered);
            (cost(&filtered), without)
        };
        Measured::new(SandboxCost, 100.0 * (1.0 - without / with), f64::max(first, second))
    };
    (0..TIMES * common.pace.pairs).map(turn).collect()
}

/// Processor time of both ends' daemons for a byte, in seconds; and how disturbed it was.
#[track_caller]
fn cost(bed: &Bed) -> (f64, f64) {
    let meter = Meter::start(bed);
    let transfer = iperf::run(bed, Streams { count: 1, back: false, seconds: PAIR_SECONDS });
    let usage = meter.stop();
    (usage.daemons / transfer.bytes, usage.disturbance)
}
