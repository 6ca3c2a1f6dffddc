//! `cargo xtask soak`: see `tests/src/soak`.

use anyhow::Result;
use clap::Args;

use crate::process;

#[derive(Args)]
pub(crate) struct Options {
    /// How long
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// Determines the order of events, as a run before has printed it
    #[arg(long)]
    seed: Option<u64>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    process::run(&mut process::cargo(&["build", "--package", "sheave", "--package", "sheave-tests", "--bins"]))?;
    let mut command = process::root(process::target_directory()?.join("debug/soak"));
    command.args(["run", "--minutes", &options.minutes.to_string()]);
    command.args(options.seed.map(|seed| format!("--seed={seed}")));
    process::run(&mut command)
}
