//! Atomic addition. BPF_XADD, which every kernel has: Rust offers atomics here only where there is compare-and-swap, too (5.12).

/// Adds to a word that other CPUs add to as well.
///
/// # Safety
///
/// `place` is a map value that stays writable while the program runs, aligned to 8 octets.
#[inline(always)]
pub unsafe fn add(place: *mut i64, change: i64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: by the caller's promise.
    unsafe {
        core::arch::asm!("lock *(u64 *)({} + 0) += {}", in(reg) place, in(reg) change);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: by the caller's promise.
    unsafe {
        core::sync::atomic::AtomicI64::from_ptr(place).fetch_add(change, core::sync::atomic::Ordering::Relaxed);
    }
}
