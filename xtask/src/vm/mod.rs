//! `cargo xtask vm`: boots real kernels in QEMU with what was built inside.
//!
//! `kernels` finds a kernel, `debian` downloads Debian's, `image` makes its first file system, and `machine` runs it. `testing`
//! and `bench` say what runs there, `cost` keeps what the kernels' verifiers say about the programs, and `times` how long the
//! tests took. Nothing is installed: kernels and images lie in `target/vm`.

mod bench;
mod cost;
mod debian;
mod image;
mod kernels;
mod machine;
mod selection;
mod testing;
mod times;

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Subcommand;

#[derive(Subcommand)]
pub(crate) enum Task {
    /// Run tests on other kernels than this machine's
    Test(testing::Options),
    /// Run the benchmarks on another kernel than this machine's
    Bench(bench::Options),
}

pub(crate) fn run(task: &Task) -> Result<()> {
    match task {
        Task::Test(options) => testing::run(options),
        Task::Bench(options) => bench::run(options),
    }
}

/// One word for a shell.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The file of this name below a folder, if there is one.
fn existing(folder: &Path, name: &str) -> Option<PathBuf> {
    Some(folder.join(name)).filter(|path| path.exists())
}
