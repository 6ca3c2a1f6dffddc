//! What the running kernel can do, as a constant that the loader sets before loading; and the clock, which depends on it.

pub use sheave_common::features::*;

#[unsafe(no_mangle)]
static FEATURES: u32 = 0;

/// Whether the kernel has a feature.
#[inline(always)]
pub fn has(feature: u32) -> bool {
    // SAFETY: reads a static; volatile, because the loader replaces the value that the compiler sees.
    unsafe { core::ptr::read_volatile(&raw const FEATURES) & feature != 0 }
}

/// Seconds of CLOCK_MONOTONIC.
#[inline(always)]
pub fn now() -> u32 {
    // SAFETY: the helpers take no arguments.
    let nanoseconds = unsafe {
        if has(COARSE_CLOCK) {
            aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns()
        } else {
            aya_ebpf::helpers::generated::bpf_ktime_get_ns()
        }
    };
    (nanoseconds / 1_000_000_000) as u32
}

/// Seconds from `then` until `now`. Another CPU may have read the clock a moment after this one, so a `then` that is later
/// than `now` counts as no time at all.
#[inline(always)]
pub fn elapsed(then: u32, now: u32) -> u32 {
    let seconds = now.wrapping_sub(then);
    if seconds > u32::MAX / 2 { 0 } else { seconds }
}
