//! One API server: how to reach it, and with which credentials.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use http::Uri;
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::ConfigExt as _;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use tower::{BoxError, ServiceBuilder};

use super::super::SourceError;

/// How long connecting to a server may take, before the next one is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a server may be silent within an answer: more than a watch lasts (290 s).
const SILENCE_TIMEOUT: Duration = Duration::from_secs(330);

/// After how much silence a server's machine is asked whether it is still there, how often again, and how many times: one that
/// lost its power ends no connection, and a watch may be silent for long.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_PROBES: u32 = 3;

/// What the certificate of every API server names, whatever its address.
const EVERY_SERVER: &str = "kubernetes.default.svc";

/// One API server.
pub(super) struct Server {
    /// Its address, for people.
    pub(super) name: String,
    pub(super) uri: Uri,
    pub(super) client: Client,
}

/// An address as it may be given: without a scheme it means HTTPS.
pub(super) fn parse_address(address: &str) -> Result<Uri, SourceError> {
    let error = || SourceError::ApiServerAddress { address: address.to_owned() };
    let text = if address.contains("://") { address.to_owned() } else { format!("https://{address}") };
    let uri: Uri = text.parse().map_err(|_| error())?;
    // Names and passwords have no place in an address: they would be in every log.
    let is_plain = uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    if matches!(uri.scheme_str(), Some("http" | "https")) && is_plain { Ok(uri) } else { Err(error()) }
}

/// A client for one server, with the credentials that the configuration leads to now.
pub(super) fn server(config: &Config, uri: Uri) -> Result<Server, SourceError> {
    let name = uri.to_string().trim_end_matches('/').to_owned();
    let mut config = config.clone();
    config.cluster_url = uri.clone();
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(SILENCE_TIMEOUT);
    // Failures are to be seen here, where the next server is known.
    config.default_retry = false;
    match client(config) {
        Ok(client) => Ok(Server { name, uri, client }),
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
pub(super) fn common_name(config: &Config) -> Option<String> {
    if config.tls_server_name.is_some() {
        return config.tls_server_name.clone();
    }
    let host = config.cluster_url.host()?;
    let is_address = host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
    Some(if is_address { EVERY_SERVER } else { host }.to_owned())
}

/// The kubeconfig that was asked for, $KUBECONFIG, ~/.kube/config, or the in-cluster service account: the first that
/// is there, and it has to be sound.
pub(super) async fn configuration(kubeconfig: Option<PathBuf>) -> Result<Config, SourceError> {
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
