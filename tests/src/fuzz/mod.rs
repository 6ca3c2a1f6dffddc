//! What the fuzz targets do with their input. `tests/fuzz` has cargo-fuzz run them under AddressSanitizer, and
//! `tests/tests/fuzz.rs` replays the corpus and everything that was ever found.
//!
//! A target takes any bytes at all, and panics when something isn't as it must be.

mod kernel_maps;
pub mod manifests;
pub mod objects;
pub mod packets;
pub mod readback;
