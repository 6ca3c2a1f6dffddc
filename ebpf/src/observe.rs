//! Counting: one function for packets that are dropped or rejected, one for traffic of a service port.

use sheave_common::DropReason;

use crate::maps::{DROP_COUNTERS, SERVICE_COUNTERS};

/// Counts a packet that is not simply passed.
#[inline(always)]
pub fn count(reason: DropReason) {
    if let Some(counter) = DROP_COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: the element is this CPU's own, and the program is not preempted by itself.
        unsafe { *counter += 1 };
    }
}

/// Counts a new connection of a service port.
#[inline(always)]
pub fn connection(service_id: u32) {
    if let Some(counter) = SERVICE_COUNTERS.get_ptr_mut(service_id) {
        // SAFETY: as in `count`.
        unsafe { (*counter).connections += 1 };
    }
}

/// Counts a translated packet of a service port.
#[inline(always)]
pub fn packet(service_id: u32, bytes: u32) {
    if let Some(counter) = SERVICE_COUNTERS.get_ptr_mut(service_id) {
        // SAFETY: as in `count`.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += u64::from(bytes);
        }
    }
}
