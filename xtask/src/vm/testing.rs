//! `cargo xtask vm test`.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use clap::Args;

use super::cost::Costs;
use super::kernels::{self, Kernel};
use super::machine::{Accelerator, Machine};
use super::quote;
use super::selection::{EMULATED, LOADING, PROGRAM, left_out};
use super::times::{self, RUNNING, Times};
use crate::test::{self, CONTAINER, Summary, TestProgram};
use crate::{image, process};

/// The longest that one kernel may take.
const LOADING_LIMIT: Duration = Duration::from_secs(15 * 60);
const TESTING_LIMIT: Duration = Duration::from_secs(90 * 60);

#[derive(Args)]
pub(crate) struct Options {
    /// Which kernel: one of Debian's (5.10, 6.1, 6.12, 7.2), `all` of them, an image, or a folder with `vmlinuz`, and
    /// `lib/modules` unless everything is built in
    #[arg(long, default_value = "all")]
    kernel: String,
    /// Only load and attach the programs
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
struct Outcome<'a> {
    kernel: &'a Kernel,
    summary: Summary,
    times: Times,
    took: Duration,
    succeeded: bool,
}

pub(super) fn run(options: &Options) -> Result<()> {
    let folder = process::target_directory()?.join("vm");
    let kernels = kernels::chosen(&options.kernel, &folder)?;
    let machines = kernels.iter().map(|kernel| Machine::new(kernel, &folder)).collect::<Result<Vec<_>>>()?;
    let accelerator = machines.first().map_or(Accelerator::Emulation, Machine::probe);
    let programs = build(options, accelerator)?;
    let costs = Mutex::new(Costs::default());
    // Where everything is fast, tests of traffic have the processors to themselves; emulated ones are patient.
    let alone = accelerator == Accelerator::Kvm && !options.load_only;
    let at_once = if alone { 1 } else { std::thread::available_parallelism()?.get() };
    let queue = Mutex::new(machines.iter());
    let work = || -> Result<Vec<Outcome<'_>>> {
        let mut outcomes = Vec::new();
        loop {
            let Some(machine) = queue.lock().unwrap_or_else(PoisonError::into_inner).next() else {
                return Ok(outcomes);
            };
            outcomes.push(run_one(machine, accelerator, &programs, options, &costs)?);
        }
    };
    let mut outcomes = std::thread::scope(|scope| -> Result<Vec<Outcome<'_>>> {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        let mut all = Vec::new();
        for worker in workers {
            all.extend(worker.join().map_err(|_| anyhow!("a machine's thread panicked"))??);
        }
        Ok(all)
    })?;
    outcomes.sort_by_key(|outcome| outcome.kernel.version());
    report(&outcomes, options, &costs.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn run_one<'a>(
    machine: &Machine<'a>,
    accelerator: Accelerator,
    programs: &[TestProgram],
    options: &Options,
    costs: &Mutex<Costs>,
) -> Result<Outcome<'a>> {
    let kernel = machine.kernel();
    let name = kernel.name();
    println!("\nvm: Linux {} ({accelerator})", kernel.release);
    let mut skipped = Vec::new();
    if !options.load_only {
        for (why, tests) in left_out(kernel, accelerator) {
            println!("vm: left out of {PROGRAM}: {} ({why})", tests.join(", "));
            skipped.extend_from_slice(tests);
        }
    }
    let script = script(programs, options, accelerator, &skipped);
    let limit = if options.load_only { LOADING_LIMIT } else { TESTING_LIMIT };
    let (mut summary, mut times) = (Summary::default(), Times::default());
    let started = Instant::now();
    let succeeded = machine.run(accelerator, &script, limit, |line| {
        summary.add(line);
        times.read(line);
        if !costs.lock().unwrap_or_else(PoisonError::into_inner).read(line) {
            println!("{name:<4} {:>4} s | {line}", started.elapsed().as_secs());
        }
    })?;
    let succeeded = succeeded && summary.passed > 0;
    Ok(Outcome { kernel, succeeded, summary, times, took: started.elapsed() })
}

/// Shows costs, times and verdicts.
fn report(outcomes: &[Outcome<'_>], options: &Options, costs: &Costs) -> Result<()> {
    println!("\n{}", costs.table());
    if options.update_costs {
        costs.update(Path::new("tests/verifier-cost.md"))?;
    }
    let times: Vec<_> = outcomes.iter().map(|outcome| (outcome.kernel.name(), &outcome.times)).collect();
    println!("{}", times::table(&times));
    let mut failed = Vec::new();
    for outcome in outcomes {
        let release = outcome.kernel.release.as_str();
        let verdict = if outcome.succeeded { "ok" } else { "FAILED" };
        let minutes = outcome.took.as_secs_f64() / 60.0;
        println!("{release:<24} {verdict} after {minutes:.1} minutes, {}", outcome.summary);
        if !outcome.succeeded {
            failed.push(release);
        }
    }
    if !failed.is_empty() {
        bail!("tests failed on {}", failed.join(", "));
    }
    Ok(())
}

/// The test programs that are wanted.
fn build(options: &Options, accelerator: Accelerator) -> Result<Vec<TestProgram>> {
    if !options.load_only {
        let all = accelerator == Accelerator::Kvm;
        if options.only.as_ref().map_or(all, |only| CONTAINER.contains(only.as_str())) {
            image::build_for_tests()?;
        }
        process::run(&mut process::cargo(&["build", "--package", "sheave", "--package", "sheave-tests", "--bins"]))?;
    }
    let targets: Vec<String> = match &options.only {
        Some(only) => vec![format!("--test=*{only}*")],
        None if options.load_only => vec![format!("--test={LOADING}")],
        None if accelerator == Accelerator::Kvm => vec!["--tests".to_owned()],
        None => EMULATED.iter().map(|(name, _)| format!("--test={name}")).collect(),
    };
    let arguments = ["--package", "sheave-tests"].into_iter().chain(targets.iter().map(String::as_str));
    test::build(&arguments.collect::<Vec<_>>())
}

/// The test programs in the order in which they run, each with parts of names of its tests, or none for all of them.
fn ordered<'a>(
    programs: &'a [TestProgram],
    options: &Options,
    accelerator: Accelerator,
) -> Vec<(&'a TestProgram, &'static [&'static str])> {
    let rank = |program: &TestProgram| EMULATED.iter().position(|(name, _)| *name == program.name);
    let all = options.only.is_some() || accelerator == Accelerator::Kvm;
    let mut ordered: Vec<_> = programs
        .iter()
        .map(|program| match rank(program) {
            Some(rank) if !all => (program, EMULATED[rank].1),
            _ => (program, &[][..]),
        })
        .collect();
    // First whether the programs load and attach at all.
    ordered.sort_by_key(|(program, _)| rank(program).unwrap_or(usize::MAX));
    ordered
}

/// What the guest runs: every test program, whatever became of the one before; its status is the worst.
fn script(programs: &[TestProgram], options: &Options, accelerator: Accelerator, skipped: &[&str]) -> String {
    let mut script = format!("status=0\nexport SHEAVE_TEST_PATIENCE={}\n", accelerator.slowness());
    if options.update_costs {
        script += "export SHEAVE_ACCEPT_COSTS=1\n";
    }
    for (program, tests) in ordered(programs, options, accelerator) {
        let mut arguments = vec!["--color=never".to_owned()];
        if program.one_at_a_time() {
            arguments.push("--test-threads=1".to_owned());
        }
        if program.name == LOADING {
            // Its output has the costs.
            arguments.push("--nocapture".to_owned());
        } else {
            if program.name == PROGRAM {
                arguments.extend(skipped.iter().flat_map(|name| ["--skip".to_owned(), (*name).to_owned()]));
            }
            if options.passed_on.is_empty() {
                arguments.extend(tests.iter().map(ToString::to_string));
            }
            arguments.extend(options.passed_on.iter().cloned());
        }
        let arguments: Vec<String> = arguments.iter().map(|argument| quote(argument)).collect();
        script += &format!(
            "echo; echo '{RUNNING}{}'\ncd {} && {} {} || status=1\n",
            program.name,
            quote(&program.folder.to_string_lossy()),
            quote(&program.path.to_string_lossy()),
            arguments.join(" ")
        );
    }
    script + "exit $status\n"
}
