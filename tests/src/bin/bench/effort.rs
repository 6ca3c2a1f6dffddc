//! How much is measured.

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
}

impl Effort {
    /// Of a quick run, or of a full one.
    pub(crate) fn new(quick: bool) -> Self {
        if quick {
            Self { quick, rounds: 10, runs: 10_000, flows: 1 << 16 }
        } else {
            Self { quick, rounds: 40, runs: 50_000, flows: 1 << 20 }
        }
    }
}
