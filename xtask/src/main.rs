//! Development tasks: `cargo xtask setup | build | image | test | fuzz | soak | deny | vm | demo | bench`.
//!
//! Each task first sets up what it needs and says in plain words what it installs; on a machine where nothing is
//! missing that takes no time.

mod apt;
mod bench;
mod demo;
mod deny;
mod fuzz;
mod image;
mod oci;
mod process;
mod setup;
mod soak;
mod test;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Sheave's development tasks.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what building, the tests and the demo need; does nothing when nothing is missing
    Setup,
    /// Build the `sheave` binary with its BPF programs
    Build {
        /// Optimised
        #[arg(long)]
        release: bool,
    },
    /// Make the container image, in target/image, as an OCI archive
    Image(image::Options),
    /// Build and run every test; those that need it run as root
    Test(test::Options),
    /// Everything at once, for an hour: no byte may be misrouted, no connection lost, and no memory taken for good
    Soak(soak::Options),
    /// Check the dependencies: known vulnerabilities, licences, where they come from
    Deny(deny::Options),
    /// Run the fuzz targets under AddressSanitizer
    Fuzz(fuzz::Options),
    /// Boot other kernels in virtual machines
    #[command(subcommand)]
    Vm(vm::Task),
    /// Show Services at work: two nodes and a client in network namespaces, real HTTP and DNS
    Demo,
    /// Measure what Sheave costs, side by side with what it is compared to; `--help` says how
    Bench(bench::Options),
}

fn main() -> ExitCode {
    match run(&Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: &Task) -> Result<()> {
    std::env::set_current_dir(repository())?;
    match task {
        Task::Setup => setup::run(setup::Need::Everything),
        Task::Build { release } => {
            setup::run(setup::Need::Building)?;
            let mut cargo = process::cargo(&["build", "--package", "sheave"]);
            if *release {
                cargo.arg("--release");
            }
            process::run(&mut cargo)
        }
        Task::Image(options) => {
            setup::run(setup::Need::Building)?;
            image::run(options)
        }
        Task::Test(options) => {
            setup::run(setup::Need::Everything)?;
            test::run(options)
        }
        Task::Soak(options) => {
            setup::run(setup::Need::Everything)?;
            soak::run(options)
        }
        Task::Deny(options) => deny::run(options),
        Task::Fuzz(options) => {
            setup::run(setup::Need::Building)?;
            fuzz::run(options)
        }
        Task::Vm(task) => {
            setup::run(setup::Need::VirtualMachines)?;
            vm::run(task)
        }
        Task::Demo => {
            setup::run(setup::Need::Everything)?;
            demo::run()
        }
        Task::Bench(options) => {
            setup::run(setup::Need::Everything)?;
            bench::run(options)
        }
    }
}

/// The checkout that this task was started in: with a target directory of several checkouts, another one may have built it.
fn repository() -> PathBuf {
    let xtask = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    PathBuf::from(xtask).join("..")
}
