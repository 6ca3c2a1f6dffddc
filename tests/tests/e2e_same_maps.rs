//! The same Services give the same maps, wherever they come from: folders that say it differently, and an API server
//! where `kubectl` has made them.

use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sheave_tests::agent::Agent;
use sheave_tests::kube_api::KubeApi;
use sheave_tests::kubectl::Kubectl;
use sheave_tests::manifests::Manifests;
use sheave_tests::process::eventually;
use sheave_tests::topology::{Cluster, Shape};

/// As somebody writes it by hand: what an API server would fill in is left out.
const DNS: &str = "
apiVersion: v1
kind: Service
metadata: {name: dns}
spec:
  sessionAffinity: ClientIP
  externalIPs: [192.0.2.53]
  ports:
  - {name: dns, port: 53, protocol: UDP}
  - {name: dns-tcp, port: 53}
";
const PLAIN: &str = "
apiVersion: v1
kind: Service
metadata: {name: plain}
spec:
  ports: [{port: 81, targetPort: 8081}]
";
const WEB: &str = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  ports: [{name: 80-8080, port: 80, targetPort: 8080, nodePort: 30500}]
";
const WEB_SLICES: [&str; 2] = [
    "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: 80-8080, port: 8080}]
endpoints:
- {addresses: [10.244.1.2], nodeName: node-1}
- {addresses: [10.244.1.3], nodeName: node-1, conditions: {ready: false}}
",
    "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-2, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: 80-8080, port: 8080}]
endpoints: [{addresses: [10.244.2.2], nodeName: node-2}]
",
];
const OTHER_SLICES: [&str; 2] = [
    "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: dns-1, labels: {kubernetes.io/service-name: dns}}
addressType: IPv4
ports:
- {name: dns, port: 53, protocol: UDP}
- {name: dns-tcp, port: 53}
endpoints:
- {addresses: [10.244.1.3], nodeName: node-1}
- {addresses: [10.244.2.2], nodeName: node-2}
",
    "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: plain-1, labels: {kubernetes.io/service-name: plain}}
addressType: IPv4
ports: [{port: 8081}]
endpoints: [{addresses: [10.244.2.2], nodeName: node-2}]
",
];
const NODE: &str = "
apiVersion: v1
kind: Node
metadata: {name: node-1}
status: {addresses: [{type: InternalIP, address: 192.168.50.1}]}
";

/// A node that is fed from a folder would behave differently from one that is fed by the API server.
#[test]
fn folders_and_services_made_by_kubectl_give_the_same_maps() -> Result<()> {
    let cluster = Cluster::build(Shape { pod_counts: [1, 0], ..Shape::default() })?;
    let node = &cluster.nodes[0];
    let listener = node.namespace.run(|| TcpListener::bind("127.0.0.1:0")).context("a free port")?;
    let api = KubeApi::serve(listener);
    let kubectl = Kubectl::new(&node.namespace, &api.kubeconfig())?;
    kubectl.create(NODE)?;
    let by_kubectl = Agent::start_with_kubeconfig(node, "node-1", &kubectl.kubeconfig(), &[])?;

    // Made while Sheave watches. Recent kubectls would themselves send this one as protobuf, which our API doesn't speak.
    let make = ["create", "service", "nodeport", "web", "--tcp=80:8080", "--node-port=30500"];
    let web = kubectl.run(&[&make[..], &["--dry-run=client", "-o", "json"]].concat())?;
    kubectl.create(&web)?;
    kubectl.create(&[DNS, PLAIN].join("---"))?;
    kubectl.create(&[&WEB_SLICES[..], &OTHER_SLICES].concat().join("---"))?;
    let services = [("web", WEB), ("dns", DNS), ("plain", PLAIN)];
    let services = services.map(|(name, text)| -> Result<String> {
        let address = kubectl.run(&["get", "service", name, "-o", "jsonpath={.spec.clusterIP}"])?;
        let address: Ipv4Addr =
            address.trim().parse().with_context(|| format!("{name} has the address {address:?}"))?;
        Ok(text.replace("spec:\n", &format!("spec:\n  clusterIP: {address}\n")))
    });
    let services = services.into_iter().collect::<Result<Vec<_>>>()?;

    let one_by_one = one_file_an_object(&services)?;
    let lists = lists_in_another_order(&services)?;
    let printed = Manifests::new()?;
    printed.write("all.yaml", &kubectl.run(&["get", "services,endpointslices,nodes", "-o", "yaml"])?)?;
    let folders = [&one_by_one, &lists, &printed].map(|folder| Agent::start(node, folder, &[]));
    let folders = folders.into_iter().collect::<Result<Vec<_>>>()?;
    equal(&by_kubectl, &folders, |shown| {
        ["192.168.50.1", "192.0.2.53", "default/web:", "default/dns:dns", "default/plain", "10.244.2.2:8081"]
            .iter()
            .all(|part| shown.contains(part))
    })?;

    kubectl.run(&["delete", "service", "web"])?;
    kubectl.run(&["patch", "service", "plain", "-p", r#"{"spec": {"ports": [{"port": 81, "name": "other"}]}}"#])?;
    let plain = services[2].replace("{port: 81", "{name: other, port: 81");
    one_by_one.remove("0.yaml")?;
    one_by_one.write("2.yaml", &plain)?;
    lists.write("services.json", &list(&[&plain, &services[1]])?.to_string())?;
    printed.write("all.yaml", &kubectl.run(&["get", "services,endpointslices,nodes", "-o", "yaml"])?)?;
    equal(&by_kubectl, &folders, |shown| !shown.contains("default/web") && !shown.contains("10.244.2.2:8081"))
}

fn one_file_an_object(services: &[String]) -> Result<Manifests> {
    let folder = Manifests::new()?;
    let slices = WEB_SLICES.into_iter().chain(OTHER_SLICES);
    for (number, text) in services.iter().map(String::as_str).chain(slices).chain([NODE]).enumerate() {
        folder.write(&format!("{number}.yaml"), text)?;
    }
    Ok(folder)
}

/// Services as a list in JSON, the Node and one of the slices as documents of one file, the other two as a list in YAML with
/// the endpoints of `web` in one slice, everything turned round.
fn lists_in_another_order(services: &[String]) -> Result<Manifests> {
    let folder = Manifests::new()?;
    let services: Vec<&str> = services.iter().rev().map(String::as_str).collect();
    folder.write("services.json", &list(&services)?.to_string())?;
    folder.write("more.yml", &[OTHER_SLICES[1], NODE].join("---"))?;
    let [mut web, second] = [parse(WEB_SLICES[0])?, parse(WEB_SLICES[1])?];
    let endpoints = [&second, &web].into_iter().flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
    web["endpoints"] = endpoints.rev().cloned().collect::<Vec<_>>().into();
    web["metadata"]["name"] = "all-of-web".into();
    let items = json!([web, parse(OTHER_SLICES[0])?]);
    folder.write("a-list.yaml", &format!("apiVersion: v1\nkind: List\nitems: {items}\n"))?;
    Ok(folder)
}

fn list(texts: &[&str]) -> Result<Value> {
    let items = texts.iter().map(|text| parse(text)).collect::<Result<Vec<_>>>()?;
    Ok(json!({"apiVersion": "v1", "kind": "List", "items": items}))
}

fn parse(text: &str) -> Result<Value> {
    serde_saphyr::from_str(text).context("YAML")
}

/// What all of them show is the same text, and is what it should be.
fn equal(one: &Agent, others: &[Agent], holds: impl Fn(&str) -> bool) -> Result<()> {
    eventually(Duration::from_secs(10), || {
        let shown = one.view("services", &["-o", "json"])?;
        ensure!(holds(&shown), "the maps hold something else:\n{shown}");
        for (number, other) in others.iter().enumerate() {
            let differs = other.view("services", &["-o", "json"])?;
            ensure!(differs == shown, "folder {number} gives\n{differs}\nkubectl gives\n{shown}\n{}", other.log());
        }
        Ok(())
    })
}
