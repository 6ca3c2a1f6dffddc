//! How much is measured.

use std::time::Duration;

/// Sizes of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// Good enough for development, and over in three minutes.
    pub(crate) quick: bool,
    /// Rounds, in each of which everything that is compared runs once.
    pub(crate) rounds: u32,
    /// Runs of a program in one sample.
    pub(crate) runs: u32,
    /// Most flows that packets rotate over.
    pub(crate) flows: u32,
    /// Rounds of real traffic.
    pub(crate) path_rounds: u32,
    /// How long one sample of real traffic lasts.
    pub(crate) traffic: Duration,
    /// Bytes of one sample of bulk data.
    pub(crate) bulk: u64,
    /// Numbers of services.
    pub(crate) services: &'static [u32],
    /// Full syncs and restarts.
    pub(crate) syncs: u32,
    /// Restarts of a whole agent.
    pub(crate) restarts: u32,
    /// Changes of each kind, one by one.
    pub(crate) changes: u32,
    /// Seconds of churn.
    pub(crate) churn: u32,
}

impl Effort {
    /// Of a quick run, or of a full one.
    pub(crate) fn new(quick: bool) -> Self {
        if quick {
            Self {
                quick,
                rounds: 10,
                runs: 10_000,
                flows: 1 << 16,
                path_rounds: 5,
                traffic: Duration::from_millis(100),
                bulk: 100_000_000,
                services: &[1_000],
                syncs: 5,
                restarts: 2,
                changes: 100,
                churn: 5,
            }
        } else {
            Self {
                quick,
                rounds: 20,
                runs: 50_000,
                flows: 1 << 20,
                path_rounds: 15,
                traffic: Duration::from_millis(300),
                bulk: 1_000_000_000,
                services: &[1, 100, 1_000, 10_000, 50_000],
                syncs: 10,
                restarts: 5,
                changes: 500,
                churn: 10,
            }
        }
    }
}
