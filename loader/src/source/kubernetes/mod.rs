//! The Kubernetes API as a source: four watches that outlive every trouble of the server.
//!
//! [`server`] reaches one API server, [`servers`] knows them all and turns to the next one when one fails; [`endpoints`] hears from the cluster which
//! there are; [`answer`] bounds what they say; [`follow`] lists and watches one kind of object; [`trouble`] says what is
//! wrong, and [`backoff`] how long to wait. Objects are trimmed as they arrive; the selectors keep headless and
//! foreign ones from arriving at all.

mod answer;
mod backoff;
mod endpoints;
mod follow;
mod server;
mod servers;
mod trouble;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::Client;
use kube::runtime::watcher;
use tokio::sync::mpsc::Sender;

use super::{SourceError, SourceEvent};
pub use endpoints::SERVICE_PORT;
use follow::Follower;
use servers::Servers;

/// Services that this proxy serves.
const SERVICES: &str = "!service.kubernetes.io/service-proxy-name";
/// EndpointSlices of Services that this proxy serves.
const ENDPOINT_SLICES: &str = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";
/// Objects in one page of a list.
const PAGE: u32 = 500;

/// A client of the same API servers as [`run`], for what is told to them. It has connections of its own.
///
/// # Errors
///
/// A configuration that can't be used.
pub async fn client(
    kubeconfig: Option<PathBuf>,
    api_servers: &[String],
    known: &BTreeSet<SocketAddr>,
) -> Result<Client, SourceError> {
    Ok(Arc::new(Servers::find(kubeconfig, api_servers, known).await?).client())
}

/// Follows an API server until the receiver is gone. `kubeconfig` and `api_servers` as in
/// [`SourceConfig::Kubernetes`](crate::config::SourceConfig::Kubernetes); `known` are the addresses of API servers that the
/// cluster has named earlier, the endpoints of [`SERVICE_PORT`].
///
/// # Errors
///
/// A configuration that can't be used. A server that can't be reached is no error: it is tried again.
pub async fn run(
    kubeconfig: Option<PathBuf>,
    api_servers: Vec<String>,
    known: BTreeSet<SocketAddr>,
    node_name: String,
    sender: Sender<SourceEvent>,
) -> Result<(), SourceError> {
    let servers = Arc::new(Servers::find(kubeconfig, &api_servers, &known).await?);
    let follower = Follower::new(servers, sender.clone());
    let config = || watcher::Config::default().page_size(PAGE);
    tokio::select! {
        () = follower.follow::<Service>(config().labels(SERVICES)) => {}
        () = follower.follow::<EndpointSlice>(config().labels(ENDPOINT_SLICES)) => {}
        () = follower.follow::<Node>(config().fields(&format!("metadata.name={node_name}"))) => {}
        () = follower.follow::<ServiceCIDR>(config()) => {}
        () = sender.closed() => {}
    }
    Ok(())
}
