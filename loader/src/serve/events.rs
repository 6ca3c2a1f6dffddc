//! Events about Services whose health checks can't be answered, where the API server is there to take them.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;
use tracing::{debug, warn};

use crate::config::{RunConfig, SourceConfig};
use crate::dataplane::PinnedMaps;
use crate::model::desired::ServiceKey;
use crate::source::kubernetes;

/// As kube-proxy reports it.
const REASON: &str = "FailedToStartServiceHealthcheck";
const ACTION: &str = "Listen";
/// Events that may wait for the API server; a node with more of them has said enough.
const QUEUE: usize = 64;
/// How often an Event is sent until the API server has taken it, and the first wait in between; each one is twice as long.
const ATTEMPTS: u32 = 6;
const FIRST_WAIT: Duration = Duration::from_secs(1);

/// A health check that can't be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) service: ServiceKey,
    pub(super) uid: Option<String>,
    pub(super) address: SocketAddr,
    /// What the kernel said.
    pub(super) error: String,
}

/// Where failures are reported. Never waits.
#[derive(Clone, Debug)]
pub(super) struct Events(Option<mpsc::Sender<Failure>>);

impl Events {
    pub(super) fn report(&self, failure: Failure) {
        // One that finds the queue full is in the log all the same.
        if let Some(sender) = &self.0
            && let Err(error) = sender.try_send(failure)
        {
            debug!(%error, "an Event is left out");
        }
    }
}

/// Turns failures into Events of the API server that is the source.
pub(super) struct Publisher {
    node_name: String,
    kubeconfig: Option<PathBuf>,
    api_servers: Vec<String>,
    pin_path: PathBuf,
    failures: mpsc::Receiver<Failure>,
}

/// The two ends; a folder of manifests has nobody who could take Events.
pub(super) fn channel(config: &RunConfig) -> (Events, Option<Publisher>) {
    let SourceConfig::Kubernetes { kubeconfig, api_servers } = &config.source else { return (Events(None), None) };
    let (sender, failures) = mpsc::channel(QUEUE);
    let publisher = Publisher {
        node_name: config.node_name.clone(),
        kubeconfig: kubeconfig.clone(),
        api_servers: api_servers.clone(),
        pin_path: config.pin_path.clone(),
        failures,
    };
    (Events(Some(sender)), Some(publisher))
}

/// The API servers that the cluster has named: the maps outlive this process, and so do the last ones that were good.
pub(crate) fn known_api_servers(pin_path: &Path) -> BTreeSet<SocketAddr> {
    PinnedMaps::open(pin_path).and_then(|maps| maps.endpoints(kubernetes::SERVICE_PORT)).unwrap_or_else(|error| {
        debug!(%error, "cannot read which API servers were known");
        BTreeSet::new()
    })
}

impl Publisher {
    /// Publishes until nobody can report any more.
    pub(super) async fn run(mut self) {
        let mut recorder = None;
        while let Some(failure) = self.failures.recv().await {
            if recorder.is_none() {
                recorder = self.recorder().await;
            }
            if let Some(recorder) = &recorder {
                self.publish(recorder, &failure).await;
            }
        }
    }

    /// Made when it is first needed: most nodes never report anything.
    async fn recorder(&self) -> Option<Recorder> {
        let known = known_api_servers(&self.pin_path);
        match kubernetes::client(self.kubeconfig.clone(), &self.api_servers, &known).await {
            Ok(client) => {
                let instance = Some(self.node_name.clone());
                Some(Recorder::new(client, Reporter { controller: "sheave".to_owned(), instance }))
            }
            Err(error) => {
                warn!(%error, "cannot publish Events");
                None
            }
        }
    }

    async fn publish(&self, recorder: &Recorder, failure: &Failure) {
        let (event, service) = (event(&self.node_name, failure), reference(failure));
        let mut wait = FIRST_WAIT;
        for attempt in 1..=ATTEMPTS {
            match recorder.publish(&event, &service).await {
                Ok(()) => return,
                Err(error) if attempt == ATTEMPTS || is_refusal(&error) => {
                    warn!(service = %failure.service, %error,
                        remedy = "give this account create and patch on events.events.k8s.io",
                        "an Event about a Service is not published");
                    return;
                }
                Err(error) => debug!(%error, "an Event is not published yet"),
            }
            tokio::time::sleep(wait).await;
            wait *= 2;
        }
    }
}

/// The server was reached and would say the same again.
fn is_refusal(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if (400..500).contains(&status.code) && status.code != 429)
}

fn event(node_name: &str, failure: &Failure) -> Event {
    let Failure { service, address, error, .. } = failure;
    Event {
        type_: EventType::Warning,
        reason: REASON.to_owned(),
        note: Some(format!("node {node_name} failed to start healthcheck \"{service}\" on {address}: {error}")),
        action: ACTION.to_owned(),
        secondary: None,
    }
}

fn reference(failure: &Failure) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Service".to_owned()),
        namespace: Some(failure.service.namespace.to_string()),
        name: Some(failure.service.name.to_string()),
        uid: failure.uid.clone(),
        ..ObjectReference::default()
    }
}
