//! Deals the events, waits for the recovery from each, checks and reports.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant, SystemTime};

use wgsep_simulation::dice::Dice;
use wgsep_tests::link::{Family, Side};

use crate::events::{EVENTS, Event};
use crate::flows::{self, Receivers, Senders};
use crate::patience::{self, Took};
use crate::probe::Probe;
use crate::underlay::opposite;
use crate::witness::{self, Background, Findings};
use crate::world::{Node, World};

/// How long the first handshake may take, and the flows to begin.
const START_LIMIT: Duration = Duration::from_secs(20);
/// Traffic before anything is compared with: buffers and pools have grown to their size by then.
const WARM_UP: Duration = Duration::from_secs(3);
/// How long after the recovery TCP and UDP may take to make progress: a stream is given up after 2 s,
/// connected anew 0.2 s later, and a SYN that is lost is sent again after 1 s and after 3 s.
const FLOW_LIMIT: Duration = Duration::from_secs(10);
/// Events that a failure shows.
const SHOWN: usize = 20;

/// What is to be run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How long; the last event is completed.
    pub duration: Duration,
    /// Which events, in which order, with which parameters.
    pub seed: u64,
    /// Only the events of these names.
    pub only: Option<Vec<String>>,
    /// Without the events of these names.
    pub except: Vec<String>,
}

/// A seed that no other run has.
#[must_use]
pub fn random_seed() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    // Short enough to be typed.
    Dice::new(u64::try_from(now.as_nanos()).unwrap_or(0)).below(1_000_000_000)
}

/// Runs a plan.
///
/// # Panics
///
/// When the tunnel does not recover from an event, or anything else is not as it must be. Seed, events
/// and logs are printed.
pub fn soak(plan: &Plan) {
    say(&format!("soak: {} s with seed {}", plan.duration.as_secs(), plan.seed));
    let mut run = Run::new(plan.clone());
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run.run())) {
        say(&run.failure());
        resume_unwind(panic);
    }
}

/// Prints a line where it is seen at once, or with the test's other output.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// The events of a seed in their order: every one once, shuffled, then every one again.
struct Deck {
    events: Vec<&'static Event>,
    seed: u64,
    dealt: u64,
    round: Vec<&'static Event>,
}

impl Deck {
    fn new(plan: &Plan) -> Self {
        let is_in = |names: &[String], event: &Event| names.iter().any(|name| name == event.name);
        let is_asked_for = |event: &&Event| {
            plan.only.as_ref().is_none_or(|only| is_in(only, event)) && !is_in(&plan.except, event)
        };
        let events = EVENTS.iter().filter(is_asked_for).collect();
        Self { events, seed: plan.seed, dealt: 0, round: Vec::new() }
    }

    /// The next event, and the dice for its parameters: what an event has rolled, or whether it was
    /// skipped, changes nothing of those after it.
    fn deal(&mut self) -> (&'static Event, Dice) {
        let mut dice = Dice::new(self.seed ^ Dice::new(self.dealt).roll());
        self.dealt += 1;
        if self.round.is_empty() {
            self.round.clone_from(&self.events);
            for left in (1..self.round.len()).rev() {
                let other = dice.below(left as u64 + 1) as usize;
                self.round.swap(left, other);
            }
        }
        match self.round.pop() {
            Some(event) => (event, dice),
            None => panic!("no event of that name"),
        }
    }
}

struct Run {
    plan: Plan,
    begin: Instant,
    world: World,
    probes: Vec<Probe>,
    receivers: [Receivers; 2],
    _senders: [Senders; 2],
    _witnesses: [Background; 2],
    leaks: Vec<wgsep_tests::nft::Counter>,
    findings: Findings,
    history: Vec<String>,
    skipped: Vec<String>,
}

impl Run {
    fn new(plan: Plan) -> Self {
        let world = World::new();
        let findings = Findings::default();
        let leaks = witness::leak_counters(&world.router);
        let places = [0, 1].map(|index| {
            let node = &world.nodes[index];
            (node.netns().clone(), node.interface.clone())
        });
        let witnesses = [
            witness::sniff(&world.router, findings.clone()),
            witness::poll_configuration(places, findings.clone()),
        ];
        let receivers = [0, 1].map(|index| Receivers::start(world.nodes[index].netns()));
        let senders = [Side::Left, Side::Right].map(|from| {
            // One family for each protocol, the other way round at the other end.
            let (tcp, udp) = match from {
                Side::Left => (Family::V4, Family::V6),
                Side::Right => (Family::V6, Family::V4),
            };
            let to = opposite(from);
            let [tcp, udp] =
                [tcp, udp].map(|family| SocketAddr::new(to.inner(family), flows::PORT));
            Senders::start(world.node(from).netns(), tcp, udp)
        });
        let mut probes = Vec::new();
        for from in [Side::Left, Side::Right] {
            for family in crate::underlay::FAMILIES {
                let name = format!("{from:?} to {:?} over {family:?}", opposite(from));
                let identifier = 100 + probes.len() as u16;
                let to = opposite(from).inner(family);
                probes.push(Probe::start(name, world.node(from).netns(), to, identifier));
            }
        }
        Self {
            plan,
            begin: Instant::now(),
            world,
            probes,
            receivers,
            _senders: senders,
            _witnesses: witnesses,
            leaks,
            findings,
            history: Vec::new(),
            skipped: Vec::new(),
        }
    }

    #[track_caller]
    fn run(&mut self) {
        let mut deck = Deck::new(&self.plan);
        self.note("start");
        self.until_probed(START_LIMIT, "the first handshake");
        self.until_flowing();
        self.let_flow(WARM_UP);
        self.world.note_usage();
        let usage: Vec<_> = self.world.nodes.iter().map(Node::usage).collect();
        self.note(&format!("at the start: {}", usage.join("; ")));
        let mut index = 0;
        while self.begin.elapsed() < self.plan.duration {
            let (event, mut dice) = deck.deal();
            index += 1;
            self.event(index, event, &mut dice);
        }
        let wrong = self.world.compare_with_start();
        let usage: Vec<_> = self.world.nodes.iter().map(Node::usage).collect();
        self.note(&format!("at the end: {}", usage.join("; ")));
        assert!(wrong.is_empty(), "not as at the start: {}", wrong.join("\n"));
        self.check(&[]);
        self.note(&format!("{index} events, {} skipped", self.skipped.len()));
        for skipped in &self.skipped {
            say(&format!("skipped: {skipped}"));
        }
    }

    #[track_caller]
    fn event(&mut self, index: u64, event: &'static Event, dice: &mut Dice) {
        self.note(&format!("#{index} {}", event.name));
        match (event.run)(&mut self.world, dice) {
            Ok(what) => self.note(&format!("#{index} {}: {what}", event.name)),
            Err(reason) => {
                self.note(&format!("#{index} {}: skipped: {reason}", event.name));
                self.skipped.push(format!("{}: {reason}", event.name));
                return;
            }
        }
        let took = self.until_probed(event.recovery.limit, event.recovery.reason);
        let limit = event.recovery.limit.as_secs_f64();
        self.note(&format!("#{index} {}: recovered in {took} (limit {limit:.1} s)", event.name));
        self.until_flowing();
        self.check(event.errors);
        self.world.note_usage();
        self.world.end_of_event();
    }

    /// Waits until a request of every probe is answered that was sent after now.
    #[track_caller]
    fn until_probed(&self, limit: Duration, reason: &str) -> Took {
        let begin = Instant::now();
        let missing = || -> Vec<&str> {
            let waiting = self.probes.iter().filter(|probe| !probe.is_answered_since(begin));
            waiting.map(|probe| probe.name.as_str()).collect()
        };
        match patience::until(&self.world.processes(), limit, || missing().is_empty()) {
            Ok(took) => took,
            Err(took) => panic!(
                "no answer within {limit:?} ({reason}) after {took}: {}",
                missing().join(", ")
            ),
        }
    }

    /// Waits until TCP and UDP arrive at both ends.
    #[track_caller]
    fn until_flowing(&self) {
        let received = || self.receivers.each_ref().map(Receivers::received);
        let before = received();
        let progress = patience::until(&self.world.processes(), FLOW_LIMIT, || {
            let ends = received().into_iter().zip(before);
            let mut all = ends.flat_map(|(now, before)| now.into_iter().zip(before));
            all.all(|(now, before)| now > before)
        });
        if let Err(took) = progress {
            panic!(
                "no progress within {FLOW_LIMIT:?}, after {took}: bytes of [TCP, UDP] at [left, right] \
                 were {before:?} and are {:?}",
                received()
            );
        }
    }

    fn let_flow(&self, time: Duration) {
        std::thread::sleep(time);
    }

    #[track_caller]
    fn check(&mut self, declared: &[&str]) {
        let mut wrong = self.world.check(declared);
        wrong.extend(self.findings.take());
        let leaked: u64 = self.leaks.iter().map(wgsep_tests::nft::Counter::packets).sum();
        if leaked > 0 {
            wrong.push(format!("{leaked} packets of inner addresses on the underlay"));
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    fn note(&mut self, what: &str) {
        let line = format!("{:8.2} {what}", self.begin.elapsed().as_secs_f64());
        say(&line);
        self.history.push(line);
    }

    /// All that is needed to read a failure, and to run it again.
    fn failure(&self) -> String {
        let mut text = format!("\nsoak failed with seed {}\n", self.plan.seed);
        let minutes = self.plan.duration.as_secs().div_ceil(60);
        let _ = writeln!(text, "again: make soak MINUTES={minutes} SEED={}", self.plan.seed);
        let _ = writeln!(text, "last events:");
        for line in &self.history[self.history.len().saturating_sub(3 * SHOWN)..] {
            let _ = writeln!(text, "  {line}");
        }
        text + &self.world.describe()
    }
}
