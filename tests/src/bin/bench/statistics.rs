//! Medians, and how sure one can be of them.

use serde::{Deserialize, Serialize};

/// How many resamples an interval is made of.
const RESAMPLES: usize = 2_000;
/// The interval holds the true median in this share of all measurements.
const CONFIDENCE: f64 = 0.95;

/// A median and the bootstrap interval around it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Estimate {
    /// The median.
    pub(crate) median: f64,
    /// Lower end of the interval.
    pub(crate) low: f64,
    /// Upper end.
    pub(crate) high: f64,
}

impl Estimate {
    /// Of these samples; `None` if there are none. The same samples give the same interval.
    pub(crate) fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        let median = median(&mut sorted)?;
        let mut random = fastrand::Rng::with_seed(0x5eed);
        let mut medians: Vec<f64> = (0..RESAMPLES)
            .filter_map(|_| {
                let mut again: Vec<f64> = samples.iter().map(|_| samples[random.usize(..samples.len())]).collect();
                self::median(&mut again)
            })
            .collect();
        medians.sort_unstable_by(f64::total_cmp);
        let tail = (1.0 - CONFIDENCE) / 2.0;
        Some(Self { median, low: quantile(&medians, tail), high: quantile(&medians, 1.0 - tail) })
    }
}

/// Two series that were measured side by side, combined pair by pair.
pub(crate) fn paired(one: &[f64], other: &[f64], combine: impl Fn(f64, f64) -> f64) -> Vec<f64> {
    one.iter().zip(other).map(|(one, other)| combine(*one, *other)).collect()
}

/// The ratios of two series that were measured side by side.
pub(crate) fn ratios(one: &[f64], other: &[f64]) -> Vec<f64> {
    paired(one, other, |one, other| one / other)
}

/// Sorts and takes the middle.
fn median(samples: &mut [f64]) -> Option<f64> {
    samples.sort_unstable_by(f64::total_cmp);
    let middle = samples.len() / 2;
    match samples.len() {
        0 => None,
        even if even % 2 == 0 => Some(f64::midpoint(samples[middle - 1], samples[middle])),
        _ => Some(samples[middle]),
    }
}

/// The value below which this share of sorted samples is; there must be some.
pub(crate) fn quantile(sorted: &[f64], share: f64) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index of a few thousand, and a share between 0 and 1"
    )]
    let index = ((sorted.len() - 1) as f64 * share).round() as usize;
    sorted[index]
}

#[cfg(test)]
mod tests {
    use super::{Estimate, ratios};

    /// A goal would be called met or missed by chance.
    #[test]
    fn the_interval_holds_the_median_and_narrows_with_less_noise() {
        let noisy: Vec<f64> = (0..51).map(|index| f64::from(index * 37 % 51)).collect();
        let estimate = Estimate::of(&noisy).expect("samples");
        assert!((estimate.median - 25.0).abs() < f64::EPSILON, "{estimate:?}");
        assert!(estimate.low < 25.0 && estimate.high > 25.0, "{estimate:?}");
        let still = Estimate::of(&[7.0; 9]).expect("samples");
        assert_eq!((still.low, still.median, still.high), (7.0, 7.0, 7.0));
        assert_eq!(Estimate::of(&[]), None);
    }

    /// A machine that gets slower while it measures would change every ratio.
    #[test]
    fn ratios_are_taken_pair_by_pair() {
        assert_eq!(ratios(&[10.0, 20.0, 40.0], &[20.0, 40.0, 80.0]), [0.5, 0.5, 0.5]);
    }
}
