//! Three minutes of `make soak`, with a seed that no run had before; a failure prints it.

use std::env;
use std::time::Duration;

use wgsep_soak::{Plan, random_seed, soak};
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::require;

/// Gives the test a seed, and so repeats a run.
const SEED: &str = "WGSEP_SOAK_SEED";

#[test]
fn a_tunnel_recovers_from_three_minutes_of_random_events() {
    require!(Wgsep);
    let given = env::var(SEED).ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(random_seed);
    soak(&Plan { duration: Duration::from_secs(180), seed, only: None, except: Vec::new() });
}
