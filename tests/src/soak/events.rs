//! What happens to the cluster, in an order that a seed determines.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::figures::Daemon;
use super::flood::Flood;
use super::world::{CHANGING, STEADY, World, cluster_ip, cluster_ip6};
use crate::process::eventually;
use crate::topology::Pod;

/// Between two changes of Services.
const CHANGE: Duration = Duration::from_millis(400);
const RESTART: Duration = Duration::from_secs(40);
const FLOOD: Duration = Duration::from_secs(50);
const POD: Duration = Duration::from_secs(15);
/// How long a flood lasts.
const FLOODED: Duration = Duration::from_secs(3);
/// How long a pod lives on when no Service has it any more: packets on their way arrive, connections end.
const GRACE: Duration = Duration::from_secs(2);
/// Events that are kept to be shown.
const SHOWN: usize = 60;

/// The generator of events.
pub(super) struct Events {
    started: Instant,
    random: fastrand::Rng,
    /// When the next change, restart, flood, and coming or going of a pod is due.
    due: [Instant; 4],
    floods: Vec<Flood>,
    timeline: VecDeque<String>,
    changes: u32,
    restarts: u32,
    pods: u32,
    flooded: u64,
}

impl Events {
    pub(super) fn new(started: Instant, seed: u64) -> Self {
        let addresses =
            STEADY.into_iter().flat_map(|service| [cluster_ip(service).into(), cluster_ip6(service).into()]);
        let floods = addresses.flat_map(|to| [Flood::of_syns(to), Flood::of_datagrams(to)]);
        let (floods, now) = (floods.collect(), Instant::now());
        Self {
            started,
            random: fastrand::Rng::with_seed(seed),
            due: [CHANGE, RESTART, FLOOD, POD].map(|after| now + after),
            floods,
            timeline: VecDeque::new(),
            changes: 0,
            restarts: 0,
            pods: 0,
            flooded: 0,
        }
    }

    fn note(&mut self, what: String) {
        if self.timeline.len() == SHOWN {
            self.timeline.pop_front();
        }
        self.timeline.push_back(format!("{:>7.1} s  {what}", self.started.elapsed().as_secs_f64()));
    }

    /// Waits for the next event and brings it about. Before the daemon is restarted: its figures.
    pub(super) fn step(&mut self, world: &mut World) -> Result<Option<Daemon>> {
        let [change, restart, flood, pod] = self.due;
        let next = change.min(restart).min(flood).min(pod);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        if next == restart {
            self.due[1] = Instant::now() + RESTART;
            return self.restart(world).map(Some);
        }
        if next == flood {
            self.due[2] = Instant::now() + FLOOD;
            self.flood(world)?;
        } else if next == pod {
            self.due[3] = Instant::now() + POD;
            self.pod_comes_or_goes(world)?;
        } else {
            self.due[0] = Instant::now() + CHANGE;
            self.change(world)?;
        }
        Ok(None)
    }

    /// One Service is made, changed or removed.
    fn change(&mut self, world: &World) -> Result<()> {
        self.changes += 1;
        if self.random.u8(..4) == 0 {
            let service = STEADY[self.random.usize(..STEADY.len())];
            let mut pods = world.further();
            self.random.shuffle(&mut pods);
            pods.truncate(self.random.usize(..=pods.len()));
            return self.publish(world, service, &[world.staying(), pods].concat());
        }
        let service = self.random.u32(CHANGING);
        if self.random.u8(..4) == 0 {
            self.note(format!("service {service} is removed"));
            world.remove(service);
            return Ok(());
        }
        let mut pods = world.staying();
        self.random.shuffle(&mut pods);
        pods.truncate(self.random.usize(..=pods.len()));
        self.publish(world, service, &pods)
    }

    fn publish(&mut self, world: &World, service: u32, pods: &[&Pod]) -> Result<()> {
        let names: Vec<&str> = pods.iter().map(|pod| pod.name.as_str()).collect();
        self.note(format!("service {service} has {}", names.join(", ")));
        world.publish(service, pods)
    }

    /// The daemon of node 1 ends, by SIGTERM or `kill -9`; something changes; and it starts again.
    fn restart(&mut self, world: &mut World) -> Result<Daemon> {
        self.restarts += 1;
        let figures = Daemon::of(&mut world.agents[0])?;
        if self.restarts.is_multiple_of(2) {
            self.note("node-1: kill -9".to_owned());
            world.agents[0].kill();
        } else {
            self.note("node-1: SIGTERM".to_owned());
            world.agents[0].stop()?;
        }
        for _ in 0..self.random.u8(..4) {
            self.change(world)?;
        }
        world.agents[0].restart().context("after a restart")?;
        self.note("node-1: up".to_owned());
        Ok(figures)
    }

    fn flood(&mut self, world: &World) -> Result<()> {
        let number = self.random.usize(..self.floods.len());
        self.note(format!("a flood of {}", self.floods[number].what));
        let sent = self.floods[number].pour(&world.flooder().namespace, FLOODED)?;
        self.note(format!("the flood ends after {sent} packets"));
        self.flooded += u64::from(sent);
        Ok(())
    }

    fn pod_comes_or_goes(&mut self, world: &mut World) -> Result<()> {
        self.pods += 1;
        let Some(address) = world.passing().map(|pod| pod.address.to_string()) else {
            world.add_pod()?;
            self.note("a pod comes".to_owned());
            let pods = [world.staying(), world.further()].concat();
            return STEADY.into_iter().try_for_each(|service| self.publish(world, service, &pods));
        };
        for service in STEADY {
            self.publish(world, service, &world.staying())?;
        }
        for agent in &world.agents {
            let gone = eventually(Duration::from_secs(10), || {
                let shown = agent.services()?.to_string();
                ensure!(!shown.contains(&format!("{address}:")), "{address} is still a backend: {shown}");
                Ok(())
            });
            gone.context("an endpoint that has left")?;
        }
        std::thread::sleep(GRACE);
        self.note(format!("the pod {address} goes"));
        world.remove_pod()
    }

    /// How much has happened.
    pub(super) fn counts(&self) -> String {
        let Self { changes, restarts, pods, flooded, .. } = self;
        format!("{changes} changes, {restarts} restarts, {pods} pods came or went, {flooded} packets of floods")
    }

    /// The last events.
    pub(super) fn last(&self) -> String {
        self.timeline.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}
