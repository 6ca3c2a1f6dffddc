//! A configuration for tests that open the dataplane themselves, without a source.

use std::path::{Path, PathBuf};

use sheave::config::{MapSizes, RunConfig, SourceConfig};

use crate::leftovers::unique_name;

/// The defaults of `sheave run`, but for pins of a name of their own, this cgroup, and maps that are small enough to be
/// made and read in no time.
#[must_use]
pub fn small(cgroup: &Path) -> RunConfig {
    let mut config = RunConfig::new(SourceConfig::Manifests(PathBuf::from("/nonexistent")), "node".to_owned());
    config.pin_path = Path::new("/sys/fs/bpf").join(unique_name());
    config.cgroup = Some(cgroup.to_owned());
    config.sizes = MapSizes {
        services: 64,
        frontends: 64,
        backends: 64,
        table: 64,
        conntrack: 1024,
        half_open: 1024,
        affinity: 64,
        sockets: 64,
        source_ranges: 64,
    };
    config
}
