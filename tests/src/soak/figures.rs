//! What must not grow: memory, descriptors, threads and pins of the daemons.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapData;

use crate::agent::Agent;

/// Of one daemon.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Daemon {
    /// Resident memory in kB, without pages of files: those of the program come and go as the machine has room for them.
    memory: u64,
    descriptors: u64,
    threads: u64,
    pins: u64,
    /// Memory of the pinned maps in kB, as the kernel counts it.
    maps: u64,
}

/// Of both: the one that is started again and again, and the one that runs from beginning to end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Figures {
    pub(super) restarted: Daemon,
    pub(super) lasting: Daemon,
}

/// How much more than in the first half is flat: a part, and kB or descriptors besides. An allocator's pages come in steps.
const MEMORY: (u64, u64) = (10, 2_048);
const COUNT: (u64, u64) = (10, 3);

impl Daemon {
    pub(super) fn of(agent: &mut Agent) -> Result<Self> {
        let pid = agent.process().context("the daemon does not run")?.id();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).context("the daemon has ended")?;
        let field = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
            Ok(line.split_whitespace().next().context("no number")?.parse()?)
        };
        let (mut pins, mut maps) = (0, 0);
        count(agent.pins(), &mut pins, &mut maps)?;
        Ok(Self {
            memory: field("RssAnon:")?,
            descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64,
            threads: field("Threads:")?,
            pins,
            maps: maps / 1_024,
        })
    }
}

/// Counts pins, and adds up what the maps directly in the folder take.
fn count(folder: &Path, pins: &mut u64, maps: &mut u64) -> Result<()> {
    use std::os::fd::{AsFd as _, AsRawFd as _};
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            count(&entry.path(), pins, &mut 0)?;
            continue;
        }
        *pins += 1;
        if let Ok(map) = MapData::from_pin(entry.path()) {
            let descriptor = map.fd().as_fd().as_raw_fd();
            let text = fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}"))?;
            let memory = text.lines().find_map(|line| line.strip_prefix("memlock:"));
            *maps += memory.and_then(|bytes| bytes.trim().parse::<u64>().ok()).unwrap_or(0);
        }
    }
    Ok(())
}

impl fmt::Display for Daemon {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { memory, descriptors, threads, pins, maps } = self;
        let tenths = memory * 10 / 1_024;
        write!(
            formatter,
            "{}.{} MB, {descriptors} fds, {threads} threads, {pins} pins, maps {maps} kB",
            tenths / 10,
            tenths % 10
        )
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "node-1: {}; node-2: {}", self.restarted, self.lasting)
    }
}

/// Figures of a whole run.
#[derive(Default)]
pub(super) struct Series {
    minutes: Vec<Daemon>,
    /// Always at the same age.
    restarts: Vec<Daemon>,
}

impl Series {
    pub(super) fn each_minute(&mut self, figures: Figures) {
        self.minutes.push(figures.lasting);
    }

    pub(super) fn before_restart(&mut self, restarted: Daemon) {
        self.restarts.push(restarted);
    }

    /// Fails if something has grown: the most of the last quarter is compared with the most of the first half.
    pub(super) fn flat(&self) -> Result<()> {
        for (daemon, figures) in
            [("node-2, which ran all the time", &self.minutes), ("node-1, before its restarts", &self.restarts)]
        {
            type Figure = (&'static str, fn(&Daemon) -> u64, (u64, u64));
            let kinds: [Figure; 5] = [
                ("kB of resident memory", |daemon| daemon.memory, MEMORY),
                ("descriptors", |daemon| daemon.descriptors, COUNT),
                ("threads", |daemon| daemon.threads, COUNT),
                ("pins", |daemon| daemon.pins, COUNT),
                ("kB of maps", |daemon| daemon.maps, MEMORY),
            ];
            for (what, figure, (part, more)) in kinds {
                let (first, last) = ends(figures, figure);
                ensure!(last <= first + first / part + more, "{what} of {daemon} grew from {first} to {last}");
            }
        }
        Ok(())
    }
}

/// The most of the first half, and of the last quarter.
fn ends(figures: &[Daemon], figure: fn(&Daemon) -> u64) -> (u64, u64) {
    let most = |part: &[Daemon]| part.iter().map(figure).max().unwrap_or(0);
    let count = figures.len();
    (most(&figures[..count.div_ceil(2)]), most(&figures[count - count.div_ceil(4)..]))
}

impl fmt::Display for Series {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (memory, restarted) =
            (ends(&self.minutes, |daemon| daemon.memory), ends(&self.restarts, |daemon| daemon.memory));
        let ((before, after), (first, last)) = (memory, restarted);
        write!(formatter, "memory {before} → {after} kB, before {} restarts {first} → {last} kB", self.restarts.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn growing(by: u64) -> Series {
        let each = |minute: u64| Daemon { memory: 30_000 + minute * by, ..Daemon::default() };
        Series { minutes: (0..60).map(each).collect(), restarts: Vec::new() }
    }

    /// A leak of 1 MB a minute would pass, or a run without one would not.
    #[test]
    fn a_leak_is_told_from_noise() {
        assert!(growing(10).flat().is_ok());
        assert!(growing(1_000).flat().is_err());
    }
}
