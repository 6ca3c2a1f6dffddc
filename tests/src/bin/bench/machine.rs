//! Where figures were taken: without that nobody could compare them.

use std::fs;
use std::io::Write as _;

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

/// Nice value of what is measured.
const NICE: i32 = -15;

/// A raised priority for this process and all that it starts: other people's work makes less noise. Without the right to it, there
/// is more of that.
#[derive(Debug)]
pub(crate) struct Precedence {
    /// Where the kernel keeps a session's share of the processors; absent without CONFIG_SCHED_AUTOGROUP.
    session: Option<fs::File>,
}

impl Precedence {
    /// Takes it until it is dropped.
    pub(crate) fn take() -> Self {
        // SAFETY: setpriority takes no pointers.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
        let session = fs::OpenOptions::new().write(true).open("/proc/self/autogroup").ok();
        let precedence = Self { session };
        precedence.share(NICE);
        precedence
    }

    fn share(&self, nice: i32) {
        if let Some(mut session) = self.session.as_ref() {
            // One that may not be set stays as it is.
            let _ = write!(session, "{nice}");
        }
    }
}

impl Drop for Precedence {
    fn drop(&mut self) {
        self.share(0);
    }
}
