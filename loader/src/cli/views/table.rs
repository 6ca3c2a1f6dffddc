//! Aligned columns for people.

use super::Row;

/// Rows below their titles, all columns if `wide`; a sentence if there are none.
pub(super) fn render<R: Row>(rows: &[R], wide: bool) -> String {
    let Some(first) = rows.first() else { return "(none)\n".to_owned() };
    let more = |row: &R| if wide { row.wide() } else { Vec::new() };
    let titles = first.titles().into_iter().chain(more(first).into_iter().map(|(title, _)| title));
    let mut lines: Vec<Vec<String>> = vec![titles.map(str::to_owned).collect()];
    lines.extend(rows.iter().map(|row| {
        let mut cells = row.cells();
        cells.extend(more(row).into_iter().map(|(_, cell)| cell));
        cells
    }));
    align(&lines)
}

/// Lines of cells, each column as wide as its widest cell.
pub(in crate::cli) fn align(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or_default();
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for line in lines {
        let padded: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(padded.join("  ").trim_end());
        text.push('\n');
    }
    text
}
