//! Packets through a tunnel on one thread: sealed at one end, opened at the other, by each library alternately.
//!
//! `cargo bench --manifest-path tests/libraries/Cargo.toml`. What is measured is the processor time of the thread, not the time of
//! day, so that waiting for other processes does not count. They still take their share of caches and of the
//! processor's clock: only ratios within one run mean something on a machine that does other things too.
#![allow(missing_docs)]

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use nix::time::{ClockId, clock_gettime};
use std::hint::black_box;
use std::time::Duration;
use wgsep_libraries::{Boringtun, Ends, Gotatun, Wgsep, packet};

/// Lengths of packets, in bytes.
const LENGTHS: [usize; 3] = [64, 512, 1400];
/// Packets that are sealed, and then opened, at once.
const BATCHES: [usize; 2] = [1, 32];

/// The processor time of the thread.
struct ThreadTime;

impl Measurement for ThreadTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
    }

    fn end(&self, start: Duration) -> Duration {
        self.start() - start
    }

    fn add(&self, one: &Duration, other: &Duration) -> Duration {
        *one + *other
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        value.as_nanos() as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

fn measure<E: Ends>(criterion: &mut Criterion<ThreadTime>, len: usize, batch: usize) {
    let mut ends = E::establish(len, batch);
    let plain = packet(len).repeat(batch);
    let mut group = criterion.benchmark_group(format!("{len} bytes, {batch} at once"));
    group.throughput(Throughput::Bytes((len * batch) as u64));
    group.bench_function(BenchmarkId::from_parameter(E::NAME), |bencher| {
        bencher.iter(|| assert_eq!(ends.carry(black_box(&plain), len), len * batch));
    });
    group.finish();
}

fn through(criterion: &mut Criterion<ThreadTime>) {
    for len in LENGTHS {
        for batch in BATCHES {
            measure::<Wgsep>(criterion, len, batch);
            measure::<Boringtun>(criterion, len, batch);
            measure::<Gotatun>(criterion, len, batch);
        }
    }
}

criterion_group! {
    name = throughput;
    config = Criterion::default()
        .with_measurement(ThreadTime)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = through
}
criterion_main!(throughput);
