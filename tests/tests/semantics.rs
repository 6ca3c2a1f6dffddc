//! Every sentence of SEMANTICS.md has a row in `tests/semantics.md`, with tests that exist.
//!
//! How the page is split into sentences:
//!
//! - What stands before its first `##` is about the page itself and promises nothing.
//! - A paragraph, an item of a list (its marker dropped) and a row of a table (not its head) are taken by themselves, with
//!   single spaces where lines end.
//! - A row is one sentence, its cells joined by `: `. Elsewhere a sentence ends with a `.`, `!` or `?` before a space.
//!
//! `tests/SEMANTICS.md` is a copy, because the page lies beside the repository, and not everywhere.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The repository's root.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository").to_owned()
}

fn read(path: &str) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The sentences of a page, in order.
fn sentences(page: &str) -> Vec<String> {
    let mut sentences = Vec::new();
    let mut block = String::new();
    let mut promises = false;
    let mut rows = 0;
    for line in page.lines().chain([""]) {
        let text = line.trim();
        let item = item(line);
        if text.is_empty() || text.starts_with(['#', '|']) || item.is_some() {
            sentences.extend(split(&std::mem::take(&mut block)));
        }
        rows = if text.starts_with('|') { rows + 1 } else { 0 };
        promises |= text.starts_with("## ");
        if !promises || text.is_empty() || text.starts_with('#') {
            continue;
        }
        if text.starts_with('|') {
            // The head, and the line below it.
            if rows > 2 {
                let cells: Vec<&str> = text.trim_matches('|').split('|').map(str::trim).collect();
                sentences.push(cells.join(": "));
            }
            continue;
        }
        if !block.is_empty() {
            block.push(' ');
        }
        block.push_str(item.unwrap_or(text));
    }
    sentences
}

/// What follows the marker of a list's item.
fn item(line: &str) -> Option<&str> {
    let (marker, text) = line.split_once(' ')?;
    let numbered = marker.strip_suffix('.').is_some_and(|number| number.parse::<u32>().is_ok());
    (marker == "-" || numbered).then(|| text.trim())
}

fn split(block: &str) -> Vec<String> {
    let mut sentences: Vec<String> = Vec::new();
    let mut begun = true;
    for word in block.split_whitespace() {
        if begun {
            sentences.push(String::new());
        }
        if let Some(sentence) = sentences.last_mut() {
            if !sentence.is_empty() {
                sentence.push(' ');
            }
            sentence.push_str(word);
        }
        begun = word.ends_with(['.', '!', '?']);
    }
    sentences
}

/// A row of the table: a sentence, and tests as `file::name`.
struct Row {
    sentence: String,
    tests: Vec<String>,
}

fn rows(table: &str) -> Vec<Row> {
    let cells = |line: &str| -> Vec<String> {
        line.trim().trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()
    };
    let rows = table.lines().filter(|line| line.starts_with('|')).map(cells);
    let rows = rows.filter(|cells| cells[0] != "sentence" && !cells[0].chars().all(|one| one == '-'));
    rows.map(|cells| {
        assert_eq!(cells.len(), 2, "not a sentence and its tests: {cells:?}");
        let tests = cells[1].split('`').skip(1).step_by(2).map(str::to_owned).collect();
        Row { sentence: cells[0].clone(), tests }
    })
    .collect()
}

/// Whether a source file has a test of this name: a function below `#[test]` or `#[tokio::test]`, with nothing but attributes
/// and comments between.
fn has_test(source: &str, name: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let is_it = |line: &str| {
        let declared = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ");
        declared.and_then(|rest| rest.strip_prefix(name)).is_some_and(|rest| rest.starts_with('('))
    };
    lines.iter().enumerate().filter(|(_, line)| is_it(line)).any(|(number, _)| {
        let above = lines[..number].iter().rev().take_while(|line| line.starts_with("#[") || line.starts_with("//"));
        above.into_iter().any(|line| *line == "#[test]" || line.starts_with("#[tokio::test"))
    })
}

/// What a cluster relies on would be promised and tested by nobody.
#[test]
fn every_sentence_has_a_row() {
    let (page, table) = (sentences(&read("tests/SEMANTICS.md")), rows(&read("tests/semantics.md")));
    assert!(page.len() > 50, "the page has {} sentences", page.len());
    let with_row: BTreeSet<&str> = table.iter().map(|row| row.sentence.as_str()).collect();
    let without: Vec<&String> = page.iter().filter(|sentence| !with_row.contains(sentence.as_str())).collect();
    assert!(without.is_empty(), "no row in tests/semantics.md for {without:#?}");
    let promised: BTreeSet<&str> = page.iter().map(String::as_str).collect();
    let stale: Vec<&str> = with_row.difference(&promised).copied().collect();
    assert!(stale.is_empty(), "rows of tests/semantics.md that the page has no sentence for: {stale:#?}");
    assert_eq!(table.len(), page.len(), "a sentence has two rows");
}

/// A row would name a test that was renamed or never written.
#[test]
fn every_row_names_tests_that_exist() {
    for row in rows(&read("tests/semantics.md")) {
        assert!(!row.tests.is_empty(), "no test proves {:?}", row.sentence);
        for test in &row.tests {
            let (file, name) = test.split_once("::").unwrap_or_else(|| panic!("{test} is not file::name"));
            assert!(has_test(&read(file), name), "{file} has no test {name}, which should prove {:?}", row.sentence);
        }
    }
}

/// The table would be about another page than the one that counts.
#[test]
fn the_copy_is_the_page_where_the_page_is_there() {
    if let Ok(page) = std::fs::read_to_string(root().join("../shared/SEMANTICS.md")) {
        assert_eq!(
            page,
            read("tests/SEMANTICS.md"),
            "tests/SEMANTICS.md is no copy of ../shared/SEMANTICS.md any more"
        );
    }
}

/// A sentence could hide in a list, a table or the middle of a line.
#[test]
fn a_page_is_split_into_all_of_its_sentences() {
    let page = "# Title\n\nAbout the page. Nothing here counts.\n\n## One\n\nFirst `a.b` thing, 1.5 of\nit. Second!\n- An item: it\n  \
                goes on. And on?\n1. A number;\n   more\n2. else all.\n\n| when | what |\n| --- | --- |\n| a | b. C |\n| d | e |\n\n\
                ### Deeper\n\nLast: the end\n";
    let expected = [
        "First `a.b` thing, 1.5 of it.",
        "Second!",
        "An item: it goes on.",
        "And on?",
        "A number; more",
        "else all.",
        "a: b. C",
        "d: e",
        "Last: the end",
    ];
    assert_eq!(sentences(page), expected);
}

/// A row could point at a helper, a comment or a test of a longer name.
#[test]
fn only_a_function_below_test_is_a_test() {
    let source = "/// fn spoken_of()\n#[test]\n#[ignore = \"slow\"]\n/// Why.\nfn real() {}\n\n#[test]\nfn longer_name() {}\nfn helper() {}\n\
                  #[tokio::test(flavor = \"current_thread\")]\nasync fn later() {}\n";
    for name in ["real", "longer_name", "later"] {
        assert!(has_test(source, name), "{name}");
    }
    for name in ["spoken_of", "longer", "helper", "absent"] {
        assert!(!has_test(source, name), "{name}");
    }
}
