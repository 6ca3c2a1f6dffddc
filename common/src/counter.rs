//! `service_counters` (per-CPU array: service id → traffic) and `drop_counters` (per-CPU array: drop reason → packets).

/// Traffic of a service port, as seen by one CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ServiceCounter {
    /// New flows, and connect()s and new (socket, frontend) pairs of host processes.
    pub connections: u64,
    /// Translated packets, both directions.
    pub packets: u64,
    /// Their bytes, from the network header on.
    pub bytes: u64,
}

/// Packets rejected by this CPU in one second; for the rate limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct RejectBudget {
    /// Second of CLOCK_MONOTONIC that `sent` belongs to.
    pub second: u32,
    /// ICMP errors and resets sent in it.
    pub sent: u32,
}

crate::layout::layout!(ServiceCounter, size 24, { connections @ 0 + 8, packets @ 8 + 8, bytes @ 16 + 8 });
crate::layout::layout!(RejectBudget, size 8, { second @ 0 + 4, sent @ 4 + 4 });
