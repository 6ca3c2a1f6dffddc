//! The command line: flags and environment variables in, a [`crate::config::RunConfig`] or a table out.

pub mod logging;
mod run;
mod values;
pub mod views;

use clap::{Args, Parser, Subcommand};

pub use run::RunArgs;

/// What went wrong on the command line, with the remedy.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Two flags that exclude each other.
    #[error("{first} and {second} exclude each other: give one of them (they may also come from SHEAVE_ variables)")]
    Exclusive {
        /// One flag.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// A value that is well formed and can't work.
    #[error("{flag} {value}: {remedy}")]
    Value {
        /// The flag.
        flag: &'static str,
        /// Its value.
        value: String,
        /// What to give instead.
        remedy: String,
    },
    /// This machine's name could not be read.
    #[error("cannot read this machine's name from /proc/sys/kernel/hostname; give --node-name")]
    Hostname(#[source] std::io::Error),
    /// A filter for the log.
    #[error("--log-level {directives}: give error, warn, info, debug or trace, or RUST_LOG directives")]
    LogLevel {
        /// What was given.
        directives: String,
        /// The parser's answer.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
}

/// A Kubernetes Service load balancer in the kernel.
#[derive(Debug, Parser)]
#[command(name = "sheave", version, max_term_width = 120, propagate_version = true)]
pub struct Cli {
    /// How to log.
    #[command(flatten)]
    pub log: logging::LogArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What `sheave` can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Keep this node's kernel equal to the cluster's Services, until SIGTERM or SIGINT. The dataplane stays.
    Run(Box<RunArgs>),
    /// Show the Services that the kernel balances, a row per frontend.
    Services(views::ServicesArgs),
    /// Show the backends, of all service ports.
    Backends(views::ViewArgs),
    /// Show the flows, half-open ones too, a row per direction.
    Conntrack(views::ConntrackArgs),
    /// Show which client comes back to which backend.
    Affinity(views::ViewArgs),
    /// Remove every trace of Sheave from this node: programs, links and maps. Refused while `sheave run` runs.
    Cleanup(PinArgs),
    /// Print the version, and that of the map layouts.
    Version,
}

/// Where the pins are.
#[derive(Clone, Debug, Args)]
pub struct PinArgs {
    /// Directory of the pinned maps, on a BPF file system.
    #[arg(long, env = "SHEAVE_PIN_PATH", value_name = "DIR", default_value = "/sys/fs/bpf/sheave")]
    pub pin_path: std::path::PathBuf,
}

#[cfg(test)]
mod tests;
