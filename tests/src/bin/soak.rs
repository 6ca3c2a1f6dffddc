//! Everything at once, for long: `sheave_tests::soak`. `cargo xtask soak` runs it.

use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use sheave_tests::soak;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// The cluster and what happens to it
    Run {
        /// How long
        #[arg(long, default_value_t = 60)]
        minutes: u64,
        /// Determines the order of events; another one each time if absent
        #[arg(long)]
        seed: Option<u64>,
    },
    /// A client in it, which the former starts
    #[command(hide = true)]
    Talk { job: String },
}

fn main() -> Result<()> {
    match Arguments::parse().task {
        Task::Run { minutes, seed } => {
            soak::run(Duration::from_secs(60 * minutes), seed.unwrap_or_else(|| fastrand::u64(..1 << 32)))
        }
        Task::Talk { job } => soak::talk(serde_json::from_str(&job).context("a job is JSON")?),
    }
}
