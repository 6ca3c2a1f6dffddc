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
use crate::dataplane::{Audit, Usage};
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
            Change::Node(_)
            | Change::NodeGone
            | Change::ServiceCidr(_)
            | Change::ServiceCidrGone(_)
            | Change::ServiceCidrsReplaced(_) => (None, None),
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

    /// Whether the source follows a kind of object.
    pub fn followed(&self, kind: &str, followed: bool) {
        self.metrics.followed.with_label_values(&[kind]).set(followed.into());
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
        let skipped = &self.metrics.skipped_fields;
        skipped.inc_by(model.problems().saturating_sub(skipped.get()));
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

    /// How full the maps are.
    pub fn maps(&self, maps: &[Usage]) {
        for Usage { map, entries, capacity, refused } in maps {
            self.metrics.map_entries.with_label_values(&[map]).set(i64::try_from(*entries).unwrap_or(i64::MAX));
            self.metrics.map_capacity.with_label_values(&[map]).set((*capacity).into());
            let counter = self.metrics.map_refusals.with_label_values(&[map]);
            counter.inc_by(refused.saturating_sub(counter.get()));
        }
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

    /// An audit has ended.
    pub fn audited(&self, audit: &Audit) {
        self.metrics.audits.inc();
        for ((place, _), finding) in &audit.findings {
            self.metrics.audit_findings.with_label_values(&[place]).inc_by(finding.number);
        }
        self.metrics.audit_troubles.set(i64::try_from(audit.troubles.len()).unwrap_or(i64::MAX));
        self.metrics.audit_busy.set(audit.busy.as_secs_f64());
        self.metrics.last_audit.set(seconds(SystemTime::now()));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ExternalIps, NodePortAddresses};
    use crate::model::ModelOptions;
    use crate::model::desired::Algorithm;
    use crate::model::desired::{Endpoint, Protocol};
    use crate::model::objects::{EndpointSlice, Family, Node, SliceKey};

    fn status() -> (Status, watch::Receiver<HealthChecks>) {
        let (sender, receiver) = watch::channel(HealthChecks::default());
        let health = Arc::new(Health::new(Duration::from_secs(60)));
        (Status::new(health, Arc::new(Metrics::new()), sender), receiver)
    }

    fn slice(triggered: SystemTime) -> EndpointSlice {
        let key = SliceKey { namespace: "default".into(), name: "web-1".into() };
        let (ports, endpoints, problems) = ([].into(), [].into(), Vec::new());
        let (service, ignored, family, triggered) = (None, false, Some(Family::V4), Some(triggered));
        EndpointSlice { key, service, ignored, family, ports, endpoints, triggered, problems }
    }

    /// How many times from a cause to the kernel were measured.
    fn measured(status: &Status) -> u64 {
        status.metrics.network_programming.get_sample_count()
    }

    #[test]
    fn only_what_changed_for_a_new_cause_is_measured_and_only_once_it_is_applied() {
        let (mut status, _receiver) = status();
        let (before, after) = (status.started - Duration::from_secs(60), status.started + Duration::from_millis(1));
        let key = slice(after).key;
        for (change, services) in [
            (Change::Slice(slice(before)), 1),
            (Change::SlicesReplaced(vec![slice(after)]), 1),
            (Change::SliceGone(key), 1),
            (Change::Slice(slice(after)), 0),
        ] {
            status.changed(&Arrival::from(&change), services);
        }
        status.applied();
        assert_eq!(measured(&status), 0);
        status.changed(&Arrival::from(&Change::Slice(slice(after))), 1);
        assert_eq!(measured(&status), 0);
        status.applied();
        status.applied();
        assert_eq!(measured(&status), 1);
    }

    #[test]
    fn changes_are_pending_until_they_are_applied() {
        let (mut status, _receiver) = status();
        let counts = |status: &Status| {
            let of = |changes: &Changes| (changes.pending.get(), changes.total.get());
            (of(&status.metrics.endpoint_changes), of(&status.metrics.service_changes))
        };
        status.changed(&Arrival::from(&Change::SlicesReplaced(Vec::new())), 3);
        status.changed(&Arrival::from(&Change::ServicesReplaced(Vec::new())), 2);
        status.changed(&Arrival::from(&Change::NodeGone), 7);
        assert_eq!(counts(&status), ((3, 3), (2, 2)));
        status.applied();
        assert_eq!(counts(&status), ((0, 3), (0, 2)));
    }

    #[test]
    fn a_port_lacks_local_endpoints_if_a_policy_asks_for_them_and_they_are_elsewhere() {
        let endpoint = |local| {
            let address = "10.1.0.1".parse().unwrap();
            Endpoint { address, port: 80, local, terminating: false, weight: 1 }
        };
        let elsewhere = EndpointSets { cluster: [endpoint(false)].into(), ..EndpointSets::default() };
        let here = EndpointSets { cluster: [endpoint(true)].into(), local: [endpoint(true)].into(), kept: [].into() };
        let internal = flags::CLUSTER_IP | flags::INTERNAL_LOCAL | flags::EXTERNAL_LOCAL;
        let external = flags::NODE_PORT | flags::EXTERNAL_LOCAL;
        for (frontend, bits, sets, expected) in [
            ("10.96.0.1:80", internal, &elsewhere, (true, false)),
            ("10.96.0.1:80", flags::CLUSTER_IP, &elsewhere, (false, false)),
            ("192.0.2.1:80", external, &elsewhere, (false, true)),
            ("192.0.2.1:80", flags::NODE_PORT, &elsewhere, (false, false)),
            ("192.0.2.1:80", external, &here, (false, false)),
            // Nothing anywhere is another matter, and the other family's endpoints don't count.
            ("192.0.2.1:80", external, &EndpointSets::default(), (false, false)),
            ("[2001:db8::1]:80", external, &elsewhere, (false, false)),
        ] {
            let frontends = [(frontend.parse().unwrap(), bits)].into();
            let port = ServicePort { frontends, endpoints4: sets.clone(), ..ServicePort::default() };
            assert_eq!((lacks_local(&port, "internal"), lacks_local(&port, "external")), expected, "{frontend} {bits}");
        }
        let (mut status, _receiver) = status();
        let service = ServiceKey { namespace: "default".into(), name: "web".into() };
        let name = ServicePortName { service, port: "".into(), protocol: Protocol::Tcp };
        let frontends = [("192.0.2.1:80".parse().unwrap(), external)].into();
        let port = ServicePort { frontends, endpoints4: elsewhere, ..ServicePort::default() };
        status.port(&name, Some(&port));
        status.port(&name, Some(&port));
        assert_eq!(status.no_local["external"].len(), 1);
        status.port(&name, None);
        assert!(status.no_local["external"].is_empty());
    }

    #[test]
    fn a_node_that_was_there_and_went_has_left_and_one_that_never_came_has_not() {
        let node_name = "here".to_owned();
        let nodeport_addresses = NodePortAddresses::Primary;
        let mut model = Model::new(ModelOptions {
            node_name,
            external_ips: ExternalIps::All,
            nodeport_addresses,
            algorithm: Algorithm::Random,
        });
        let (mut status, receiver) = status();
        status.applied();
        let healthz = |status: &Status| status.health.answer(super::super::health::Question::Healthz).status().as_u16();
        status.node(&model);
        assert_eq!(healthz(&status), 200);
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        let (name, zone, problems) = ("here".to_owned(), None, Vec::new());
        model.apply(Change::Node(Node { name, zone, internal_ips: vec![address], leaving: false, problems }));
        status.node(&model);
        assert_eq!((healthz(&status), &receiver.borrow().addresses), (200, &BTreeSet::from([address])));
        model.apply(Change::NodeGone);
        status.node(&model);
        assert_eq!((healthz(&status), receiver.borrow().addresses.len()), (503, 0));
    }
}
