//! `cargo xtask vm`: boots real kernels in QEMU with the built tests inside.
//!
//! `kernels` gets a kernel, `image` makes its first file system, `machine` runs it, and `cost` keeps what the kernels'
//! verifiers say about the programs. Nothing is installed: kernels and images lie in `target/vm`.

mod cost;
mod image;
mod kernels;
mod machine;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};

use crate::process;
use crate::test::{self, Summary, TestProgram};
use cost::Costs;
use kernels::Kernel;
use machine::{Accelerator, Machine};

/// The longest that one kernel may take.
const LOADING_LIMIT: Duration = Duration::from_secs(10 * 60);
const TESTING_LIMIT: Duration = Duration::from_secs(90 * 60);

/// Test targets that run on every kernel, in this order: first whether the programs load and attach at all.
const LOADING: &[&str] = &["kernel"];
const EMULATED: &[&str] = &["kernel", "program", "e2e_clusterip"];

/// Tests that the emulated processor is too slow for: readers and writers at full speed.
const TOO_SLOW: &[&str] = &["versions::"];
/// Tests that a kernel can't run, by the start of its release: before 5.15, BPF_PROG_TEST_RUN gives XDP no interface; before 5.12,
/// `bpf_fib_lookup` does not judge a GSO packet's segments.
const IMPOSSIBLE: &[(&str, &[&str])] = &[(
    "5.10.",
    &[
        "xdp",
        "frames_for_another_host_are_left_alone",
        "a_packet_whose_ttl_runs_out_here_is_answered",
        "a_gso_packet_is_judged_by_its_segments",
    ],
)];

#[derive(Subcommand)]
pub(crate) enum Task {
    /// Run tests on other kernels than this machine's
    Test(Options),
}

#[derive(Args)]
pub(crate) struct Options {
    /// Which kernel: one of Debian's (5.10, 6.1, 6.12, 7.2), `all` of them, or a folder with `vmlinuz` and `lib/modules`
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

pub(crate) fn run(task: &Task) -> Result<()> {
    let Task::Test(options) = task;
    let folder = process::target_directory()?.join("vm");
    let kernels = kernels::chosen(&options.kernel, &folder)?;
    let programs = build(options)?;
    let mut accelerator = None;
    let mut costs = Costs::default();
    let mut failed = Vec::new();
    let mut rows = Vec::new();
    for kernel in &kernels {
        let machine = Machine::new(kernel, &folder)?;
        let accelerator = *accelerator.get_or_insert_with(|| machine.probe());
        let programs = chosen(&programs, options, accelerator);
        println!("\nvm: Linux {} ({accelerator})", kernel.release);
        let limit = if options.load_only { LOADING_LIMIT } else { TESTING_LIMIT };
        let mut summary = Summary::default();
        let succeeded =
            machine.run(accelerator, &script(&programs, options, &skipped(kernel, accelerator)), limit, |line| {
                summary.add(line);
                costs.read(line)
            })?;
        if !succeeded || summary.passed == 0 {
            failed.push(kernel.release.clone());
        }
        let verdict = if succeeded && summary.passed > 0 { "ok" } else { "FAILED" };
        rows.push(format!("{:<24} {verdict}, {summary}", kernel.release));
    }
    println!("\n{}", costs.table());
    if options.update_costs {
        costs.update(Path::new("tests/verifier-cost.md"))?;
    }
    println!("{}", rows.join("\n"));
    if !failed.is_empty() {
        bail!("tests failed on {}", failed.join(", "));
    }
    Ok(())
}

/// The test programs that may be wanted.
fn build(options: &Options) -> Result<Vec<TestProgram>> {
    let arguments = ["--package", "sheave-tests"];
    if options.load_only {
        let targets = LOADING.iter().flat_map(|target| ["--test", target]);
        return test::build(&arguments.into_iter().chain(targets).collect::<Vec<_>>());
    }
    process::run(&mut process::cargo(&["build", "--package", "sheave", "--package", "sheave-tests", "--bins"]))?;
    test::build(&arguments.into_iter().chain(["--tests"]).collect::<Vec<_>>())
}

/// The test programs that run: everything where the processor helps, a selection where it is emulated.
fn chosen<'a>(programs: &'a [TestProgram], options: &Options, accelerator: Accelerator) -> Vec<&'a TestProgram> {
    let mut chosen: Vec<&TestProgram> = match (&options.only, accelerator) {
        (Some(only), _) => programs.iter().filter(|program| program.name.contains(only.as_str())).collect(),
        (None, Accelerator::Kvm) => programs.iter().collect(),
        (None, Accelerator::Emulation) => {
            programs.iter().filter(|program| EMULATED.contains(&program.name.as_str())).collect()
        }
    };
    chosen.sort_by_key(|program| EMULATED.iter().position(|name| *name == program.name).unwrap_or(usize::MAX));
    chosen
}

/// Parts of names of tests that are left out on a kernel.
fn skipped(kernel: &Kernel, accelerator: Accelerator) -> Vec<&'static str> {
    let slow = if accelerator == Accelerator::Emulation { TOO_SLOW } else { &[] };
    let impossible = IMPOSSIBLE.iter().filter(|(release, _)| kernel.release.starts_with(release));
    slow.iter().chain(impossible.flat_map(|(_, names)| *names)).copied().collect()
}

/// What the guest runs: every test program, whatever became of the one before; its status is the worst.
fn script(programs: &[&TestProgram], options: &Options, skipped: &[&str]) -> String {
    let mut script = String::from("status=0\n");
    if options.update_costs {
        script += "export SHEAVE_ACCEPT_COSTS=1\n";
    }
    for program in programs {
        let mut arguments = vec!["--test-threads=1".to_owned(), "--color=never".to_owned()];
        if LOADING.contains(&program.name.as_str()) {
            // Its output has the costs.
            arguments.push("--nocapture".to_owned());
        } else {
            arguments.extend(skipped.iter().flat_map(|name| ["--skip".to_owned(), (*name).to_owned()]));
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

/// One word for a shell.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The file of this name below a folder, if there is one.
fn existing(folder: &Path, name: &str) -> Option<PathBuf> {
    Some(folder.join(name)).filter(|path| path.exists())
}
