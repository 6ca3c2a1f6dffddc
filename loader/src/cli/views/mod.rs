//! The views on the live maps: `sheave services`, `backends`, `conntrack` and `affinity`.
//!
//! [`snapshot`] holds what the pinned maps say as plain data; each view makes rows of it, and [`table`] or JSON shows
//! them. They work whether or not the daemon runs, and only read.

mod affinity;
mod backends;
mod conntrack;
mod read;
mod services;
mod snapshot;
mod table;

use std::io::{self, Write};
use std::net::IpAddr;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::PinArgs;
pub use read::ReadError;
use read::{Wanted, read};

/// Why a view can't be shown.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The maps can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Standard output can't be written.
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
    /// A row has no JSON form.
    #[error("cannot write JSON")]
    Json(#[from] serde_json::Error),
}

/// Shape of a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Aligned columns.
    Table,
    /// An array of objects.
    Json,
}

/// Flags of every view.
#[derive(Clone, Debug, Args)]
pub struct ViewArgs {
    #[command(flatten)]
    pins: PinArgs,
    /// Shape of the output.
    #[arg(short, long, env = "SHEAVE_OUTPUT", value_enum, default_value = "table")]
    output: Format,
}

/// Flags of `sheave services`.
#[derive(Clone, Debug, Args)]
pub struct ServicesArgs {
    #[command(flatten)]
    view: ViewArgs,
    /// Also show connections, packets and bytes, of the whole service port on each of its frontends.
    #[arg(long, env = "SHEAVE_COUNTERS")]
    counters: bool,
}

/// Flags of `sheave conntrack`.
#[derive(Clone, Debug, Args)]
pub struct ConntrackArgs {
    #[command(flatten)]
    view: ViewArgs,
    /// Only flows of this Service: namespace/name, or namespace/name:port.
    #[arg(long, env = "SHEAVE_SERVICE", value_name = "SERVICE")]
    service: Option<String>,
    /// Only flows of this client.
    #[arg(long, env = "SHEAVE_CLIENT", value_name = "ADDRESS")]
    client: Option<IpAddr>,
}

/// A line of a view.
trait Row: Serialize {
    /// Titles of the columns.
    fn titles(&self) -> Vec<&'static str>;
    /// Their texts.
    fn cells(&self) -> Vec<String>;
}

/// `sheave services`
///
/// # Errors
///
/// If the maps can't be read or the output can't be written.
pub fn services(args: &ServicesArgs) -> Result<(), ViewError> {
    let wanted = Wanted { frontends: true, counters: args.counters, ..Default::default() };
    let snapshot = read(&args.view.pins.pin_path, wanted)?;
    show(&services::rows(&snapshot), args.view.output)
}

/// `sheave backends`
///
/// # Errors
///
/// If the maps can't be read or the output can't be written.
pub fn backends(args: &ViewArgs) -> Result<(), ViewError> {
    let wanted = Wanted::default();
    let snapshot = read(&args.pins.pin_path, wanted)?;
    show(&backends::rows(&snapshot), args.output)
}

/// `sheave conntrack`
///
/// # Errors
///
/// If the maps can't be read or the output can't be written.
pub fn conntrack(args: &ConntrackArgs) -> Result<(), ViewError> {
    let wanted = Wanted { flows: true, ..Default::default() };
    let snapshot = read(&args.view.pins.pin_path, wanted)?;
    let filter = conntrack::Filter { service: args.service.as_deref(), client: args.client };
    show(&conntrack::rows(&snapshot, &filter), args.view.output)
}

/// `sheave affinity`
///
/// # Errors
///
/// If the maps can't be read or the output can't be written.
pub fn affinity(args: &ViewArgs) -> Result<(), ViewError> {
    let wanted = Wanted { frontends: true, affinity: true, ..Default::default() };
    let snapshot = read(&args.pins.pin_path, wanted)?;
    show(&affinity::rows(&snapshot), args.output)
}

fn show<R: Row>(rows: &[R], format: Format) -> Result<(), ViewError> {
    print(&match format {
        Format::Table => table::render(rows),
        Format::Json => json(rows)?,
    })
}

fn json<R: Row>(rows: &[R]) -> Result<String, ViewError> {
    Ok(serde_json::to_string_pretty(rows)? + "\n")
}

/// Prints a text; a reader that has seen enough (`| head`) is no error.
///
/// # Errors
///
/// If standard output can't be written for another reason.
pub fn print(text: &str) -> Result<(), ViewError> {
    let mut output = io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(ViewError::Output(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
