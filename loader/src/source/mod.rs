//! Where Services, EndpointSlices, this Node and ServiceCIDRs come from: a Kubernetes API server, or a folder of manifests.
//!
//! A source reports changes; it never looks at what they mean. It serves until its receiver is gone, and takes every
//! trouble of the other side (an unreachable server, a broken file) as something that will pass.

pub mod convert;
pub mod kubernetes;
pub mod manifests;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::sync::mpsc::Sender;

use crate::config::SourceConfig;
use crate::model;

/// What a source reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// Objects changed, in this order.
    Changes(Vec<model::Change>),
    /// Whether a kind of object is followed: while it is not, what was reported of it stays, and may be out of date.
    Followed {
        /// Its name, for people.
        kind: &'static str,
        /// It is, or is not any more.
        followed: bool,
    },
    /// Reported once: every object that existed at the start has been reported, but perhaps for ServiceCIDRs, which not
    /// every account may read. Nothing may be pruned before.
    Synced,
}

/// What no amount of waiting will mend.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The kubeconfig that was asked for can't be used.
    #[error("kubeconfig {path}: {source}")]
    Kubeconfig {
        /// Its path, or where it was looked for.
        path: String,
        /// What is wrong with it.
        source: Box<kube::config::KubeconfigError>,
    },
    /// The service account of the pod that Sheave runs in can't be used.
    #[error("in-cluster service account: {0}")]
    InCluster(#[source] Box<kube::config::InClusterError>),
    /// Nothing says where the API server is.
    #[error(
        "no API server: give --kubeconfig or --api-server, set KUBECONFIG, or run as a pod with a service account \
         (--manifests takes a folder instead)"
    )]
    NoApiServer,
    /// An address of an API server isn't one.
    #[error("--api-server {address:?} is not an address like https://192.0.2.1:6443")]
    ApiServerAddress {
        /// The address as it was given.
        address: String,
    },
    /// The client for an API server can't be made, for its certificates or its credentials.
    #[error("client for {server}: {source}")]
    Client {
        /// The API server.
        server: String,
        /// What is wrong.
        source: Box<kube::Error>,
    },
    /// Changes of the folder can't be watched.
    #[error(
        "inotify_init for {directory:?}: {source}; raise fs.inotify.max_user_instances if it is \"too many open files\""
    )]
    Inotify {
        /// The folder.
        directory: PathBuf,
        /// What the kernel says.
        source: std::io::Error,
    },
}

/// Runs the source that was configured, until the receiver is gone. `known` as in [`kubernetes::run`].
///
/// # Errors
///
/// Only what waiting does not mend, see [`SourceError`].
pub async fn run(
    config: SourceConfig,
    known: BTreeSet<SocketAddr>,
    node_name: String,
    sender: Sender<SourceEvent>,
) -> Result<(), SourceError> {
    match config {
        SourceConfig::Manifests(directory) => manifests::run(directory, node_name, sender).await,
        SourceConfig::Kubernetes { kubeconfig, api_servers } => {
            kubernetes::run(kubeconfig, api_servers, known, node_name, sender).await
        }
    }
}
