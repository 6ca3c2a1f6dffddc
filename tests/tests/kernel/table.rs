//! Reading `tests/verifier-cost.md`, which `cargo xtask vm test --update-costs` writes.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};

/// The table.
pub(crate) struct Table {
    /// What made the object that was measured.
    pub(crate) compiler: String,
    kernels: Vec<String>,
    rows: Vec<(String, Vec<String>)>,
}

impl Table {
    /// The one in the repository.
    pub(crate) fn checked_in() -> Result<Self> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/verifier-cost.md");
        let text = std::fs::read_to_string(path).with_context(|| path.to_owned())?;
        Self::parse(&text).with_context(|| format!("{path} has no table"))
    }

    fn parse(text: &str) -> Option<Self> {
        let compiler = text.lines().find_map(|line| line.strip_prefix("Compiler: "))?.trim().to_owned();
        let mut lines = text.lines().filter_map(|line| {
            let cells = line.strip_prefix('|')?.strip_suffix('|')?.split('|');
            Some(cells.map(|cell| cell.trim().to_owned()).collect::<Vec<_>>())
        });
        let kernels = lines.next()?.into_iter().skip(1).collect();
        let rows = lines.skip(1).filter_map(|cells| Some((cells.first()?.clone(), cells[1..].to_vec()))).collect();
        Some(Self { compiler, kernels, rows })
    }

    /// Instructions by program on a kernel, if it is in the table.
    pub(crate) fn kernel(&self, kernel: &str) -> Option<BTreeMap<&str, u64>> {
        let column = self.kernels.iter().position(|known| known == kernel)?;
        let cell = |cells: &[String]| cells.get(column)?.replace(' ', "").parse().ok();
        Some(self.rows.iter().filter_map(|(program, cells)| Some((program.as_str(), cell(cells)?))).collect())
    }
}

/// Nothing would be compared.
#[test]
fn the_table_is_read_by_kernel_and_program() {
    let text = "# Title\n\nCompiler: rustc version 1.96.0\n\n| program | 5.10 | 6.1 |\n| --- | ---: | ---: |\n\
                | pod_ingress | 65 209 | 65 148 |\n| uplink_xdp | 26 870 | |\n";
    let table = Table::parse(text).expect("a table");
    assert_eq!(table.compiler, "rustc version 1.96.0");
    assert_eq!(table.kernel("6.1"), Some(BTreeMap::from([("pod_ingress", 65_148)])));
    assert_eq!(table.kernel("5.10").map(|column| column["uplink_xdp"]), Some(26_870));
    assert_eq!(table.kernel("4.19"), None);
}
