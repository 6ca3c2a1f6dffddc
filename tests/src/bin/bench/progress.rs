//! A bar that says what is measured now.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Shows how far a run is; on a terminal only.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// Of a run of this length.
    pub(crate) fn new(length: Duration) -> Self {
        let bar = ProgressBar::new(length.as_secs().max(1));
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {elapsed} of about {len} s  {prefix}: {wide_msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_secs(1));
        Self { bar }
    }

    /// A measure begins, after others that were to take so long.
    pub(crate) fn begin(&self, measure: &str, before: Duration) {
        self.bar.set_position(before.as_secs());
        self.bar.set_prefix(measure.to_owned());
        self.step("");
    }

    /// What it does now.
    pub(crate) fn step(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    /// Prints a line above the bar.
    pub(crate) fn say(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    /// The run is over.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
