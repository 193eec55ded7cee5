//! The state that one process hands over to another, changed in any way.

use super::{Input, check_bounds};
use crate::host::HostId;
use crate::link::Kind;
use crate::simulation::Simulation;
use std::time::Duration;

/// Changes to the records of one run.
const MAX_CHANGES: usize = 16;

/// What is restored is a device like any other: it can be saved and restored again without a difference, and it goes on
/// without a panic, whatever is in it. All else is refused.
///
/// # Panics
/// If not.
pub fn saved(data: &[u8]) {
    let (mut simulation, host, peer) = device();
    let mut records = simulation.save(host);
    let mut input = Input(data);
    for _ in 0..MAX_CHANGES {
        if input.is_empty() || records.is_empty() {
            break;
        }
        change(&mut records, &mut input);
    }
    if simulation.restore(host, &records) != Ok(true) {
        return;
    }
    let once = simulation.save(host);
    assert_eq!(simulation.restore(host, &once), Ok(true), "a restored device cannot be saved");
    assert!(simulation.save(host) == once, "restoring changed the state");
    simulation.heal();
    simulation.ping(host, peer);
    simulation.ping(peer, host);
    simulation.run_for(Duration::from_secs(200));
    check_bounds(simulation.host(host));
}

/// A device with a session with one peer, with which it has shaken hands, and one to which packets wait.
fn device() -> (Simulation, HostId, HostId) {
    let (mut simulation, host, peer) = Simulation::pair(11);
    let silent = simulation.add_host();
    simulation.introduce(host, silent);
    simulation.introduce(silent, host);
    assert!(simulation.reaches(host, peer));
    simulation.lose(&[Kind::Response]);
    simulation.ping(host, silent);
    simulation.run_for(Duration::from_millis(100));
    (simulation, host, peer)
}

/// One change: mostly of some bytes.
fn change(records: &mut Vec<Vec<u8>>, input: &mut Input<'_>) {
    let kind = input.byte();
    let at = usize::from(input.byte()) % records.len();
    match kind % 8 {
        0 => _ = records.remove(at),
        1 => records.insert(at, records[at].clone()),
        2 => {
            let other = usize::from(input.byte()) % records.len();
            records.swap(at, other);
        }
        3 => {
            let len = usize::from(input.word());
            records[at].truncate(len);
        }
        4 => {
            let len = usize::from(input.byte());
            records[at].extend_from_slice(input.bytes(len));
        }
        _ => {
            let from = usize::from(input.word()) % records[at].len().max(1);
            let new = input.bytes(usize::from(kind / 8) % 8 + 1);
            for (byte, new) in records[at].iter_mut().skip(from).zip(new) {
                *byte = *new;
            }
        }
    }
}
