//! What the system-call filter costs: one TCP stream through wgsep as it is and through the same
//! program with a filter that allows everything, turn by turn.

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;

use crate::bed::Bed;
use crate::cpu::Meter;
use crate::iperf::{self, Streams};
use crate::quantity::Quantity::SandboxCost;
use crate::round::{Common, Measured, PAIR_SECONDS};
use crate::unfiltered;

/// The loss of each turn, in percent.
#[track_caller]
pub(crate) fn measure(common: &Common) -> Vec<Measured> {
    let filtered = Bed::of_daemons(common.veth, &common.key, |netns| Daemon::start(Wgsep, netns));
    let unfiltered = Bed::of_daemons(common.veth, &common.key, unfiltered::start);
    let streams = Streams { count: 1, back: false, seconds: PAIR_SECONDS };
    let rate = |bed| iperf::run(bed, streams).bits_per_second;
    let turn = |number: u32| {
        let meter = Meter::start(&filtered);
        // Who goes first takes turns too.
        let (with, without) = if number.is_multiple_of(2) {
            let with = rate(&filtered);
            (with, rate(&unfiltered))
        } else {
            let without = rate(&unfiltered);
            (rate(&filtered), without)
        };
        let disturbance = meter.stop().disturbance;
        Measured::new(SandboxCost, 100.0 * (1.0 - with / without), disturbance)
    };
    (0..common.pace.pairs).map(turn).collect()
}
