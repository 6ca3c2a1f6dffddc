//! Ten minutes of `cargo xtask soak`.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use sheave_tests::process::{Process, built};

/// What goes wrong only after long, or only when everything happens at once, would be found by users.
#[test]
#[ignore = "slow: ten minutes"]
fn ten_minutes_of_everything_at_once_misroute_lose_and_leak_nothing() -> Result<()> {
    let mut command = Command::new(built("soak")?);
    let said =
        Process::start("soak", command.args(["run", "--minutes", "10"]))?.finish(Duration::from_secs(15 * 60))?;
    println!("{said}");
    Ok(())
}
