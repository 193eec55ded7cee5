//! TCP through the tunnel: how much, and what it costs.

use crate::cpu::{Meter, Usage};
use crate::iperf::{self, Streams, Transfer};
use crate::quantity::Quantity::{self, DaemonCpu, MachineCpu, TcpBack, TcpForth, TcpFour};
use crate::round::{Context, Measured};

/// One stream each way, and four.
#[track_caller]
pub(crate) fn measure(context: &Context<'_>) -> Vec<Measured> {
    let seconds = context.pace.stream_seconds;
    let stream = |count, back| -> (Transfer, Usage) {
        context.undisturbed(|| {
            let meter = Meter::start(context.bed);
            let transfer = iperf::run(context.bed, Streams { count, back, seconds });
            (transfer, meter.stop())
        })
    };
    let (forth, usage) = stream(1, false);
    let mut measured = vec![gigabits(TcpForth, forth, usage)];
    for (quantity, seconds) in [(DaemonCpu, usage.daemons), (MachineCpu, usage.machine)] {
        measured.push(Measured::new(quantity, seconds * 1e9 / forth.bytes, usage.disturbance));
    }
    for (quantity, count, back) in [(TcpBack, 1, true), (TcpFour, 4, false)] {
        let (transfer, usage) = stream(count, back);
        measured.push(gigabits(quantity, transfer, usage));
    }
    measured
}

fn gigabits(quantity: Quantity, transfer: Transfer, usage: Usage) -> Measured {
    Measured::new(quantity, transfer.bits_per_second / 1e9, usage.disturbance)
}
