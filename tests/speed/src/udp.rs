//! UDP through the tunnel: the rate that arrives nearly whole, and what is left when more is sent.
//!
//! One system call a datagram at both ends, as nearly every program has it. The sender keeps to its
//! rate by the clock, in bursts a fraction of a millisecond apart.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};

use crate::bed::Bed;
use crate::cpu::{Meter, Usage};
use crate::quantity::Quantity::{LargeOverload, SmallKept, SmallLossless, SmallOverload};
use crate::results::Load;
use crate::round::{Context, Measured};

const SMALL: usize = 64;
/// With its headers, as long as the tunnel takes.
const LARGE: usize = 1372;
/// Of datagrams sent, in "nearly whole".
const MOST_LOST: f64 = 0.01;
/// Below this share of the rate asked for the sender is what failed.
const LEAST_SENT: f64 = 0.95;
/// Halvings of the range in which the rate is looked for.
const PROBES: u32 = 7;
/// At each rate: a short hiccup of the machine must not look like a limit.
const TRIES: u32 = 2;
/// The lower end of the range, in datagrams a second; the upper is what the sender can.
const LEAST_RATE: f64 = 5_000.0;
/// Between two bursts.
const PAUSE: Duration = Duration::from_micros(100);
/// A sender that was held up for longer than this does not catch up: it would only lose what it sends.
const MOST_LATE: f64 = 0.002;
/// After this time without a datagram, all that was under way has arrived.
const SILENCE: Duration = Duration::from_millis(50);
const RECEIVE_BUFFER: usize = 8 << 20;

/// What to send.
pub(crate) struct Offer<'a> {
    /// Bytes of each datagram.
    pub(crate) len: usize,
    /// Datagrams a second; `None` for as many as possible.
    pub(crate) rate: Option<f64>,
    pub(crate) duration: Duration,
    /// In turn.
    pub(crate) destinations: &'a [IpAddr],
}

/// What became of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Delivery {
    /// Datagrams.
    pub(crate) sent: f64,
    /// Datagrams.
    pub(crate) received: f64,
    pub(crate) seconds: f64,
}

impl Delivery {
    fn offered(&self) -> f64 {
        self.sent / self.seconds
    }

    fn delivered(&self) -> f64 {
        self.received / self.seconds
    }

    fn is_nearly_whole(&self) -> bool {
        self.received >= self.sent * (1.0 - MOST_LOST)
    }
}

/// Sends from left to right, and counts.
///
/// # Panics
///
/// When there is no socket to be had.
#[track_caller]
pub(crate) fn offer(bed: &Bed, offer: &Offer<'_>) -> Delivery {
    let bind = || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0));
    let (Ok(sender), Ok(receiver)) = (bed.left.netns.inside(bind), bed.right.netns.inside(bind))
    else {
        panic!("cannot bind a UDP socket");
    };
    let buffer = setsockopt(&receiver, sockopt::RcvBufForce, &RECEIVE_BUFFER);
    let timeout = receiver.set_read_timeout(Some(SILENCE));
    assert!(buffer.is_ok() && timeout.is_ok(), "set up the receiver: {buffer:?}, {timeout:?}");
    let port = receiver.local_addr().map_or(0, |address| address.port());
    let to: Vec<_> = offer.destinations.iter().map(|ip| SocketAddr::new(*ip, port)).collect();
    let all_sent = AtomicBool::new(false);
    thread::scope(|scope| {
        let counting = scope.spawn(|| count(&receiver, &all_sent));
        let start = Instant::now();
        let sent = send(&sender, &to, offer);
        let seconds = start.elapsed().as_secs_f64();
        all_sent.store(true, Ordering::Relaxed);
        Delivery { sent, received: counting.join().unwrap_or(0.0), seconds }
    })
}

fn count(receiver: &UdpSocket, all_sent: &AtomicBool) -> f64 {
    let mut buffer = [0; 2048];
    let mut received: u32 = 0;
    loop {
        match receiver.recv(&mut buffer) {
            Ok(_len) => received += 1,
            Err(_silence) if all_sent.load(Ordering::Relaxed) => return received.into(),
            Err(_silence) => {}
        }
    }
}

fn send(sender: &UdpSocket, to: &[SocketAddr], offer: &Offer<'_>) -> f64 {
    let payload = vec![0; offer.len];
    let mut destinations = to.iter().cycle();
    let (start, mut sent, mut due) = (Instant::now(), 0.0, 0.0);
    let mut last = 0.0;
    while start.elapsed() < offer.duration {
        let now = start.elapsed().as_secs_f64();
        let burst = match offer.rate {
            None => 64.0,
            Some(rate) => {
                due += rate * (now - last).min(MOST_LATE);
                last = now;
                f64::floor(due)
            }
        };
        due -= burst.min(due);
        for _ in 0..burst as u32 {
            let Some(destination) = destinations.next() else { return sent };
            // One that the kernel has no room for was offered, and is lost.
            let _full = sender.send_to(&payload, destination);
            sent += 1.0;
        }
        if offer.rate.is_some() {
            thread::sleep(PAUSE);
        }
    }
    sent
}

/// Small datagrams at the highest rate that loses nearly none, and both lengths under overload.
#[track_caller]
pub(crate) fn measure(context: &Context<'_>) -> (Vec<Measured>, Vec<Load>) {
    let destinations = [context.bed.right.inner];
    let metered = |len, rate, duration| -> (Delivery, Usage) {
        let meter = Meter::start(context.bed);
        let destinations = &destinations;
        let delivery = offer(context.bed, &Offer { len, rate, duration, destinations });
        (delivery, meter.stop())
    };
    let pace = context.pace;
    let overload = |len| context.undisturbed(|| metered(len, None, pace.overload));
    let (large, large_usage) = overload(LARGE);
    let (small, small_usage) = overload(SMALL);
    let (mut low, mut high, mut best) = (LEAST_RATE, small.offered().max(LEAST_RATE), 0.0);
    let mut probes = vec![small];
    let mut disturbance = 0.0_f64;
    for _ in 0..PROBES {
        let rate = f64::sqrt(low * high);
        let mut is_held = false;
        for _ in 0..TRIES {
            let (probe, usage) = metered(SMALL, Some(rate), pace.probe);
            disturbance = disturbance.max(usage.disturbance);
            probes.push(probe);
            is_held = probe.is_nearly_whole() && probe.offered() >= rate * LEAST_SENT;
            if is_held {
                best = f64::max(best, probe.delivered());
                break;
            }
        }
        if is_held {
            low = rate;
        } else {
            high = rate;
        }
    }
    let peak = probes.iter().map(Delivery::delivered).fold(0.0, f64::max);
    let thousands = |quantity, value: f64, usage: Usage| {
        Measured::new(quantity, value / 1000.0, usage.disturbance)
    };
    let kept = 100.0 * small.delivered() / peak.max(1.0);
    let measured = vec![
        Measured::new(SmallLossless, best / 1000.0, disturbance),
        thousands(SmallOverload, small.delivered(), small_usage),
        Measured::new(SmallKept, kept, small_usage.disturbance),
        thousands(LargeOverload, large.delivered(), large_usage),
    ];
    let loads = probes.iter().map(|probe| Load {
        contender: context.contender.name().to_owned(),
        offered: probe.offered(),
        delivered: probe.delivered(),
    });
    (measured, loads.collect())
}
