//! A configuration for tests that open the dataplane themselves, without a source.

use std::path::{Path, PathBuf};

use sheave::config::{DrainForeign, MapSizes, RunConfig, SourceConfig};

use crate::leftovers::unique_name;

/// The defaults of `sheave run`, but for pins of a name of their own, this cgroup, and maps that are small enough to be
/// made and read in no time.
#[must_use]
pub fn small(cgroup: &Path) -> RunConfig {
    let mut config = RunConfig::new(SourceConfig::Manifests(PathBuf::from("/nonexistent")), "node".to_owned());
    config.pin_path = Path::new("/sys/fs/bpf").join(unique_name());
    config.cgroup = Some(cgroup.to_owned());
    // As the controller would find out.
    config.drain_foreign = DrainForeign::Off;
    config.sizes = MapSizes {
        services: Some(64),
        frontends: Some(64),
        backends: Some(64),
        table: Some(64),
        conntrack: Some(1024),
        half_open: Some(1024),
        affinity: Some(64),
        sockets: Some(64),
        source_ranges: Some(64),
    };
    config
}
