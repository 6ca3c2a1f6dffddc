//! `sheave check`: flags of `sheave run`, and a table or JSON.

use clap::Args;

use super::output::{Format, OutputArgs, OutputError};
use super::{CliError, RunArgs};
use crate::check::{Finding, Verdict};
use crate::config::RunConfig;

/// Flags of `sheave check`.
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Shape of the output.
    #[arg(short, long, env = "SHEAVE_OUTPUT", value_enum, default_value = "table")]
    output: Format,
}

impl CheckArgs {
    /// The configuration that `sheave run` would have.
    ///
    /// # Errors
    ///
    /// As [`RunArgs::config`].
    pub fn config(&self) -> Result<RunConfig, CliError> {
        self.run.config()
    }

    /// What is printed.
    ///
    /// # Errors
    ///
    /// If there is no such form of it.
    pub fn show(&self, findings: &[Finding]) -> Result<String, OutputError> {
        OutputArgs { output: self.output, watch: None }.format(findings, |_| table(findings))
    }
}

fn table(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    let lines = findings.iter().map(|Finding { check, verdict, found, remedy }| {
        let verdict = match verdict {
            Verdict::Pass => "pass",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        let indent = " ".repeat(width + 8);
        let remedy = remedy.as_ref().map(|remedy| format!("{indent}→ {remedy}\n")).unwrap_or_default();
        format!("{verdict}  {check:width$}  {found}\n{remedy}")
    });
    lines.collect()
}
