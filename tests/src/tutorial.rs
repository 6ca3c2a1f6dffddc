//! Tutorials' manifests as people write them, brought to life: `kubectl create` makes the Services in the tests' own API,
//! which gives out addresses; here is the part of a cluster's controllers that makes pods of Deployments and DaemonSets,
//! and EndpointSlices of Services. Sheave runs on every node.
//!
//! An image decides which server runs in a pod: `nginx`, the ingress `controller` (an nginx that leads to the first Ingress'
//! Service), or `dnsmasq`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::TcpListener;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::agent::Agent;
use crate::kube_api::{KubeApi, Resource};
use crate::kubectl::Kubectl;
use crate::netns::Namespace;
use crate::real_server::{self, RealServer};
use crate::topology::{Cluster, Node, Pod, Shape};

/// A cluster in which a tutorial's manifests have come to life. The first pod of node 1 is the reader's shell.
pub struct Tutorial {
    servers: BTreeMap<String, RealServer>,
    workloads: Vec<Workload>,
    free: VecDeque<Place>,
    /// Sheave on every node.
    pub agents: Vec<Agent>,
    /// A kubectl on node 1.
    pub kubectl: Kubectl,
    api: KubeApi,
    /// Where all that runs.
    pub cluster: Cluster,
}

/// A pod by its node's and its own index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    node: usize,
    pod: usize,
}

/// A Deployment or DaemonSet and its pods.
#[derive(Debug)]
struct Workload {
    name: String,
    labels: Value,
    container: Value,
    places: Vec<Place>,
}

fn elements(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

impl Tutorial {
    /// Builds the cluster and brings to life what is in a file of `tests/tests/tutorials`.
    ///
    /// # Errors
    /// Whatever does not start.
    pub fn start(file: &str, shape: Shape) -> Result<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tutorials").join(file);
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let cluster = Cluster::build(shape)?;
        let first = &cluster.nodes[0];
        let api = KubeApi::serve(first.namespace.run(|| TcpListener::bind((first.address, 0))).context("a free port")?);
        for node in &cluster.nodes {
            api.apply(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name},
                "status": {"addresses": [{"type": "InternalIP", "address": node.address}]}}));
        }
        let kubectl = Kubectl::new(&first.namespace, &api.kubeconfig())?;
        let start = |node: &Node| Agent::start_with_kubeconfig(node, &node.name, &kubectl.kubeconfig(), &[]);
        let agents = cluster.nodes.iter().map(start).collect::<Result<_>>()?;
        // The nodes take turns.
        let counts = cluster.nodes.iter().map(|node| node.pods.len()).collect::<Vec<_>>();
        let most = counts.iter().copied().max().unwrap_or_default();
        let places = (0..most).flat_map(|pod| (0..counts.len()).map(move |node| Place { node, pod }));
        let free = places.filter(|place| place.pod < counts[place.node] && (place.node, place.pod) != (0, 0)).collect();
        let (servers, workloads) = (BTreeMap::new(), Vec::new());
        let mut tutorial = Self { servers, workloads, free, agents, kubectl, api, cluster };
        tutorial.create(&text)?;
        Ok(tutorial)
    }

    fn create(&mut self, text: &str) -> Result<()> {
        let texts: Vec<&str> = text.split("\n---\n").collect();
        let documents: Vec<Value> =
            texts.iter().map(|text| serde_saphyr::from_str(text)).collect::<Result<_, _>>().context("YAML")?;
        let services = texts.iter().zip(&documents).filter(|(_, document)| document["kind"] == "Service");
        let services: Vec<&str> = services.map(|(text, _)| *text).collect();
        self.kubectl.create(&services.join("\n---\n"))?;
        let ingress = documents.iter().find(|document| document["kind"] == "Ingress");
        for document in &documents {
            let count = match document["kind"].as_str() {
                Some("Deployment") => usize::try_from(document["spec"]["replicas"].as_u64().unwrap_or(1))?,
                Some("DaemonSet") => self.cluster.nodes.len(),
                Some("Service" | "Ingress") => continue,
                other => bail!("a document of kind {other:?} in a tutorial"),
            };
            let template = &document["spec"]["template"];
            let workload = Workload {
                name: document["metadata"]["name"].as_str().context("a workload without a name")?.to_owned(),
                labels: template["metadata"]["labels"].clone(),
                container: template["spec"]["containers"][0].clone(),
                places: self.free.drain(..count.min(self.free.len())).collect(),
            };
            ensure!(workload.places.len() == count, "too few pods for {}", workload.name);
            if document["kind"] == "DaemonSet" {
                let nodes: BTreeSet<usize> = workload.places.iter().map(|place| place.node).collect();
                ensure!(nodes.len() == count, "{} is not on every node: {workload:?}", workload.name);
            }
            for place in &workload.places {
                let server = self.serve(self.pod(*place), &workload.container, ingress)?;
                self.servers.insert(self.pod(*place).name.clone(), server);
            }
            self.workloads.push(workload);
        }
        self.publish()
    }

    /// Starts what a container's image stands for.
    fn serve(&self, pod: &Pod, container: &Value, ingress: Option<&Value>) -> Result<RealServer> {
        let ports = elements(&container["ports"]).filter_map(|port| port["containerPort"].as_u64());
        let ports = ports.map(u16::try_from).collect::<Result<Vec<_>, _>>()?;
        let image = container["image"].as_str().context("a container without an image")?;
        let image = image.rsplit('/').next().and_then(|image| image.split(':').next()).unwrap_or(image);
        match image {
            "nginx" => real_server::web(pod, &ports),
            "dnsmasq" => real_server::dns(pod, ports[0]),
            "controller" => {
                let service =
                    &ingress.context("no Ingress")?["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"];
                let name = service["name"].as_str().context("an Ingress without a Service")?;
                let upstream = format!("{}:{}", self.cluster_ip(name)?, service["port"]["number"]);
                real_server::ingress(pod, &ports, &upstream)
            }
            other => bail!("no image {other} here"),
        }
    }

    fn pod(&self, place: Place) -> &Pod {
        &self.cluster.nodes[place.node].pods[place.pod]
    }

    /// Pods of a Deployment or DaemonSet.
    #[must_use]
    pub fn pods(&self, workload: &str) -> Vec<&Pod> {
        let places = self.workloads.iter().filter(|other| other.name == workload).flat_map(|workload| &workload.places);
        places.map(|place| self.pod(*place)).collect()
    }

    /// The reader's shell: a pod of node 1 that serves nothing.
    #[must_use]
    pub fn shell(&self) -> &Namespace {
        &self.cluster.nodes[0].pods[0].namespace
    }

    /// The address that the API has given a Service.
    ///
    /// # Errors
    /// If kubectl fails.
    pub fn cluster_ip(&self, service: &str) -> Result<String> {
        self.kubectl.run(&["get", "service", service, "-o", "jsonpath={.spec.clusterIP}"])
    }

    /// Replaces a workload's first pod by a free one: the old server is dead before anybody says so.
    ///
    /// # Errors
    /// If the new server does not start, or Sheave does not follow.
    pub fn replace_first_pod(&mut self, workload: &str) -> Result<()> {
        let index = self.workloads.iter().position(|other| other.name == workload).context("no such workload")?;
        let place = self.free.pop_front().context("no free pod")?;
        let server = self.serve(self.pod(place), &self.workloads[index].container, None)?;
        self.servers.insert(self.pod(place).name.clone(), server);
        let old = std::mem::replace(&mut self.workloads[index].places[0], place);
        let old = self.pod(old).name.clone();
        self.servers.remove(&old);
        self.publish()
    }

    /// Makes the EndpointSlices of all Services with a selector, and waits until Sheave has those of them that are to be
    /// balanced.
    fn publish(&self) -> Result<()> {
        for service in self.api.objects(Resource::Services) {
            let Some(selector) = service["spec"]["selector"].as_object() else { continue };
            let selected = |workload: &&Workload| selector.iter().all(|(key, value)| workload.labels[key] == *value);
            let workloads: Vec<&Workload> = self.workloads.iter().filter(selected).collect();
            let pods = workloads.iter().flat_map(|workload| &workload.places).map(|place| self.pod(*place));
            let pods: Vec<&Pod> = pods.collect();
            let name = service["metadata"]["name"].as_str().context("a Service without a name")?;
            let containers: Vec<&Value> = workloads.iter().map(|workload| &workload.container).collect();
            let ports = elements(&service["spec"]["ports"]).map(|port| slice_port(port, &containers));
            let headless = service["spec"]["clusterIP"] == "None";
            let mut slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {"name": format!("{name}-1"), "namespace": "default",
                    "labels": {"kubernetes.io/service-name": name}},
                "ports": ports.collect::<Result<Vec<_>>>()?,
                "endpoints": pods.iter().map(|pod| json!({"addresses": [pod.address], "nodeName": pod.node,
                    "conditions": {"ready": true, "serving": true, "terminating": false}})).collect::<Vec<_>>()});
            if headless {
                slice["metadata"]["labels"]["service.kubernetes.io/headless"] = "".into();
            }
            self.api.apply(slice);
            if !headless {
                self.wait_for(name, &pods)?;
            }
        }
        Ok(())
    }

    fn wait_for(&self, service: &str, pods: &[&Pod]) -> Result<()> {
        let expected: BTreeSet<String> = pods.iter().map(|pod| pod.address.to_string()).collect();
        let id = format!("default/{service}");
        let published = |shown: &Value| {
            let is_ours =
                |row: &&Value| row["service"].as_str().is_some_and(|name| name.split(':').next() == Some(&id));
            let mut rows = elements(shown).filter(is_ours).peekable();
            rows.peek().is_some()
                && rows.all(|row| {
                    let backends = elements(&row["cluster_backends"]).filter_map(Value::as_str);
                    let addresses =
                        backends.filter_map(|one| one.rsplit_once(':')).map(|(address, _)| address.to_owned());
                    addresses.collect::<BTreeSet<_>>() == expected
                })
        };
        self.wait_for_services(&format!("{id} with {expected:?}"), published)
    }

    /// Waits until `sheave services` shows something on every node.
    ///
    /// # Errors
    /// If it doesn't in a few seconds; with what it shows instead.
    pub fn wait_for_services(&self, what: &str, shown: impl Fn(&Value) -> bool) -> Result<()> {
        self.agents.iter().try_for_each(|agent| agent.wait_for_services(what, &shown))
    }
}

/// A Service's port as its EndpointSlice has it: the targetPort as a number, also where it is a container port's name.
fn slice_port(port: &Value, containers: &[&Value]) -> Result<Value> {
    let number = match port["targetPort"].as_str() {
        None => port["targetPort"].clone(),
        Some(name) => {
            let mut named = containers.iter().flat_map(|one| elements(&one["ports"])).filter(|one| one["name"] == name);
            named.next().with_context(|| format!("no container has a port {name}"))?["containerPort"].clone()
        }
    };
    let name = port["name"].as_str().unwrap_or_default();
    Ok(json!({"name": name, "protocol": port["protocol"], "port": number}))
}
