//! Aligned columns for people.

use super::Row;

/// Rows below their titles; a sentence if there are none.
pub(super) fn render<R: Row>(rows: &[R]) -> String {
    let Some(first) = rows.first() else { return "(none)\n".to_owned() };
    let mut lines: Vec<Vec<String>> = vec![first.titles().into_iter().map(str::to_owned).collect()];
    lines.extend(rows.iter().map(Row::cells));
    let columns = lines.iter().map(Vec::len).max().unwrap_or_default();
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for line in &lines {
        let padded: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(padded.join("  ").trim_end());
        text.push('\n');
    }
    text
}
