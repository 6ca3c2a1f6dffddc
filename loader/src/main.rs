//! The `sheave` binary: parses the command line, starts logging, and calls what was asked for.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use sheave::cli::{self, Cli, Command, RunArgs, logging, views};
use sheave::controller;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info};

/// How long blocking work may take to end after a stop.
const STOP: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = logging::start(&cli.log).map_err(anyhow::Error::from) {
        eprintln!("sheave: {error:#}");
        return ExitCode::FAILURE;
    }
    match (&cli.command, command(&cli.command)) {
        (_, Ok(code)) => code,
        (Command::Run(_), Err(error)) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
        (_, Err(error)) => {
            eprintln!("sheave: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn command(command: &Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run(args) => run(args)?,
        Command::Status(args) => return Ok(cli::status::status(args)?),
        Command::Services(args) => views::services(args)?,
        Command::Backends(args) => views::backends(args)?,
        Command::Conntrack(args) => views::conntrack(args)?,
        Command::Affinity(args) => views::affinity(args)?,
        Command::Monitor(args) => cli::monitor::monitor(args)?,
        Command::Trace(args) => return Ok(cli::trace::trace(args)?),
        Command::Report(args) => views::print(&format!("{}\n", cli::report::report(args)?.display()))?,
        Command::Cleanup(pins) => sheave::dataplane::cleanup(&pins.pin_path)?,
        Command::Completions { shell } => views::print(&cli::completions(*shell))?,
        Command::Manual { folder } => {
            cli::manual(folder).with_context(|| format!("cannot write manual pages into {}", folder.display()))?;
        }
        Command::Version => {
            let layout = sheave_common::LAYOUT_VERSION;
            views::print(&format!("sheave {} (map layout {layout})\n", env!("CARGO_PKG_VERSION")))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run(args: &RunArgs) -> anyhow::Result<()> {
    let config = args.config()?;
    info!(version = env!("CARGO_PKG_VERSION"), node = config.node_name, pins = %config.pin_path.display(), "starting");
    // From the API server's socket to the maps a change stays in one thread: to wake another one costs more than the change.
    let runtime = Builder::new_current_thread().enable_all().build()?;
    // Servers answer even while that one is busy.
    let servers = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let result = runtime.block_on(async {
        let mut terminated = signal(SignalKind::terminate())?;
        let mut interrupted = signal(SignalKind::interrupt())?;
        let shutdown = async {
            tokio::select! {
                _ = terminated.recv() => info!("SIGTERM: stopping; the dataplane stays in place"),
                _ = interrupted.recv() => info!("SIGINT: stopping; the dataplane stays in place"),
            }
        };
        anyhow::Ok(controller::run(config, servers.handle(), shutdown).await?)
    });
    // Threads that wait in a system call don't hold up the end.
    runtime.shutdown_timeout(STOP);
    servers.shutdown_background();
    result
}
