//! Memory that a large pass leaves behind: lists as they came from the source, and writes.

/// Gives freed memory back to the system. glibc keeps what lies below the last block in use, in every thread's arena.
pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) may be called at any time, by any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
