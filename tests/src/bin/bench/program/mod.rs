//! What a packet costs in each program (BPF_PROG_TEST_RUN), less what the kernel takes to run an empty one.

mod cases;
mod live;
mod node;
mod raw;
mod rotating;
mod subject;
mod walk;

use std::collections::BTreeMap;

use anyhow::Result;
use sheave_tests::family::Family;
use sheave_tests::program::Programs;
use sheave_tests::raw_bpf::Kind;

use crate::effort::Effort;
use crate::findings::{Better, Findings};
use crate::goal::{Goal, Reach};
use crate::progress::Progress;
use crate::statistics::{paired, ratios};
use cases::Cases;
use raw::Raw;

pub(crate) use live::measure as live_frames;
pub(crate) use rotating::measure as rotating;

/// MAC address of the uplink's only neighbour.
const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// MAC address of the uplink.
const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// Flow entries that a node has room for by default.
const DEFAULT_FLOWS: u32 = 524_288;
/// PERFORMANCE.md's name for these.
const ROW: &str = "program cost";

/// Samples of each subject of one family by name, in nanoseconds above an empty program.
type Costs = BTreeMap<String, Vec<f64>>;

/// Measures every path on flows that are in the caches.
pub(crate) fn hot(effort: &Effort, findings: &mut Findings, progress: &Progress) -> Result<()> {
    node::namespace()?.run(|| -> Result<()> {
        let uplink = node::uplink()?;
        let (mut programs, backends) = node::programs(uplink, DEFAULT_FLOWS)?;
        let mut cases = Vec::new();
        for (family, backends) in Family::BOTH.into_iter().zip(backends) {
            cases.push((family, Cases::new(family, uplink, backends, &mut programs)?));
        }
        let mut costs: Vec<Costs> = vec![Costs::new(); cases.len()];
        // The first round warms caches and branch predictors, and shows that every packet comes out right.
        for round in 0..=effort.rounds {
            for ((family, cases), costs) in cases.iter().zip(&mut costs) {
                progress.step(&format!("{family}, round {round} of {}", effort.rounds));
                let sample = sample(cases, &mut programs, effort)?;
                if round > 0 {
                    for (name, cost) in sample {
                        costs.entry(name).or_default().push(cost);
                    }
                }
            }
        }
        for ((family, _), costs) in cases.iter().zip(costs) {
            goals(*family, &costs, findings);
            for (name, costs) in costs {
                findings.add(format!("program/{name}/{family}/hot"), "ns", Better::Lower, costs);
            }
        }
        Ok(())
    })
}

/// One round: every subject once, each less the empty program of its kind that ran just before.
fn sample(cases: &Cases, programs: &mut Programs, effort: &Effort) -> Result<BTreeMap<String, f64>> {
    let runs = effort.runs;
    let mut costs = BTreeMap::new();
    for subject in &cases.subjects {
        let empty = if subject.hook.program == "uplink_xdp" { &cases.empty_xdp } else { &cases.empty_tc };
        let nothing = empty.sample(runs)?;
        costs.insert(subject.name.to_owned(), cases.sample(programs, subject, runs)? - nothing);
    }
    let moves = cases.moves.sample(runs)?;
    costs.insert("lookup".into(), cases.lookup.sample(runs)? - moves);
    cases.lookup.rewind()?;
    for (name, inserts, map) in &cases.inserts {
        let nothing = cases.empty_tc.sample(runs)?;
        inserts.rewind()?;
        costs.insert((*name).into(), inserts.sample(runs / 2)? - nothing);
        cases.forget(programs, map)?;
    }
    Ok(costs)
}

fn goals(family: Family, costs: &Costs, findings: &mut Findings) {
    let of = |name: &str| costs.get(name).map(Vec::as_slice).unwrap_or_default();
    let mut at_most = |case: &str, sentence: &str, bound: f64, samples: &[f64]| {
        let case = format!("{case}, {family}");
        findings.reach(Goal::new(ROW, &case, sentence, Reach::AtMost(bound), samples));
    };
    let lookup = of("lookup");
    for (case, name, lookups) in [
        ("established TCP", "established tcp", 1.4),
        ("established UDP", "established udp", 2.4),
        ("TCP reply", "reply tcp", 1.4),
    ] {
        let allowed = paired(of(name), lookup, |cost, lookup| cost / (lookups * lookup + 25.0));
        at_most(case, &format!("≤ {lookups} lookups + 25 ns (shown in parts of that)"), 1.0, &allowed);
    }
    at_most("established TCP", "≤ 100 ns", 100.0, of("established tcp"));
    let snat = ratios(of("snat tcp"), of("established tcp"));
    at_most("SNAT established", "≤ 1.3 × ClusterIP", 1.3, &snat);
    for (case, name, inserts) in [
        ("new TCP", "new tcp", "inserts tcp"),
        ("new UDP", "new udp", "inserts udp"),
        ("new TCP with SNAT", "new snat tcp", "inserts tcp"),
    ] {
        at_most(case, "≤ 2.5 × its own inserts", 2.5, &ratios(of(name), of(inserts)));
    }
    for name in ["pass ingress", "pass egress", "pass uplink ingress", "pass xdp"] {
        at_most(name, "≤ 40 ns", 40.0, of(name));
    }
}

/// An empty program of each kind.
fn empty() -> Result<[Raw; 2]> {
    Ok([Raw::empty(Kind::Classifier)?, Raw::empty(Kind::Xdp)?])
}
