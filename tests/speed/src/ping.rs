//! Round trips through the tunnel: idle, and beside a TCP stream that takes all there is.

use crate::bed::Bed;
use crate::cpu::{Meter, Usage};
use crate::iperf::{Iperf, Streams};
use crate::quantity::Quantity::{PingIdle, PingIdleTail, PingLoaded, PingLoadedTail};
use crate::round::{Context, Measured};
use crate::statistics::{median, percentile};

/// Between two pings where nothing else is sent, in seconds.
const IDLE_INTERVAL: f64 = 0.002;
/// Between two pings beside a stream.
const LOADED_INTERVAL: f64 = 0.01;

/// Both medians, and what 99 of 100 are below.
#[track_caller]
pub(crate) fn measure(context: &Context<'_>) -> Vec<Measured> {
    let seconds = context.pace.ping_seconds;
    let (idle, idle_usage) = context.undisturbed(|| {
        let meter = Meter::start(context.bed);
        (round_trips(context.bed, IDLE_INTERVAL, seconds), meter.stop())
    });
    let (loaded, loaded_usage) = context.undisturbed(|| loaded(context));
    let value = |quantity, value: Option<f64>, usage: Usage| {
        value.map(|value| Measured::new(quantity, value, usage.disturbance))
    };
    let measured = [
        value(PingIdle, median(&idle), idle_usage),
        value(PingIdleTail, percentile(&idle, 0.99), idle_usage),
        value(PingLoaded, median(&loaded), loaded_usage),
        value(PingLoadedTail, percentile(&loaded, 0.99), loaded_usage),
    ];
    measured.into_iter().flatten().collect()
}

fn loaded(context: &Context<'_>) -> (Vec<f64>, Usage) {
    let seconds = context.pace.stream_seconds;
    let streams = Streams { count: 1, back: false, seconds };
    let stream = Iperf::start(context.bed, streams);
    let meter = Meter::start(context.bed);
    let round_trips = round_trips(context.bed, LOADED_INTERVAL, seconds as f64 - 0.5);
    let usage = meter.stop();
    stream.finish();
    (round_trips, usage)
}

/// Round trips, in µs.
///
/// # Panics
///
/// When none was completed.
#[track_caller]
fn round_trips(bed: &Bed, interval: f64, seconds: f64) -> Vec<f64> {
    let count = (seconds / interval).max(1.0) as u32;
    let line = format!("ping -n -i {interval} -c {count} -W 1 {}", bed.right.inner);
    let output = bed.left.netns.output(line);
    let times = parse(&String::from_utf8_lossy(&output.stdout));
    assert!(!times.is_empty(), "no ping of {count} was answered");
    times
}

/// Reads the times that ping(8) prints, in ms, as µs.
fn parse(text: &str) -> Vec<f64> {
    let times = text.lines().filter_map(|line| {
        let (_, time) = line.split_once("time=")?;
        time.split(' ').next()?.parse::<f64>().ok()
    });
    times.map(|milliseconds| milliseconds * 1000.0).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_times_of_ping_are_read_as_microseconds() {
        let text = "PING 192.168.77.2 (192.168.77.2) 56(84) bytes of data.\n\
            64 bytes from 192.168.77.2: icmp_seq=1 ttl=64 time=0.125 ms\n\
            64 bytes from 192.168.77.2: icmp_seq=2 ttl=64 time=2 ms\n\n\
            rtt min/avg/max/mdev = 0.125/1.062/2.000/0.938 ms\n";
        assert_eq!(super::parse(text), [125.0, 2000.0]);
    }
}
