//! The API servers: where their addresses and credentials come from, and which of them is asked.
//!
//! All watches share one current server. Whoever sees it fail turns to the next one, so a watch goes on where it was:
//! API servers of one cluster know the same resource versions. After those that are configured come those that the cluster
//! names itself ([`super::endpoints`]), the last ones that it has named if none is there to ask.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{Request, Response, StatusCode};
use kube::client::Body;
use kube::{Client, Config};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

use super::super::SourceError;
use super::answer::{self, LimitedBody};
use super::endpoints::Endpoints;
use super::server::{Server, common_name, configuration, parse_address, server};
use crate::model::Change;

/// How long a server may think about a request before it begins to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Least time between two starts of the same watch. A server, or something before it, that ends watches at once would
/// otherwise be asked as fast as it answers: the watcher goes on without a pause.
const WATCH_PAUSE: Duration = Duration::from_millis(500);

/// How long a watch must last without an error to count as one that works.
const STEADY: Duration = Duration::from_secs(5);

/// The API servers of the cluster, of which one is in use.
pub(super) struct Servers {
    /// What a client of a server that the cluster has named is made of, but for its address.
    config: Config,
    pool: Mutex<Pool>,
    /// When the last watch of a path started, or will.
    watches: Mutex<HashMap<String, Instant>>,
    /// When a server last began to answer a watch of a path.
    begun: watch::Sender<HashMap<String, Instant>>,
}

struct Pool {
    /// The configured ones, then those that the cluster has named.
    servers: Vec<Arc<Server>>,
    configured: usize,
    /// Which of them is in use.
    current: usize,
    endpoints: Endpoints,
}

impl Servers {
    /// Finds the configuration, and replaces its server by `addresses` if there are any. `known` are API servers that the
    /// cluster had named before.
    pub(super) async fn find(
        kubeconfig: Option<PathBuf>,
        addresses: &[String],
        known: &BTreeSet<SocketAddr>,
    ) -> Result<Self, SourceError> {
        let mut uris = Vec::with_capacity(addresses.len());
        for address in addresses {
            uris.push(parse_address(address)?);
        }
        let mut config = match configuration(kubeconfig).await {
            Err(SourceError::NoApiServer) if !uris.is_empty() => Config::new(uris[0].clone()),
            config => config?,
        };
        if uris.is_empty() {
            uris.push(config.cluster_url.clone());
        }
        config.cluster_url = uris[0].clone();
        let servers = uris.into_iter().map(|uri| server(&config, uri).map(Arc::new));
        let servers = servers.collect::<Result<Vec<_>, _>>()?;
        config.tls_server_name = common_name(&config);
        let configured = servers.len();
        let pool = Mutex::new(Pool { servers, configured, current: 0, endpoints: Endpoints::default() });
        let found = Self { config, pool, watches: Mutex::default(), begun: watch::Sender::default() };
        found.named(known);
        Ok(found)
    }

    /// Takes in what a change says about the API servers themselves.
    pub(super) fn learn(&self, change: &Change) {
        let named = self.pool().endpoints.take(change);
        if let Some(named) = named {
            self.named(&named);
        }
    }

    /// The cluster names these API servers, instead of those that it named before. They are of no use where the configured
    /// address has a path: there something stands before them that has credentials of its own. Where certificates are not
    /// checked, whoever may write that EndpointSlice would be given ours.
    fn named(&self, addresses: &BTreeSet<SocketAddr>) {
        if self.config.cluster_url.path() != "/" || self.config.accept_invalid_certs {
            return;
        }
        let mut pool = self.pool();
        let used = Arc::clone(&pool.servers[pool.current]);
        let scheme = self.config.cluster_url.scheme_str().unwrap_or("https");
        let mut servers = pool.servers[..pool.configured].to_vec();
        for address in addresses {
            let name = format!("{scheme}://{address}");
            if servers.iter().any(|server| server.name == name) {
                continue;
            }
            let known = pool.servers.iter().find(|server| server.name == name).cloned();
            let made = || parse_address(&name).and_then(|uri| server(&self.config, uri)).map(Arc::new);
            match known.map_or_else(made, Ok) {
                Ok(server) => servers.push(server),
                Err(error) => warn!(%error, "an API server that the cluster names can't be used"),
            }
        }
        let names = |servers: &[Arc<Server>]| servers.iter().map(|server| server.name.clone()).collect::<Vec<_>>();
        if names(&servers) != names(&pool.servers) {
            info!(servers = names(&servers).join(" "), "API servers to turn to when the one in use fails");
        }
        pool.current = servers.iter().position(|server| Arc::ptr_eq(server, &used)).unwrap_or(0);
        pool.servers = servers;
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn in_use(&self) -> Arc<Server> {
        let pool = self.pool();
        Arc::clone(&pool.servers[pool.current])
    }

    /// Turns to the next server, unless somebody else has: only who sees the server in use fail may.
    fn turn_from(&self, used: &Arc<Server>) {
        let mut pool = self.pool();
        if Arc::ptr_eq(&pool.servers[pool.current], used) {
            pool.current = (pool.current + 1) % pool.servers.len();
        }
    }

    /// Reads the credentials again. kube does that by the wall clock: after that was set back, only when it has caught up.
    fn renew(&self, refused: &Arc<Server>) {
        match server(&self.config, refused.uri.clone()) {
            Ok(renewed) => {
                let renewed = Arc::new(renewed);
                let mut pool = self.pool();
                for known in pool.servers.iter_mut().filter(|known| Arc::ptr_eq(known, refused)) {
                    *known = Arc::clone(&renewed);
                }
            }
            Err(error) => warn!(%error, "cannot read the credentials again"),
        }
    }

    /// A client that asks the server in use.
    pub(super) fn client(self: &Arc<Self>) -> Client {
        let servers = Arc::clone(self);
        let service = tower::service_fn(move |request| {
            let servers = Arc::clone(&servers);
            async move { servers.send(request).await }
        });
        Client::new(service, "default")
    }

    /// Address of the server in use.
    pub(super) fn current(&self) -> String {
        self.in_use().name.clone()
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<LimitedBody>, kube::Error> {
        let watch = request.uri().query().is_some_and(|query| query.split('&').any(|pair| pair == "watch=true"));
        let path = request.uri().path().to_owned();
        if watch {
            tokio::time::sleep_until(self.next_start(&path)).await;
        }
        let server = self.in_use();
        let answer = match tokio::time::timeout(ANSWER_TIMEOUT, server.client.send(request)).await {
            Ok(answer) => answer.map_err(|error| named(&server.name, error)),
            Err(_) => Err(unreachable(&server.name, format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))),
        };
        // Credentials that one server takes need not be good for another, which may not even speak plain HTTP.
        let refused = |status: StatusCode| {
            status.is_server_error() || matches!(status, StatusCode::UNAUTHORIZED | StatusCode::BAD_REQUEST)
        };
        if answer.as_ref().map_or(true, |response| refused(response.status())) {
            self.turn_from(&server);
        }
        let answer = answer?;
        if answer.status() == StatusCode::UNAUTHORIZED {
            self.renew(&server);
        }
        // Another server has not asked for it.
        if let Some(rest) = answer::rest(&answer).filter(|_| Arc::ptr_eq(&self.in_use(), &server)) {
            tokio::time::sleep(rest).await;
        }
        if watch && answer.status().is_success() {
            self.begun.send_modify(|begun| {
                begun.insert(path, Instant::now());
            });
        }
        Ok(answer::limited(answer, watch))
    }

    /// Waits until a watch of a path that has begun after `since` works.
    pub(super) async fn steady(&self, path: &str, since: Instant) {
        let mut begun = self.begun.subscribe();
        loop {
            let at = begun.borrow_and_update().get(path).filter(|at| **at > since).copied();
            let over = async {
                match at {
                    Some(at) => tokio::time::sleep_until(at + STEADY).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = over => return,
                changed = begun.changed() => if changed.is_err() { return },
            }
        }
    }

    /// When a watch of a path may start.
    fn next_start(&self, path: &str) -> Instant {
        let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let start = watches.get(path).map_or(now, |last| now.max(*last + WATCH_PAUSE));
        watches.insert(path.to_owned(), start);
        start
    }
}

/// The error of a request that got no answer, with the server's name in it.
fn named(server: &str, error: kube::Error) -> kube::Error {
    match error {
        kube::Error::Service(source) => unreachable(server, chain(source.as_ref())),
        kube::Error::HyperError(source) => unreachable(server, chain(&source)),
        other => other,
    }
}

fn unreachable(server: &str, reason: String) -> kube::Error {
    kube::Error::Service(format!("{server}: {reason}").into())
}

/// An error with all its causes: the last one is what helps.
pub(super) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}
