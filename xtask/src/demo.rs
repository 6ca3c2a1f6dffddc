//! `cargo xtask demo`: builds, then runs `tests/src/bin/demo.rs` as root.

use anyhow::Result;

use crate::process;

pub(crate) fn run() -> Result<()> {
    process::run(&mut process::cargo(&[
        "build",
        "--quiet",
        "--package",
        "sheave",
        "--package",
        "sheave-tests",
        "--bins",
    ]))?;
    if !process::is_root() {
        eprintln!("demo: network namespaces and BPF need root, so the demo runs through sudo");
    }
    let demo = process::target_directory()?.join("debug/demo");
    process::run(&mut process::root(demo))
}
