//! Which test begins when.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::unit::Unit;

/// Tests that need the machine to themselves, by program and a part of the test's name, and why. They run one at a time after
/// all others.
const ALONE: &[(&str, &str, &str)] = &[("bench_report", "", "it compares durations")];

/// Why a test must run alone, if it must.
pub(super) fn alone(unit: &Unit<'_>) -> Option<&'static str> {
    let test = unit.test.as_deref().unwrap_or_default();
    ALONE.iter().find(|(program, part, _)| unit.program.name == *program && test.contains(part)).map(|(.., why)| *why)
}

/// Puts tests in an order that the seed determines, and says the seed.
pub(super) fn shuffle(units: &mut [Unit<'_>], seed: Option<u64>) {
    let seed = seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    println!("test: in the order of --shuffle {seed}");
    fastrand::Rng::with_seed(seed).shuffle(units);
}

/// How long tests took when they ran last, in milliseconds: the longest begin first, so that none is left to run alone at the
/// end.
pub(super) struct Durations {
    file: PathBuf,
    known: BTreeMap<String, u64>,
}

impl Durations {
    /// Reads the file that [`Self::save`] wrote; without one nothing is known.
    pub(super) fn load(file: &Path) -> Self {
        let known = fs::read(file).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { file: file.to_owned(), known }
    }

    /// What is known of a test, or a guess.
    pub(super) fn expected(&self, unit: &Unit<'_>) -> Duration {
        let guess = match unit.program.name.starts_with("e2e_") {
            _ if unit.slow && unit.test.is_some() => 600_000,
            true => 10_000,
            false => 1_000,
        };
        Duration::from_millis(self.known.get(&unit.name()).copied().unwrap_or(guess))
    }

    pub(super) fn learn(&mut self, unit: &Unit<'_>, took: Duration) {
        self.known.insert(unit.name(), u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
    }

    pub(super) fn save(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.known)?;
        fs::write(&self.file, text).with_context(|| self.file.display().to_string())
    }
}
