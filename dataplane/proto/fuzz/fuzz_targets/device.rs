//! See `wgsep_simulation::fuzz::device`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| wgsep_simulation::fuzz::device(data));
