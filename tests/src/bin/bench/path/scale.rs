//! New connections against the number of services.

use std::collections::BTreeMap;

use anyhow::Result;

use super::traffic::Kind;
use super::variant::{Variant, Way};
use super::{Series, turned};
use crate::effort::Effort;
use crate::findings::{Better, Findings};
use crate::goal::{Goal, Reach};
use crate::progress::Progress;

/// Beyond that, kube-proxy's rules take minutes to load.
const MOST_RULES: u32 = 10_000;
/// What everything is compared with: the same clusters at each number of services.
const ONE: &str = "sheave tc, one service";
const TRACKED: &str = "direct with conntrack";

/// Whom one sample's client asks.
struct Case<'a> {
    name: String,
    variant: &'a Variant,
    service: u32,
    /// So many services in random order, in place of that one.
    spread: Option<u32>,
}

/// Measures one number of services after the other.
pub(crate) fn measure(effort: &Effort, findings: &mut Findings, progress: &Progress) -> Result<()> {
    let (one, tracked) = (Variant::start(Way::SheaveTc, 1)?, Variant::start(Way::DirectTracked, 1)?);
    for count in effort.services {
        progress.step(&format!("builds {count} services"));
        let mut variants = vec![Variant::start(Way::SheaveTc, *count)?];
        if *count <= MOST_RULES {
            variants.push(Variant::start(Way::Nftables, *count)?);
            variants.push(Variant::start(Way::Iptables, *count)?);
        }
        let mut cases: Vec<Case<'_>> = [(ONE, &one), (TRACKED, &tracked)]
            .map(|(name, variant)| Case { name: name.into(), variant, service: 0, spread: None })
            .into();
        for variant in &variants {
            let name = variant.way.name();
            for (place, service) in [("first", 0), ("middle", count / 2), ("last", count - 1)] {
                // Only a list knows places.
                if variant.way == Way::Iptables || place == "middle" {
                    cases.push(Case { name: format!("{name}, {place}"), variant, service, spread: None });
                }
            }
            cases.push(Case { name: format!("{name}, random"), variant, service: 0, spread: Some(*count) });
        }
        let mut series: BTreeMap<&str, Series> = BTreeMap::new();
        for round in 0..=effort.path_rounds {
            progress.step(&format!("{count} services, round {round} of {}", effort.path_rounds));
            for Case { name, variant, service, spread } in turned(&cases, round) {
                let sample = variant.ask(Kind::Connections, *service, *spread, effort.traffic)?;
                if round > 0 {
                    series.entry(name).or_default().add(&sample)?;
                }
            }
        }
        goals(&series, *count, findings);
        report(series, *count, findings);
    }
    Ok(())
}

fn goals(series: &BTreeMap<&str, Series>, count: u32, findings: &mut Findings) {
    let nothing = Series::default();
    let of = |name: &str| series.get(name).unwrap_or(&nothing);
    let row = "cost against number of services";
    let case = |what: &str| format!("{what} of {count}");
    let hot = of(ONE).faster_than(of("sheave tc, middle"));
    findings.reach(Goal::new(row, &case("one hot service"), "≤ 1.05 × one service", Reach::AtMost(1.05), &hot));
    let random = of(ONE).faster_than(of("sheave tc, random"));
    findings.reach(Goal::new(row, &case("random services"), "≤ 1.5 × one service", Reach::AtMost(1.5), &random));
    let nftables = of("sheave tc, middle").faster_than(of("nftables, middle"));
    findings.reach(Goal::new("new connections", &case("one"), "≥ 1.5 × nftables", Reach::AtLeast(1.5), &nftables));
}

/// Every figure is a point of a curve.
fn report(series: BTreeMap<&str, Series>, count: u32, findings: &mut Findings) {
    for (name, Series { rates, median, slow, slowest, .. }) in series {
        for (measure, unit, better, samples) in [
            ("connections by services", "1/s", Better::Higher, rates),
            ("connections by services p50", "µs", Better::Lower, median),
            ("connections by services p99", "µs", Better::Lower, slow),
            ("connections by services p99.9", "µs", Better::Lower, slowest),
        ] {
            let figure = format!("{measure}/{name}/{count}");
            findings.add(&figure, unit, better, samples);
            if let Some(figure) = findings.figures.get_mut(&figure) {
                figure.point = Some((name.to_owned(), f64::from(count)));
            }
        }
    }
}
