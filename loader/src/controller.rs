//! The one task that ties sources, model, dataplane and interfaces together, and the only one that writes.
//!
//! A change is applied at once; a burst becomes one pass. Nothing is applied before the source and the interfaces have
//! reported everything that existed at the start: a Service without its EndpointSlices, or nodePorts without addresses,
//! would undo what the kernel still holds from before. Programs are put on interfaces right away. Nothing is undone at
//! the end: the dataplane outlives this task. [`inputs`] is what it waits for.

mod audit;
mod inputs;
mod memory;
mod migration;
mod ports;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::IpAddr;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use crate::config::{Bypass, DrainForeign, RunConfig, SourceConfig};
use crate::dataplane::{self, Applied, Dataplane, DataplaneError};
use crate::interfaces::{self, Event, Interface, InterfaceError};
use crate::model::desired::{ServiceKey, ServicePort, ServicePortName};
use crate::model::network::Network;
use crate::model::{Change, Model, ModelOptions};
use crate::netfilter::{self, BypassError};
use crate::plan::Grace;
use crate::serve::{self, Arrival, Status};
use crate::source::{self, SourceError, SourceEvent};
use audit::Audits;
use inputs::{Input, Inputs, Passing, QUEUE};
use migration::Over;

/// The least time between two passes: what arrives meanwhile becomes one.
const PAUSE: Duration = Duration::from_millis(2);
/// The first wait before something that failed is tried again; each further one is twice as long.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// How many service ports that failed in one pass the log names.
const NAMED: usize = 20;
/// Services in one pass of which the garbage is worth giving back to the system.
const MANY: usize = 1_000;

/// Why the controller had to end.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// The dataplane can't be set up.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// Netfilter can't be bypassed.
    #[error(transparent)]
    Bypass(#[from] BypassError),
    /// The source can't work.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Interfaces can't be followed.
    #[error(transparent)]
    Interfaces(#[from] InterfaceError),
    /// A task broke down.
    #[error("a task of the controller broke down")]
    Task(#[from] JoinError),
    /// A task ended that should not.
    #[error("the source or the interface watch ended without an error")]
    Ended,
}

/// Runs until `shutdown` completes, and leaves the dataplane in place; or, with [`RunConfig::drain`], removes it when nothing
/// needs it any more, and waits for `shutdown` then: who supervises a daemon starts it again when it ends.
/// What others ask is answered by the runtime `servers`.
///
/// # Errors
///
/// Only what waiting does not mend; failures to apply a change are logged and retried.
pub async fn run(
    mut config: RunConfig,
    servers: &Handle,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ControllerError> {
    let mut shutdown = std::pin::pin!(shutdown);
    if config.drain.is_some() {
        // What belongs to no flow is another proxy's anyway.
        config.drain_foreign = DrainForeign::Off;
        if config.pin_path.exists() && !serve_until(&config, servers, shutdown.as_mut()).await? {
            return Ok(());
        }
        dataplane::cleanup(&config.pin_path)?;
        info!("drained: nothing of Sheave is left on this node; waiting to be stopped");
        shutdown.await;
        return Ok(());
    }
    migration::settle(&mut config);
    serve_until(&config, servers, shutdown).await.map(drop)
}

/// Runs until `shutdown` completes, or the last connection has drained, which it says.
async fn serve_until(
    config: &RunConfig,
    servers: &Handle,
    mut shutdown: std::pin::Pin<&mut impl Future<Output = ()>>,
) -> Result<bool, ControllerError> {
    let (status, answering) = serve::new(config);
    let mut tasks = JoinSet::new();
    // First of all: a starting proxy is live. Who leaves has nothing to say, and another proxy needs the ports.
    if config.drain.is_none() {
        let answering = async {
            answering.run().await;
            Ok(())
        };
        tasks.spawn_on(answering, servers);
    }
    if config.bypass_netfilter == Bypass::Safe && config.drain.is_none() {
        netfilter::may_be_bypassed()?;
    }
    let dataplane = Dataplane::open(config)?;
    let (source_sender, source_events) = mpsc::channel(QUEUE);
    let (interface_sender, interface_events) = mpsc::channel(QUEUE);
    let (over, overs) = mpsc::channel(1);
    let (node_addresses, watched_addresses) = watch::channel(Vec::new());
    let (rules, source, node) = (config.interfaces.clone(), config.source.clone(), config.node_name.clone());
    let known = match &source {
        SourceConfig::Kubernetes { .. } => serve::known_api_servers(&config.pin_path),
        SourceConfig::Manifests(_) => BTreeSet::new(),
    };
    tasks.spawn(async { source::run(source, known, node, source_sender).await.map_err(ControllerError::from) });
    tasks.spawn(async { interfaces::run(rules, watched_addresses, interface_sender).await.map_err(From::from) });
    tasks.spawn(ports::watch(config.pin_path.clone(), config.snat_ports));
    if let Some(time) = config.drain {
        tasks.spawn(migration::own(time, config.pin_path.clone(), over.clone()));
    }
    // What is a frontend has to be known first.
    let mut foreign = Some(migration::foreign(config.drain_foreign, config.pin_path.clone(), over));
    let mut inputs = Inputs { source: source_events, interfaces: interface_events, overs, tasks };
    let mut controller = Controller::new(config, dataplane, node_addresses, status);
    loop {
        let due = controller.due();
        let input = tokio::select! {
            () = &mut shutdown => return Ok(false),
            input = inputs.next(due, &mut controller.grace) => input?,
        };
        if matches!(input, Input::Over(Over::Own)) {
            return Ok(true);
        }
        controller.status.wake();
        controller.take(input);
        // What waits already becomes one pass with it.
        for _ in 0..QUEUE {
            let Some(input) = inputs.ready() else { break };
            controller.take(input);
        }
        controller.pass();
        if controller.settled
            && let Some(foreign) = foreign.take()
        {
            inputs.tasks.spawn(foreign);
        }
    }
}

struct Controller {
    dataplane: Dataplane,
    model: Model,
    status: Status,
    node_name: String,
    node_addresses: watch::Sender<Vec<IpAddr>>,
    source_synced: bool,
    interfaces_synced: bool,
    /// Everything was made as desired once; from then on only what changes is.
    settled: bool,
    dirty: BTreeSet<ServiceKey>,
    /// Service ports of each Service that the dataplane was told of.
    ports: BTreeMap<ServiceKey, Box<[ServicePortName]>>,
    /// The ServiceCIDRs that the dataplane was told of.
    service_cidrs: Option<BTreeSet<Network>>,
    /// Why it could not make them so, as it was logged.
    service_cidrs_failure: Option<String>,
    interfaces: BTreeMap<u32, Interface>,
    /// Interfaces that programs could not be put on.
    unattached: BTreeSet<u32>,
    /// Service ports that failed, with what was logged.
    failures: BTreeMap<ServicePortName, String>,
    grace: Option<Passing>,
    audits: Audits,
    next_pass: Instant,
    retry: Option<Instant>,
    retry_delay: Duration,
}

impl Controller {
    fn new(
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

    fn take(&mut self, input: Input) {
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
    fn due(&self) -> Option<Instant> {
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

    fn pass(&mut self) {
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

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
