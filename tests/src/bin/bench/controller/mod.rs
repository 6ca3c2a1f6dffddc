//! What the controller takes: for everything at once, for a restart, and for one change after another.

mod load;
mod rig;

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use sheave::model::Change;
use sheave_common::frontend::{Frontend, FrontendKey};
use sheave_common::{Ipv4Address, PROTOCOL_TCP, names};
use sheave_tests::netns::Namespace;

use crate::effort::Effort;
use crate::findings::{Better, Findings};
use crate::goal::{Goal, Reach};
use crate::path::address;
use crate::progress::Progress;
use load::PORT;
use rig::Rig;

pub(crate) use load::{LOAD, Load};

/// Changes per second of the churn.
pub(crate) const CHURN: u32 = 1_000;

/// Full sync into empty maps, and restarts that find everything there.
pub(crate) fn sync(effort: &Effort, findings: &mut Findings, progress: &Progress) -> Result<()> {
    let wide = Load { services: 50_000, endpoints: 1 };
    for load in if effort.quick { vec![LOAD] } else { vec![LOAD, wide] } {
        let (services, slices) = load.typed()?;
        let (mut cold, mut warm, mut opening) = (Vec::new(), Vec::new(), Vec::new());
        let (mut audits, mut audit_slices) = (Vec::new(), Vec::new());
        let mut most_writes = 0;
        for round in 0..effort.syncs {
            progress.step(&format!("{load}, round {} of {}", round + 1, effort.syncs));
            Namespace::new("node")?.run(|| -> Result<()> {
                let mut rig = Rig::new()?;
                cold.push(rig.sync(&services, &slices)?.elapsed.as_secs_f64());
                load.check(&rig.maps()?)?;
                let before = processor_time();
                let audited: Vec<f64> = rig.audit()?.into_iter().map(milliseconds).collect();
                audits.push(milliseconds(processor_time() - before));
                audit_slices.extend(slowest(&audited));
                let (step, opened) = rig.restart(&services, &slices)?;
                warm.push(step.elapsed.as_secs_f64());
                opening.push(opened.as_secs_f64());
                most_writes = most_writes.max(step.writes);
                load.check(&rig.maps()?)
            })?;
        }
        let case = load.to_string();
        findings.reach(Goal::new("full sync", &case, "≤ 0.5 s", Reach::AtMost(0.5), &cold));
        let row = "restart with nothing changed";
        findings.reach(Goal::new(row, &case, "≤ 0.3 s", Reach::AtMost(0.3), &warm));
        findings.reach(Goal::counted(row, &case, "0 writes", Reach::AtMost(0.0), count(most_writes)));
        findings.add(format!("sync/audit, processor time/{load}"), "ms", Better::Lower, audits);
        findings.add(format!("sync/audit, p99 of its slices/{load}"), "ms", Better::Lower, audit_slices);
        findings.add(format!("sync/full/{load}"), "s", Better::Lower, cold);
        findings.add(format!("sync/restart/{load}"), "s", Better::Lower, warm);
        findings.add(format!("sync/restart, of which opening maps and programs/{load}"), "s", Better::Lower, opening);
    }
    Ok(())
}

/// One endpoint added, removed and moved: time and writes; then a thousand changes a second.
pub(crate) fn changes(effort: &Effort, findings: &mut Findings, progress: &Progress) -> Result<()> {
    // With few services first: what a change costs must not depend on how many others there are.
    let small = Namespace::new("node")?.run(|| one_by_one(Load { services: 10, ..LOAD }, effort))?;
    progress.step(&format!("{LOAD}"));
    let (large, churn) = Namespace::new("node")?.run(|| -> Result<_> {
        let mut rig = loaded(LOAD)?;
        Ok((one_by_one_in(&mut rig, LOAD, effort)?, churn(&mut rig, LOAD, effort, progress)?))
    })?;
    for ((kind, few), (_, many)) in small.iter().zip(&large) {
        let row = "writes per change";
        let own = f64::from(LOAD.endpoints) + 1.0;
        let sentence = "≤ 2 × the service's own endpoints and frontends";
        findings.reach(Goal::counted(row, kind, sentence, Reach::AtMost(2.0 * own), many.most_writes));
        let more = many.most_writes - few.most_writes;
        findings.reach(Goal::counted(row, kind, "no more than among 10 services", Reach::AtMost(0.0), more));
        findings.add(format!("changes/{kind}/{LOAD}"), "ms", Better::Lower, many.milliseconds.clone());
        findings.add(format!("change writes/{kind}/{LOAD}"), "writes", Better::Lower, many.writes.clone());
    }
    let all: Vec<f64> = large.iter().flat_map(|(_, changes)| &changes.milliseconds).copied().collect();
    findings.reach(Goal::new(
        "change latency",
        "event in the agent to maps, p99",
        "≤ 1 ms",
        Reach::AtMost(1.0),
        &slowest(&all),
    ));
    findings.add("churn/share of a core, model and dataplane alone", "cores", Better::Lower, churn.share);
    findings.add("churn/latency, model and dataplane alone", "ms", Better::Lower, churn.milliseconds);
    Ok(())
}

/// The p99 of each tenth of the samples: ten estimates of it.
pub(crate) fn slowest(samples: &[f64]) -> Vec<f64> {
    let tenth = samples.len().div_ceil(10).max(1);
    let worst = |part: &[f64]| {
        let mut part = part.to_vec();
        part.sort_unstable_by(f64::total_cmp);
        part.get((part.len() * 99).div_ceil(100).saturating_sub(1)).copied()
    };
    samples.chunks(tenth).filter_map(worst).collect()
}

/// Samples of one kind of change.
#[derive(Default)]
struct Changes {
    milliseconds: Vec<f64>,
    writes: Vec<f64>,
    most_writes: f64,
}

fn loaded(load: Load) -> Result<Rig> {
    let (services, slices) = load.typed()?;
    let mut rig = Rig::new()?;
    rig.sync(&services, &slices)?;
    load.check(&rig.maps()?)?;
    Ok(rig)
}

fn one_by_one(load: Load, effort: &Effort) -> Result<[(&'static str, Changes); 3]> {
    one_by_one_in(&mut loaded(load)?, load, effort)
}

fn one_by_one_in(rig: &mut Rig, load: Load, effort: &Effort) -> Result<[(&'static str, Changes); 3]> {
    let mut kinds = [("added", Changes::default()), ("moved", Changes::default()), ("removed", Changes::default())];
    let frontends = MapData::from_pin(rig.pin(names::FRONTENDS4)).context("the pin of frontends4")?;
    let frontends: HashMap<_, FrontendKey<Ipv4Address>, Frontend> = HashMap::try_from(Map::HashMap(frontends))?;
    for round in 0..effort.changes {
        let service = fastrand::u32(..load.services);
        let before = load.endpoints_of(service);
        let [_, _, high, low] = round.to_be_bytes();
        let added = [before.clone(), vec![Ipv4Addr::new(10, 64, high, low)]].concat();
        let moved = [before.clone(), vec![Ipv4Addr::new(10, 65, high, low)]].concat();
        for ((kind, changes), endpoints) in kinds.iter_mut().zip([added, moved, before]) {
            let change = load.change(service, &endpoints)?;
            let step = rig.change(change)?;
            let key = FrontendKey::new(Ipv4Address::from(address(service)), PORT.to_be(), PROTOCOL_TCP);
            let length = frontends.get(&key, 0)?.cluster.length as usize;
            ensure!(length == endpoints.len(), "an endpoint was {kind}, and there are {length}");
            let writes = count(step.writes + rig.reclaim()?);
            changes.milliseconds.push(milliseconds(step.elapsed));
            changes.most_writes = changes.most_writes.max(writes);
            changes.writes.push(writes);
        }
    }
    load.check(&rig.maps()?)?;
    Ok(kinds)
}

/// What a thousand changes a second take.
struct Churned {
    share: Vec<f64>,
    milliseconds: Vec<f64>,
}

fn churn(rig: &mut Rig, load: Load, effort: &Effort, progress: &Progress) -> Result<Churned> {
    let mut churned = Churned { share: Vec::new(), milliseconds: Vec::new() };
    for second in 0..effort.churn {
        progress.step(&format!("churn, second {} of {}", second + 1, effort.churn));
        // Made beforehand: what a source takes to read objects is not the question.
        let changes = (0..CHURN).map(|number| {
            let service = fastrand::u32(..load.services);
            let mut endpoints = load.endpoints_of(service);
            endpoints.truncate(endpoints.len() - number as usize % 2);
            load.change(service, &endpoints)
        });
        let changes: Vec<Change> = changes.collect::<Result<_>>()?;
        let (began, used) = (Instant::now(), processor_time());
        for (number, change) in (0..).zip(changes) {
            let due = began + Duration::from_secs(1) / CHURN * number;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            // What the change waited for its turn counts, too.
            rig.change(change)?;
            churned.milliseconds.push(milliseconds(due.elapsed()));
            if number % 100 == 0 {
                rig.reclaim()?;
            }
        }
        churned.share.push((processor_time() - used).as_secs_f64() / began.elapsed().as_secs_f64().max(1.0));
    }
    for service in 0..load.services {
        rig.change(load.change(service, &load.endpoints_of(service))?)?;
    }
    load.check(&rig.maps()?)?;
    Ok(churned)
}

/// Processor time of the calling thread.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the time is written to a value that outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(u64::try_from(time.tv_sec).unwrap_or_default(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1_000.0
}

#[expect(clippy::cast_precision_loss, reason = "writes, entries or bytes of one node")]
pub(crate) fn count(number: usize) -> f64 {
    number as f64
}
