//! What shells and `man` know of the command line.

use std::io;
use std::path::Path;

use clap::CommandFactory as _;

use super::Cli;

/// A shell's completions.
#[must_use]
pub fn completions(shell: clap_complete::Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "sheave", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Writes a manual page for each command into a folder, which is made.
///
/// # Errors
///
/// If the folder can't be made, or a page not be written.
pub fn manual(folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    clap_mangen::generate_to(Cli::command(), folder)
}
