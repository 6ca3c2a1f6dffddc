//! The command line: flags and environment variables in, a [`crate::config::RunConfig`] or something to look at out.

pub mod check;
mod documents;
mod http;
pub mod logging;
pub mod monitor;
pub mod output;
pub mod report;
mod run;
pub mod status;
pub mod trace;
mod values;
pub mod views;

use clap::{Args, Parser, Subcommand};

pub use check::CheckArgs;
pub use documents::{completions, manual};
pub use run::RunArgs;

/// Exit code of a command that has done its work, and whose answer is no: see [`EXIT_CODES`].
pub const DISAPPOINTED: u8 = 3;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  it could not be done; standard error says why, and what to do
  2  the command line is wrong
  3  done, and the answer is no: `status` found no healthy daemon, `trace` found no backend for the packet

Every flag can also be given by an environment variable. Colours go to terminals alone, and not with NO_COLOR.";

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
#[command(name = "sheave", version, max_term_width = 120, propagate_version = true, after_help = EXIT_CODES)]
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
    /// Show how this node's Sheave is, on one screen: daemon, dataplane, maps, drops.
    #[command(after_help = "Examples:\n  sheave status --watch\n  sheave status -o json | jq .daemon.healthy")]
    Status(status::StatusArgs),
    /// Show the Services that the kernel balances, a row per frontend.
    #[command(after_help = "Examples:\n  sheave services --counters\n  sheave services -o wide --watch=5")]
    Services(views::ServicesArgs),
    /// Show the backends, of all service ports.
    #[command(after_help = "Examples:\n  sheave backends -o yaml")]
    Backends(views::ViewArgs),
    /// Show the flows, half-open ones too, a row per direction.
    #[command(
        after_help = "Examples:\n  sheave conntrack --service default/web\n  sheave conntrack --client 10.244.1.5 --watch"
    )]
    Conntrack(views::ConntrackArgs),
    /// Show which client comes back to which backend.
    #[command(after_help = "Examples:\n  sheave affinity -o json")]
    Affinity(views::ViewArgs),
    /// Show flows as they begin and end, and packets that don't get through. Costs nothing while it does not run.
    #[command(
        after_help = "Examples:\n  sheave monitor --event drop\n  sheave monitor --service default/web --address 10.244.1.5\n  \
                            sheave monitor --reason no_endpoint,source_range -o json --duration 1m"
    )]
    Monitor(monitor::MonitorArgs),
    /// Show what would become of a packet, and why. It is tried on the live maps, and nothing changes.
    #[command(after_help = "Examples:\n  sheave trace --from 10.244.1.5 --to 10.96.0.10:53/udp\n  \
                            sheave trace --from 198.51.100.7 --to 192.0.2.1:30500 --interface eth0")]
    Trace(trace::TraceArgs),
    /// Write an archive for a bug report. It holds no credentials.
    #[command(after_help = "Examples:\n  sheave report --file /tmp/sheave.tar.gz\n  \
                            kubectl -n kube-system exec sheave-x7k2p -- sheave report --file - > report.tar.gz")]
    Report(report::ReportArgs),
    /// Print a shell's completions for this program.
    #[command(
        after_help = "Examples:\n  source <(sheave completions bash)\n  sheave completions fish > ~/.config/fish/completions/sheave.fish"
    )]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write manual pages into a folder.
    #[command(after_help = "Examples:\n  sheave manual /usr/local/share/man/man1")]
    Manual {
        /// The folder.
        folder: std::path::PathBuf,
    },
    /// Look at this node before Sheave is installed, or while it runs, with the flags that `sheave run` is to have: kernel, mounts,
    /// rights, interfaces, settings, other balancers, programs and rules. Ends with 1 if something fails.
    Check(Box<CheckArgs>),
    /// Remove every trace of Sheave from this node: programs, links and maps. Refused while `sheave run` runs. Or, with
    /// --kube-proxy, what kube-proxy left.
    Cleanup(CleanupArgs),
    /// Print the version, and that of the map layouts.
    Version,
}

/// What to remove.
#[derive(Clone, Debug, Args)]
pub struct CleanupArgs {
    /// Where the pins are.
    #[command(flatten)]
    pub pins: PinArgs,
    /// Remove kube-proxy's rules instead, and nothing of Sheave: its nftables tables, its iptables chains (legacy and nft) and
    /// kube-ipvs0. Connections that netfilter translates by them carry on. Only where Sheave serves, and kube-proxy is stopped.
    #[arg(
        long,
        env = "SHEAVE_KUBE_PROXY",
        value_name = "BOOL",
        default_value_t = false,
        action = clap::ArgAction::Set,
        num_args = 0..=1,
        default_missing_value = "true"
    )]
    pub kube_proxy: bool,
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
