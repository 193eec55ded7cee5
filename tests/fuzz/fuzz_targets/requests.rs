//! See `wgsep_tests::sim::fuzz::requests`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| wgsep_tests::sim::fuzz::requests(data));
