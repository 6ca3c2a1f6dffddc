#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| sheave_tests::fuzz::packets::run_headers(input));
