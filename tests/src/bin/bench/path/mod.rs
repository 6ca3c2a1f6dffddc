//! Real traffic between pods, on each way there is to a backend.

mod scale;
mod server;
mod services;
pub(crate) mod traffic;
mod variant;

use std::collections::BTreeMap;

use anyhow::Result;
use hdrhistogram::Histogram;

use crate::effort::Effort;
use crate::findings::{Better, Findings};
use crate::goal::{Goal, Reach};
use crate::progress::Progress;
use crate::statistics::{quantile, ratios};
pub(crate) use scale::measure as against_services;
pub(crate) use services::address;
use traffic::{Kind, Sample};
use variant::{Variant, Way};

/// Percentiles of a distribution's plot.
const PERCENTILES: [f64; 8] = [0.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99];

/// Samples of one series, such as connections through nftables.
#[derive(Default)]
struct Series {
    rates: Vec<f64>,
    median: Vec<f64>,
    slow: Vec<f64>,
    slowest: Vec<f64>,
    all: Option<Histogram<u64>>,
}

impl Series {
    fn add(&mut self, sample: &Sample) -> Result<()> {
        #[expect(clippy::cast_precision_loss, reason = "events of some seconds")]
        self.rates.push(sample.events as f64 / sample.seconds);
        if sample.latencies.is_empty() {
            return Ok(());
        }
        let mut histogram = Histogram::<u64>::new(3)?;
        for (nanoseconds, count) in &sample.latencies {
            histogram.record_n(*nanoseconds, *count)?;
        }
        self.median.push(microseconds(histogram.value_at_percentile(50.0)));
        self.slow.push(microseconds(histogram.value_at_percentile(99.0)));
        self.slowest.push(microseconds(histogram.value_at_percentile(99.9)));
        match &mut self.all {
            Some(all) => all.add(&histogram)?,
            None => self.all = Some(histogram),
        }
        Ok(())
    }

    /// How many times as fast as another series this one is, round by round.
    fn faster_than(&self, other: &Self) -> Vec<f64> {
        if self.median.is_empty() { ratios(&self.rates, &other.rates) } else { ratios(&other.median, &self.median) }
    }

    /// Adds rate, percentiles and distribution as figures.
    fn report(self, measure: &str, name: &str, findings: &mut Findings) {
        findings.add(format!("{measure}/{name}"), "1/s", Better::Higher, self.rates);
        findings.add(format!("{measure} p50/{name}"), "µs", Better::Lower, self.median);
        findings.add(format!("{measure} p99/{name}"), "µs", Better::Lower, self.slow);
        findings.add(format!("{measure} p99.9/{name}"), "µs", Better::Lower, self.slowest);
        let Some(all) = self.all else { return };
        if let Some(figure) = findings.figures.get_mut(&format!("{measure} p50/{name}")) {
            let at = |percentile: f64| (percentile, microseconds(all.value_at_percentile(percentile)));
            figure.distribution = PERCENTILES.map(at).to_vec();
        }
    }
}

/// Gives a figure whose samples are single events the distribution of its own samples.
pub(crate) fn distribution(findings: &mut Findings, figure: &str) {
    let Some(figure) = findings.figures.get_mut(figure) else { return };
    let mut sorted = figure.samples.clone();
    sorted.sort_unstable_by(f64::total_cmp);
    figure.distribution = PERCENTILES.map(|percentile| (percentile, quantile(&sorted, percentile / 100.0))).to_vec();
}

#[expect(clippy::cast_precision_loss, reason = "nanoseconds of one event")]
fn microseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1_000.0
}

/// All of them, beginning with another one each round: nobody is always the first.
fn turned<T>(all: &[T], round: u32) -> impl Iterator<Item = &T> {
    all.iter().cycle().skip(round as usize % all.len().max(1)).take(all.len())
}

/// Bulk, requests, connections and datagrams to a pod of the same node, through one service.
pub(crate) fn ways(effort: &Effort, findings: &mut Findings, progress: &Progress) -> Result<()> {
    let ways = [
        Way::Direct,
        Way::DirectTracked,
        Way::Iptables,
        Way::Nftables,
        Way::SheaveTc,
        Way::SheaveBypass,
        Way::SheaveConnect,
        Way::SheaveConnectTcp,
        Way::HostDirect,
        Way::SheaveHost,
    ];
    let series = side_by_side(&ways, effort, progress)?;
    let (tc, all, tcp, host) = (Way::SheaveTc, Way::SheaveConnect, Way::SheaveConnectTcp, Way::SheaveHost);
    for (row, measure, bounds) in [
        ("TCP throughput", "throughput", [0.97, 0.995]),
        ("request/response", "requests", [0.97; 2]),
        ("small UDP packets", "datagrams", [0.95; 2]),
    ] {
        let [by_tc, by_connect] = bounds;
        reach(&series, findings, row, measure, tc, Way::Direct, by_tc);
        reach(&series, findings, row, measure, all, Way::Direct, by_connect);
        // Its datagrams go by tc.
        let by_tcp = if measure == "datagrams" { by_tc } else { by_connect };
        reach(&series, findings, row, measure, tcp, Way::Direct, by_tcp);
        reach(&series, findings, row, measure, host, Way::HostDirect, by_connect);
    }
    let bypass = Way::SheaveBypass;
    for way in [tc, bypass, all] {
        reach(&series, findings, "new connections", "connections", way, Way::Nftables, 1.5);
    }
    reach(&series, findings, "new connections", "connections", bypass, Way::DirectTracked, 1.2);
    report(series, "", findings);
    Ok(())
}

/// The same from outside through a nodePort to a backend on another node.
pub(crate) fn node_port(effort: &Effort, findings: &mut Findings, progress: &Progress) -> Result<()> {
    // Wires that are fit for XDP have no offloads, and are so much slower.
    let effort = Effort { bulk: effort.bulk / 10, ..*effort };
    let ways = [Way::RemoteDirect, Way::NodePortIptables, Way::NodePortNftables, Way::NodePortTc, Way::NodePortXdp];
    let series = side_by_side(&ways, &effort, progress)?;
    for way in [Way::NodePortTc, Way::NodePortXdp] {
        reach(&series, findings, "new connections, nodePort", "connections", way, Way::NodePortNftables, 1.5);
    }
    report(series, "nodePort ", findings);
    Ok(())
}

/// Series by measure and way.
type All = BTreeMap<(&'static str, &'static str), Series>;

fn report(series: All, prefix: &str, findings: &mut Findings) {
    for ((measure, way), series) in series {
        let measure = format!("{prefix}{measure}");
        if measure.ends_with("throughput") {
            findings.add(format!("{measure}/{way}"), "Gbit/s", Better::Higher, series.rates);
        } else {
            series.report(&measure, way, findings);
        }
    }
}

fn side_by_side(ways: &[Way], effort: &Effort, progress: &Progress) -> Result<All> {
    let mut variants = Vec::new();
    for way in ways {
        progress.step(&format!("builds {}", way.name()));
        variants.push(Variant::start(*way, 1)?);
    }
    let kinds = [("requests", Kind::Requests), ("connections", Kind::Connections), ("datagrams", Kind::Datagrams)];
    let mut series = All::new();
    // The first round warms neighbours and caches, and shows that everything answers.
    for round in 0..=effort.path_rounds {
        for (measure, kind) in kinds {
            progress.step(&format!("{measure}, round {round} of {}", effort.path_rounds));
            for variant in turned(&variants, round) {
                let sample = variant.ask(kind, 0, None, effort.traffic)?;
                if round > 0 {
                    series.entry((measure, variant.way.name())).or_default().add(&sample)?;
                }
            }
        }
        progress.step(&format!("throughput, round {round} of {}", effort.path_rounds));
        for variant in turned(&variants, round) {
            let rate = variant.bulk(effort.bulk)? / 1e9;
            if round > 0 {
                series.entry(("throughput", variant.way.name())).or_default().rates.push(rate);
            }
        }
    }
    Ok(series)
}

/// A goal for one way's rate in parts of another's. Where single events were timed, it is the rate at their median: what other
/// processes take from a few events is not the way's.
fn reach(series: &All, findings: &mut Findings, row: &str, measure: &'static str, way: Way, other: Way, bound: f64) {
    let nothing = Series::default();
    let of = |way: Way| series.get(&(measure, way.name())).unwrap_or(&nothing);
    let sentence = format!("≥ {bound} × {}", other.name());
    let found = of(way).faster_than(of(other));
    findings.reach(Goal::new(row, way.name(), &sentence, Reach::AtLeast(bound), &found));
}
