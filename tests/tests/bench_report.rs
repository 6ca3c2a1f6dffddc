//! `cargo xtask bench` on one short measure: the rest is the same with more of everything.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use sheave_tests::process::{Process, built};

/// A folder that is removed at the end.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Whoever compares two runs, or reads the report, would have nothing to read.
#[test]
fn a_quick_run_of_one_measure_leaves_figures_goals_and_a_report() -> Result<()> {
    let folder = Folder(std::env::temp_dir().join(sheave_tests::leftovers::unique_name()));
    let (json, html) = (folder.0.join("bench.json"), folder.0.join("report.html"));
    let run = |more: &[&str]| -> Result<String> {
        let mut command = Command::new(built("bench")?);
        command.args(["--quick", "--only", "program-hot", "--rounds", "1"]).args(more);
        command.arg("--json").arg(&json).arg("--html").arg(&html);
        Process::start("bench", &mut command)?.finish(Duration::from_secs(120))
    };
    let said = run(&[])?;
    ensure!(said.contains("established TCP, IPv4"), "no table of goals: {said}");

    let findings: Value = serde_json::from_str(&std::fs::read_to_string(&json)?).context("the JSON")?;
    for family in ["IPv4", "IPv6"] {
        let figure = |name: &str| {
            let figure = &findings["figures"][format!("program/{name}/{family}/hot")];
            figure["estimate"]["median"].as_f64().with_context(|| format!("{name} of {family}: {figure}"))
        };
        // What a lookup is part of takes longer than the lookup, or something else was timed.
        ensure!(figure("established tcp")? > figure("lookup")?, "{findings:#}");
        ensure!(figure("new tcp")? > figure("established tcp")?, "{findings:#}");
    }
    let goals = findings["goals"].as_array().context("no goals")?;
    // Of one round nobody can tell.
    ensure!(goals.iter().all(|goal| ["met", "missed", "few"].contains(&goal["verdict"].as_str().unwrap_or_default())));
    let report = std::fs::read_to_string(&html)?;
    ensure!(report.contains("<svg") && report.ends_with("</html>\n"), "not a report: {report}");

    let saved = json.to_string_lossy().into_owned();
    let said = run(&["--against", &saved])?;
    ensure!(said.contains("program/lookup/IPv4/hot:") && said.contains(" → "), "no comparison: {said}");
    Ok(())
}
