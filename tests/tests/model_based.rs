//! Random clusters and random packets: what the real programs do, on maps that the real controller code filled, is what a
//! plain reading of the rules says.
//!
//! Needs root and a kernel with BPF. `SHEAVE_SEED=n cargo xtask test --only model_based` plays one history again.

use std::io::Write as _;
use std::time::Instant;

use sheave_tests::oracle::history::play;

/// Changes of the cluster in one history.
const CHANGES: u64 = 180;
/// Packets that all histories together must have tried.
const CASES: u64 = 100_000;

#[test]
fn packets_go_where_the_rules_say_in_random_clusters() {
    let (seeds, enough) = match std::env::var("SHEAVE_SEED") {
        Ok(seed) => (vec![seed.parse().expect("SHEAVE_SEED is a number")], 0),
        // What was seen to work, and something new with each run.
        Err(_) => (vec![1, 2, 3, fastrand::u64(..)], CASES),
    };
    let mut cases = 0;
    for seed in seeds {
        // Past the test harness, which keeps to itself what a test prints that passes.
        let mut stderr = std::io::stderr();
        let _ = writeln!(stderr, "\nSHEAVE_SEED={seed}");
        let started = Instant::now();
        let tally = play(seed, CHANGES);
        let _ = writeln!(stderr, "{tally:?} in {:.1} s", started.elapsed().as_secs_f64());
        let met =
            [tally.ipv6, tally.sctp, tally.not_ours, tally.rejected, tally.dropped, tally.translated, tally.answered];
        assert!(met.iter().all(|tried| *tried > tally.cases / 1_000), "everything was tried often: {tally:?}");
        assert!(tally.sets > tally.clusters / 2, "sets were drawn from: {tally:?}");
        cases += tally.cases;
    }
    assert!(cases >= enough, "{cases} cases");
}
