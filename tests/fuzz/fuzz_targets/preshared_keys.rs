//! See `wgsep_tests::fuzz::preshared_keys`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| wgsep_tests::fuzz::preshared_keys(data));
