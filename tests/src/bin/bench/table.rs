//! The results for people: figures, goals, and what has changed since another run.

use std::fmt::Write as _;

use crate::findings::{Better, Figure, Findings};
use crate::goal::{FEWEST, Goal, Reach, Verdict};

/// Everything as text.
pub(crate) fn text(findings: &Findings) -> String {
    let machine = &findings.machine;
    let mut text = format!(
        "{} × {}, Linux {}, load {:.1} before the run\n\n",
        machine.processors, machine.processor, machine.kernel, machine.load
    );
    let width = findings.figures.keys().map(|name| name.chars().count()).max().unwrap_or(0);
    for (name, figure) in &findings.figures {
        let Figure { estimate, unit, samples, .. } = figure;
        let (low, high) = (number(estimate.low), number(estimate.high));
        let _ = writeln!(
            text,
            "{name:width$}  {:>9} {unit:<8} {low:>9} … {high:<9} {} samples",
            number(estimate.median),
            samples.len()
        );
    }
    if !findings.goals.is_empty() {
        let _ = writeln!(text, "\n{}", goals(findings));
    }
    for (measure, failure) in &findings.failures {
        let _ = writeln!(text, "NOT MEASURED: {measure}: {failure}");
    }
    text
}

/// PERFORMANCE.md's column beside what was found.
fn goals(findings: &Findings) -> String {
    let rows: Vec<[String; 5]> = findings.goals.iter().map(row).collect();
    let heads = ["measure", "reach", "found", "of the bound", ""].map(String::from);
    let mut widths = [0; 5];
    for row in rows.iter().chain([&heads]) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in [&heads].into_iter().chain(&rows) {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

/// A goal's cells.
pub(crate) fn row(goal: &Goal) -> [String; 5] {
    let found = &goal.found;
    let bound = match goal.reach {
        Reach::AtLeast(0.0) | Reach::AtMost(0.0) => String::new(),
        _ => format!("{:.2}", goal.by_how_much()),
    };
    [
        format!("{}: {}", goal.measure, goal.case),
        goal.sentence.clone(),
        format!("{} ({} … {})", number(found.median), number(found.low), number(found.high)),
        bound,
        verdict(goal.verdict).into(),
    ]
}

/// A verdict in words.
pub(crate) fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Met => "met",
        Verdict::Missed => "NOT MET",
        Verdict::Open => "open: too much noise",
        Verdict::Few => "open: too few samples",
    }
}

/// What differs from another run by more than both runs' noise.
pub(crate) fn against(findings: &Findings, other: &Findings) -> String {
    let mut text = String::new();
    for (name, figure) in &findings.figures {
        let Some(before) = other.figures.get(name) else { continue };
        let enough = figure.samples.len().min(before.samples.len()) >= FEWEST;
        let (now, before) = (&figure.estimate, &before.estimate);
        let apart = enough && (now.low > before.high || now.high < before.low);
        let better = (now.median < before.median) == (figure.better == Better::Lower);
        let word = match (apart, better) {
            (false, _) => "as before",
            (true, true) => "BETTER",
            (true, false) => "WORSE",
        };
        let ratio = now.median / before.median;
        let (before, now, unit) = (number(before.median), number(now.median), &figure.unit);
        let _ = writeln!(text, "{name}: {before} → {now} {unit} (× {ratio:.3}) {word}");
    }
    text
}

/// A number with as many digits as say something.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        large if large >= 1_000_000.0 => format!("{:.2} M", value / 1_000_000.0),
        large if large >= 1_000.0 => format!("{value:.0}"),
        large if large >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::against;
    use crate::findings::{Better, Findings};

    /// A regression would be called noise, or noise a regression.
    #[test]
    fn two_runs_differ_where_their_intervals_lie_apart() {
        let run = |samples: &[f64]| {
            let mut findings = Findings::new(true);
            findings.add("cost", "ns", Better::Lower, samples.to_vec());
            findings.add("rate", "1/s", Better::Higher, samples.to_vec());
            findings
        };
        let (slow, fast) = (run(&[20.0, 20.0, 21.0, 22.0, 22.0]), run(&[10.0, 10.0, 11.0, 12.0, 12.0]));
        let text = against(&slow, &fast);
        assert!(text.contains("cost: 11.0 → 21.0 ns (× 1.909) WORSE"), "{text}");
        assert!(text.contains("rate: 11.0 → 21.0 1/s (× 1.909) BETTER"), "{text}");
        assert!(!against(&slow, &run(&[19.0, 19.0, 21.5, 24.0, 24.0])).contains("WORSE"));
        assert!(!against(&slow, &run(&[10.0])).contains("WORSE"), "one sample says nothing about its noise");
    }
}
