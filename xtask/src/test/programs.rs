//! Building the test programs.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};

use crate::process;

/// A built test target.
pub(crate) struct TestProgram {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// Of its package, where it is run.
    pub(crate) folder: PathBuf,
    /// Its tests need root, and each a process of its own.
    pub(super) of_the_kernel: bool,
}

impl TestProgram {
    /// Where the tests of a program share a process, those that need root share too much; program tests share nothing.
    pub(crate) fn one_at_a_time(&self) -> bool {
        self.of_the_kernel && self.name != "program"
    }
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
        programs.push(TestProgram { name, path: path.into(), of_the_kernel: folder.ends_with("tests"), folder });
    }
    if !child.wait()?.success() {
        bail!("building the tests failed");
    }
    programs.sort_by(|one, other| (one.of_the_kernel, &one.name).cmp(&(other.of_the_kernel, &other.name)));
    Ok(programs)
}
