//! See `wgsep_tests::fuzz::status`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| wgsep_tests::fuzz::status(data));
