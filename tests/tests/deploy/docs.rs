//! The pages in `deploy/docs` leave nothing out.

use std::collections::BTreeSet;
use std::fs;

use anyhow::Result;
use sheave_common::{DropReason, names};

use super::folder;

/// What stands between backquotes in the first column of a page's tables.
fn first_column(page: &str) -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(folder().join("docs").join(page))?;
    let cells = text.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    Ok(cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(str::to_owned).collect())
}

#[test]
fn every_reason_of_a_drop_has_a_remedy() -> Result<()> {
    let reasons: BTreeSet<String> = DropReason::ALL.iter().map(|reason| reason.name().to_owned()).collect();
    assert_eq!(first_column("troubleshooting.md")?, reasons);
    Ok(())
}

#[test]
fn every_pinned_map_is_explained() -> Result<()> {
    let maps: BTreeSet<String> = names::MAPS.iter().map(|map| (*map).to_owned()).collect();
    assert_eq!(first_column("maps.md")?, maps);
    Ok(())
}
