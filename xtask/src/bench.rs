//! `cargo xtask bench`: builds with optimisation, then runs `tests/src/bin/bench` as root.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::process;

#[derive(Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Options {
    /// Passed on: --quick, --only NAME, --list, --against FILE, --help
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    passed_on: Vec<OsString>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let bench = build()?;
    if !process::is_root() {
        eprintln!("bench: network namespaces and BPF need root, so it runs through sudo");
    }
    process::run(process::root(bench).args(&options.passed_on))
}

/// Builds the measuring program and what it measures, and says where it is.
pub(crate) fn build() -> Result<PathBuf> {
    process::run(&mut process::cargo(&[
        "build",
        "--quiet",
        "--release",
        "--package",
        "sheave",
        "--package",
        "sheave-tests",
        "--bin",
        "sheave",
        "--bin",
        "bench",
    ]))?;
    Ok(process::target_directory()?.join("release/bench"))
}
