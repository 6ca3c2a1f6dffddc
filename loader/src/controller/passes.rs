//! What the controller knows, and its passes over it: what comes in is noted at once, and one pass applies all of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::audit::Audits;
use super::inputs::{Input, Passing};
use super::{chain, memory};
use crate::config::RunConfig;
use crate::dataplane::{self, Applied, Dataplane};
use crate::interfaces::{Event, Interface};
use crate::model::desired::{ServiceKey, ServicePort, ServicePortName};
use crate::model::network::Network;
use crate::model::{Change, Model, ModelOptions};
use crate::plan::Grace;
use crate::serve::{Arrival, Status};
use crate::source::SourceEvent;

/// The least time between two passes: what arrives meanwhile becomes one.
const PAUSE: Duration = Duration::from_millis(2);
/// The first wait before something that failed is tried again; each further one is twice as long.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// How many service ports that failed in one pass the log names.
const NAMED: usize = 20;
/// Services in one pass of which the garbage is worth giving back to the system.
const MANY: usize = 1_000;

/// What is known, and what was done about it.
pub(super) struct Controller {
    pub(super) dataplane: Dataplane,
    model: Model,
    pub(super) status: Status,
    node_name: String,
    node_addresses: watch::Sender<Vec<IpAddr>>,
    source_synced: bool,
    interfaces_synced: bool,
    /// Everything was made as desired once; from then on only what changes is.
    pub(super) settled: bool,
    dirty: BTreeSet<ServiceKey>,
    /// Service ports of each Service that the dataplane was told of.
    ports: BTreeMap<ServiceKey, Box<[ServicePortName]>>,
    /// The ServiceCIDRs that the dataplane was told of.
    service_cidrs: Option<BTreeSet<Network>>,
    /// Why it could not make them so, as it was logged.
    service_cidrs_failure: Option<String>,
    pub(super) interfaces: BTreeMap<u32, Interface>,
    /// Interfaces that programs could not be put on.
    pub(super) unattached: BTreeSet<u32>,
    /// Service ports that failed, with what was logged.
    failures: BTreeMap<ServicePortName, String>,
    pub(super) grace: Option<Passing>,
    pub(super) audits: Audits,
    next_pass: Instant,
    retry: Option<Instant>,
    retry_delay: Duration,
}

impl Controller {
    pub(super) fn new(
        config: &RunConfig,
        dataplane: Dataplane,
        node_addresses: watch::Sender<Vec<IpAddr>>,
        status: Status,
    ) -> Self {
        let options = ModelOptions {
            node_name: config.node_name.clone(),
            external_ips: config.external_ips.clone(),
            nodeport_addresses: config.nodeport_addresses.clone(),
            algorithm: config.algorithm,
        };
        Self {
            dataplane,
            model: Model::new(options),
            status,
            node_name: config.node_name.clone(),
            node_addresses,
            source_synced: false,
            interfaces_synced: false,
            settled: false,
            dirty: BTreeSet::new(),
            ports: BTreeMap::new(),
            service_cidrs: None,
            service_cidrs_failure: None,
            interfaces: BTreeMap::new(),
            unattached: BTreeSet::new(),
            failures: BTreeMap::new(),
            grace: None,
            audits: Audits::new(config.audit_period),
            next_pass: Instant::now(),
            retry: None,
            retry_delay: FIRST_RETRY,
        }
    }

    pub(super) fn take(&mut self, input: Input) {
        match input {
            Input::Source(event) => self.source_event(event),
            Input::Interface(event) => self.interface_event(event),
            Input::GraceOver(grace) => self.reclaim(grace),
            Input::Over(_) => self.end_foreign(),
            // A pass follows in any case.
            Input::Due => {}
        }
    }

    fn end_foreign(&mut self) {
        match self.dataplane.end_foreign() {
            Ok(()) => info!("connections of another proxy have drained"),
            Err(error) => error!(error = chain(&error), "cannot tell the programs that the other proxy has drained"),
        }
    }

    fn source_event(&mut self, event: SourceEvent) {
        match event {
            SourceEvent::Changes(changes) => {
                for change in changes {
                    if let Change::Node(node) = &change
                        && node.name == self.node_name
                    {
                        self.node(node.internal_ips.clone());
                    }
                    let arrival = Arrival::from(&change);
                    let dirty = self.model.apply(change);
                    self.status.changed(&arrival, dirty.len());
                    self.dirty.extend(dirty);
                }
            }
            SourceEvent::Followed { kind, followed } => self.status.followed(kind, followed),
            SourceEvent::Synced => {
                info!(services = self.model.services().count(), "the source has reported everything");
                self.source_synced = true;
            }
        }
    }

    /// This node's addresses changed, or were told again.
    fn node(&mut self, addresses: Vec<IpAddr>) {
        let node4 = addresses.iter().find_map(|address| if let IpAddr::V4(v4) = address { Some(*v4) } else { None });
        let node6 = addresses.iter().find_map(|address| if let IpAddr::V6(v6) = address { Some(*v6) } else { None });
        if let Err(error) = self.dataplane.set_node_addresses(node4, node6) {
            error!(error = chain(&error), "cannot tell the programs this node's addresses");
        }
        self.node_addresses.send_if_modified(|known| {
            let differs = *known != addresses;
            *known = addresses;
            differs
        });
    }

    fn interface_event(&mut self, event: Event) {
        match event {
            Event::Present(interface) => {
                let index = interface.index;
                self.interfaces.insert(index, interface);
                self.attach(index);
            }
            Event::Gone { index } => {
                self.interfaces.remove(&index);
                self.unattached.remove(&index);
                if let Err(error) = self.dataplane.detach(index) {
                    warn!(index, error = chain(&error), "cannot clean up after an interface");
                }
            }
            Event::Addresses(addresses) => {
                self.dirty.extend(self.model.set_node_addresses(addresses.into_iter().collect()));
            }
            Event::Synced => {
                self.interfaces_synced = true;
                let existing = self.interfaces.keys().copied().collect();
                if let Err(error) = self.dataplane.prune_interfaces(&existing) {
                    warn!(error = chain(&error), "cannot clean up after interfaces that went away");
                }
            }
        }
    }

    fn attach(&mut self, index: u32) {
        let Some(interface) = self.interfaces.get(&index) else { return };
        match self.dataplane.attach(interface) {
            Ok(()) => {
                if self.unattached.remove(&index) {
                    info!(interface.name, index, "attached after all");
                }
            }
            Err(error) => {
                if self.unattached.insert(index) {
                    warn!(interface.name, index, error = chain(&error), "cannot attach; will try again");
                }
            }
        }
    }

    /// When a pass is due without a further event, if one is.
    pub(super) fn due(&self) -> Option<Instant> {
        let change = (self.may_apply() && self.has_changes()).then_some(self.next_pass);
        [change, self.retry, self.audits.due()].into_iter().flatten().min()
    }

    /// Something is not in the kernel as it should be because a write failed.
    fn is_unfinished(&self) -> bool {
        self.dataplane.is_unfinished() || self.service_cidrs_failure.is_some()
    }

    const fn may_apply(&self) -> bool {
        self.source_synced && self.interfaces_synced
    }

    fn has_changes(&self) -> bool {
        !self.settled || !self.dirty.is_empty() || self.has_new_service_cidrs()
    }

    /// A source may learn later than everything else which ServiceCIDRs there are: until then, what the kernel knows stays.
    fn has_new_service_cidrs(&self) -> bool {
        self.model.service_cidrs().is_some_and(|networks| self.service_cidrs.as_ref() != Some(&networks))
    }

    pub(super) fn pass(&mut self) {
        let now = Instant::now();
        let retry = self.retry.is_some_and(|retry| retry <= now);
        if retry {
            self.retry = None;
            for index in self.unattached.clone() {
                self.attach(index);
            }
        }
        if self.may_apply() && now >= self.next_pass && (self.has_changes() || retry) {
            self.apply(now);
            self.next_pass = Instant::now() + PAUSE;
        } else {
            self.audit(now);
        }
        if let Err(error) = self.dataplane.sweep() {
            warn!(error = chain(&error), "cannot sweep flows");
        }
        if self.grace.is_none()
            && let Some(grace) = self.dataplane.begin_grace()
        {
            self.grace = Some((tokio::task::spawn_blocking(dataplane::grace_period), grace));
        }
        self.schedule_retry(retry);
        self.status.node(&self.model);
        if !(self.may_apply() && self.has_changes() || self.is_unfinished()) {
            self.status.rest();
        }
    }

    fn apply(&mut self, started: Instant) {
        let mut dirty = std::mem::take(&mut self.dirty);
        let first = !self.settled;
        let mut changed = BTreeMap::new();
        if first {
            self.settled = true;
            dirty.extend(self.model.services().cloned());
        }
        for key in &dirty {
            self.changes_of(key, &mut changed);
        }
        for (name, port) in &changed {
            self.status.port(name, port.as_ref());
        }
        let applied = if first {
            let desired = changed.into_iter().filter_map(|(name, port)| Some((name, port?)));
            self.dataplane.apply_all(desired.collect())
        } else {
            self.dataplane.apply(changed)
        };
        debug!(services = dirty.len(), writes = applied.written, elapsed = ?started.elapsed(), "applied");
        if first || dirty.len() >= MANY {
            tokio::task::spawn_blocking(memory::give_back);
        }
        let written = applied.written;
        self.report(applied);
        self.tell_service_cidrs();
        self.status.maps(&self.dataplane.usage());
        self.status.passed(&self.model, dirty.iter(), started.elapsed(), written);
        if !self.is_unfinished() {
            self.status.applied();
        }
        if first {
            self.audits.begin();
            info!(services = self.ports.len(), interfaces = self.interfaces.len(), writes = written, "ready");
        }
    }

    fn tell_service_cidrs(&mut self) {
        if self.service_cidrs_failure.is_none() && !self.has_new_service_cidrs() {
            return;
        }
        let Some(networks) = self.model.service_cidrs() else { return };
        match self.dataplane.set_service_cidrs(&networks) {
            Ok(()) => {
                debug!(networks = networks.len(), "told the programs where ClusterIPs come from");
                self.service_cidrs_failure = None;
            }
            Err(error) => {
                let text = chain(&error);
                if self.service_cidrs_failure.as_ref() != Some(&text) {
                    error!(error = text, "cannot tell the programs the ServiceCIDRs; will try again");
                }
                self.service_cidrs_failure = Some(text);
            }
        }
        self.service_cidrs = Some(networks);
    }

    /// What the dataplane has to be told of a Service that may have changed.
    fn changes_of(&mut self, key: &ServiceKey, changed: &mut BTreeMap<ServicePortName, Option<ServicePort>>) {
        let desired = self.model.desired(key);
        let names: Box<[ServicePortName]> = desired.keys().cloned().collect();
        let known = if names.is_empty() {
            self.ports.remove(key).unwrap_or_default()
        } else {
            self.ports.insert(key.clone(), names).unwrap_or_default()
        };
        changed.extend(known.into_iter().map(|name| (name, None)));
        changed.extend(desired.into_iter().map(|(name, port)| (name, Some(port))));
    }

    fn reclaim(&mut self, grace: Grace) {
        match self.dataplane.reclaim(grace) {
            Ok(applied) => {
                debug!(writes = applied.written, "reclaimed");
                self.status.maps(&self.dataplane.usage());
                self.report(applied);
            }
            Err(error) => warn!(error = chain(&error), "cannot reclaim"),
        }
    }

    /// Logs a failure when it is new, and its end.
    fn report(&mut self, applied: Applied) {
        if let Some(error) = applied.other {
            error!(error = chain(&error), "cannot write to a map; will try again");
        }
        let mut new = 0;
        for (name, failure) in applied.failed {
            let text = chain(&failure);
            if self.failures.get(&name) != Some(&text) {
                new += 1;
                if new <= NAMED {
                    error!(service = %name, error = text, "not applied; will try again, other services are not affected");
                }
                self.failures.insert(name, text);
            }
        }
        if new > NAMED {
            error!(
                services = new - NAMED,
                "as many more are not applied, too; the metrics sheave_map_… say how full maps are"
            );
        }
        if !self.dataplane.is_unfinished() && !self.failures.is_empty() {
            info!(services = self.failures.len(), "what had failed is applied");
            self.failures.clear();
        }
    }

    fn schedule_retry(&mut self, retried: bool) {
        if !self.is_unfinished() && self.unattached.is_empty() {
            (self.retry, self.retry_delay) = (None, FIRST_RETRY);
        } else if self.retry.is_none() {
            if retried {
                self.retry_delay = (self.retry_delay * 2).min(LONGEST_RETRY);
            }
            self.retry = Some(Instant::now() + self.retry_delay);
        }
    }
}
