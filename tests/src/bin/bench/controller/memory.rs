//! Memory: of a running agent, and of the maps that hold services.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapData;
use sheave::dataplane::PinnedMaps;
use sheave_common::names;
use sheave_tests::agent::Agent;
use sheave_tests::manifests::Manifests;
use sheave_tests::topology::{Cluster, Shape};

use super::count;
use super::load::{LOAD, Load};
use crate::effort::Effort;
use crate::findings::{Better, Findings};
use crate::goal::{Goal, Reach};
use crate::progress::Progress;

/// Maps whose size follows from services, names and counters included.
const SERVICE_MAPS: [&str; 7] = [
    names::FRONTENDS4,
    names::FRONTENDS6,
    names::BACKENDS4,
    names::BACKENDS6,
    names::BACKEND_TABLE,
    names::SERVICE_NAMES,
    names::SERVICE_COUNTERS,
];

/// Starts agents with no load and with much, and looks.
pub(crate) fn measure(_effort: &Effort, findings: &mut Findings, progress: &Progress) -> Result<()> {
    let cluster = Cluster::build(Shape { pod_counts: [0, 0], ..Shape::default() })?;
    let node = &cluster.nodes[0];
    let mut idle = 0.0;
    for load in [Load { services: 1, endpoints: 1 }, LOAD] {
        progress.step(&load.to_string());
        let folder = Manifests::for_node(node)?;
        folder.objects("load", &load.objects())?;
        let started = Instant::now();
        let arguments = ["--connect", "off", "--healthz-bind-address", "", "--metrics-bind-address", ""];
        let mut agent = Agent::start(node, &folder, &arguments)?;
        let start = started.elapsed().as_secs_f64();
        load.check(&PinnedMaps::open(agent.pins())?)?;
        let process = agent.process().context("the agent runs")?.id();
        let resident = resident(process)?;
        if load.services == 1 {
            idle = resident;
        } else {
            let allowed = 1_000.0 * f64::from(load.services) + 150.0 * f64::from(load.services * load.endpoints);
            let share = (resident - idle) / allowed;
            let (case, sentence) =
                (format!("agent, {load}"), "≤ 1 kB per service + 150 B per endpoint (shown in parts)");
            findings.reach(Goal::counted("memory", &case, sentence, Reach::AtMost(1.0), share));
            let maps = SERVICE_MAPS.iter().map(|map| locked(&agent.pins().join(map))).sum::<Result<f64>>()?;
            let (case, megabytes) = (format!("service maps, {load}"), maps / 1e6);
            findings.reach(Goal::counted("memory", &case, "≤ 15 MB", Reach::AtMost(15.0), megabytes));
            findings.add(format!("memory/service maps/{load}"), "MB", Better::Lower, vec![megabytes]);
        }
        findings.add(format!("memory/agent/{load}"), "MB", Better::Lower, vec![resident / 1e6]);
        findings.add(format!("agent start until ready/{load}"), "s", Better::Lower, vec![start]);
    }
    Ok(())
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
