//! The order of things: rounds, in each of which every contender is measured in turn.

use std::any::Any;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use wgsep_tests::wg::KeyPair;

use crate::bed::{Bed, VethOffload};
use crate::contender::{Contender, WGSEP};
use crate::cpu::Usage;
use crate::handshakes::{self, Initiations};
use crate::quantity::Quantity;
use crate::results::{Failure, Load, Results, Sample};
use crate::{flood, memory, ping, sandbox, scale, tcp, udp};

/// How long each half of a comparison of wgsep with itself lasts.
pub(crate) const PAIR_SECONDS: u64 = 1;
/// The share of the machine that others may use before a measure is repeated.
const MOST_DISTURBED: f64 = 0.1;
/// Initiations made for each second of the measure: more than are answered.
const INITIATIONS_A_SECOND: f64 = 12_000.0;

/// What can be asked for, by the words of `BENCH=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Measure {
    Tcp,
    Ping,
    Udp,
    Memory,
    Handshakes,
    Flood,
    Scale,
    Sandbox,
}

impl Measure {
    /// All, in the order in which they are made: memory after what fills it and before the
    /// peers that handshakes add, and these before a flood after which none is answered for a while.
    pub(crate) const ALL: [(&'static str, Self); 8] = [
        ("ping", Self::Ping),
        ("tcp", Self::Tcp),
        ("udp", Self::Udp),
        ("memory", Self::Memory),
        ("handshakes", Self::Handshakes),
        ("flood", Self::Flood),
        ("scale", Self::Scale),
        ("sandbox", Self::Sandbox),
    ];

    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(known, _)| *known == name).map(|(_, measure)| measure)
    }

    fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(_, known)| *known == self).map_or("", |(name, _)| name)
    }

    /// Whether it compares wgsep with itself alone.
    const fn is_of_wgsep_alone(self) -> bool {
        matches!(self, Self::Scale | Self::Sandbox)
    }
}

/// How long everything lasts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    pub(crate) stream_seconds: u64,
    pub(crate) ping_seconds: f64,
    pub(crate) overload: Duration,
    pub(crate) probe: Duration,
    pub(crate) handshakes: Duration,
    /// Of each kind.
    pub(crate) flood_phases: u32,
    /// Comparisons of wgsep with itself.
    pub(crate) pairs: u32,
    /// Of what was disturbed.
    pub(crate) repeats: u32,
}

impl Pace {
    /// With every peer and three rounds a quarter of an hour.
    pub(crate) const FULL: Self = Self {
        stream_seconds: 3,
        ping_seconds: 1.0,
        overload: Duration::from_millis(1000),
        probe: Duration::from_millis(600),
        handshakes: Duration::from_millis(1500),
        flood_phases: 100,
        pairs: 8,
        repeats: 1,
    };
    /// With every peer and one round less than three minutes.
    pub(crate) const QUICK: Self = Self {
        stream_seconds: 2,
        ping_seconds: 0.5,
        overload: Duration::from_millis(600),
        probe: Duration::from_millis(400),
        handshakes: Duration::from_millis(800),
        flood_phases: 20,
        pairs: 3,
        repeats: 0,
    };
    /// Only to see that everything works.
    pub(crate) const BRIEF: Self = Self {
        stream_seconds: 1,
        ping_seconds: 0.1,
        overload: Duration::from_millis(50),
        probe: Duration::from_millis(20),
        handshakes: Duration::from_millis(50),
        flood_phases: 1,
        pairs: 1,
        repeats: 0,
    };
}

/// What all contenders have in common.
pub(crate) struct Common {
    pub(crate) veth: VethOffload,
    pub(crate) pace: Pace,
    /// Of every right end, so that what is made for one is good for all.
    pub(crate) key: KeyPair,
}

/// What a measure is given.
pub(crate) struct Context<'a> {
    pub(crate) contender: Contender,
    pub(crate) bed: &'a Bed,
    pub(crate) pace: Pace,
    pub(crate) initiations: &'a Initiations,
}

impl Context<'_> {
    /// The outcome of `work`; where others used much of the machine meanwhile it is repeated, and
    /// the least disturbed counts.
    pub(crate) fn undisturbed<T>(&self, mut work: impl FnMut() -> (T, Usage)) -> (T, Usage) {
        let mut best = work();
        for _ in 0..self.pace.repeats {
            if best.1.disturbance <= MOST_DISTURBED {
                break;
            }
            let again = work();
            if again.1.disturbance < best.1.disturbance {
                best = again;
            }
        }
        best
    }
}

/// One value that a measure gives.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Measured {
    quantity: Quantity,
    value: f64,
    disturbance: f64,
}

impl Measured {
    pub(crate) const fn new(quantity: Quantity, value: f64, disturbance: f64) -> Self {
        Self { quantity, value, disturbance }
    }
}

/// Fills in what a run finds.
pub(crate) struct Run<'a> {
    pub(crate) contenders: &'a [Contender],
    pub(crate) measures: &'a [Measure],
    pub(crate) common: Common,
    pub(crate) results: &'a mut Results,
    pub(crate) start: Instant,
}

impl Run<'_> {
    /// All rounds, and then what concerns wgsep alone.
    pub(crate) fn run(mut self) {
        let seconds = self.common.pace.handshakes.as_secs_f64();
        let wanted = self.measures.contains(&Measure::Handshakes);
        let count = if wanted { (seconds * INITIATIONS_A_SECOND) as usize } else { 0 };
        let initiations = Initiations::to(&self.common.key, count);
        for round in 0..self.results.rounds {
            for contender in self.contenders.iter().copied() {
                self.contender(round, contender, &initiations);
            }
        }
        if self.contenders.contains(&WGSEP) {
            self.alone(Measure::Scale, scale::measure);
            self.alone(Measure::Sandbox, sandbox::measure);
        }
    }

    fn contender(&mut self, round: u32, contender: Contender, initiations: &Initiations) {
        let of_each = |measure: &&Measure| !measure.is_of_wgsep_alone();
        let measures: Vec<_> = self.measures.iter().filter(of_each).copied().collect();
        if measures.is_empty() {
            return;
        }
        let Common { veth, pace, key } = &self.common;
        let bed = match caught(|| Bed::new(contender, *veth, key)) {
            Ok(bed) => bed,
            Err(reason) => return self.failed(contender, round, "start", reason),
        };
        let context = Context { contender, bed: &bed, pace: *pace, initiations };
        for measure in measures {
            self.tell(round, contender, measure);
            match caught(|| of_each_contender(measure, &context)) {
                Ok((measured, loads)) => {
                    self.add(contender, round, &measured);
                    self.results.loads.extend(loads);
                }
                Err(reason) => self.failed(contender, round, measure.name(), reason),
            }
        }
    }

    /// A measure whose turns take the place of rounds.
    fn alone(&mut self, measure: Measure, work: impl Fn(&Common) -> Vec<Measured>) {
        if !self.measures.contains(&measure) {
            return;
        }
        self.tell(0, WGSEP, measure);
        match caught(|| work(&self.common)) {
            Ok(measured) => {
                for (turn, measured) in (0..).zip(&measured) {
                    self.add(WGSEP, turn, std::slice::from_ref(measured));
                }
            }
            Err(reason) => self.failed(WGSEP, 0, measure.name(), reason),
        }
    }

    fn add(&mut self, contender: Contender, round: u32, measured: &[Measured]) {
        for Measured { quantity, value, disturbance } in measured.iter().copied() {
            let digits = quantity.digits();
            say(&format!("        {:<38} {value:.digits$}", quantity.title()));
            let contender = contender.name().to_owned();
            self.results.samples.push(Sample { contender, round, quantity, value, disturbance });
        }
    }

    fn failed(&mut self, contender: Contender, round: u32, measure: &str, reason: String) {
        say(&format!("        {measure} failed: {reason}"));
        let (contender, measure) = (contender.name().to_owned(), measure.to_owned());
        self.results.failures.push(Failure { contender, round, measure, reason });
    }

    fn tell(&self, round: u32, contender: Contender, measure: Measure) {
        let seconds = self.start.elapsed().as_secs();
        let (minutes, seconds) = (seconds / 60, seconds % 60);
        let (name, measure) = (contender.name(), measure.name());
        let (round, rounds) = (round + 1, self.results.rounds);
        say(&format!("{minutes:3}:{seconds:02}  round {round} of {rounds}  {name}: {measure}"));
    }
}

fn of_each_contender(measure: Measure, context: &Context<'_>) -> (Vec<Measured>, Vec<Load>) {
    let measured = match measure {
        Measure::Ping => ping::measure(context),
        Measure::Tcp => tcp::measure(context),
        Measure::Udp => return udp::measure(context),
        Measure::Memory => memory::measure(context.bed),
        Measure::Flood => flood::measure(context),
        Measure::Handshakes => handshakes::measure(context),
        Measure::Scale | Measure::Sandbox => Vec::new(),
    };
    (measured, Vec::new())
}

/// Progress, for the terminal.
pub(crate) fn say(line: &str) {
    let _nobody_watches = writeln!(io::stderr(), "{line}");
}

/// The outcome of `work`, or why it panicked: one measure that fails must not cost the others.
fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| reason(&*panic))
}

fn reason(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked");
    text.lines().next().unwrap_or_default().to_owned()
}
