//! One factor for all time limits, for machines that are slower than the limits were made for.

use std::sync::LazyLock;
use std::time::Duration;

/// `SHEAVE_TEST_PATIENCE`; `cargo xtask vm` sets it where the processor is emulated.
static FACTOR: LazyLock<u32> = LazyLock::new(|| match std::env::var("SHEAVE_TEST_PATIENCE") {
    Ok(factor) => factor.parse().expect("SHEAVE_TEST_PATIENCE is a number"),
    Err(_) => 1,
});

/// How long to wait on this machine for what should take no longer than `limit`.
#[must_use]
pub fn patient(limit: Duration) -> Duration {
    limit * *FACTOR
}
