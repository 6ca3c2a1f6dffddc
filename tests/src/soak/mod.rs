//! The soak: for an hour or so, everything at once happens to a cluster of two nodes, while every byte that arrives anywhere
//! is compared with what must arrive there.
//!
//! Connections of both protocols and families go through ClusterIPs, nodePorts (to pods of the other node, too) and session
//! affinity, from pods, from outside and from the node's own processes. Meanwhile Services and endpoints change, pods come
//! and go, daemons are stopped and killed, and half-open connections and datagrams of spoofed senders pour in. No
//! byte may be misrouted, no established connection to a pod that stays may end, and memory must stay as it is.

mod events;
mod exchange;
mod figures;
mod flood;
mod serve;
mod talk;
mod totals;
mod world;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

pub use talk::{Job, talk};

use events::Events;
use figures::Series;
use totals::Totals;
use world::World;

/// New connections that may fail, of a thousand: a flood may lose a SYN more often than it is sent again.
const FAILED: u64 = 1;
/// Datagrams that may be lost, of a thousand.
const LOST: u64 = 10;

/// Runs for a time, with events in an order that the seed determines, and prints a line of figures each minute.
///
/// # Errors
/// If something could not be started, or with what went wrong and the events before it.
pub fn run(length: Duration, seed: u64) -> Result<()> {
    let started = Instant::now();
    println!("soak: {} minutes with --seed {seed}", length.as_secs() / 60);
    let mut world = World::build()?;
    let totals = Totals::new(started);
    let clients = world.clients(seed, &totals)?;
    let mut events = Events::new(started, seed);
    let mut series = Series::default();
    let outcome = (|| -> Result<()> {
        let mut next_line = started + Duration::from_secs(60);
        while started.elapsed() < length {
            if let Some(figures) = events.step(&mut world)? {
                series.before_restart(figures);
            }
            if Instant::now() >= next_line {
                next_line += Duration::from_secs(60);
                let figures = world.figures()?;
                println!(
                    "soak: {:>4.1} min: {totals}; {figures}; {}",
                    started.elapsed().as_secs_f64() / 60.0,
                    events.counts()
                );
                series.each_minute(figures);
            }
            let wrong = totals.wrong(&world.findings);
            ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        }
        Ok(())
    })();
    let outcome = outcome.and_then(|()| clients.finish()).and_then(|()| {
        let wrong = totals.wrong(&world.findings);
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        totals.within(FAILED, LOST)?;
        series.flat()
    });
    println!(
        "soak: {:.1} min in all: {totals}; {}; {}",
        started.elapsed().as_secs_f64() / 60.0,
        series,
        events.counts()
    );
    outcome.map_err(|error| {
        error.context(format!("--seed {seed}; what happened before:\n{}\n{}", events.last(), world.logs()))
    })
}
