//! How long the test targets took on each kernel.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

/// Times of one kernel's test targets.
#[derive(Default)]
pub(super) struct Times {
    current: Option<String>,
    targets: BTreeMap<String, Duration>,
}

impl Times {
    /// Takes a line of the tests' output: the one that names a target, or the one with which it ends.
    pub(super) fn read(&mut self, line: &str) {
        if let Some(target) = line.strip_prefix(RUNNING) {
            self.current = Some(target.to_owned());
        } else if line.starts_with("test result: ")
            && let Some((_, took)) = line.rsplit_once("finished in ")
            && let Some(seconds) = took.strip_suffix('s').and_then(|seconds| seconds.parse().ok())
            && let Some(target) = self.current.take()
        {
            self.targets.insert(target, Duration::from_secs_f64(seconds));
        }
    }
}

/// What stands before the name of the test target that runs next.
pub(super) const RUNNING: &str = "     Running ";

/// Whole seconds by target and kernel, in Markdown; `kernels` are names with the times of each.
pub(super) fn table(kernels: &[(String, &Times)]) -> String {
    let mut targets: Vec<&str> =
        kernels.iter().flat_map(|(_, times)| times.targets.keys().map(String::as_str)).collect();
    targets.sort_unstable();
    targets.dedup();
    let mut table = format!("| {:<17} |", "seconds");
    let mut line = format!("| {} |", "-".repeat(17));
    for (kernel, _) in kernels {
        let _ = write!(table, " {kernel:>5} |");
        line += " ----: |";
    }
    let _ = writeln!(table, "\n{line}");
    for target in targets {
        let _ = write!(table, "| {target:<17} |");
        for (_, times) in kernels {
            let cell = times.targets.get(target).map(|took| format!("{:.0}", took.as_secs_f64())).unwrap_or_default();
            let _ = write!(table, " {cell:>5} |");
        }
        table.push('\n');
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table would say that a target took what another one did, or nothing.
    #[test]
    fn each_targets_time_is_read_from_its_last_line() {
        let (mut old, mut new) = (Times::default(), Times::default());
        for line in [
            "     Running kernel",
            "test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 31.28s",
            "     Running e2e_host",
            "test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 104.61s",
        ] {
            old.read(line);
        }
        new.read("     Running kernel");
        new.read("test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 29.38s");
        new.read("     Running e2e_host");
        assert_eq!(
            table(&[("5.10".into(), &old), ("6.12".into(), &new)]),
            "| seconds           |  5.10 |  6.12 |\n\
             | ----------------- | ----: | ----: |\n\
             | e2e_host          |   105 |       |\n\
             | kernel            |    31 |    29 |\n"
        );
    }
}
