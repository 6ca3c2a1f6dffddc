//! Memory: of a running agent, and of the maps that hold services.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapData;
use sheave_common::names;

use super::running::Running;
use crate::controller::{LOAD, Load, count};
use crate::effort::Effort;
use crate::findings::{Better, Findings};
use crate::goal::{Goal, Reach};
use crate::progress::Progress;

/// Maps whose size follows from services, names and counters included.
const SERVICE_MAPS: [&str; 8] = [
    names::FRONTENDS4,
    names::FRONTENDS6,
    names::BACKENDS4,
    names::BACKENDS6,
    names::BACKEND_TABLE,
    names::BACKEND_LOADS,
    names::SERVICE_NAMES,
    names::SERVICE_COUNTERS,
];

/// Room for a Maglev table of each service of the largest load, in elements.
const MAGLEV_TABLE: &str = "12600000";

/// What an agent takes.
struct Taken {
    /// Bytes of its own memory.
    heap: f64,
    /// Bytes of each service map.
    maps: Vec<(&'static str, f64)>,
    /// Seconds from its start until it serves.
    start: f64,
}

impl Taken {
    fn maps(&self) -> f64 {
        self.maps.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// Starts agents with no load, with services, and with services that have many endpoints.
pub(crate) fn measure(effort: &Effort, findings: &mut Findings, progress: &Progress) -> Result<()> {
    let look = |load: Load, more: &[&str]| {
        progress.step(&format!("{load} {}", more.join(" ")));
        look(load, more).with_context(|| load.to_string())
    };
    let one_each = Load { endpoints: 1, ..LOAD };
    let (idle, few, many) = (look(Load { services: 1, endpoints: 1 }, &[])?, look(one_each, &[])?, look(LOAD, &[])?);
    let (services, endpoints) = (f64::from(LOAD.services), f64::from(LOAD.endpoints));
    let each_endpoint = (many.heap - few.heap) / (services * (endpoints - 1.0));
    let each_service = (few.heap - idle.heap) / services - each_endpoint;
    let mut at_most = |case: &str, sentence: &str, bound: f64, found: f64| {
        findings.reach(Goal::counted("memory", case, sentence, Reach::AtMost(bound), found));
    };
    at_most(&format!("heap per service, {one_each} less no load"), "≤ 1 000 B", 1_000.0, each_service);
    at_most(&format!("heap per endpoint, {LOAD} less {one_each}"), "≤ 150 B", 150.0, each_endpoint);
    at_most(&format!("service maps, {LOAD}"), "≤ 15 MB", 15.0, many.maps() / 1e6);
    if !effort.quick {
        let maglev = look(LOAD, &["--algorithm", "maglev", "--max-table", MAGLEV_TABLE])?;
        at_most(&format!("Maglev tables, {LOAD}"), "≤ 50 MB more", 50.0, (maglev.maps() - many.maps()) / 1e6);
    }
    findings.add("memory/agent's heap for each service", "B", Better::Lower, vec![each_service]);
    findings.add("memory/agent's heap for each endpoint", "B", Better::Lower, vec![each_endpoint]);
    for (map, bytes) in &many.maps {
        findings.add(format!("memory/map {map}/{LOAD}"), "MB", Better::Lower, vec![bytes / 1e6]);
    }
    for (load, taken) in [("no load".to_owned(), idle), (one_each.to_string(), few), (LOAD.to_string(), many)] {
        findings.add(format!("memory/agent/{load}"), "MB", Better::Lower, vec![taken.heap / 1e6]);
        findings.add(format!("agent start until ready/{load}"), "s", Better::Lower, vec![taken.start]);
    }
    Ok(())
}

fn look(load: Load, more: &[&str]) -> Result<Taken> {
    let mut running = Running::start(load, more)?;
    if more.is_empty() {
        running.check()?;
    }
    let process = running.agent.process().context("the agent runs")?.id();
    let maps = SERVICE_MAPS.iter().map(|map| Ok((*map, locked(&running.agent.pins().join(map))?)));
    Ok(Taken { heap: resident(process)?, maps: maps.collect::<Result<_>>()?, start: running.start.as_secs_f64() })
}

/// Bytes of a process's own memory that are in use.
fn resident(process: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    Ok(count(line.trim().trim_end_matches(" kB").parse::<usize>()?) * 1024.0)
}

/// Bytes of kernel memory that a pinned map takes.
fn locked(pin: &Path) -> Result<f64> {
    let map = MapData::from_pin(pin).with_context(|| pin.display().to_string())?;
    let descriptor = map.fd().as_fd().as_raw_fd();
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("memlock:")).context("no memlock")?;
    let bytes = line.trim().parse::<usize>()?;
    ensure!(bytes > 0, "{} takes no memory", pin.display());
    Ok(count(bytes))
}
