//! The `sheave` binary: parses the command line, starts logging, and calls what was asked for.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use sheave::check::{self, Verdict};
use sheave::cli::{self, CheckArgs, Cli, Command, RunArgs, logging, views};
use sheave::netfilter::kube_proxy;
use sheave::{controller, dataplane, interfaces};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info};

/// Where kube-proxy's IPVS mode parks the addresses of Services.
const IPVS_DEVICE: &str = "kube-ipvs0";
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
        Command::Report(args) => {
            if let Some(path) = cli::report::report(args)? {
                views::print(&format!("{}\n", path.display()))?;
            }
        }
        Command::Check(args) => check(args)?,
        Command::Cleanup(args) if args.kube_proxy => clean_up_kube_proxy(&args.pins.pin_path)?,
        Command::Cleanup(args) => dataplane::cleanup(&args.pins.pin_path)?,
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

/// Looks at this node, and fails if something does.
fn check(args: &CheckArgs) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let findings = runtime.block_on(check::run(&args.config()?));
    views::print(&args.show(&findings)?)?;
    let failed = findings.iter().filter(|finding| finding.verdict == Verdict::Fail).count();
    anyhow::ensure!(failed == 0, "{failed} of {} checks failed", findings.len());
    Ok(())
}

/// Removes what kube-proxy left, and says what that was.
fn clean_up_kube_proxy(pin_path: &Path) -> anyhow::Result<()> {
    let serves = dataplane::PinnedMaps::open(pin_path).is_ok_and(|maps| {
        let held = |frontends: Result<bool, _>| frontends.unwrap_or(false);
        held(maps.frontends4().map(|all| !all.is_empty())) || held(maps.frontends6().map(|all| !all.is_empty()))
    });
    anyhow::ensure!(
        serves,
        "{} holds no Services: without kube-proxy's rules nobody would serve them; start `sheave run` first",
        pin_path.display()
    );
    let mut removed = kube_proxy::remove()?;
    let runtime = Builder::new_current_thread().enable_all().build()?;
    if runtime.block_on(interfaces::remove(IPVS_DEVICE))? {
        removed.gone.push(format!("interface {IPVS_DEVICE}; what IPVS itself balances goes with `ipvsadm --clear`"));
    }
    let mut lines: Vec<String> = removed.gone.iter().map(|what| format!("removed {what}\n")).collect();
    if lines.is_empty() {
        lines.push("nothing of kube-proxy is here\n".to_owned());
    }
    if !removed.kept.is_empty() {
        let (translated, tables) = (removed.translated, keepers(&removed.kept));
        lines.push(format!(
            "netfilter still translates {translated} connections; {tables} holds the nat chain that it needs for that, until \
             `sheave run` sees that the last has ended\n"
        ));
    }
    Ok(views::print(&lines.concat())?)
}

fn keepers(families: &[&str]) -> String {
    let tables: Vec<_> = families.iter().map(|family| format!("table {family} {}", kube_proxy::KEEPER)).collect();
    tables.join(" and ")
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
