//! What runs in one process: a test that drives the kernel, or a whole program of tests that don't.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::programs::TestProgram;
use super::summary::Summary;

/// How the reason of `#[ignore = "slow: …"]` begins.
const SLOW: &str = "slow";

/// One process.
pub(super) struct Unit<'a> {
    pub(super) program: &'a TestProgram,
    /// The test; all of the program's if absent.
    pub(super) test: Option<String>,
    /// Its arguments.
    pub(super) arguments: Vec<String>,
    /// It may take long.
    pub(super) slow: bool,
}

impl Unit<'_> {
    /// `e2e_nodeport the_name_of_the_test`
    pub(super) fn name(&self) -> String {
        match &self.test {
            Some(test) => format!("{} {test}", self.program.name),
            None => self.program.name.clone(),
        }
    }
}

/// What is to run of a program; what it ignores is counted.
pub(super) fn of<'a>(
    program: &'a TestProgram,
    passed_on: &[String],
    slow: bool,
    total: &mut Summary,
) -> Result<Vec<Unit<'a>>> {
    if !program.of_the_kernel {
        let mut arguments = passed_on.to_vec();
        if slow {
            arguments.push("--include-ignored".to_owned());
        }
        return Ok(vec![Unit { program, test: None, arguments, slow }]);
    }
    let has = |flag: &str| passed_on.iter().any(|argument| argument == flag);
    // With --ignored these are all that are wanted.
    let chosen = list(program, passed_on)?;
    let reasons = if has("--ignored") || has("--include-ignored") { Vec::new() } else { ignored(program, passed_on)? };
    let mut units = Vec::new();
    for test in chosen {
        let reason = reasons.iter().find(|(name, _)| *name == test).map(|(_, reason)| reason);
        let is_slow = reason.is_some_and(|reason| reason.starts_with(SLOW));
        if reason.is_some() && !(slow && is_slow) {
            total.ignored += 1;
            continue;
        }
        let arguments = ["--exact", &test, "--include-ignored", "--nocapture", "--test-threads=1"];
        let arguments = arguments.map(str::to_owned).to_vec();
        units.push(Unit { program, test: Some(test), arguments, slow: is_slow || has("--ignored") });
    }
    Ok(units)
}

/// The names of a program's tests that arguments choose.
fn list(program: &TestProgram, arguments: &[String]) -> Result<Vec<String>> {
    let said = output(program, &[arguments, &["--list".into(), "--format".into(), "terse".into()]].concat())?;
    Ok(said.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

/// The tests that a program ignores, each with the reason.
fn ignored(program: &TestProgram, arguments: &[String]) -> Result<Vec<(String, String)>> {
    let names = list(program, &[arguments, &["--ignored".into()]].concat())?;
    if names.is_empty() {
        return Ok(Vec::new());
    }
    // libtest says the reason where one would run it.
    let said = output(program, &[&["--exact".into(), "--color=never".into()], &names[..]].concat())?;
    Ok(said.lines().filter_map(reason).collect())
}

/// Reads `test the_name ... ignored, the reason`.
fn reason(line: &str) -> Option<(String, String)> {
    let (name, verdict) = line.strip_prefix("test ")?.split_once(" ... ")?;
    let reason = verdict.strip_prefix("ignored")?;
    Some((name.to_owned(), reason.trim_start_matches(", ").to_owned()))
}

fn output(program: &TestProgram, arguments: &[String]) -> Result<String> {
    let mut command = Command::new(&program.path);
    command.args(arguments).current_dir(&program.folder).stdin(Stdio::null());
    let output = command.output().with_context(|| format!("cannot run {}", program.path.display()))?;
    if !output.status.success() {
        bail!("{} does not list its tests:\n{}", program.name, String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::reason;

    /// The slow tier would be empty, or would run what is ignored for other reasons.
    #[test]
    fn the_reason_of_an_ignored_test_is_read() {
        let slow = reason("test soak::for_ten_minutes ... ignored, slow: ten minutes");
        assert_eq!(slow, Some(("soak::for_ten_minutes".into(), "slow: ten minutes".into())));
        assert_eq!(reason("test other ... ignored"), Some(("other".into(), String::new())));
        assert_eq!(reason("test runs ... ok"), None);
    }
}
