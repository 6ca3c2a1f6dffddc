//! The API servers: where their addresses and credentials come from, and which of them is asked.
//!
//! All watches share one current server. Whoever sees it fail turns to the next one, so a watch goes on where it was:
//! API servers of one cluster know the same resource versions.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::{Request, Response, Uri};
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use tokio::time::Instant;

use super::super::SourceError;

/// How long connecting to a server may take, before the next one is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a server may think about a request before it begins to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a server may be silent within an answer: more than a watch lasts (290 s).
const SILENCE_TIMEOUT: Duration = Duration::from_secs(330);

/// Least time between two starts of the same watch. A server, or something before it, that ends watches at once would
/// otherwise be asked as fast as it answers: the watcher goes on without a pause.
const WATCH_PAUSE: Duration = Duration::from_millis(500);

/// One API server.
struct Server {
    /// Its address, for people.
    name: String,
    client: Client,
}

/// The API servers of the cluster, of which one is in use.
pub(super) struct Servers {
    servers: Vec<Server>,
    current: AtomicUsize,
    /// When the last watch of a path started, or will.
    watches: Mutex<HashMap<String, Instant>>,
}

impl Servers {
    /// Finds the configuration, and replaces its server by `addresses` if there are any.
    pub(super) async fn find(kubeconfig: Option<PathBuf>, addresses: &[String]) -> Result<Self, SourceError> {
        let mut uris = Vec::with_capacity(addresses.len());
        for address in addresses {
            uris.push(parse_address(address)?);
        }
        let config = match configuration(kubeconfig).await {
            Err(SourceError::NoApiServer) if !uris.is_empty() => Config::new(uris[0].clone()),
            config => config?,
        };
        if uris.is_empty() {
            uris.push(config.cluster_url.clone());
        }
        let servers = uris.into_iter().map(|uri| server(&config, uri)).collect::<Result<_, _>>()?;
        Ok(Self { servers, current: AtomicUsize::new(0), watches: Mutex::default() })
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
    pub(super) fn current(&self) -> &str {
        &self.servers[self.current.load(Ordering::Relaxed)].name
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Body>, kube::Error> {
        if request.uri().query().is_some_and(|query| query.split('&').any(|pair| pair == "watch=true")) {
            tokio::time::sleep_until(self.next_start(request.uri().path())).await;
        }
        let used = self.current.load(Ordering::Relaxed);
        let server = &self.servers[used];
        let answer = match tokio::time::timeout(ANSWER_TIMEOUT, server.client.send(request)).await {
            Ok(answer) => answer.map_err(|error| named(&server.name, error)),
            Err(_) => Err(unreachable(&server.name, format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))),
        };
        if answer.as_ref().map_or(true, |response| response.status().is_server_error()) {
            // Only who sees the server in use fail may turn to the next one.
            let next = (used + 1) % self.servers.len();
            let _: Result<_, _> = self.current.compare_exchange(used, next, Ordering::Relaxed, Ordering::Relaxed);
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
    if matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some() { Ok(uri) } else { Err(error()) }
}

fn server(config: &Config, uri: Uri) -> Result<Server, SourceError> {
    let name = uri.to_string().trim_end_matches('/').to_owned();
    let mut config = config.clone();
    config.cluster_url = uri;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(SILENCE_TIMEOUT);
    // Failures are to be seen here, where the next server is known.
    config.default_retry = false;
    match Client::try_from(config) {
        Ok(client) => Ok(Server { name, client }),
        Err(source) => Err(SourceError::Client { server: name, source: Box::new(source) }),
    }
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
}
