//! `cargo xtask test`: builds every test as the user, then runs them as root, several at a time.
//!
//! Each test of the crate `tests` drives the kernel and runs in a process of its own: no test sees what another one left in
//! the process, a hanging or crashing one takes no other along, and what one leaves behind has its name on it. The other
//! crates' test programs run whole, on threads.

mod order;
mod programs;
mod running;
mod summary;
mod unit;

use std::collections::VecDeque;
use std::num::NonZero;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;

use crate::{image, process};

pub(crate) use programs::{TestProgram, build};
pub(crate) use summary::Summary;

use order::{Durations, alone};
use running::{Ended, Environment};
use unit::Unit;

/// The target that runs the container image.
pub(crate) const CONTAINER: &str = "e2e_container";

#[derive(Args)]
pub(crate) struct Options {
    /// Only test programs whose name contains this (`model`, `e2e_clusterip`)
    #[arg(long)]
    only: Option<String>,
    /// Also the tests that are ignored because they are slow
    #[arg(long)]
    slow: bool,
    /// How many run at a time; twice the number of processors if absent, one with SHEAVE_TEST_KUBECONFIG
    #[arg(long)]
    jobs: Option<NonZero<usize>>,
    /// In a random order, which this number determines; without a number, by one that is printed
    #[arg(long, value_name = "SEED", num_args = 0..=1)]
    shuffle: Option<Option<u64>>,
    /// Passed to every test program: a filter, --exact, --skip, --ignored; --nocapture shows what passing tests print
    #[arg(last = true)]
    passed_on: Vec<String>,
}

impl Options {
    /// Most tests wait most of the time. Those that share a cluster's API server would see each other's Services.
    fn at_once(&self) -> Result<usize> {
        Ok(match self.jobs {
            Some(jobs) => jobs.get(),
            None if std::env::var_os("SHEAVE_TEST_KUBECONFIG").is_some() => 1,
            None => 2 * std::thread::available_parallelism().context("counting processors")?.get(),
        })
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if options.only.as_ref().is_none_or(|only| CONTAINER.contains(only.as_str())) {
        // Before the binaries: cargo puts the static one in the same place.
        image::build_for_tests()?;
    }
    process::run(&mut process::cargo(&["build", "--package", "sheave", "--package", "sheave-tests", "--bins"]))?;
    let mut programs = build(&["--workspace", "--exclude", "sheave-ebpf"])?;
    // What logs every packet must load as well; it is another object, so another build.
    programs.extend(build(&["--package", "sheave-tests", "--features", "packet-trace", "--test", "packet_trace"])?);
    if let Some(only) = &options.only {
        programs.retain(|program| program.name.contains(only.as_str()));
    }
    if !process::is_root() {
        eprintln!("test: network namespaces and BPF need root, so the tests run through sudo");
    }
    let mut total = Summary::default();
    let mut units = Vec::new();
    for program in &programs {
        units.extend(unit::of(program, &options.passed_on, options.slow, &mut total)?);
    }
    let mut durations = Durations::load(&process::target_directory()?.join("test-durations.json"));
    match options.shuffle {
        Some(seed) => order::shuffle(&mut units, seed),
        None => units.sort_by_key(|unit| std::cmp::Reverse(durations.expected(unit))),
    }
    let (last, first): (Vec<_>, Vec<_>) = units.into_iter().partition(|unit| alone(unit).is_some());

    let at_once = options.at_once()?;
    let (started, tests) = (Instant::now(), first.len() + last.len());
    println!("test: {tests} units, {at_once} at a time");
    let mut run = Run { tests, total, durations: &mut durations, failed: Vec::new(), ended: 0 };
    let environment = Environment::new(at_once, options);
    several(&mut run, first, at_once, &environment)?;
    for (unit, why) in last.iter().filter_map(|unit| Some((unit, alone(unit)?))) {
        println!("test: alone now: {} ({why})", unit.name());
    }
    several(&mut run, last, 1, &environment)?;
    let Run { total, failed, .. } = run;
    durations.save()?;
    println!("\n{total} in {:.0} s", started.elapsed().as_secs_f64());
    if !failed.is_empty() {
        bail!("these tests failed:\n  {}", failed.join("\n  "));
    }
    if total.passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

/// What has become of the tests so far.
struct Run<'a> {
    tests: usize,
    ended: usize,
    total: Summary,
    durations: &'a mut Durations,
    failed: Vec<String>,
}

/// Runs tests, a number of them at a time, in their order.
fn several(run: &mut Run<'_>, units: Vec<Unit<'_>>, at_once: usize, environment: &Environment) -> Result<()> {
    let (queue, run) = (Mutex::new(VecDeque::from(units)), Mutex::new(run));
    let work = || -> Result<()> {
        loop {
            let Some(unit) = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front() else { return Ok(()) };
            let ended = running::run(&unit, environment)?;
            run.lock().unwrap_or_else(PoisonError::into_inner).add(&unit, ended, environment);
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| anyhow!("a runner panicked"))?)
    })
}

impl Run<'_> {
    /// Takes an ended test in and shows it: one line if all is well, everything that it said if not.
    fn add(&mut self, unit: &Unit<'_>, ended: Ended, environment: &Environment) {
        self.ended += 1;
        let (seconds, tests, name) = (ended.took.as_secs_f64(), self.tests, unit.name());
        let width = tests.to_string().len();
        let verdict = if ended.wrong.is_some() { "FAILED" } else { "ok" };
        println!("[{:>width$}/{tests}] {verdict:<6} {seconds:>6.1} s  {name}", self.ended);
        if ended.wrong.is_some() || environment.shows_everything {
            println!("---- {name}\n{}\n----", ended.output.trim_end());
        }
        self.durations.learn(unit, ended.took);
        self.total.extend(&ended.summary);
        if let Some(wrong) = ended.wrong {
            println!("---- {name}: {wrong}");
            self.failed.push(format!("{name}: {wrong}"));
        }
    }
}
