//! `cargo xtask test`: builds every test as the user, then runs them as root.
//!
//! The crate `tests` drives the kernel and runs one test at a time; the others use all cores.

use std::fmt;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::{image, process};

/// A test program that runs longer than this hangs.
const LIMIT: Duration = Duration::from_secs(20 * 60);

/// The target that runs the container image.
pub(crate) const CONTAINER: &str = "e2e_container";

#[derive(Args)]
pub(crate) struct Options {
    /// Only test programs whose name contains this (`model`, `e2e_clusterip`)
    #[arg(long)]
    only: Option<String>,
    /// Passed to every test program: a filter, --nocapture, --ignored
    #[arg(last = true)]
    passed_on: Vec<String>,
}

/// A built test target.
pub(crate) struct TestProgram {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// Of its package, where it is run.
    pub(crate) folder: PathBuf,
    serial: bool,
}

impl TestProgram {
    /// What needs root shares the machine; program tests share nothing.
    pub(crate) fn one_at_a_time(&self) -> bool {
        self.serial && self.name != "program"
    }
}

/// Numbers of tests.
#[derive(Default)]
pub(crate) struct Summary {
    pub(crate) passed: u64,
    failed: u64,
    ignored: u64,
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
    let mut broken = Vec::new();
    for program in &programs {
        println!("\n     Running {} ({})", program.name, program.path.display());
        let started = Instant::now();
        let (summary, succeeded) = run_one(program, options)?;
        if !succeeded {
            broken.push(program.name.clone());
        }
        println!("     {}: {:.1} s", program.name, started.elapsed().as_secs_f64());
        total.passed += summary.passed;
        total.failed += summary.failed;
        total.ignored += summary.ignored;
    }
    println!("\n{total}");
    if !broken.is_empty() {
        bail!("these test programs failed: {}", broken.join(", "));
    }
    if total.passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

/// Builds the test programs that cargo's arguments choose, and says where each is.
pub(crate) fn build(chosen: &[&str]) -> Result<Vec<TestProgram>> {
    let arguments = [&["test", "--no-run", "--message-format", "json-render-diagnostics"], chosen].concat();
    let mut command = process::cargo(&arguments);
    let mut child = command.stdout(Stdio::piped()).spawn().context("cannot run cargo")?;
    let messages = BufReader::new(child.stdout.take().context("cargo's output was not piped")?);
    let mut programs = Vec::new();
    for line in messages.lines() {
        let Ok(message) = serde_json::from_str::<serde_json::Value>(&line?) else { continue };
        let (Some(path), Some(true)) = (message["executable"].as_str(), message["profile"]["test"].as_bool()) else {
            continue;
        };
        let manifest = PathBuf::from(message["manifest_path"].as_str().unwrap_or_default());
        let folder = manifest.parent().context("a manifest lies in a folder")?.to_owned();
        let name = message["target"]["name"].as_str().unwrap_or("?").to_owned();
        programs.push(TestProgram { name, path: path.into(), serial: folder.ends_with("tests"), folder });
    }
    if !child.wait()?.success() {
        bail!("building the tests failed");
    }
    // The quick ones first, so that a mistake shows early.
    programs.sort_by(|one, other| (one.serial, &one.name).cmp(&(other.serial, &other.name)));
    Ok(programs)
}

/// Runs one test program, showing its output as it comes.
fn run_one(program: &TestProgram, options: &Options) -> Result<(Summary, bool)> {
    let mut command = if program.serial { process::root(&program.path) } else { Command::new(&program.path) };
    if program.one_at_a_time() {
        command.arg("--test-threads=1");
    }
    command.args(&options.passed_on).current_dir(&program.folder).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {}", program.path.display()))?;
    let output = BufReader::new(child.stdout.take().context("the test's output was not piped")?);
    let reader = std::thread::spawn(move || {
        let mut summary = Summary::default();
        for line in output.lines().map_while(Result::ok) {
            println!("{line}");
            summary.add(&line);
        }
        summary
    });
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if started.elapsed() > LIMIT {
            println!("test: {} hangs; killed after {} minutes", program.name, LIMIT.as_secs() / 60);
            child.kill()?;
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let mut summary = reader.join().unwrap_or_default();
    let succeeded = status.is_some_and(|status| status.success());
    if !succeeded && summary.failed == 0 {
        summary.failed = 1;
    }
    Ok((summary, succeeded))
}

impl Summary {
    /// Adds up a line like `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    pub(crate) fn add(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else { return };
        let words: Vec<&str> = result.split([' ', ';', '.']).filter(|word| !word.is_empty()).collect();
        for pair in words.windows(2) {
            let Ok(number) = pair[0].parse::<u64>() else { continue };
            match pair[1] {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.ignored)
    }
}

#[cfg(test)]
mod tests {
    use super::Summary;

    /// A failing or an empty run would be reported as a good one.
    #[test]
    fn cargos_summary_lines_add_up() {
        let mut summary = Summary::default();
        summary.add("test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.02s");
        summary.add("running 2 tests");
        summary.add("test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 9.1s");
        assert_eq!((summary.passed, summary.failed, summary.ignored), (13, 2, 1));
    }
}
