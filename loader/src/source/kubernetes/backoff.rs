//! How long to wait before trying again: twice as long each time, and never all nodes of a cluster at once.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

const FIRST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(30);
/// The longest wait for what may never be.
const LONGEST_PATIENT: Duration = Duration::from_secs(300);

/// The wait after the next failure.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
    longest: Duration,
}

impl Backoff {
    pub(super) const fn new() -> Self {
        Self { next: FIRST, longest: LONGEST }
    }

    /// For what may never work, so that asking for it weighs on nobody.
    pub(super) const fn patient() -> Self {
        Self { next: FIRST, longest: LONGEST_PATIENT }
    }

    /// It works again: the next failure waits briefly.
    pub(super) const fn reset(&mut self) {
        self.next = FIRST;
    }

    /// Between half and all of the time that has doubled with each failure.
    pub(super) fn next(&mut self) -> Duration {
        let whole = self.next;
        self.next = (whole * 2).min(self.longest);
        let random = RandomState::new().hash_one(0) % 1000;
        let part = u32::try_from(random).unwrap_or(0);
        whole / 2 + whole / 2 * part / 1000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_half_a_minute_and_start_over_after_a_success() {
        let mut backoff = Backoff::new();
        for expected in [250, 500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000] {
            let expected = Duration::from_millis(expected);
            let wait = backoff.next();
            assert!(wait >= expected / 2 && wait <= expected, "{wait:?} of {expected:?}");
        }
        backoff.reset();
        assert!(backoff.next() <= FIRST);
    }
}
