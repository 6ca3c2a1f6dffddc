//! How everything is shown: for people in aligned columns, in colour on a terminal alone (and not with `NO_COLOR`), or as
//! JSON or YAML for programs; once, or again and again.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::values;

/// Titles.
pub const TITLE: Style = Style::new().bold();
/// What is as it should be.
pub const GOOD: Style = AnsiColor::Green.on_default();
/// What is not.
pub const BAD: Style = AnsiColor::Red.on_default().bold();

/// Moves a terminal's cursor to its upper left corner, and clears it.
const CLEAR: &str = "\x1b[H\x1b[2J\x1b[3J";

/// Shape of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Aligned columns.
    Table,
    /// The same with more columns.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// How to show something.
#[derive(Clone, Copy, Debug, Args)]
pub struct OutputArgs {
    /// Shape of the output.
    #[arg(short, long, env = "SHEAVE_OUTPUT", value_enum, default_value = "table")]
    pub output: Format,
    /// Show it again every so often (2 s if not said) until interrupted.
    #[arg(short, long, env = "SHEAVE_WATCH", value_name = "SECONDS", value_parser = values::seconds,
          num_args = 0..=1, require_equals = true, default_missing_value = "2")]
    pub watch: Option<u32>,
}

/// Why something can't be shown.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// Standard output can't be written.
    #[error("cannot write to standard output")]
    Write(#[source] io::Error),
    /// It has no JSON form.
    #[error("cannot write JSON")]
    Json(#[from] serde_json::Error),
    /// It has no YAML form.
    #[error("cannot write YAML")]
    Yaml(#[from] serde_saphyr::SerializeError),
}

impl OutputArgs {
    /// A value in the shape that was asked for; `table` makes the text for people, with all columns if it is told so.
    ///
    /// # Errors
    ///
    /// If the value has no such form.
    pub fn format<T: Serialize + ?Sized>(
        &self,
        value: &T,
        table: impl FnOnce(bool) -> String,
    ) -> Result<String, OutputError> {
        Ok(match self.output {
            Format::Table => table(false),
            Format::Wide => table(true),
            Format::Json => json(value)?,
            Format::Yaml => serde_saphyr::to_string(&value)?,
        })
    }

    /// Shows what `make` returns, once or for as long as somebody watches.
    ///
    /// # Errors
    ///
    /// What `make` returns, or if standard output can't be written.
    pub fn show<E: From<OutputError>>(&self, mut make: impl FnMut() -> Result<String, E>) -> Result<(), E> {
        let terminal = io::stdout().is_terminal();
        loop {
            let text = make()?;
            if terminal && self.watch.is_some() {
                // Also with NO_COLOR; what can't be written here can't be below.
                let _ = io::stdout().write_all(CLEAR.as_bytes());
            }
            let read = write(&text)?;
            match self.watch {
                Some(seconds) if read => std::thread::sleep(Duration::from_secs(seconds.into())),
                _ => return Ok(()),
            }
        }
    }
}

/// A value as JSON for people to read, too.
pub(super) fn json<T: Serialize + ?Sized>(value: &T) -> Result<String, OutputError> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// A text whose first line is a title.
#[must_use]
pub fn titled(text: &str) -> String {
    match text.split_once('\n') {
        Some((title, rest)) => format!("{TITLE}{title}{TITLE:#}\n{rest}"),
        None => text.to_owned(),
    }
}

/// Prints a text, its colours only where they are welcome. A reader that has seen enough (`| head`) is no error, but false.
///
/// # Errors
///
/// If standard output can't be written for another reason.
pub fn write(text: &str) -> Result<bool, OutputError> {
    let mut output = anstream::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(OutputError::Write(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_value_comes_in_every_shape() {
        let shown = |output| OutputArgs { output, watch: None }.format(&["one"], |wide| format!("wide: {wide}\n"));
        let shown = [Format::Table, Format::Wide, Format::Json, Format::Yaml].map(|output| shown(output).unwrap());
        assert_eq!(shown, ["wide: false\n", "wide: true\n", "[\n  \"one\"\n]\n", "- one\n"]);
    }

    #[test]
    fn only_the_first_line_is_a_title() {
        assert_eq!(titled("A  B\n1  2\n"), "\x1b[1mA  B\x1b[0m\n1  2\n");
    }
}
