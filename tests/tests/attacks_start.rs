//! Attack 11: starts, many and in a hurry. Names and socket paths are in `bad_input`.
#![allow(clippy::unwrap_used)]

use std::env;
use std::hint;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use wgsep_tests::daemon::Daemon;
use wgsep_tests::implementation::Implementation::Wgsep;
use wgsep_tests::netns::Netns;
use wgsep_tests::require;

/// How often to start; more by the variable, which finds rarer races.
const STARTS: usize = 20;
const STARTS_VARIABLE: &str = "WGSEP_STARTS";
/// Of the daemon, each of which is to be sealed by the one call, and of the load.
const WORKERS: &str = "16";
const BUSY: usize = 4;

/// A thread that is still starting when the filter closes over all of them would be killed by it.
#[test]
fn attack_11_many_starts_under_load_are_sealed_without_a_race() {
    require!(Wgsep);
    let starts = env::var(STARTS_VARIABLE).map_or(STARTS, |text| text.parse().unwrap());
    let (netns, ended) = (Netns::new(), AtomicBool::new(false));
    thread::scope(|scope| {
        for _ in 0..BUSY {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    hint::spin_loop();
                }
            });
        }
        let failed = (0..starts).find_map(|start| {
            let started = std::panic::catch_unwind(|| {
                Daemon::start_with(Wgsep, &netns, |command| {
                    command.args(["--workers", WORKERS]);
                })
            });
            started.err().map(|_| start)
        });
        ended.store(true, Ordering::Relaxed);
        assert_eq!(failed, None, "a start failed");
    });
}
