//! What the controller tells the servers. Telling costs a few stores: nothing here waits for anybody.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use sheave_common::frontend::flags;
use tokio::sync::watch;

use super::health::Health;
use super::metrics::{Changes, Metrics, seconds};
use super::service_health::HealthChecks;
use crate::model::desired::{EndpointSets, ServiceKey, ServicePort, ServicePortName};
use crate::model::{Change, Model};

/// The controller's end.
pub struct Status {
    health: Arc<Health>,
    metrics: Arc<Metrics>,
    checks: watch::Sender<HealthChecks>,
    /// Changes before this were made for a predecessor.
    started: SystemTime,
    /// When that happened for which the changes were made that are not applied yet.
    triggers: Vec<SystemTime>,
    /// Service ports with endpoints, none of them here, by the policy that asks for one here.
    no_local: BTreeMap<&'static str, BTreeSet<ServicePortName>>,
    /// This Node was seen.
    node_known: bool,
}

/// What kind of change came in.
#[derive(Debug)]
pub struct Arrival {
    kind: Option<Kind>,
    triggered: Option<SystemTime>,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Endpoints,
    Services,
}

impl From<&Change> for Arrival {
    fn from(change: &Change) -> Self {
        let (kind, triggered) = match change {
            // A deletion carries the time of an earlier change; a list, those of changes that may be long known.
            Change::Slice(slice) => (Some(Kind::Endpoints), slice.triggered),
            Change::SliceGone(_) | Change::SlicesReplaced(_) => (Some(Kind::Endpoints), None),
            Change::Service(_) | Change::ServiceGone(_) | Change::ServicesReplaced(_) => (Some(Kind::Services), None),
            Change::Node(_) | Change::NodeGone => (None, None),
        };
        Self { kind, triggered }
    }
}

impl Status {
    pub(super) fn new(health: Arc<Health>, metrics: Arc<Metrics>, checks: watch::Sender<HealthChecks>) -> Self {
        let no_local = BTreeMap::from([("internal", BTreeSet::new()), ("external", BTreeSet::new())]);
        let (triggers, node_known) = (Vec::new(), false);
        Self { health, metrics, checks, started: SystemTime::now(), triggers, no_local, node_known }
    }

    /// The controller has something to do: from now on, it is late if it doesn't come to rest.
    pub fn wake(&self) {
        self.health.wait(Instant::now());
    }

    /// A change was taken in that concerns so many Services.
    pub fn changed(&mut self, arrival: &Arrival, services: usize) {
        if services == 0 {
            return;
        }
        self.metrics.last_queued.set(seconds(SystemTime::now()));
        let changes = match arrival.kind {
            Some(Kind::Endpoints) => &self.metrics.endpoint_changes,
            Some(Kind::Services) => &self.metrics.service_changes,
            None => return,
        };
        changes.total.inc_by(services as u64);
        changes.pending.add(i64::try_from(services).unwrap_or(i64::MAX));
        self.triggers.extend(arrival.triggered.filter(|triggered| *triggered > self.started));
    }

    /// What a service port will be after the next pass.
    pub fn port(&mut self, name: &ServicePortName, port: Option<&ServicePort>) {
        for (policy, ports) in &mut self.no_local {
            if port.is_some_and(|port| lacks_local(port, policy)) {
                ports.insert(name.clone());
            } else {
                ports.remove(name);
            }
        }
    }

    /// A pass over these Services was made, in so much time.
    pub fn passed<'a>(
        &mut self,
        model: &Model,
        services: impl Iterator<Item = &'a ServiceKey>,
        took: Duration,
        written: usize,
    ) {
        self.metrics.sync_duration.observe(took.as_secs_f64());
        self.metrics.map_writes.inc_by(written as u64);
        self.metrics.skipped_fields.set(i64::try_from(model.problems()).unwrap_or(i64::MAX));
        for (policy, ports) in &self.no_local {
            let ports = i64::try_from(ports.len()).unwrap_or(i64::MAX);
            self.metrics.no_local_endpoints.with_label_values(&[policy]).set(ports);
        }
        let checked: Vec<_> = services.map(|key| (key, model.health_check(key))).collect();
        self.checks.send_if_modified(|checks| {
            let mut differs = false;
            for (key, check) in checked {
                differs |= checks.services.get(key) != check.as_ref();
                match check {
                    Some(check) => drop(checks.services.insert(key.clone(), check)),
                    None => drop(checks.services.remove(key)),
                }
            }
            differs
        });
        self.health.synced();
    }

    /// Everything that is known has been applied.
    pub fn applied(&mut self) {
        let now = SystemTime::now();
        self.health.applied(now);
        self.metrics.last_sync.set(seconds(now));
        for Changes { pending, .. } in [&self.metrics.endpoint_changes, &self.metrics.service_changes] {
            pending.set(0);
        }
        for triggered in self.triggers.drain(..) {
            self.metrics.programmed(triggered, now);
        }
    }

    /// The controller will sleep until something happens, and has nothing left to do.
    pub fn rest(&self) {
        self.health.rest();
    }

    /// What this Node and the addresses that serve nodePorts are now.
    pub fn node(&mut self, model: &Model) {
        // A Node that is no longer there has left; one that never was may still come.
        self.health.set_node_leaving(model.node().map_or(self.node_known, |node| node.leaving));
        self.node_known |= model.node().is_some();
        let addresses = model.nodeport_addresses();
        self.checks.send_if_modified(|checks| replace(&mut checks.addresses, addresses));
    }
}

/// Whether that changed anything.
fn replace(known: &mut BTreeSet<IpAddr>, addresses: &BTreeSet<IpAddr>) -> bool {
    let differs = known != addresses;
    if differs {
        known.clone_from(addresses);
    }
    differs
}

/// Whether a frontend that wants an endpoint of this node finds only others.
fn lacks_local(port: &ServicePort, policy: &str) -> bool {
    let elsewhere = |sets: &EndpointSets| !sets.cluster.is_empty() && sets.local.is_empty();
    port.frontends.iter().any(|(frontend, bits)| {
        let is_internal = bits & flags::CLUSTER_IP != 0;
        let wants_local = match policy {
            "internal" => is_internal && bits & flags::INTERNAL_LOCAL != 0,
            _ => !is_internal && bits & flags::EXTERNAL_LOCAL != 0,
        };
        wants_local && elsewhere(if frontend.is_ipv4() { &port.endpoints4 } else { &port.endpoints6 })
    })
}
