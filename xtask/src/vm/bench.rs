//! `cargo xtask vm bench`.

use std::ffi::OsString;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;

use super::kernels;
use super::machine::{Accelerator, Machine};
use super::quote;
use crate::{bench, process};

/// A full run on a processor takes a part of it; a quick one on an emulated processor, too.
const LIMIT: Duration = Duration::from_secs(3 * 60 * 60);

/// What the measurements leave.
const RESULTS: [&str; 2] = ["bench.json", "report.html"];

#[derive(Args)]
pub(crate) struct Options {
    /// Which kernel: one of Debian's (5.10, 6.1, 6.12, 7.2), an image, or a folder with `vmlinuz`, and `lib/modules` unless
    /// everything is built in
    #[arg(long, default_value = "6.12")]
    kernel: String,
    /// Passed on to the benchmarks: --only NAME, --rounds N, --list; where the processor is emulated, with --quick
    #[arg(last = true)]
    passed_on: Vec<OsString>,
}

pub(super) fn run(options: &Options) -> Result<()> {
    let target = process::target_directory()?;
    let folder = target.join("vm");
    let kernels = kernels::chosen(&options.kernel, &folder)?;
    let [kernel] = &kernels[..] else { bail!("one kernel at a time is measured; name it with --kernel") };
    let program = bench::build()?;
    let machine = Machine::new(kernel, &folder)?;
    let accelerator = machine.probe();
    let mut arguments = options.passed_on.clone();
    for (option, file) in ["--json", "--html"].into_iter().zip(RESULTS) {
        arguments.extend([option.into(), format!("/run/results/{file}").into()]);
        let _ = fs::remove_file(machine.results().join(file));
    }
    if accelerator == Accelerator::Emulation {
        println!("vm: the processor is emulated: what takes how long says nothing about a real one");
        if !arguments.iter().any(|argument| argument == "--quick") {
            arguments.push("--quick".into());
        }
    }
    println!("vm: Linux {} ({accelerator})", kernel.release);
    let arguments: Vec<String> = arguments.iter().map(|argument| quote(&argument.to_string_lossy())).collect();
    let script = format!(
        "export SHEAVE_TEST_PATIENCE={}\ncd {} && {} {}\n",
        accelerator.slowness(),
        quote(&std::env::current_dir()?.to_string_lossy()),
        quote(&program.to_string_lossy()),
        arguments.join(" ")
    );
    let succeeded = machine.run(accelerator, &script, LIMIT, |line| println!("{line}"))?;
    let place = target.join("bench").join(&kernel.release);
    for file in RESULTS {
        let result = machine.results().join(file);
        if result.exists() {
            fs::create_dir_all(&place)?;
            let copy = place.join(file);
            fs::copy(&result, &copy).with_context(|| format!("copying {}", result.display()))?;
            println!("vm: {}", copy.display());
        }
    }
    if !succeeded {
        bail!("the benchmarks failed on {}", kernel.release);
    }
    Ok(())
}
