//! Packets through a tunnel on one thread: sealed at one end, opened at the other, by each library in turn.
//!
//! `cargo bench --manifest-path tests/libraries/Cargo.toml`. Only ratios within one run mean something on a machine that does other
//! things too.
#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::Duration;
use wgsep_libraries::{Boringtun, Ends, Gotatun, Wgsep, packet};

/// Lengths of packets, in bytes.
const LENGTHS: [usize; 3] = [64, 512, 1400];
/// Packets that are sealed, and then opened, at once.
const BATCHES: [usize; 2] = [1, 32];

fn measure<E: Ends>(criterion: &mut Criterion, len: usize, batch: usize) {
    let mut ends = E::establish(len, batch);
    let plain = packet(len).repeat(batch);
    let mut group = criterion.benchmark_group(format!("{len} bytes, {batch} at once"));
    group.throughput(Throughput::Bytes((len * batch) as u64));
    group.bench_function(BenchmarkId::from_parameter(E::NAME), |bencher| {
        bencher.iter(|| assert_eq!(ends.carry(black_box(&plain), len), len * batch));
    });
    group.finish();
}

fn through(criterion: &mut Criterion) {
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
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = through
}
criterion_main!(throughput);
