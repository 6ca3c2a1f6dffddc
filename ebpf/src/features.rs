//! What the running kernel can do, as a constant that the loader sets before loading; and the clock, which depends on it.

use aya_ebpf::helpers::generated::bpf_jiffies64;
pub use sheave_common::features::*;

#[unsafe(no_mangle)]
static FEATURES: u32 = 0;

/// Whether the kernel has a feature.
#[inline(always)]
pub fn has(feature: u32) -> bool {
    // SAFETY: reads a static; volatile, because the loader replaces the value that the compiler sees.
    unsafe { core::ptr::read_volatile(&raw const FEATURES) & feature != 0 }
}

/// The last tick at which the clock was read, in the upper half, and the second that it showed. One word, so that no CPU sees
/// the one without the other.
static mut SECOND_OF_TICK: u64 = 0;

/// Seconds of CLOCK_MONOTONIC. It is read once a tick, which is how often the coarse clock moves: counting ticks is one load in
/// compiled programs, reading the clock a call and a division.
#[inline(always)]
pub fn now() -> u32 {
    // SAFETY: the helper takes no arguments.
    let tick = unsafe { bpf_jiffies64() } << 32;
    // SAFETY: an aligned word, which CPUs read and write whole. (LLVM 22 selects no atomic loads for BPF.)
    let known = unsafe { (&raw const SECOND_OF_TICK).read_volatile() };
    if known >> 32 << 32 == tick {
        return known as u32;
    }
    let second = read_clock();
    // SAFETY: as above.
    unsafe { (&raw mut SECOND_OF_TICK).write_volatile(tick | u64::from(second)) };
    second
}

/// The clock at a finer grain, for what is to be told apart within a second: units of 2^24 nanoseconds (16.8 ms).
#[inline(always)]
pub fn stamp() -> u32 {
    (nanoseconds() >> 24) as u32
}

/// Reads the clock; seconds.
#[inline(always)]
fn read_clock() -> u32 {
    (nanoseconds() / 1_000_000_000) as u32
}

/// Nanoseconds of CLOCK_MONOTONIC, as of the last tick where the kernel has that.
#[inline(always)]
fn nanoseconds() -> u64 {
    // SAFETY: the helpers take no arguments.
    unsafe {
        if has(COARSE_CLOCK) {
            aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns()
        } else {
            aya_ebpf::helpers::generated::bpf_ktime_get_ns()
        }
    }
}

/// Seconds from `then` until `now`. Another CPU may have read the clock a moment after this one, so a `then` that is later
/// than `now` counts as no time at all.
#[inline(always)]
pub fn elapsed(then: u32, now: u32) -> u32 {
    let seconds = now.wrapping_sub(then);
    if seconds > u32::MAX / 2 { 0 } else { seconds }
}
