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

use std::net::IpAddr;
use std::path::Path;

use clap::Args;
use serde::Serialize;

use super::PinArgs;
use super::output::{self, OutputArgs, OutputError};
pub(super) use conntrack::is_of;
pub use read::ReadError;
use read::{Wanted, read};
pub(super) use read::{interface_name, open, socket};
use snapshot::Snapshot;
pub(super) use snapshot::protocol_name;
pub(super) use table::align;

/// Why a view can't be shown.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The maps can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// They can't be shown.
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// Flags of every view.
#[derive(Clone, Debug, Args)]
pub struct ViewArgs {
    #[command(flatten)]
    pins: PinArgs,
    #[command(flatten)]
    output: OutputArgs,
}

impl ViewArgs {
    fn show<R: Row>(&self, wanted: Wanted, rows: impl Fn(&Snapshot) -> Vec<R>) -> Result<(), ViewError> {
        self.output.show(|| {
            let rows = rows(&read(&self.pins.pin_path, wanted)?);
            Ok(self.output.format(&rows, |wide| output::titled(&table::render(&rows, wide)))?)
        })
    }
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
    /// Titles and texts of the columns that a wide table has besides.
    fn wide(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }
}

/// `sheave services`
///
/// # Errors
///
/// If the maps can't be read or the output can't be written.
pub fn services(args: &ServicesArgs) -> Result<(), ViewError> {
    let wanted = Wanted { frontends: true, counters: args.counters, ..Default::default() };
    args.view.show(wanted, services::rows)
}

/// `sheave backends`
///
/// # Errors
///
/// If the maps can't be read or the output can't be written.
pub fn backends(args: &ViewArgs) -> Result<(), ViewError> {
    args.show(Wanted::default(), backends::rows)
}

/// `sheave conntrack`
///
/// # Errors
///
/// If the maps can't be read or the output can't be written.
pub fn conntrack(args: &ConntrackArgs) -> Result<(), ViewError> {
    let wanted = Wanted { flows: true, ..Default::default() };
    let filter = conntrack::Filter { service: args.service.as_deref(), client: args.client };
    args.view.show(wanted, |snapshot| conntrack::rows(snapshot, &filter))
}

/// `sheave affinity`
///
/// # Errors
///
/// If the maps can't be read or the output can't be written.
pub fn affinity(args: &ViewArgs) -> Result<(), ViewError> {
    let wanted = Wanted { frontends: true, affinity: true, ..Default::default() };
    args.show(wanted, affinity::rows)
}

/// Every view as JSON, by name: the first rows of each.
pub(super) fn all(pins: &Path, most: usize) -> Result<[(&'static str, String); 4], ViewError> {
    fn text<R: Row>(mut rows: Vec<R>, most: usize) -> Result<String, OutputError> {
        rows.truncate(most);
        output::json(&rows)
    }
    let snapshot = read(pins, Wanted { frontends: true, counters: true, flows: true, affinity: true })?;
    Ok([
        ("services", text(services::rows(&snapshot), most)?),
        ("backends", text(backends::rows(&snapshot), most)?),
        ("conntrack", text(conntrack::rows(&snapshot, &conntrack::Filter::default()), most)?),
        ("affinity", text(affinity::rows(&snapshot), most)?),
    ])
}

/// Prints a text; a reader that has seen enough (`| head`) is no error.
///
/// # Errors
///
/// If standard output can't be written for another reason.
pub fn print(text: &str) -> Result<(), ViewError> {
    Ok(output::write(text).map(drop)?)
}

#[cfg(test)]
mod tests;
