//! The fuzz target `tunnel`, with random bytes instead of a fuzzer.

#[allow(dead_code)]
#[path = "../shared/input.rs"]
mod input;
#[path = "../shared/tunnel.rs"]
mod tunnel;

use crate::dice::Dice;
use input::Input;

#[test]
fn tunnels_survive_random_calls() {
    let mut dice = Dice::new(23);
    for run in 0..300 {
        let data: Vec<u8> = (0..400).map(|_| dice.roll() as u8).collect();
        let outcome = std::panic::catch_unwind(|| tunnel::tunnel(&data));
        assert!(outcome.is_ok(), "run {run}");
    }
}
