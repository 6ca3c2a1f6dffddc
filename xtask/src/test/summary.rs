//! Counting tests by what libtest prints.

use std::fmt;

/// Numbers of tests.
#[derive(Default)]
pub(crate) struct Summary {
    pub(crate) passed: u64,
    pub(super) failed: u64,
    pub(super) ignored: u64,
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

    /// Adds up another one.
    pub(super) fn extend(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
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
