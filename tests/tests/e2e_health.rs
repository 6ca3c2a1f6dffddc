//! What load balancers, kubelets and Prometheus ask a node by HTTP, and what the API server is told: healthCheckNodePorts,
//! the proxy's own health, metrics and Events.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use sheave_tests::agent::Agent;
use sheave_tests::client;
use sheave_tests::http::{self, Answer};
use sheave_tests::kube_api::{KubeApi, Resource};
use sheave_tests::leftovers::unique_name;
use sheave_tests::netns::Namespace;
use sheave_tests::patience::patient;
use sheave_tests::process::eventually;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{Cluster, Shape};

const NODE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 50, 1));
const HEALTH_CHECK: u16 = 32_100;
/// More than a change takes on a busy machine, and than a port takes that is tried again.
const SOON: Duration = Duration::from_secs(15);

fn start(arguments: &[&str]) -> Result<Scenario> {
    Scenario::start_with_folder(Shape { pod_counts: [3, 1], ..Shape::default() }, arguments)
}

/// A load-balancer Service under policy Local, as an API server keeps it.
fn balanced(name: &str, number: u8, health_check: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "uid": format!("uid-of-{name}")},
        "spec": {
            "type": "LoadBalancer", "clusterIP": format!("10.96.0.{number}"), "clusterIPs": [format!("10.96.0.{number}")],
            "externalTrafficPolicy": "Local", "healthCheckNodePort": health_check,
            "ports": [
                {"name": "http", "port": 80, "targetPort": server::WHO, "nodePort": 30_000 + u16::from(number)},
                {"name": "echo", "port": 7, "targetPort": server::ECHO, "nodePort": 30_100 + u16::from(number)},
            ],
        },
    })
}

/// A slice of a Service.
fn slice(service: &str, number: u8, endpoints: &[Value]) -> Value {
    let ports = json!([{"name": "http", "port": server::WHO}, {"name": "echo", "port": server::ECHO}]);
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("{service}-{number}"), "namespace": "default",
            "labels": {"kubernetes.io/service-name": service}, "annotations": {}},
        "addressType": "IPv4", "ports": ports, "endpoints": endpoints,
    })
}

fn endpoint(scenario: &Scenario, node: usize, number: usize, conditions: &Value) -> Value {
    let pod = scenario.pod(node, number);
    json!({"addresses": [pod.address], "nodeName": pod.node, "conditions": conditions})
}

fn ready(scenario: &Scenario, node: usize, number: usize) -> Value {
    endpoint(scenario, node, number, &json!({"ready": true}))
}

fn terminating(scenario: &Scenario, node: usize, number: usize) -> Value {
    endpoint(scenario, node, number, &json!({"ready": false, "serving": true, "terminating": true}))
}

/// Puts objects into the folder that Sheave reads, each in a file of its own.
fn publish(scenario: &Scenario, objects: &[Value]) -> Result<()> {
    objects.iter().try_for_each(|object| scenario.manifests().write(&file(object), &object.to_string()))
}

fn file(object: &Value) -> String {
    format!("{}-{}.json", object["kind"], object["metadata"]["name"]).replace('"', "")
}

fn get(from: &Namespace, port: u16, path: &str) -> Result<Answer> {
    from.run(|| http::get(SocketAddr::new(NODE, port), path))
}

/// Waits until a question has this status for an answer.
fn becomes(from: &Namespace, port: u16, path: &str, status: u16) -> Result<Answer> {
    eventually(SOON, || {
        let answer = get(from, port, path)?;
        ensure!(answer.status == status, "{path} of port {port} should become {status}: {answer:?}");
        Ok(answer)
    })
}

/// Waits until a health check counts so many endpoints.
fn counts(from: &Namespace, port: u16, endpoints: u64) -> Result<Answer> {
    let answer = eventually(SOON, || {
        let answer = get(from, port, "/")?;
        ensure!(answer.json()?["localEndpoints"] == endpoints, "not {endpoints} endpoints: {answer:?}");
        Ok(answer)
    })?;
    let status = if endpoints > 0 { 200 } else { 503 };
    ensure!(answer.status == status, "{endpoints} endpoints should be {status}: {answer:?}");
    ensure!(answer.headers["x-load-balancing-endpoint-weight"] == endpoints.to_string(), "{answer:?}");
    Ok(answer)
}

/// Waits until nobody serves a port of an address.
fn is_refused(from: &Namespace, address: SocketAddr) -> Result<()> {
    eventually(SOON, || match from.run(|| std::net::TcpStream::connect_timeout(&address, patient(client::LIMIT))) {
        Ok(_) => bail!("{address} accepts connections"),
        Err(error) => {
            ensure!(error.kind() == std::io::ErrorKind::ConnectionRefused, "{address}: {error}");
            Ok(())
        }
    })
}

/// A cloud's load balancer would send clients to nodes without endpoints, where they are dropped, or to none at all.
#[test]
fn a_load_balancer_learns_which_nodes_have_endpoints() -> Result<()> {
    let scenario = start(&[])?;
    let outside = &scenario.cluster.client;
    let web = balanced("web", 10, HEALTH_CHECK);
    publish(&scenario, &[web.clone(), slice("web", 1, &[])])?;
    counts(outside, HEALTH_CHECK, 0)?;

    publish(&scenario, &[slice("web", 1, &[ready(&scenario, 1, 1), ready(&scenario, 2, 1)])])?;
    let answer = counts(outside, HEALTH_CHECK, 1)?;
    ensure!(
        answer.json()?
            == json!({"service": {"namespace": "default", "name": "web"}, "localEndpoints": 1, "serviceProxyHealthy": true}),
        "{answer:?}"
    );
    ensure!(answer.headers["content-type"] == "application/json", "{answer:?}");
    ensure!(answer.headers["x-content-type-options"] == "nosniff", "{answer:?}");

    // A pod in two slices is one pod.
    publish(&scenario, &[slice("web", 2, &[ready(&scenario, 1, 1), ready(&scenario, 1, 2)])])?;
    counts(outside, HEALTH_CHECK, 2)?;
    let (pod, node) = (&scenario.pod(1, 3).namespace, &scenario.node().namespace);
    for (who, from) in
        [("the node itself", node), ("a pod of the node", pod), ("a pod elsewhere", &scenario.pod(2, 1).namespace)]
    {
        counts(from, HEALTH_CHECK, 2).with_context(|| format!("{who} asks"))?;
    }

    scenario.manifests().remove(&file(&slice("web", 2, &[])))?;
    publish(&scenario, &[slice("web", 1, &[terminating(&scenario, 1, 1), ready(&scenario, 2, 1)])])?;
    counts(outside, HEALTH_CHECK, 0)?;
    // Its clients are still served meanwhile.
    outside.run(|| client::who(SocketAddr::new(NODE, 30_010))).context("a terminating pod finishes its work")?;
    publish(&scenario, &[slice("web", 1, &[ready(&scenario, 1, 2)])])?;
    counts(outside, HEALTH_CHECK, 1)?;

    let mut moved = web.clone();
    moved["spec"]["healthCheckNodePort"] = (HEALTH_CHECK + 1).into();
    publish(&scenario, &[moved.clone()])?;
    counts(outside, HEALTH_CHECK + 1, 1)?;
    is_refused(outside, SocketAddr::new(NODE, HEALTH_CHECK))?;
    moved["spec"]["externalTrafficPolicy"] = "Cluster".into();
    publish(&scenario, &[moved])?;
    is_refused(outside, SocketAddr::new(NODE, HEALTH_CHECK + 1))?;
    publish(&scenario, std::slice::from_ref(&web))?;
    counts(outside, HEALTH_CHECK, 1)?;
    scenario.manifests().remove(&file(&web))?;
    is_refused(outside, SocketAddr::new(NODE, HEALTH_CHECK))
}

/// Health checks would be answered where node ports are not, or not where they are.
#[test]
fn health_checks_are_answered_on_the_addresses_of_node_ports() -> Result<()> {
    let dual = |scenario: &Scenario| {
        let mut web = balanced("web", 10, HEALTH_CHECK);
        web["spec"]["clusterIPs"] = json!(["10.96.0.10", "fd00:96::10"]);
        let mut six = slice("web", 6, &[]);
        six["addressType"] = "IPv6".into();
        let here = |number| json!({"addresses": [scenario.pod(1, number).address6], "nodeName": scenario.node().name});
        six["endpoints"] = json!([here(1), here(2)]);
        [web, slice("web", 4, &[ready(scenario, 1, 1)]), six]
    };
    let gateway = SocketAddr::new(Ipv4Addr::new(10, 244, 1, 1).into(), HEALTH_CHECK);
    let second = SocketAddr::new(Ipv4Addr::new(192, 168, 50, 11).into(), HEALTH_CHECK);
    let six: SocketAddr = format!("[fd00:50::1]:{HEALTH_CHECK}").parse()?;
    let asks = |scenario: &Scenario, address: SocketAddr, endpoints: u64| {
        eventually(SOON, || {
            let answer = scenario.cluster.client.run(|| http::get(address, "/any/path"))?;
            ensure!(answer.status == 200 && answer.json()?["localEndpoints"] == endpoints, "{address}: {answer:?}");
            Ok(())
        })
    };

    let primary = start(&[])?;
    publish(&primary, &dual(&primary))?;
    asks(&primary, SocketAddr::new(NODE, HEALTH_CHECK), 1)?;
    asks(&primary, six, 2)?;
    primary.cluster.client.ip(&["route add 10.244.1.0/24 via 192.168.50.1"])?;
    is_refused(&primary.cluster.client, gateway)?;
    // An address that the machine gets later.
    primary.manifests().node("node-1", &[second.ip()])?;
    is_refused(&primary.node().namespace, SocketAddr::new(NODE, HEALTH_CHECK))?;
    primary.node().namespace.ip(&["address add 192.168.50.11/24 dev eth0"])?;
    asks(&primary, second, 1)?;
    drop(primary);

    let all = start(&["--nodeport-addresses", "all"])?;
    all.cluster.client.ip(&["route add 10.244.1.0/24 via 192.168.50.1"])?;
    publish(&all, &dual(&all))?;
    for (address, endpoints) in [(SocketAddr::new(NODE, HEALTH_CHECK), 1), (gateway, 1), (six, 2)] {
        asks(&all, address, endpoints)?;
    }
    all.node().namespace.ip(&["address add 192.168.50.11/24 dev eth0"])?;
    asks(&all, second, 1)?;
    drop(all);

    let networks = start(&["--nodeport-addresses", "192.168.50.0/28"])?;
    publish(&networks, &dual(&networks))?;
    asks(&networks, SocketAddr::new(NODE, HEALTH_CHECK), 1)?;
    networks.cluster.client.ip(&["route add 10.244.1.0/24 via 192.168.50.1"])?;
    is_refused(&networks.cluster.client, gateway)
}

/// An API server that a test steers, on node 1, and what there is to say to it.
struct Watched {
    agent: Option<Agent>,
    api: KubeApi,
    kubeconfig: std::path::PathBuf,
    cluster: Cluster,
}

impl Watched {
    fn build() -> Result<Self> {
        let cluster = Cluster::build(Shape { pod_counts: [1, 0], ..Shape::default() })?;
        let api = KubeApi::serve(cluster.nodes[0].namespace.run(|| TcpListener::bind("127.0.0.1:0"))?);
        let kubeconfig = std::env::temp_dir().join(unique_name());
        std::fs::write(&kubeconfig, api.kubeconfig())?;
        let watched = Self { agent: None, api, kubeconfig, cluster };
        watched.node(|_| {});
        Ok(watched)
    }

    fn start(arguments: &[&str]) -> Result<Self> {
        let mut watched = Self::build()?;
        watched.agent = Some(watched.agent(arguments)?);
        Ok(watched)
    }

    fn agent(&self, arguments: &[&str]) -> Result<Agent> {
        let node = &self.cluster.nodes[0];
        Agent::start_with_kubeconfig(node, &node.name, &self.kubeconfig, arguments)
    }

    fn namespace(&self) -> &Namespace {
        &self.cluster.nodes[0].namespace
    }

    /// Publishes the Node, changed.
    fn node(&self, change: impl FnOnce(&mut Value)) {
        let mut node = json!({"kind": "Node", "metadata": {"name": self.cluster.nodes[0].name},
            "status": {"addresses": [{"type": "InternalIP", "address": NODE}]}});
        change(&mut node);
        self.api.apply(node);
    }

    fn endpoint(&self) -> Value {
        let pod = &self.cluster.nodes[0].pods[0];
        json!({"addresses": [pod.address], "nodeName": pod.node})
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.kubeconfig);
    }
}

/// The owner of a Service would search in vain for why the load balancer avoids its nodes; or one Service's trouble would
/// be everybody's.
#[test]
fn a_health_check_without_its_port_is_an_event_on_the_service_and_nobody_elses_trouble() -> Result<()> {
    let watched = Watched::start(&[])?;
    let outside = &watched.cluster.client;
    let taken = watched.namespace().run(|| TcpListener::bind(("0.0.0.0", HEALTH_CHECK)))?;
    for (name, number, port) in [("unlucky", 10, HEALTH_CHECK), ("lucky", 11, HEALTH_CHECK + 1)] {
        watched.api.apply(balanced(name, number, port));
        watched.api.apply(slice(name, 1, &[watched.endpoint()]));
    }
    counts(outside, HEALTH_CHECK + 1, 1)?;
    let event = eventually(SOON, || {
        let events = watched.api.objects(Resource::Events);
        events.first().cloned().context("no Event")
    })?;
    for (field, expected) in [
        ("/type", "Warning"),
        ("/reason", "FailedToStartServiceHealthcheck"),
        ("/action", "Listen"),
        ("/regarding/kind", "Service"),
        ("/regarding/namespace", "default"),
        ("/regarding/name", "unlucky"),
        ("/regarding/uid", "uid-of-unlucky"),
        ("/reportingController", "sheave"),
        ("/reportingInstance", "node-1"),
        ("/metadata/namespace", "default"),
    ] {
        let found = event.pointer(field).and_then(Value::as_str);
        ensure!(found == Some(expected), "{field} should be {expected}: {event:#}");
    }
    let note = event["note"].as_str().unwrap_or_default();
    ensure!(note.contains("node-1") && note.contains("default/unlucky") && note.contains("32100"), "{note}");

    drop(taken);
    counts(outside, HEALTH_CHECK, 1).context("once the port is free")?;
    let all = watched.api.objects(Resource::Events);
    ensure!(all.len() == 1, "more than one Event: {all:#?}");
    Ok(())
}

/// Where nobody takes Events, the log is the place to look.
#[test]
fn without_an_api_server_a_health_check_without_its_port_is_in_the_log() -> Result<()> {
    let scenario = start(&[])?;
    let taken = scenario.node().namespace.run(|| TcpListener::bind((NODE, HEALTH_CHECK)))?;
    publish(&scenario, &[balanced("unlucky", 10, HEALTH_CHECK), slice("unlucky", 1, &[ready(&scenario, 1, 1)])])?;
    eventually(SOON, || {
        let log = scenario.agent.log();
        let named = |line: &str| line.contains("default/unlucky") && line.contains("192.168.50.1:32100");
        ensure!(log.lines().any(named), "not in the log:\n{log}");
        Ok(())
    })?;
    drop(taken);
    counts(&scenario.cluster.client, HEALTH_CHECK, 1).context("once the port is free")?;
    Ok(())
}

const HEALTHZ: u16 = 10_256;

/// Load balancers would go on to send clients to a node that is about to vanish, or the kubelet would restart the proxy
/// that serves its last connections.
#[test]
fn a_node_that_leaves_is_not_healthy_but_its_proxy_lives() -> Result<()> {
    let watched = Watched::start(&[])?;
    let outside = &watched.cluster.client;
    watched.api.apply(balanced("web", 10, HEALTH_CHECK));
    watched.api.apply(slice("web", 1, &[watched.endpoint()]));
    let answer = becomes(outside, HEALTHZ, "/healthz", 200)?;
    ensure!(answer.headers["content-type"] == "application/json", "{answer:?}");
    let body = answer.json()?;
    ensure!(body["healthy"] == true && body["nodeEligible"] == true, "{body}");
    let time = |field: &str| body[field].as_str().unwrap_or_default().to_owned();
    ensure!(time("lastUpdated") == time("currentTime") && time("currentTime").starts_with("20"), "{body}");

    let taint = |key: &str| json!({"taints": [{"key": key, "effect": "NoSchedule"}]});
    for (what, field, value) in [
        ("tainted", "spec", taint("ToBeDeletedByClusterAutoscaler")),
        ("being deleted", "metadata", json!({"name": "node-1", "deletionTimestamp": "2026-01-01T00:00:00Z"})),
    ] {
        watched.node(|node| node[field] = value);
        let body = becomes(outside, HEALTHZ, "/healthz", 503).context(what)?.json()?;
        ensure!(body["healthy"] == false && body["nodeEligible"] == false, "{what}: {body}");
        let answer = becomes(outside, HEALTHZ, "/livez", 200).context(what)?;
        ensure!(answer.json()?["healthy"] == true, "{what}: {answer:?}");
        ensure!(counts(outside, HEALTH_CHECK, 1)?.json()?["serviceProxyHealthy"] == true, "{what}");
        watched.node(|_| {});
        becomes(outside, HEALTHZ, "/healthz", 200).with_context(|| format!("no longer {what}"))?;
    }
    watched.node(|node| node["spec"] = taint("node.kubernetes.io/unschedulable"));
    watched.api.delete(Resource::Nodes, "", "node-1");
    becomes(outside, HEALTHZ, "/healthz", 503).context("the Node is gone")?;
    becomes(outside, HEALTHZ, "/livez", 200)?;
    ensure!(get(outside, HEALTHZ, "/")?.status == 404, "something else is served");
    Ok(())
}

/// The same from a folder.
#[test]
fn a_taint_in_a_manifest_counts() -> Result<()> {
    let scenario = start(&[])?;
    let node = &scenario.node().namespace;
    becomes(node, HEALTHZ, "/healthz", 200)?;
    let tainted = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"},
        "spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]},
        "status": {"addresses": [{"type": "InternalIP", "address": NODE}]}});
    scenario.manifests().write("node-node-1.yaml", &tainted.to_string())?;
    becomes(node, HEALTHZ, "/healthz", 503)?;
    becomes(node, HEALTHZ, "/livez", 200)?;
    scenario.manifests().node("node-1", &[NODE])?;
    becomes(node, HEALTHZ, "/healthz", 200)?;
    Ok(())
}

/// The kubelet would restart a proxy that only waits for the API server, or clients would come before it knows a Service.
#[test]
fn a_starting_proxy_is_live_and_healthy_once_it_has_synced() -> Result<()> {
    let watched = Watched::build()?;
    let outside = &watched.cluster.client;
    watched.api.refuse(true);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let asked = (becomes(outside, HEALTHZ, "/livez", 200), becomes(outside, HEALTHZ, "/healthz", 503));
            watched.api.refuse(false);
            asked
        });
        // In this thread, because it ends with the one that starts it.
        let agent = watched.agent(&[]);
        let (live, unready) = asking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let _agent = agent?;
        ensure!(live?.json()?["lastUpdated"].is_null(), "nothing was updated yet");
        ensure!(unready?.json()?["healthy"] == false, "not synced");
        becomes(outside, HEALTHZ, "/healthz", 200)?;
        Ok(())
    })
}

/// A proxy that no longer follows would go on to get clients.
#[test]
fn a_change_that_cannot_be_applied_makes_the_proxy_unhealthy_until_it_is() -> Result<()> {
    let scenario = start(&["--max-services", "3", "--health-timeout", "1"])?;
    let outside = &scenario.cluster.client;
    publish(&scenario, &[balanced("web", 10, HEALTH_CHECK), slice("web", 1, &[ready(&scenario, 1, 1)])])?;
    counts(outside, HEALTH_CHECK, 1)?;
    let more = [balanced("more", 11, HEALTH_CHECK + 1), slice("more", 1, &[ready(&scenario, 1, 1)])];
    publish(&scenario, &more)?;
    let body = becomes(outside, HEALTHZ, "/healthz", 503)?.json()?;
    ensure!(body["nodeEligible"] == true && body["healthy"] == false, "{body}");
    ensure!(body["lastUpdated"].as_str() < body["currentTime"].as_str(), "{body}");
    becomes(outside, HEALTHZ, "/livez", 503)?;
    let answer = becomes(outside, HEALTH_CHECK, "/", 503)?;
    let body = answer.json()?;
    ensure!(body["localEndpoints"] == 1 && body["serviceProxyHealthy"] == false, "{body}");
    scenario.manifests().remove(&file(&more[0]))?;
    for (port, path) in [(HEALTHZ, "/healthz"), (HEALTHZ, "/livez"), (HEALTH_CHECK, "/")] {
        becomes(outside, port, path, 200)?;
    }
    Ok(())
}

const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10_249);

/// A metric's value by its name and labels as they are written; `None` if it isn't there.
fn metric(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// Dashboards and alerts made for kube-proxy would stay empty.
#[test]
fn metrics_carry_kube_proxys_names_and_count() -> Result<()> {
    let scenario = start(&[])?;
    let node = &scenario.node().namespace;
    let scrape = || {
        let answer = node.run(|| http::get(METRICS, "/metrics"))?;
        ensure!(answer.status == 200 && answer.headers["content-type"].starts_with("text/plain"), "{answer:?}");
        Ok(answer.body)
    };
    let reaches = |name: &str, least: f64| {
        eventually(SOON, || {
            let text = scrape()?;
            let value = metric(&text, name).with_context(|| format!("no {name} in:\n{text}"))?;
            ensure!(value >= least, "{name} is {value}, not {least}");
            Ok(value)
        })
    };
    let before = scrape()?;
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map(|now| now.as_secs_f64());
    let started = now()?;
    becomes(node, HEALTHZ, "/healthz", 200)?;
    becomes(node, HEALTHZ, "/livez", 200)?;

    // Endpoints elsewhere only, written for a change of just now.
    let mut elsewhere = slice("web", 1, &[ready(&scenario, 2, 1)]);
    let triggered = rfc3339(SystemTime::now() - Duration::from_millis(1));
    elsewhere["metadata"]["annotations"]["endpoints.kubernetes.io/last-change-trigger-time"] = triggered.into();
    let mut web = balanced("web", 10, HEALTH_CHECK);
    web["spec"]["internalTrafficPolicy"] = "Local".into();
    publish(&scenario, &[web.clone()])?;
    let services = "kubeproxy_sync_proxy_rules_service_changes_total";
    reaches(services, metric(&before, services).context("no count of changes")? + 1.0)?;
    publish(&scenario, &[elsewhere])?;
    reaches("kubeproxy_network_programming_duration_seconds_count", 1.0)?;
    let sum = reaches("kubeproxy_network_programming_duration_seconds_sum", 0.0)?;
    ensure!(sum < 10.0, "{sum} s from the change to the kernel");
    reaches("kubeproxy_sync_proxy_rules_endpoint_changes_total", 1.0)?;
    for policy in ["internal", "external"] {
        let name = format!("kubeproxy_sync_proxy_rules_no_local_endpoints_total{{traffic_policy=\"{policy}\"}}");
        reaches(&name, 2.0)?;
    }
    for name in ["last_timestamp_seconds", "last_queued_timestamp_seconds"] {
        let time = reaches(&format!("kubeproxy_sync_proxy_rules_{name}"), started)?;
        ensure!(time <= now()? + 1.0, "{name} is {time}");
    }
    let passes = "kubeproxy_sync_proxy_rules_duration_seconds_count";
    reaches(passes, metric(&before, passes).context("no count of passes")? + 2.0)?;
    for name in ["endpoint_changes_pending", "service_changes_pending"] {
        let text = scrape()?;
        ensure!(metric(&text, &format!("kubeproxy_sync_proxy_rules_{name}")) == Some(0.0), "{name} in:\n{text}");
    }
    for endpoint in ["healthz", "livez"] {
        reaches(&format!("kubeproxy_proxy_{endpoint}_total{{code=\"200\"}}"), 1.0)?;
    }

    publish(&scenario, &[slice("web", 1, &[ready(&scenario, 1, 1)])])?;
    counts(node, HEALTH_CHECK, 1)?;
    let text = scrape()?;
    let external = metric(&text, "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"external\"}");
    ensure!(external == Some(0.0), "{external:?} once there is a local endpoint");
    for _ in 0..3 {
        scenario.cluster.client.run(|| client::who(SocketAddr::new(NODE, 30_010)))?;
    }
    let labels = "{port=\"http\",protocol=\"TCP\",service=\"default/web\"}";
    reaches(&format!("sheave_service_connections_total{labels}"), 3.0)?;
    reaches(&format!("sheave_service_packets_total{labels}"), 18.0)?;
    reaches(&format!("sheave_service_bytes_total{labels}"), 18.0 * 40.0)?;
    // Nothing of the kind exists on this address.
    let unknown = SocketAddr::new(Ipv4Addr::new(10, 96, 0, 10).into(), 81);
    is_refused(&scenario.pod(1, 2).namespace, unknown)?;
    reaches("sheave_drops_total{reason=\"unknown_port\"}", 1.0)?;
    Ok(())
}

/// A time as Kubernetes writes it.
fn rfc3339(time: SystemTime) -> String {
    k8s_openapi::jiff::Timestamp::try_from(time).map(|time| time.to_string()).unwrap_or_default()
}

/// A second proxy on the node (kube-proxy during a migration) would keep Sheave from serving traffic.
#[test]
fn ports_that_others_have_stop_nothing_and_are_served_once_they_are_free() -> Result<()> {
    let mut watched = Watched::build()?;
    let take = |port| watched.namespace().run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)));
    let taken = [take(HEALTHZ)?, take(METRICS.port())?];
    watched.agent = Some(watched.agent(&[])?);
    watched.api.apply(balanced("web", 10, HEALTH_CHECK));
    watched.api.apply(slice("web", 1, &[watched.endpoint()]));
    counts(&watched.cluster.client, HEALTH_CHECK, 1)?;
    drop(taken);
    becomes(watched.namespace(), HEALTHZ, "/healthz", 200)?;
    eventually(SOON, || watched.namespace().run(|| http::get(METRICS, "/metrics")))?;
    Ok(())
}

/// Hardened nodes would have ports open that nobody wants.
#[test]
fn servers_can_be_turned_off_and_moved() -> Result<()> {
    let off = start(&["--healthz-bind-address=", "--metrics-bind-address="])?;
    let node = &off.node().namespace;
    publish(&off, &[balanced("web", 10, HEALTH_CHECK), slice("web", 1, &[ready(&off, 1, 1)])])?;
    counts(node, HEALTH_CHECK, 1)?;
    is_refused(node, SocketAddr::new(NODE, HEALTHZ))?;
    is_refused(node, METRICS)?;
    drop(off);
    let moved =
        start(&["--healthz-bind-address=192.168.50.1:9000,[::1]:9000", "--metrics-bind-address=192.168.50.1:9001"])?;
    becomes(&moved.cluster.client, 9_000, "/healthz", 200)?;
    becomes(&moved.cluster.client, 9_001, "/metrics", 200)?;
    moved.node().namespace.run(|| http::get("[::1]:9000".parse()?, "/livez"))?;
    is_refused(&moved.node().namespace, METRICS)
}
