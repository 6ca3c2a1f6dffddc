//! Logs on standard error: text for people, JSON for machines.

use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

use super::CliError;

/// Shape of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// A line for people.
    Text,
    /// A JSON object per line.
    Json,
}

/// How to log.
#[derive(Clone, Debug, Args)]
pub struct LogArgs {
    /// Shape of the log on standard error.
    #[arg(long, env = "SHEAVE_LOG_FORMAT", global = true, value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// What to log: a level, or directives like `info,sheave::dataplane=debug` [default: $RUST_LOG, or else info].
    #[arg(long, env = "SHEAVE_LOG_LEVEL", global = true, value_name = "DIRECTIVES")]
    pub log_level: Option<String>,
}

/// Starts logging for the whole process.
///
/// # Errors
///
/// If the directives can't be parsed.
pub fn start(args: &LogArgs) -> Result<(), CliError> {
    let given = args.log_level.clone().or_else(|| std::env::var("RUST_LOG").ok()).filter(|text| !text.is_empty());
    let directives = given.unwrap_or_else(|| "info".to_owned());
    let filter = EnvFilter::builder()
        .parse(&directives)
        .map_err(|source| CliError::LogLevel { directives: directives.clone(), source })?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second start in one process keeps the first: only tests do that.
    let _already_started = match args.log_format {
        LogFormat::Text => {
            let colour = std::io::IsTerminal::is_terminal(&std::io::stderr());
            log.with_ansi(colour).try_init()
        }
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    Ok(())
}
