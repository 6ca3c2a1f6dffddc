//! The one task that ties sources, model, dataplane and interfaces together, and the only one that writes.
//!
//! A change is applied at once; a burst becomes one pass. Nothing is applied before the source and the interfaces have
//! reported everything that existed at the start: a Service without its EndpointSlices, or nodePorts without addresses,
//! would undo what the kernel still holds from before. Programs are put on interfaces right away. Nothing is undone at
//! the end: the dataplane outlives this task. [`inputs`] is what it waits for, [`passes`] what it does.

mod audit;
mod inputs;
mod memory;
mod migration;
mod passes;
mod ports;

use std::collections::BTreeSet;
use std::future::Future;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tracing::info;

use crate::config::{Bypass, DrainForeign, RunConfig, SourceConfig};
use crate::dataplane::{self, Dataplane, DataplaneError};
use crate::interfaces::{self, InterfaceError};
use crate::netfilter::{self, BypassError};
use crate::serve;
use crate::source::{self, SourceError};
use inputs::{Input, Inputs, QUEUE};
use migration::Over;
use passes::Controller;

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
