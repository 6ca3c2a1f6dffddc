//! A cluster's own API server as the place where a scenario publishes its objects: a Namespace and Nodes of its own,
//! removed on drop. Cluster IPs and node ports are the server's to give out, because the cluster has others in use.
//!
//! The daemons run in network namespaces from which the server can't be reached, so each gets a [`Forwarder`] and a
//! kubeconfig that leads there.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::future::Future;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::{NamespaceResourceScope, Resource};
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::family::Family;
use crate::forward::Forwarder;
use crate::leftovers;
use crate::manifests::{Endpoint, Service};
use crate::netns::Namespace;
use crate::topology::Node;

/// More than a healthy server needs for an answer.
const LIMIT: Duration = Duration::from_secs(30);
/// Label of every Namespace and Node that tests make; its value is the machine whose process ids the names carry.
const LABEL: &str = "sheave-tests/machine";

/// What an API server has given out: cluster IP and node ports, each by what the Service had asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// Cluster IPs.
    pub cluster_ips: BTreeMap<IpAddr, IpAddr>,
    /// Node ports.
    pub node_ports: BTreeMap<u16, u16>,
}

/// A scenario's part of a cluster.
pub struct ApiServer {
    runtime: Runtime,
    client: Client,
    kubeconfig: Kubeconfig,
    /// HOST:PORT and path of the server.
    server: (String, String),
    /// Name of the Namespace and start of the Nodes' names.
    name: String,
    folder: PathBuf,
    nodes: Mutex<Vec<String>>,
    forwarders: Mutex<Vec<Forwarder>>,
}

impl std::fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiServer").field("server", &self.server).field("name", &self.name).finish_non_exhaustive()
    }
}

impl ApiServer {
    /// The one that `SHEAVE_TEST_KUBECONFIG` names, if it names one.
    ///
    /// # Errors
    /// If that one can't be used.
    pub fn from_environment() -> Result<Option<Self>> {
        match std::env::var_os("SHEAVE_TEST_KUBECONFIG").filter(|path| !path.is_empty()) {
            Some(path) => Self::connect(Path::new(&path)).map(Some).context("SHEAVE_TEST_KUBECONFIG"),
            None => Ok(None),
        }
    }

    /// Makes a Namespace there.
    ///
    /// # Errors
    /// If the server can't be reached or refuses.
    pub fn connect(path: &Path) -> Result<Self> {
        let kubeconfig = Kubeconfig::read_from(path).with_context(|| format!("reading {}", path.display()))?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (client, server) = runtime.block_on(async {
            let config = Config::from_custom_kubeconfig(kubeconfig.clone(), &KubeConfigOptions::default()).await?;
            let url = &config.cluster_url;
            let port = url.port_u16().unwrap_or(if url.scheme_str() == Some("http") { 80 } else { 443 });
            let host = url.host().context("the kubeconfig's server has no host")?;
            let server = (format!("{host}:{port}"), url.path().trim_end_matches('/').to_owned());
            anyhow::Ok((Client::try_from(config)?, server))
        })?;
        let name = leftovers::unique_name();
        let folder = std::env::temp_dir().join(leftovers::unique_name());
        DirBuilder::new().mode(0o700).create(&folder).with_context(|| format!("making {}", folder.display()))?;
        let (nodes, forwarders) = (Mutex::default(), Mutex::default());
        let server = Self { runtime, client, kubeconfig, server, name, folder, nodes, forwarders };
        server.sweep();
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": server.metadata(&server.name)});
        server.create(&Api::all(server.client.clone()), &serde_json::from_value::<core::Namespace>(namespace)?)?;
        Ok(server)
    }

    /// `namespace/name` of a Service here.
    #[must_use]
    pub fn id(&self, service: &Service) -> String {
        format!("{}/{}", self.name, service.name())
    }

    /// What the server calls a node of the test's cluster.
    #[must_use]
    pub fn node_name(&self, node: &str) -> String {
        format!("{}-{node}", self.name)
    }

    /// Makes a Node, as a kubelet does. Nothing is to be scheduled there.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn node(&self, node: &Node) -> Result<()> {
        let name = self.node_name(&node.name);
        let object = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": self.metadata(&name),
            "spec": {"unschedulable": true, "taints": [{"key": LABEL, "effect": "NoExecute"}]},
            "status": {"addresses": [
                {"type": "InternalIP", "address": node.address}, {"type": "InternalIP", "address": node.address6},
            ]},
        });
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).push(name);
        self.create(&Api::all(self.client.clone()), &serde_json::from_value::<core::Node>(object)?)?;
        Ok(())
    }

    /// Creates a Service and its EndpointSlices, or replaces them. Returns what the server has given out.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn service(&self, service: &Service, endpoints: &[Endpoint]) -> Result<Given> {
        let mut object: Value = serde_saphyr::from_str(&service.service_yaml())?;
        object["metadata"]["namespace"] = self.name.as_str().into();
        for field in ["clusterIP", "clusterIPs"] {
            object["spec"].as_object_mut().map(|spec| spec.remove(field));
        }
        for port in object["spec"]["ports"].as_array_mut().into_iter().flatten() {
            port.as_object_mut().map(|port| port.remove("nodePort"));
        }
        let made: core::Service = self.put(&serde_json::from_value(object)?)?;

        for slice in service.slices_yaml(endpoints) {
            let mut object: Value = serde_saphyr::from_str(&slice)?;
            object["metadata"]["namespace"] = self.name.as_str().into();
            object["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"] = "sheave-tests".into();
            for endpoint in object["endpoints"].as_array_mut().into_iter().flatten() {
                endpoint["nodeName"] = self.node_name(endpoint["nodeName"].as_str().unwrap_or_default()).into();
            }
            self.put::<EndpointSlice>(&serde_json::from_value(object)?)?;
        }

        let spec = made.spec.context("the server made a Service without spec")?;
        let addresses = spec.cluster_ips.context("the server gave no cluster IP")?;
        let addresses: Vec<IpAddr> = addresses
            .iter()
            .map(|address| address.parse().with_context(|| format!("the cluster IP {address} is no address")))
            .collect::<Result<_>>()?;
        let of = |family: Family| addresses.iter().copied().find(|address| Family::of(*address) == family);
        let mut cluster_ips = BTreeMap::new();
        for asked in service.cluster_ips() {
            let family = Family::of(*asked);
            cluster_ips.insert(*asked, of(family).with_context(|| format!("the server gave no {family} address"))?);
        }
        let given =
            spec.ports.into_iter().flatten().map(|port| port.node_port.and_then(|port| u16::try_from(port).ok()));
        let asked = service.node_ports();
        let node_ports = asked.into_iter().zip(given).filter_map(|(asked, given)| Some((asked?, given?)));
        Ok(Given { cluster_ips, node_ports: node_ports.collect() })
    }

    /// A road from a namespace to the server, and the path of a kubeconfig that takes it. The road lasts as long as `self`.
    ///
    /// # Errors
    /// If it can't be made.
    pub fn reach_from(&self, namespace: &Namespace) -> Result<PathBuf> {
        let forwarder = Forwarder::start(namespace, &self.server.0)?;
        let mut kubeconfig = self.kubeconfig.clone();
        let current = kubeconfig.current_context.as_deref().context("the kubeconfig has no current-context")?;
        let context = kubeconfig.contexts.iter().find(|context| context.name == current);
        let context =
            context.and_then(|named| named.context.as_ref()).context("the kubeconfig's context is missing")?;
        let named = kubeconfig.clusters.iter_mut().find(|cluster| cluster.name == context.cluster);
        let cluster = named.and_then(|named| named.cluster.as_mut()).context("the kubeconfig's cluster is missing")?;
        let scheme =
            if cluster.server.as_deref().is_some_and(|url| url.starts_with("http://")) { "http" } else { "https" };
        cluster.server = Some(format!("{scheme}://{}{}", forwarder.address(), self.server.1));
        // The certificate is still for the name that the server has outside.
        let host = self.server.0.rsplit_once(':').map_or("", |(host, _)| host).trim_matches(['[', ']']);
        cluster.tls_server_name.get_or_insert_with(|| host.to_owned());
        cluster.proxy_url = None;
        let path = self.folder.join(format!("{}.kubeconfig", namespace.name()));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        file.write_all(serde_json::to_string(&kubeconfig)?.as_bytes())?;
        self.forwarders.lock().unwrap_or_else(PoisonError::into_inner).push(forwarder);
        Ok(path)
    }

    fn metadata(&self, name: &str) -> Value {
        json!({"name": name, "labels": {LABEL: machine()}})
    }

    fn wait<T>(&self, answer: impl Future<Output = kube::Result<T>>) -> Result<T> {
        let answer = self.runtime.block_on(async { tokio::time::timeout(LIMIT, answer).await });
        let answer = answer.with_context(|| format!("{} did not answer within {LIMIT:?}", self.server.0))?;
        answer.with_context(|| format!("the API server {}", self.server.0))
    }

    fn create<K>(&self, api: &Api<K>, object: &K) -> Result<K>
    where
        K: Serialize + DeserializeOwned + Clone + std::fmt::Debug,
    {
        self.wait(api.create(&PostParams::default(), object))
    }

    /// Creates an object in the Namespace, or replaces it.
    fn put<K>(&self, object: &K) -> Result<K>
    where
        K: Resource<Scope = NamespaceResourceScope>
            + kube::Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Serialize
            + DeserializeOwned
            + Clone
            + std::fmt::Debug,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), &self.name);
        let Some(name) = object.meta().name.clone() else { bail!("an object without a name") };
        let parameters = PostParams::default();
        self.wait(async {
            match api.create(&parameters, object).await {
                Err(kube::Error::Api(status)) if status.code == 409 => api.replace(&name, &parameters, object).await,
                created => created,
            }
        })
        .with_context(|| format!("publishing {} {name}", K::KIND))
    }

    /// Removes what killed runs of this machine left behind. Best effort: a failure here is no test's business.
    fn sweep(&self) {
        let parameters = ListParams::default().labels(&format!("{LABEL}={}", machine()));
        let namespaces: Api<core::Namespace> = Api::all(self.client.clone());
        let nodes: Api<core::Node> = Api::all(self.client.clone());
        let dead = |name: Option<String>| name.filter(|name| leftovers::is_of_the_dead(name));
        for name in
            self.wait(namespaces.list(&parameters)).into_iter().flatten().filter_map(|one| dead(one.metadata.name))
        {
            let _ = self.wait(namespaces.delete(&name, &DeleteParams::default()));
        }
        for name in self.wait(nodes.list(&parameters)).into_iter().flatten().filter_map(|one| dead(one.metadata.name)) {
            let _ = self.wait(nodes.delete(&name, &DeleteParams::default()));
        }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        let nodes: Api<core::Node> = Api::all(self.client.clone());
        for name in std::mem::take(&mut *self.nodes.lock().unwrap_or_else(PoisonError::into_inner)) {
            if let Err(error) = self.wait(nodes.delete(&name, &DeleteParams::default())) {
                eprintln!("cannot remove Node {name}: {error:#}");
            }
        }
        let namespaces: Api<core::Namespace> = Api::all(self.client.clone());
        if let Err(error) = self.wait(namespaces.delete(&self.name, &DeleteParams::default())) {
            eprintln!("cannot remove Namespace {}: {error:#}", self.name);
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// This machine's name, as a label's value can be.
fn machine() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let sound = |character: char| character.is_ascii_alphanumeric() || character == '-';
    let name: String = name.trim().chars().map(|one| if sound(one) { one } else { '-' }).take(60).collect();
    format!("m-{name}-m")
}
