//! Kubernetes objects written out, for tests of fields that [`crate::manifests::Service`] has not, and questions that wait
//! until the right pods answer. IPv4.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::client::{self, Answers};
use crate::manifests::Manifests;
use crate::netns::Namespace;
use crate::process::{Process, built, eventually};
use crate::scenario::Scenario;
use crate::topology::{Node, Pod};

/// How long a change may take to be seen by clients: more than a busy machine needs.
const PATIENCE: Duration = Duration::from_secs(10);
/// Enough for each of four endpoints to have its turn, but for one time in 20 000.
const ROUND: usize = 40;

/// A Service in the namespace `default`.
#[must_use]
pub fn service(name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec})
}

/// An EndpointSlice of a Service; `number` tells several apart. `ports` are names and numbers, TCP.
#[must_use]
pub fn slice(service: &str, number: usize, ports: &[(&str, u16)], endpoints: &[Value]) -> Value {
    let ports: Vec<Value> = ports.iter().map(|(name, port)| json!({"name": name, "port": port})).collect();
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4", "ports": ports,
        "metadata": {"name": format!("{service}-{number}"), "labels": {"kubernetes.io/service-name": service}},
        "endpoints": endpoints})
}

/// A pod as an endpoint, with more fields, such as conditions.
#[must_use]
pub fn endpoint(pod: &Pod, fields: Value) -> Value {
    let mut endpoint = json!({"addresses": [pod.address], "nodeName": pod.node});
    if let (Some(endpoint), Value::Object(mut fields)) = (endpoint.as_object_mut(), fields) {
        endpoint.append(&mut fields);
    }
    endpoint
}

/// Pods as endpoints without conditions, which means ready.
#[must_use]
pub fn ready(pods: &[&Pod]) -> Vec<Value> {
    pods.iter().map(|pod| endpoint(pod, Value::Null)).collect()
}

/// A Node with a label for its zone, if it has one.
#[must_use]
pub fn node(node: &Node, zone: Option<&str>, addresses: &[&str]) -> Value {
    let addresses: Vec<Value> =
        addresses.iter().map(|address| json!({"type": "InternalIP", "address": address})).collect();
    let labels = zone.map_or_else(|| json!({}), |zone| json!({"topology.kubernetes.io/zone": zone}));
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name, "labels": labels},
        "status": {"addresses": addresses}})
}

impl Manifests {
    /// Writes these objects to a file of that name, in place of what was there.
    ///
    /// # Errors
    /// If that fails.
    pub fn objects(&self, name: &str, objects: &[Value]) -> Result<()> {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        self.write(&format!("{name}.json"), &list.to_string())
    }
}

impl Scenario {
    /// Publishes a Service and its slices, in place of what has had this name.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn put(&self, name: &str, spec: &Value, slices: &[Value]) -> Result<()> {
        self.manifests().objects(name, &[&[service(name, spec)], slices].concat())
    }

    /// Answers that a process of the node itself gets.
    ///
    /// # Errors
    /// If the probe can't be run.
    pub fn from_host(&self, protocol: &str, target: SocketAddr, count: usize) -> Result<Answers> {
        let mut command: Command = self.agent.host_command(built("probe")?);
        command.args([protocol, &target.to_string(), &count.to_string()]);
        let output = Process::start("probe", &mut command)?.finish(Duration::from_secs(60))?;
        serde_json::from_str(&output).with_context(|| format!("the probe printed {output}"))
    }

    /// Waits until every connection of `client` is answered, and all of these pods answer, and no other does.
    ///
    /// # Errors
    /// If that doesn't come true.
    pub fn until_answered(&self, client: &Namespace, target: SocketAddr, pods: &[&Pod]) -> Result<Answers> {
        let ask = || Ok(client::who_many(Some(client), target, ROUND, 2));
        self.until(&format!("{} asks {target}", client.name()), pods, ask)
    }

    /// The same for a process of the node itself.
    ///
    /// # Errors
    /// If that doesn't come true.
    pub fn until_host_answered(&self, target: SocketAddr, pods: &[&Pod]) -> Result<Answers> {
        self.until(&format!("the node asks {target}"), pods, || self.from_host("tcp", target, ROUND))
    }

    fn until(&self, question: &str, pods: &[&Pod], ask: impl Fn() -> Result<Answers>) -> Result<Answers> {
        let expected: BTreeSet<&String> = pods.iter().map(|pod| &pod.name).collect();
        let answers = eventually(PATIENCE, || {
            let answers = ask()?;
            answers.all_answered()?;
            let answered: BTreeSet<&String> = answers.by_backend.keys().collect();
            ensure!(answered == expected, "{:?} answered, not {expected:?}", answers.by_backend);
            Ok(answers)
        });
        answers.with_context(|| format!("{question}; log of sheave:\n{}", self.agent.log()))
    }

    /// Waits until connections of `client` fail in this way, at once or by silence.
    ///
    /// # Errors
    /// If they don't.
    pub fn until_fails(&self, client: &Namespace, target: SocketAddr, how: std::io::ErrorKind) -> Result<()> {
        eventually(PATIENCE, || {
            let attempt = client.run(|| std::net::TcpStream::connect_timeout(&target, Duration::from_secs(1)));
            let error = attempt.err().with_context(|| format!("{target} accepts {}", client.name()))?;
            ensure!(error.kind() == how, "{} asks {target}, which fails otherwise: {error}", client.name());
            Ok(())
        })
    }

    /// Fails if a connection to an address that is nobody's is accepted.
    ///
    /// # Errors
    /// If it is.
    pub fn not_served(&self, client: &Namespace, target: SocketAddr) -> Result<()> {
        let attempt = client.run(|| std::net::TcpStream::connect_timeout(&target, Duration::from_secs(1)));
        ensure!(attempt.is_err(), "{target} accepts {}", client.name());
        Ok(())
    }
}
