//! What was measured: figures, goals and what went wrong; and how it is saved.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::goal::Goal;
use crate::machine::Machine;
use crate::statistics::Estimate;

/// Whether more of it is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    /// Costs.
    Lower,
    /// Rates.
    Higher,
}

/// One measured quantity.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Figure {
    /// Unit, such as `ns`.
    pub(crate) unit: String,
    /// Which way is good.
    pub(crate) better: Better,
    /// Median and interval.
    pub(crate) estimate: Estimate,
    /// Every sample, in the order in which they were taken: the same place in two figures of one measure is the same time.
    pub(crate) samples: Vec<f64>,
    /// Where single events were timed: percentiles and values.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) distribution: Vec<(f64, f64)>,
    /// For plots: the curve that this figure is a point of, and its place on the x axis.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) point: Option<(String, f64)>,
}

/// A run's results.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Findings {
    /// Where and when.
    pub(crate) machine: Machine,
    /// Whether this was a quick run.
    pub(crate) quick: bool,
    /// How long it took.
    pub(crate) seconds: f64,
    /// Figures by name, such as `program/established tcp/IPv4/hot`.
    pub(crate) figures: BTreeMap<String, Figure>,
    /// PERFORMANCE.md's column, as far as it was measured.
    pub(crate) goals: Vec<Goal>,
    /// What could not be measured, and why.
    pub(crate) failures: BTreeMap<String, String>,
}

impl Findings {
    /// None yet.
    pub(crate) fn new(quick: bool) -> Self {
        let (figures, goals, failures) = Default::default();
        Self { machine: Machine::look(), quick, seconds: 0.0, figures, goals, failures }
    }

    /// Adds a figure, unless there are no samples of it.
    pub(crate) fn add(&mut self, name: impl Into<String>, unit: &str, better: Better, samples: Vec<f64>) {
        let Some(estimate) = Estimate::of(&samples) else { return };
        let (distribution, point) = Default::default();
        let figure = Figure { unit: unit.into(), better, estimate, samples, distribution, point };
        self.figures.insert(name.into(), figure);
    }

    /// Adds a goal, unless it was not measured.
    pub(crate) fn reach(&mut self, goal: Option<Goal>) {
        self.goals.extend(goal);
    }

    /// Reads a saved run.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not a saved run", path.display()))
    }

    /// Saves this one.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        write(path, &(serde_json::to_string_pretty(self)? + "\n"))
    }
}

/// Writes a file, and the folder that it goes to.
pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}
