//! Unique names for what a run makes outside its own process, and the removal of what killed runs left behind.

use std::fs;
use std::path::Path;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// Start of every name.
const PREFIX: &str = "sheave-test-";

/// A name that no other run and no other caller uses, and which says who made it: `sheave-test-<pid>-<number>`.
///
/// The first call removes what dead runs left behind.
#[must_use]
pub fn unique_name() -> String {
    static SWEPT: Once = Once::new();
    static NEXT: AtomicU32 = AtomicU32::new(1);
    SWEPT.call_once(sweep);
    format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Removes pins, cgroups and folders whose maker is dead. Best effort: a failure here is no test's business.
fn sweep() {
    for path in dead_entries(Path::new("/sys/fs/bpf")).into_iter().chain(dead_entries(&std::env::temp_dir())) {
        let _ = fs::remove_dir_all(path);
    }
    for root in crate::cgroup::roots() {
        for path in dead_entries(&root) {
            let _ = fs::remove_dir(path);
        }
    }
}

fn dead_entries(folder: &Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_str().is_some_and(is_of_the_dead))
        .map(|entry| entry.path())
        .collect()
}

/// Whether a name is one of [`unique_name`]'s (or begins with one), and its maker has ended.
pub(crate) fn is_of_the_dead(name: &str) -> bool {
    let maker = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
    maker.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
}
