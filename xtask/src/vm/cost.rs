//! What the kernels' verifiers say about the programs: read from the test target `kernel`, shown as a table, and kept in
//! `tests/verifier-cost.md`, with which that test compares.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

const HEAD: &str = "# What the programs cost the verifier

Instructions that each kernel's verifier looks at before it accepts a program, those of repeated paths each time: it gives up
at a million. The stack is that of the deepest chain of calls in bytes, of 512, as the newest kernel reports it (older ones don't).

`cargo xtask vm test --load-only --update-costs` writes this file. The test target `kernel` fails where a program costs more
than a fifth over it, if the object was made by the same compiler: others make other code.
";

/// Costs by program and kernel.
#[derive(Default)]
pub(super) struct Costs {
    compiler: Option<String>,
    kernels: BTreeSet<(u32, u32)>,
    programs: BTreeMap<String, Program>,
}

#[derive(Default)]
struct Program {
    instructions: BTreeMap<(u32, u32), u64>,
    stack: Option<u64>,
}

impl Costs {
    /// Takes a line of the test's output; false if it is about something else.
    pub(super) fn read(&mut self, line: &str) -> bool {
        if let Some(compiler) = line.strip_prefix("verifier-compiler: ") {
            self.compiler = Some(compiler.to_owned());
            return true;
        }
        line.strip_prefix("verifier-cost: ").and_then(|words| self.add(words)).is_some()
    }

    /// `6.1 pod_ingress 65148 184 -`: kernel, program, instructions, largest frame, deepest chain of calls.
    fn add(&mut self, words: &str) -> Option<()> {
        let mut words = words.split(' ');
        let (major, minor) = words.next()?.split_once('.')?;
        let kernel = (major.parse().ok()?, minor.parse().ok()?);
        let program = self.programs.entry(words.next()?.to_owned()).or_default();
        program.instructions.insert(kernel, words.next()?.parse().ok()?);
        program.stack = words.nth(1)?.parse().ok().or(program.stack);
        self.kernels.insert(kernel);
        Some(())
    }

    /// The table in Markdown, which people can read, too.
    pub(super) fn table(&self) -> String {
        let mut table = format!("| {:<17} |", "program");
        let mut line = format!("| {} |", "-".repeat(17));
        for (major, minor) in &self.kernels {
            let _ = write!(table, " {:>7} |", format!("{major}.{minor}"));
            line += " ------: |";
        }
        let _ = writeln!(table, " stack |\n{line} ----: |");
        for (name, program) in &self.programs {
            let _ = write!(table, "| {name:<17} |");
            for kernel in &self.kernels {
                let cell = program.instructions.get(kernel).map(|count| thousands(*count)).unwrap_or_default();
                let _ = write!(table, " {cell:>7} |");
            }
            let stack = program.stack.map(|stack| stack.to_string()).unwrap_or_default();
            let _ = writeln!(table, " {stack:>5} |");
        }
        table
    }

    /// Writes the file. Only with every supported kernel's costs, or the others' would be lost.
    pub(super) fn update(&self, file: &Path) -> Result<()> {
        let compiler = self.compiler.as_ref().context("no costs were measured")?;
        let known = fs::read_to_string(file).unwrap_or_default();
        let heading = known.lines().find(|line| line.starts_with("| program")).unwrap_or_default();
        let missing = heading.split('|').map(str::trim).find(|cell| {
            let kernel =
                cell.split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
            kernel.is_some_and(|kernel| !self.kernels.contains(&kernel))
        });
        if let Some(missing) = missing {
            bail!("the costs on {missing} were not measured; use --kernel all");
        }
        fs::write(file, format!("{HEAD}\nCompiler: {compiler}\n\n{}", self.table()))
            .with_context(|| file.display().to_string())
    }
}

/// `65 148` for 65148.
fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let mut grouped = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(' ');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table would be empty, or would show one kernel's costs as another's.
    #[test]
    fn the_tests_output_becomes_a_table_of_programs_by_kernel() {
        let mut costs = Costs::default();
        assert!(costs.read("verifier-compiler: rustc version 1.96.0"));
        assert!(costs.read("verifier-cost: 6.12 pod_egress 21443 184 -"));
        assert!(costs.read("verifier-cost: 7.2 pod_egress 908 184 432"));
        assert!(costs.read("verifier-cost: 6.12 uplink_xdp 1031598 168 -"));
        assert!(!costs.read("test cost ... ok"));
        assert_eq!(
            costs.table(),
            "| program           |    6.12 |     7.2 | stack |\n\
             | ----------------- | ------: | ------: | ----: |\n\
             | pod_egress        |  21 443 |     908 |   432 |\n\
             | uplink_xdp        | 1 031 598 |         |       |\n"
        );
    }
}
