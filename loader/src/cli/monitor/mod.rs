//! `sheave monitor`: flows as they begin and end, and packets that don't get through, while they do.
//!
//! [`happening`] says what an event is in addresses of both families, [`known`] gives names to it, [`filter`] chooses. The programs
//! tell nothing while nobody listens; what comes faster than it can be read, or is wanted, is counted instead of shown.

mod filter;
mod happening;
mod known;

use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;

use super::output::{self, Format, OutputError};
use super::views::ViewError;
use super::{PinArgs, values};
use crate::dataplane::{ListenError, Listener};
use filter::FilterArgs;
use happening::Happening;
use known::Known;

/// Why events can't be shown.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// Nobody can listen.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Names can't be read.
    #[error(transparent)]
    View(#[from] ViewError),
    /// They can't be written.
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// Flags of `sheave monitor`.
#[derive(Clone, Debug, Args)]
pub struct MonitorArgs {
    #[command(flatten)]
    pins: PinArgs,
    /// Shape of the output: a line for each event, a JSON object on each line, or YAML documents.
    #[arg(short, long, env = "SHEAVE_OUTPUT", value_enum, default_value = "table")]
    output: Format,
    #[command(flatten)]
    filter: FilterArgs,
    /// Events to show in a second; more are only counted. 0 for all.
    #[arg(long, env = "SHEAVE_RATE", value_name = "NUMBER", default_value_t = 1_000)]
    rate: u32,
    /// End after so many events.
    #[arg(long, env = "SHEAVE_COUNT", value_name = "NUMBER")]
    count: Option<u64>,
    /// End after this time.
    #[arg(long, env = "SHEAVE_DURATION", value_name = "TIME", value_parser = values::seconds)]
    duration: Option<u32>,
}

/// `sheave monitor`
///
/// # Errors
///
/// If nobody can listen, or the output can't be written.
pub fn monitor(args: &MonitorArgs) -> Result<(), MonitorError> {
    let mut listener = Listener::open(&args.pins.pin_path)?;
    let mut screen = Screen::new(args, &args.pins.pin_path)?;
    let end = args.duration.map(|seconds| Instant::now() + Duration::from_secs(seconds.into()));
    eprintln!("listening; Ctrl-C ends it");
    while screen.is_watched() {
        let left = end.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            break;
        }
        let mut events = Vec::new();
        let lost = listener.wait(left, |event| events.push(event))?;
        for event in events {
            screen.show(&event)?;
        }
        screen.say_lost(lost);
    }
    Ok(())
}

/// Where events are shown.
struct Screen<'a> {
    args: &'a MonitorArgs,
    known: Known,
    shown: u64,
    /// The second that `in_second` counts in.
    second: Instant,
    in_second: u32,
    /// Events beyond the rate that nobody was told of yet.
    skipped: u64,
    /// The reader has not gone away.
    read: bool,
}

impl<'a> Screen<'a> {
    fn new(args: &'a MonitorArgs, pins: &Path) -> Result<Self, ViewError> {
        let known = Known::read(pins)?;
        Ok(Self { args, known, shown: 0, second: Instant::now(), in_second: 0, skipped: 0, read: true })
    }

    fn is_watched(&self) -> bool {
        self.read && self.args.count.is_none_or(|count| self.shown < count)
    }

    fn show(&mut self, event: &sheave_common::event::Event) -> Result<(), MonitorError> {
        if !self.is_watched() {
            return Ok(());
        }
        let happening = Happening::new(event, &mut self.known)?;
        if !self.args.filter.wants(&happening) {
            return Ok(());
        }
        if self.second.elapsed() >= Duration::from_secs(1) {
            (self.second, self.in_second) = (Instant::now(), 0);
        }
        if self.args.rate != 0 && self.in_second >= self.args.rate {
            self.skipped += 1;
            return Ok(());
        }
        self.in_second += 1;
        self.shown += 1;
        let text = match self.args.output {
            Format::Table => happening.line(false),
            Format::Wide => happening.line(true),
            Format::Json => serde_json::to_string(&happening).map_err(OutputError::Json)? + "\n",
            Format::Yaml => format!("---\n{}", serde_saphyr::to_string(&happening).map_err(OutputError::Yaml)?),
        };
        self.read = output::write(&text)?;
        Ok(())
    }

    fn say_lost(&mut self, lost: u64) {
        if lost > 0 {
            eprintln!("({lost} events were lost: they came faster than they could be read)");
        }
        let skipped = std::mem::take(&mut self.skipped);
        if skipped > 0 {
            eprintln!("({skipped} events are not shown: more than --rate in a second)");
        }
    }
}
