//! The report: one HTML file with goals, figures and plots, which needs nothing else.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::findings::{Figure, Findings};
use crate::goal::Verdict;
use crate::statistics::Estimate;
use crate::svg::{self, Axis, Curve, escape};
use crate::table;

const STYLE: &str = "body{font-family:sans-serif;max-width:1000px;margin:2em auto}td,th{padding:2px 10px;text-align:left}\
                     tr.met td:last-child{color:#3c8d53}tr.missed td:last-child{color:#d1495b;font-weight:bold}";

/// The whole page.
pub(crate) fn page(findings: &Findings) -> String {
    let machine = &findings.machine;
    let mut page = format!(
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>What Sheave costs</title><style>{STYLE}</style>\n\
         <h1>What Sheave costs</h1>\n<p>{} × {}, Linux {}, load {:.1} before the run; a {} run of {:.0} s. Medians with 95 % \
         intervals; ratios are taken pair by pair.</p>\n",
        machine.processors,
        escape(&machine.processor),
        escape(&machine.kernel),
        machine.load,
        if findings.quick { "quick" } else { "full" },
        findings.seconds
    );
    for (measure, failure) in &findings.failures {
        let _ = writeln!(page, "<p><b>Not measured: {}: {}</b></p>", escape(measure), escape(failure));
    }
    goals(findings, &mut page);
    points(findings, &mut page);
    distributions(findings, &mut page);
    groups(findings, &mut page);
    page + "</html>\n"
}

fn goals(findings: &Findings, page: &mut String) {
    page.push_str("<h2>Goals</h2>\n<table><tr><th>measure<th>reach<th>found<th>of the bound<th></tr>\n");
    for goal in &findings.goals {
        let class = match goal.verdict {
            Verdict::Met => "met",
            Verdict::Missed => "missed",
            Verdict::Open | Verdict::Few => "open",
        };
        let cells = table::row(goal).map(|cell| format!("<td>{}</td>", escape(&cell)));
        let _ = writeln!(page, "<tr class='{class}'>{}</tr>", cells.concat());
    }
    page.push_str("</table>\n");
}

/// The points of each curve, in no order.
type Points<'a> = BTreeMap<&'a str, Vec<(f64, f64)>>;

/// Figures that are points of curves: a plot for each measure, a curve for each of its variants.
fn points(findings: &Findings, page: &mut String) {
    let mut plots: BTreeMap<(&str, &str), Points<'_>> = BTreeMap::new();
    for (name, figure) in &findings.figures {
        let Some((curve, x)) = &figure.point else { continue };
        let curves = plots.entry((group(name), &figure.unit)).or_default();
        curves.entry(curve).or_default().push((*x, figure.estimate.median));
    }
    for ((group, unit), curves) in plots {
        let _ = writeln!(page, "<h2>{} against the number of services</h2>", escape(group));
        let curves: Vec<Curve> = curves.into_iter().map(|(name, points)| sorted(name, points)).collect();
        let (x, y) = (Axis { title: "services", logarithmic: true }, Axis { title: unit, logarithmic: false });
        page.push_str(&svg::curves(x, y, &curves));
    }
}

fn sorted(name: &str, mut points: Vec<(f64, f64)>) -> Curve {
    points.sort_by(|one, other| one.0.total_cmp(&other.0));
    Curve { name: name.into(), points }
}

/// Figures whose single events were timed: a plot for each measure, a curve for each figure.
fn distributions(findings: &Findings, page: &mut String) {
    let mut plots: BTreeMap<(&str, &str), Vec<Curve>> = BTreeMap::new();
    for (name, figure) in findings.figures.iter().filter(|(_, figure)| !figure.distribution.is_empty()) {
        // 99.9 % is drawn as one in 1 000.
        let points = figure.distribution.iter().map(|(percentile, value)| (100.0 / (100.0 - percentile), *value));
        let group = group(name);
        let short = name.strip_prefix(group).unwrap_or(name).trim_start_matches('/');
        plots.entry((group, &figure.unit)).or_default().push(Curve { name: short.into(), points: points.collect() });
    }
    for ((group, unit), curves) in plots {
        let _ = writeln!(page, "<h2>{}: how slow the slowest one of so many is</h2>", escape(group));
        let (x, y) = (Axis { title: "one in", logarithmic: true }, Axis { title: unit, logarithmic: true });
        page.push_str(&svg::curves(x, y, &curves));
    }
}

/// All figures, as bars by measure and unit.
fn groups(findings: &Findings, page: &mut String) {
    let mut groups: BTreeMap<(&str, &str), Vec<(&str, Estimate)>> = BTreeMap::new();
    for (name, Figure { unit, estimate, .. }) in &findings.figures {
        let group = group(name);
        let short = name.strip_prefix(group).unwrap_or(name).trim_start_matches('/');
        groups.entry((group, unit)).or_default().push((short, *estimate));
    }
    for ((group, unit), figures) in groups {
        let _ = writeln!(page, "<h2>{}</h2>", escape(group));
        page.push_str(&svg::bars(unit, &figures));
    }
}

/// The measure that a figure belongs to: the first word of its name.
fn group(name: &str) -> &str {
    name.split('/').next().unwrap_or(name)
}
