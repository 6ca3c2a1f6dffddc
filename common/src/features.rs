//! Bits of the programs' read-only global `FEATURES`: what the running kernel has that an older supported one lacks, and what
//! was asked for that costs others nothing. The loader sets them before loading, so that the verifier removes the branches that
//! an older kernel would refuse, or that nobody wants.

/// `BPF_FIB_LOOKUP_SRC` exists (kernel 6.7).
pub const FIB_SOURCE: u32 = 1 << 0;
/// `bpf_set_retval` exists (kernel 5.18).
pub const SET_RETVAL: u32 = 1 << 1;
/// `bpf_ktime_get_coarse_ns` exists (kernel 5.11).
pub const COARSE_CLOCK: u32 = 1 << 2;
/// `bpf_fib_lookup` says the MTU that a packet exceeds (kernel 5.12).
pub const FIB_MTU: u32 = 1 << 3;
/// XDP frames may be in several buffers, and `bpf_xdp_get_buff_len` exists (kernel 5.18).
pub const XDP_FRAGS: u32 = 1 << 4;
/// New flows to pods of this node bypass netfilter (`--bypass-netfilter`).
pub const BYPASS: u32 = 1 << 16;
/// There may be flows that bypass netfilter.
pub const BYPASSED: u32 = 1 << 17;
