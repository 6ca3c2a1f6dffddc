//! The API servers: where their addresses and credentials come from, and which of them is asked.
//!
//! All watches share one current server. Whoever sees it fail turns to the next one, so a watch goes on where it was:
//! API servers of one cluster know the same resource versions. After those that are configured come those that the cluster
//! names itself ([`super::endpoints`]), the last ones that it has named if none is there to ask.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{Request, Response, StatusCode, Uri};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt as _};
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use tokio::time::Instant;
use tower::{BoxError, ServiceBuilder};
use tracing::{info, warn};

use super::super::SourceError;
use super::endpoints::Endpoints;
use crate::model::Change;

/// How long connecting to a server may take, before the next one is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a server may think about a request before it begins to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a server may be silent within an answer: more than a watch lasts (290 s).
const SILENCE_TIMEOUT: Duration = Duration::from_secs(330);

/// After how much silence a server's machine is asked whether it is still there, how often again, and how many times: one that
/// lost its power ends no connection, and a watch may be silent for long.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_PROBES: u32 = 3;

/// Least time between two starts of the same watch. A server, or something before it, that ends watches at once would
/// otherwise be asked as fast as it answers: the watcher goes on without a pause.
const WATCH_PAUSE: Duration = Duration::from_millis(500);

/// What the certificate of every API server names, whatever its address.
const EVERY_SERVER: &str = "kubernetes.default.svc";

/// One API server.
struct Server {
    /// Its address, for people.
    name: String,
    client: Client,
}

/// The API servers of the cluster, of which one is in use.
pub(super) struct Servers {
    /// What a client of a server that the cluster has named is made of, but for its address.
    config: Config,
    pool: Mutex<Pool>,
    /// When the last watch of a path started, or will.
    watches: Mutex<HashMap<String, Instant>>,
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
        let found = Self { config, pool, watches: Mutex::default() };
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

    async fn send(&self, request: Request<Body>) -> Result<Response<Body>, kube::Error> {
        if request.uri().query().is_some_and(|query| query.split('&').any(|pair| pair == "watch=true")) {
            tokio::time::sleep_until(self.next_start(request.uri().path())).await;
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
        answer
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

fn parse_address(address: &str) -> Result<Uri, SourceError> {
    let error = || SourceError::ApiServerAddress { address: address.to_owned() };
    let text = if address.contains("://") { address.to_owned() } else { format!("https://{address}") };
    let uri: Uri = text.parse().map_err(|_| error())?;
    // Names and passwords have no place in an address: they would be in every log.
    let is_plain = uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    if matches!(uri.scheme_str(), Some("http" | "https")) && is_plain { Ok(uri) } else { Err(error()) }
}

fn server(config: &Config, uri: Uri) -> Result<Server, SourceError> {
    let name = uri.to_string().trim_end_matches('/').to_owned();
    let mut config = config.clone();
    config.cluster_url = uri;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(SILENCE_TIMEOUT);
    // Failures are to be seen here, where the next server is known.
    config.default_retry = false;
    match client(config) {
        Ok(client) => Ok(Server { name, client }),
        Err(source) => Err(SourceError::Client { server: name, source: Box::new(source) }),
    }
}

/// As kube makes it, but for TCP's keep-alive.
fn client(config: Config) -> Result<Client, kube::Error> {
    if config.proxy_url.is_some() {
        return Client::try_from(config);
    }
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_keepalive(Some(KEEPALIVE));
    tcp.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    tcp.set_keepalive_retries(Some(KEEPALIVE_PROBES));
    let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(tcp)?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build(connector));
    Ok(Client::new(service, config.default_namespace))
}

/// What the certificates of API servers are checked against that the cluster names by address: the configured name, because
/// certificates of all of them carry that of a balancer before them. An address is one server's own.
fn common_name(config: &Config) -> Option<String> {
    if config.tls_server_name.is_some() {
        return config.tls_server_name.clone();
    }
    let host = config.cluster_url.host()?;
    let is_address = host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
    Some(if is_address { EVERY_SERVER } else { host }.to_owned())
}

/// The kubeconfig that was asked for, $KUBECONFIG, ~/.kube/config, or the in-cluster service account: the first that
/// is there, and it has to be sound.
async fn configuration(kubeconfig: Option<PathBuf>) -> Result<Config, SourceError> {
    let error =
        |path: String| move |source: KubeconfigError| SourceError::Kubeconfig { path, source: Box::new(source) };
    let options = KubeConfigOptions::default();
    if let Some(path) = kubeconfig {
        let path_text = path.display().to_string();
        let read = Kubeconfig::read_from(&path).map_err(error(path_text.clone()))?;
        return Config::from_custom_kubeconfig(read, &options).await.map_err(error(path_text));
    }
    let place = match std::env::var("KUBECONFIG") {
        Ok(path) if !path.is_empty() => Some(path),
        _ => std::env::home_dir()
            .map(|home| home.join(".kube/config"))
            .filter(|path| path.exists())
            .map(|path| path.display().to_string()),
    };
    if let Some(path) = place {
        return Config::from_kubeconfig(&options).await.map_err(error(path));
    }
    if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() {
        return Config::incluster().map_err(|error| SourceError::InCluster(Box::new(error)));
    }
    Err(SourceError::NoApiServer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_a_scheme_means_https() {
        let parsed = |address: &str| parse_address(address).map(|uri| uri.to_string()).ok();
        assert_eq!(parsed("192.0.2.1:6443").as_deref(), Some("https://192.0.2.1:6443/"));
        assert_eq!(parsed("http://127.0.0.1:8080").as_deref(), Some("http://127.0.0.1:8080/"));
        assert_eq!(parsed("https://[2001:db8::1]:6443").as_deref(), Some("https://[2001:db8::1]:6443/"));
        assert_eq!(parsed("ftp://192.0.2.1"), None);
        assert_eq!(parsed("no address"), None);
    }

    #[test]
    fn servers_that_the_cluster_names_show_a_certificate_with_the_configured_name_or_every_servers() {
        let name = |url: &str, given: Option<&str>| {
            let mut config = Config::new(url.parse().expect("a URI"));
            config.tls_server_name = given.map(str::to_owned);
            common_name(&config)
        };
        assert_eq!(name("https://api.example.org:6443", None).as_deref(), Some("api.example.org"));
        assert_eq!(name("https://192.0.2.1:6443", None).as_deref(), Some("kubernetes.default.svc"));
        assert_eq!(name("https://[2001:db8::1]:6443", None).as_deref(), Some("kubernetes.default.svc"));
        assert_eq!(name("https://192.0.2.1:6443", Some("api.example.org")).as_deref(), Some("api.example.org"));
    }
}
