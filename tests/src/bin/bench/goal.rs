//! What PERFORMANCE.md asks for, and whether it is reached.

use serde::{Deserialize, Serialize};

use crate::statistics::Estimate;

/// Fewer samples than that say nothing about their noise.
pub(crate) const FEWEST: usize = 5;

/// A bound.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reach {
    /// No less than this.
    AtLeast(f64),
    /// No more than this.
    AtMost(f64),
}

/// Whether a goal is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// The whole interval is on the right side.
    Met,
    /// The whole interval is on the wrong side.
    Missed,
    /// The bound lies inside the interval: the noise is too loud to tell.
    Open,
    /// There are too few samples to know how loud the noise is.
    Few,
}

/// One sentence of PERFORMANCE.md's column "reach", for one case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Goal {
    /// The row, such as `program cost`.
    pub(crate) measure: String,
    /// Which case of it, such as `established TCP, IPv4`.
    pub(crate) case: String,
    /// The sentence, such as `≤ 1.3 × ClusterIP`.
    pub(crate) sentence: String,
    /// The bound.
    pub(crate) reach: Reach,
    /// What was found.
    pub(crate) found: Estimate,
    /// How that compares.
    pub(crate) verdict: Verdict,
}

impl Goal {
    /// Of samples that the bound is for: ratios of pairs, mostly. `None` if there are none.
    pub(crate) fn new(measure: &str, case: &str, sentence: &str, reach: Reach, samples: &[f64]) -> Option<Self> {
        let found = Estimate::of(samples)?;
        let verdict = if samples.len() < FEWEST { Verdict::Few } else { reach.verdict(&found) };
        Some(Self { measure: measure.into(), case: case.into(), sentence: sentence.into(), reach, found, verdict })
    }

    /// The same of something that is counted, and has no noise.
    pub(crate) fn counted(measure: &str, case: &str, sentence: &str, reach: Reach, count: f64) -> Option<Self> {
        Self::new(measure, case, sentence, reach, &[count; FEWEST])
    }

    /// By how much: what was found in parts of the bound, or the value itself where the bound is 0.
    pub(crate) fn by_how_much(&self) -> f64 {
        match self.reach {
            Reach::AtLeast(bound) | Reach::AtMost(bound) if bound != 0.0 => self.found.median / bound,
            _ => self.found.median,
        }
    }
}

impl Reach {
    fn verdict(self, found: &Estimate) -> Verdict {
        let (good, bad) = match self {
            Self::AtLeast(bound) => (found.low >= bound, found.high < bound),
            Self::AtMost(bound) => (found.high <= bound, found.low > bound),
        };
        match (good, bad) {
            (true, _) => Verdict::Met,
            (_, true) => Verdict::Missed,
            _ => Verdict::Open,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Goal, Reach, Verdict};

    /// The report's table would say the contrary of what was measured.
    #[test]
    fn a_goal_is_met_only_if_the_noise_leaves_no_doubt() {
        let verdict = |reach, samples: &[f64]| Goal::new("", "", "", reach, samples).expect("samples").verdict;
        assert_eq!(verdict(Reach::AtLeast(0.97), &[0.98; 10]), Verdict::Met);
        assert_eq!(verdict(Reach::AtLeast(0.97), &[0.90; 10]), Verdict::Missed);
        assert_eq!(verdict(Reach::AtMost(100.0), &[90.0; 10]), Verdict::Met);
        assert_eq!(verdict(Reach::AtMost(100.0), &[130.0; 10]), Verdict::Missed);
        let wide: Vec<f64> = (0..20).map(f64::from).collect();
        assert_eq!(verdict(Reach::AtMost(9.5), &wide), Verdict::Open);
        assert_eq!(verdict(Reach::AtMost(0.0), &[0.0; 5]), Verdict::Met);
        assert_eq!(verdict(Reach::AtMost(1.0), &[0.5; 4]), Verdict::Few);
    }
}
