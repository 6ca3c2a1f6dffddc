//! `cargo xtask fuzz [TARGET] [--runs N]`: hostile input, under AddressSanitizer. `tests/src/fuzz` has the targets.
//!
//! cargo-fuzz asks the compiler for what only a nightly one grants; a stable one does when it is told that it builds itself, and both
//! come with the sanitizer's library. So whichever is there is used.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use clap::Args;

use crate::process;

/// The package of cargo-fuzz: `tests/fuzz`.
const DIRECTORY: &str = "tests/fuzz";
/// Targets that run kernel programs, which are full of pointers.
const KERNEL_PROGRAMS: [&str; 2] = ["headers", "packets"];
/// The version that this was tried with.
const CARGO_FUZZ: &str = "0.13.2";

#[derive(Args)]
pub(crate) struct Options {
    /// One of tests/fuzz/fuzz_targets; all of them, one after the other, if it isn't given
    target: Option<String>,
    /// Inputs for each target
    #[arg(long, default_value_t = 10_000_000)]
    runs: u64,
    /// Octets of an input, at most: short ones are many more a second
    #[arg(long, default_value_t = 600)]
    max_len: u32,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if process::output("cargo", &["fuzz", "--version"]).is_none() {
        process::say("cargo-fuzz is missing; cargo installs it");
        process::run(&mut process::cargo(&["install", "cargo-fuzz", "--locked", "--version", CARGO_FUZZ]))?;
    }
    let known = targets()?;
    let chosen = match &options.target {
        Some(target) => {
            ensure!(known.contains(target), "no fuzz target {target}; there are {}", known.join(", "));
            vec![target.clone()]
        }
        None => known,
    };
    for target in chosen {
        fuzz(&target, options)?;
    }
    Ok(())
}

fn targets() -> Result<Vec<String>> {
    let mut targets = Vec::new();
    for entry in fs::read_dir(Path::new(DIRECTORY).join("fuzz_targets"))? {
        let path = entry?.path();
        targets.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
    }
    targets.sort();
    Ok(targets)
}

/// Looks on from the committed corpus, which stays as it is; what breaks the target is written beside it, to be replayed by
/// `cargo test --test fuzz` from then on.
fn fuzz(target: &str, options: &Options) -> Result<()> {
    let work = process::target_directory()?.join("fuzz");
    let (grown, finds) = (work.join("corpus").join(target), Path::new(DIRECTORY).join("finds").join(target));
    fs::create_dir_all(&grown)?;
    fs::create_dir_all(&finds)?;
    let committed = Path::new(DIRECTORY).join("corpus").join(target);
    let mut cargo = process::cargo(&["fuzz", "run", "--fuzz-dir", DIRECTORY, "--target-dir"]);
    // All that is left out took most of the time, and finds little: calls at each comparison, whose values inputs choose from tables
    // and dictionaries.
    cargo.arg(&work).args([target, "--no-trace-compares"]).arg(grown).arg(committed).arg("--");
    cargo.arg(format!("-max_len={}", options.max_len)).arg(format!("-runs={}", options.runs));
    cargo.arg(format!("-artifact_prefix={}/", fs::canonicalize(finds)?.display()));
    if let Ok(words) = fs::canonicalize(Path::new(DIRECTORY).join(target).with_extension("dict")) {
        cargo.arg(format!("-dict={}", words.display()));
    }
    // Weighing inputs by how rare their features are, comparing features for shorter inputs, and names of new functions.
    cargo.args(["-entropic=0", "-reduce_inputs=0", "-print_funcs=0", "-print_final_stats=1"]);
    // Where memory was allocated, which is asked again of the one input that breaks something; a quarantine larger than the processor's
    // cache, for what one input has freed need not be kept for the next.
    let mut options =
        "malloc_context_size=0:quarantine_size_mb=1:thread_local_quarantine_size_kb=64:max_malloc_fill_size=0"
            .to_owned();
    if !KERNEL_PROGRAMS.contains(&target) {
        // Safe code returns no reference to its stack.
        options.push_str(":detect_stack_use_after_return=0");
    }
    process::run(cargo.env("RUSTC_BOOTSTRAP", "1").env("ASAN_OPTIONS", options))
}
