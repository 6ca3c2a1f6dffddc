//! Where figures were taken: without that nobody could compare them.

use std::fs;

use serde::{Deserialize, Serialize};

/// A machine at a moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// Seconds since 1970.
    pub(crate) time: u64,
    /// Kernel release.
    pub(crate) kernel: String,
    /// The processor's name.
    pub(crate) processor: String,
    /// How many there are.
    pub(crate) processors: usize,
    /// Load average of the last minute before the run: other people's work makes noise.
    pub(crate) load: f64,
}

impl Machine {
    /// This one, now.
    pub(crate) fn look() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let information = read("/proc/cpuinfo");
        let mut names = information.lines().filter_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let processor = names.next().map(|(_, name)| name.trim().to_owned()).unwrap_or_default();
        let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            time: time.map(|elapsed| elapsed.as_secs()).unwrap_or_default(),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            processor,
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            load: read("/proc/loadavg").split(' ').next().and_then(|load| load.parse().ok()).unwrap_or_default(),
        }
    }
}
