//! How a set becomes a run of the backend table. The programs index it at random, in turn, or by a hash of the client, as
//! the frontend's algorithm says; weights are in the run itself.

use std::net::SocketAddr;

use super::maglev;
use crate::model::desired::Algorithm;

/// Elements of a weighted run for each backend, at most: finer weights are rounded.
const PER_BACKEND: u64 = 32;

/// The run of backends, each with its address, weight and id, in the order of addresses. Empty if there are none. Backends
/// that weigh nothing get no new connections, unless all of them weigh nothing: then they share evenly.
#[must_use]
pub fn spread(algorithm: Algorithm, backends: &[(SocketAddr, u16, u32)]) -> Vec<u32> {
    let weightless = backends.iter().all(|(_, weight, _)| *weight == 0);
    let weight = |weight: u16| if weightless { 1 } else { weight };
    let order = match algorithm {
        Algorithm::Maglev => {
            let addresses: Vec<_> = backends.iter().map(|(address, own, _)| (*address, weight(*own))).collect();
            maglev::table(&addresses)
        }
        Algorithm::Random | Algorithm::RoundRobin | Algorithm::LeastConnections => {
            in_turn(&backends.iter().map(|(_, own, _)| weight(*own)).collect::<Vec<_>>())
        }
    };
    order.into_iter().map(|index| backends[index].2).collect()
}

/// Indexes in proportion to weights and spread evenly, so that going through them in turn never favours one backend for
/// long: at each step the one that is most behind (nginx's smooth weighted round-robin).
fn in_turn(weights: &[u16]) -> Vec<usize> {
    let weights = reduced(weights);
    // Mostly nobody says any weights.
    if weights.iter().all(|weight| *weight == 1) {
        return (0..weights.len()).collect();
    }
    let total: u64 = weights.iter().sum();
    let mut credit: Vec<i128> = vec![0; weights.len()];
    let step = |_| {
        for (credit, weight) in credit.iter_mut().zip(&weights) {
            *credit += i128::from(*weight);
        }
        // The first of those with the most.
        let chosen = (0..weights.len()).rev().max_by_key(|index| credit[*index])?;
        credit[chosen] -= i128::from(total);
        Some(chosen)
    };
    (0..total).filter_map(step).collect()
}

/// Weights by their greatest common divisor, or rounded where the run would be too long; none that counted is lost.
fn reduced(weights: &[u16]) -> Vec<u64> {
    let divisor = weights.iter().map(|weight| u64::from(*weight)).fold(0, greatest_common_divisor).max(1);
    let exact: Vec<u64> = weights.iter().map(|weight| u64::from(*weight) / divisor).collect();
    let (total, limit) = (exact.iter().sum::<u64>(), weights.len() as u64 * PER_BACKEND);
    if total <= limit {
        return exact;
    }
    let rounded = |weight: &u64| ((weight * limit + total / 2) / total).max(u64::from(*weight > 0));
    exact.iter().map(rounded).collect()
}

const fn greatest_common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_weights(algorithm: Algorithm, weights: &[u16]) -> Vec<u32> {
        let backends: Vec<_> = weights
            .iter()
            .zip(1_u8..)
            .map(|(weight, host)| (SocketAddr::from(([10, 244, 0, host], 80)), *weight, u32::from(host)))
            .collect();
        spread(algorithm, &backends)
    }

    #[test]
    fn equal_weights_take_one_element_each() {
        assert_eq!(of_weights(Algorithm::Random, &[1, 1, 1]), [1, 2, 3]);
        assert_eq!(of_weights(Algorithm::RoundRobin, &[7, 7]), [1, 2]);
        assert_eq!(of_weights(Algorithm::Random, &[]), [0_u32; 0]);
    }

    #[test]
    fn weighted_turns_are_spread_and_not_bunched() {
        assert_eq!(of_weights(Algorithm::RoundRobin, &[5, 1, 1]), [1, 1, 2, 1, 3, 1, 1]);
        assert_eq!(of_weights(Algorithm::RoundRobin, &[50, 10, 10]), [1, 1, 2, 1, 3, 1, 1]);
    }

    #[test]
    fn a_backend_without_weight_gets_nothing_unless_none_has_any() {
        assert_eq!(of_weights(Algorithm::Random, &[0, 3, 3]), [2, 3]);
        assert_eq!(of_weights(Algorithm::Random, &[0, 0]), [1, 2]);
        assert!(!of_weights(Algorithm::Maglev, &[0, 3, 3]).contains(&1));
    }

    #[test]
    fn coarse_weights_keep_their_shares_in_a_short_run() {
        let run = of_weights(Algorithm::Random, &[65_535, 1, 32_767]);
        assert!(run.len() <= 3 * 32 + 3, "{} elements", run.len());
        let share = |id| run.iter().filter(|other| **other == id).count() as f64 / run.len() as f64;
        assert!((share(1) - 2.0 / 3.0).abs() < 0.02 && (share(3) - 1.0 / 3.0).abs() < 0.02 && share(2) > 0.0);
    }
}
