//! `cargo xtask vm test`.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use clap::Args;

use super::cost::Costs;
use super::kernels::{self, Kernel};
use super::machine::{Accelerator, Machine};
use super::quote;
use super::selection::{EMULATED, LOADING, left_out};
use crate::process;
use crate::test::{self, Summary, TestProgram};

/// The longest that one kernel may take.
const LOADING_LIMIT: Duration = Duration::from_secs(15 * 60);
const TESTING_LIMIT: Duration = Duration::from_secs(90 * 60);

#[derive(Args)]
pub(crate) struct Options {
    /// Which kernel: one of Debian's (5.10, 6.1, 6.12, 7.2), `all` of them, an image, or a folder with `vmlinuz`, and
    /// `lib/modules` unless everything is built in
    #[arg(long, default_value = "all")]
    kernel: String,
    /// Only load and attach the programs, on as many kernels at once as there are processors
    #[arg(long)]
    load_only: bool,
    /// Only test targets whose name contains this; also those that are left out under emulation
    #[arg(long, conflicts_with = "load_only")]
    only: Option<String>,
    /// Write what the verifiers say into tests/verifier-cost.md
    #[arg(long)]
    update_costs: bool,
    /// Passed to every test program: a filter, --nocapture, --ignored
    #[arg(last = true)]
    passed_on: Vec<String>,
}

/// What became of one kernel.
struct Outcome {
    release: String,
    summary: Summary,
    succeeded: bool,
}

pub(super) fn run(options: &Options) -> Result<()> {
    let folder = process::target_directory()?.join("vm");
    let kernels = kernels::chosen(&options.kernel, &folder)?;
    let programs = build(options)?;
    let machines = kernels.iter().map(|kernel| Machine::new(kernel, &folder)).collect::<Result<Vec<_>>>()?;
    let accelerator = machines.first().map_or(Accelerator::Emulation, Machine::probe);
    let costs = Mutex::new(Costs::default());
    // Tests of traffic have the machine to themselves.
    let at_once = if options.load_only { std::thread::available_parallelism()?.get() } else { 1 };
    let queue = Mutex::new(machines.iter());
    let work = || -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        loop {
            let Some(machine) = queue.lock().unwrap_or_else(PoisonError::into_inner).next() else {
                return Ok(outcomes);
            };
            outcomes.push(run_one(machine, accelerator, &programs, options, &costs)?);
        }
    };
    let outcomes = std::thread::scope(|scope| -> Result<Vec<Outcome>> {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        let mut all = Vec::new();
        for worker in workers {
            all.extend(worker.join().map_err(|_| anyhow!("a machine's thread panicked"))??);
        }
        Ok(all)
    })?;
    report(&kernels, &outcomes, options, &costs.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn run_one(
    machine: &Machine<'_>,
    accelerator: Accelerator,
    programs: &[TestProgram],
    options: &Options,
    costs: &Mutex<Costs>,
) -> Result<Outcome> {
    let kernel = machine.kernel();
    let (major, minor) = kernel.version();
    println!("\nvm: Linux {} ({accelerator})", kernel.release);
    let mut skipped = Vec::new();
    if !options.load_only {
        for (why, tests) in left_out(kernel, accelerator) {
            println!("vm: left out: {} ({why})", tests.join(", "));
            skipped.extend_from_slice(tests);
        }
    }
    let script = script(programs, options, accelerator, &skipped);
    let limit = if options.load_only { LOADING_LIMIT } else { TESTING_LIMIT };
    let mut summary = Summary::default();
    let succeeded = machine.run(accelerator, &script, limit, |line| {
        summary.add(line);
        if !costs.lock().unwrap_or_else(PoisonError::into_inner).read(line) {
            println!("{major}.{minor:<3}| {line}");
        }
    })?;
    Ok(Outcome { release: kernel.release.clone(), succeeded: succeeded && summary.passed > 0, summary })
}

/// Shows costs and verdicts in the kernels' order.
fn report(kernels: &[Kernel], outcomes: &[Outcome], options: &Options, costs: &Costs) -> Result<()> {
    println!("\n{}", costs.table());
    if options.update_costs {
        costs.update(Path::new("tests/verifier-cost.md"))?;
    }
    let mut failed = Vec::new();
    for kernel in kernels {
        let Some(outcome) = outcomes.iter().find(|outcome| outcome.release == kernel.release) else { continue };
        let verdict = if outcome.succeeded { "ok" } else { "FAILED" };
        println!("{:<24} {verdict}, {}", outcome.release, outcome.summary);
        if !outcome.succeeded {
            failed.push(outcome.release.as_str());
        }
    }
    if !failed.is_empty() {
        bail!("tests failed on {}", failed.join(", "));
    }
    Ok(())
}

/// The test programs that may be wanted.
fn build(options: &Options) -> Result<Vec<TestProgram>> {
    let arguments = ["--package", "sheave-tests"];
    if options.load_only {
        return test::build(&[&arguments[..], &["--test", LOADING]].concat());
    }
    process::run(&mut process::cargo(&["build", "--package", "sheave", "--package", "sheave-tests", "--bins"]))?;
    test::build(&[&arguments[..], &["--tests"]].concat())
}

/// The test programs that run, each with parts of names of its tests: everything where the processor helps, a selection where
/// it is emulated.
fn chosen<'a>(
    programs: &'a [TestProgram],
    options: &Options,
    accelerator: Accelerator,
) -> Vec<(&'a TestProgram, &'static [&'static str])> {
    if let Some(only) = &options.only {
        return programs
            .iter()
            .filter(|program| program.name.contains(only.as_str()))
            .map(|program| (program, &[][..]))
            .collect();
    }
    let rank = |program: &TestProgram| EMULATED.iter().position(|(name, _)| *name == program.name);
    let mut chosen: Vec<_> = programs
        .iter()
        .filter(|program| accelerator == Accelerator::Kvm || rank(program).is_some())
        .map(|program| match (accelerator, rank(program)) {
            (Accelerator::Emulation, Some(rank)) => (program, EMULATED[rank].1),
            _ => (program, &[][..]),
        })
        .collect();
    // First whether the programs load and attach at all.
    chosen.sort_by_key(|(program, _)| rank(program).unwrap_or(usize::MAX));
    chosen
}

/// What the guest runs: every test program, whatever became of the one before; its status is the worst.
fn script(programs: &[TestProgram], options: &Options, accelerator: Accelerator, skipped: &[&str]) -> String {
    let mut script = format!("status=0\nexport SHEAVE_TEST_PATIENCE={}\n", accelerator.slowness());
    if options.update_costs {
        script += "export SHEAVE_ACCEPT_COSTS=1\n";
    }
    for (program, tests) in chosen(programs, options, accelerator) {
        let mut arguments = vec!["--test-threads=1".to_owned(), "--color=never".to_owned()];
        if program.name == LOADING {
            // Its output has the costs.
            arguments.push("--nocapture".to_owned());
        } else {
            arguments.extend(skipped.iter().flat_map(|name| ["--skip".to_owned(), (*name).to_owned()]));
            if options.passed_on.is_empty() {
                arguments.extend(tests.iter().map(ToString::to_string));
            }
            arguments.extend(options.passed_on.iter().cloned());
        }
        let arguments: Vec<String> = arguments.iter().map(|argument| quote(argument)).collect();
        script += &format!(
            "echo; echo '     Running {}'\ncd {} && {} {} || status=1\n",
            program.name,
            quote(&program.folder.to_string_lossy()),
            quote(&program.path.to_string_lossy()),
            arguments.join(" ")
        );
    }
    script + "exit $status\n"
}
