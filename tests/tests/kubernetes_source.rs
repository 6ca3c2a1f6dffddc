//! The Kubernetes source against an API that does everything an API server does to its clients.
//!
//! Nothing here needs root. Every wait is bounded by [`PATIENCE`].

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use sheave::model::Change;
use sheave::model::desired::ServiceKey;
use sheave::source;
use sheave_tests::follower::{Folder, Follower, HERE, PATIENCE};
use sheave_tests::kube_api::{Gone, KubeApi, Resource, Verb};
use sheave_tests::log::Log;
use tokio::time::{Instant, timeout};

fn kubeconfig(folder: &Folder, server: &str, token: &str) -> PathBuf {
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": server}}],
        "users": [{"name": "test", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    });
    folder.write("config", &config.to_string());
    folder.path("config")
}

/// `name` is the test's, for its folder. The kubeconfig names `server`; `servers` are given besides.
fn start(name: &str, server: &str, servers: &[String]) -> Follower {
    start_knowing(name, server, servers, BTreeSet::new())
}

/// The same, with API servers that the cluster has named earlier.
fn start_knowing(name: &str, server: &str, servers: &[String], known: BTreeSet<SocketAddr>) -> Follower {
    let folder = Folder::new(name);
    let (kubeconfig, servers) = (kubeconfig(&folder, server, "secret"), servers.to_vec());
    Follower::start(|sender| source::kubernetes::run(Some(kubeconfig), servers, known, HERE.to_owned(), sender), folder)
}

async fn follow(name: &str, api: &KubeApi) -> Follower {
    start(name, &api.url(), &[]).synced().await
}

/// IPv4 endpoints of a Service's ports, policy Cluster.
fn endpoints(follower: &Follower, service: &str) -> usize {
    let key = ServiceKey { namespace: "default".into(), name: service.into() };
    follower.model.desired(&key).values().map(|port| port.endpoints4.cluster.len()).sum()
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Every kind has a watch that began after this many of them had.
async fn watches(api: &KubeApi, count: usize) {
    let kinds = [Resource::Services, Resource::EndpointSlices, Resource::Nodes];
    eventually("watches", || kinds.iter().all(|kind| api.count(*kind, Verb::Watch) >= count)).await;
}

fn service(name: &str) -> Value {
    json!({"kind": "Service", "metadata": {"name": name},
        "spec": {"clusterIP": "10.96.0.10", "ports": [{"port": 80}]}})
}

fn labelled(mut object: Value, label: &str, value: &str) -> Value {
    object["metadata"]["labels"][label] = value.into();
    object
}

fn slice(name: &str, service: &str) -> Value {
    let slice = json!({"kind": "EndpointSlice", "metadata": {"name": name}, "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080}], "endpoints": [{"addresses": ["10.1.0.1"]}]});
    labelled(slice, "kubernetes.io/service-name", service)
}

/// Otherwise a fresh node would serve nothing, or prune what it had served before it knows better.
#[tokio::test]
async fn what_exists_is_reported_and_then_synced_once() {
    let api = KubeApi::start().await;
    api.apply(service("web"));
    api.apply(slice("web-1", "web"));
    api.apply(json!({"kind": "Node", "metadata": {"name": "there"}}));
    api.apply(json!({"kind": "Node", "metadata": {"name": "here", "labels": {"topology.kubernetes.io/zone": "a"}}}));
    let mut running = follow("list", &api).await;
    assert_eq!(running.services(), BTreeSet::from(["web".to_owned()]));
    assert_eq!(endpoints(&running, "web"), 1);
    running.settle().await;
    assert_eq!(running.synced, 1);
    let nodes: Vec<&Change> = running.changes.iter().filter(|change| matches!(change, Change::Node(_))).collect();
    assert!(matches!(nodes[..], [Change::Node(node)] if node.name == "here" && node.zone.as_deref() == Some("a")));
}

/// Otherwise large clusters would be served in part, or their lists would weigh on the API server.
#[tokio::test]
async fn large_lists_come_in_pages() {
    let api = KubeApi::start().await;
    for i in 0..1201 {
        api.apply(service(&format!("web-{i}")));
    }
    let running = follow("pages", &api).await;
    assert_eq!(running.services().len(), 1201);
    assert_eq!(api.count(Resource::Services, Verb::List), 3);
}

/// Otherwise changes would not reach the kernel.
#[tokio::test]
async fn changes_are_followed() {
    let api = KubeApi::start().await;
    let mut running = follow("watch", &api).await;
    api.apply(service("web"));
    running.until_services(&["web"]).await;
    api.apply(slice("web-1", "web"));
    running.until("an endpoint", |running| endpoints(running, "web") == 1).await;
    api.delete(Resource::EndpointSlices, "default", "web-1");
    running.until("no endpoint", |running| endpoints(running, "web") == 0).await;
    api.delete(Resource::Services, "default", "web");
    running.until_services(&[]).await;
    api.apply(json!({"kind": "Node", "metadata": {"name": "here"}}));
    running.until("the Node", |running| matches!(running.changes.last(), Some(Change::Node(_)))).await;
    api.delete(Resource::Nodes, "", "here");
    running.until("no Node", |running| matches!(running.changes.last(), Some(Change::NodeGone))).await;
}

/// Otherwise every network hiccup would make every node list the whole cluster again.
#[tokio::test]
async fn a_lost_connection_is_resumed_where_it_was() {
    let api = KubeApi::start().await;
    let mut running = follow("resume", &api).await;
    watches(&api, 1).await;
    for round in 1..=3 {
        api.refuse(true);
        api.apply(service(&format!("web-{round}")));
        if round == 3 {
            api.delete(Resource::Services, "default", "web-1");
        }
        api.refuse(false);
        let expected = if round == 3 { vec!["web-2", "web-3"] } else { vec!["web-1", "web-2"] };
        running.until_services(&expected[..expected.len().min(round)]).await;
    }
    assert_eq!(api.count(Resource::Services, Verb::List), 1);
    assert_eq!(api.count(Resource::EndpointSlices, Verb::List), 1);
}

/// Otherwise a proxy that ends every watch at once would let all nodes together storm the API server.
#[tokio::test]
async fn watches_that_end_at_once_are_not_asked_for_in_a_storm() {
    let api = KubeApi::start().await;
    api.end_watches(true);
    let mut running = follow("storm", &api).await;
    watches(&api, 1).await;
    let before = api.count(Resource::Services, Verb::Watch);
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let asked = api.count(Resource::Services, Verb::Watch) - before;
    assert!((1..=4).contains(&asked), "{asked} watches in 1.2 s");
    api.end_watches(false);
    api.apply(service("web"));
    running.until_services(&["web"]).await;
    assert_eq!(api.count(Resource::Services, Verb::List), 1);
}

/// Otherwise a quiet kind would have to be listed again whenever a busy one has used up the history.
#[tokio::test]
async fn a_bookmark_saves_a_list() {
    let api = KubeApi::start().await;
    let mut running = follow("bookmark", &api).await;
    watches(&api, 1).await;
    for i in 0..10 {
        api.apply(slice(&format!("web-{i}"), "web"));
    }
    api.bookmark();
    running.settle().await;
    api.compact(Gone::Status);
    api.disconnect();
    watches(&api, 2).await;
    api.apply(service("web"));
    running.until_services(&["web"]).await;
    assert_eq!(api.count(Resource::Services, Verb::List), 1);
}

/// Otherwise a node that was away for long would serve deleted Services for ever, or stop following.
#[tokio::test]
async fn after_the_end_of_history_a_list_removes_what_was_deleted_meanwhile() {
    for gone in [Gone::Status, Gone::Event] {
        let api = KubeApi::start().await;
        for name in ["a", "b"] {
            api.apply(service(name));
            api.apply(slice(&format!("{name}-1"), name));
        }
        let mut running = follow(&format!("gone-{gone:?}"), &api).await;
        watches(&api, 1).await;
        api.refuse(true);
        api.delete(Resource::Services, "default", "a");
        api.delete(Resource::EndpointSlices, "default", "b-1");
        api.apply(service("c"));
        api.compact(gone);
        api.refuse(false);
        running.until_services(&["b", "c"]).await;
        running.until("no endpoint", |running| endpoints(running, "b") == 0).await;
        assert!(api.count(Resource::Services, Verb::List) >= 2, "{gone:?}");
        api.apply(service("d"));
        running.until_services(&["b", "c", "d"]).await;
        assert_eq!(running.synced, 1);
    }
}

/// Otherwise Sheave would serve what another proxy serves, or keep every headless Service's pods in memory.
#[tokio::test]
async fn foreign_and_headless_objects_do_not_arrive_and_go_when_they_become_so() {
    let proxy = "service.kubernetes.io/service-proxy-name";
    let headless = "service.kubernetes.io/headless";
    let api = KubeApi::start().await;
    api.apply(service("web"));
    api.apply(slice("web-1", "web"));
    api.apply(slice("web-2", "web"));
    api.apply(labelled(service("foreign"), proxy, "other"));
    api.apply(labelled(slice("foreign-1", "foreign"), proxy, "other"));
    api.apply(labelled(slice("headless-1", "headless"), headless, ""));
    let mut running = follow("selectors", &api).await;
    assert_eq!(running.services(), BTreeSet::from(["web".to_owned()]));
    let listed = running.changes.iter().find_map(|change| match change {
        Change::SlicesReplaced(slices) => Some(slices.len()),
        _ => None,
    });
    assert_eq!(listed, Some(2));

    api.apply(labelled(slice("web-1", "web"), headless, ""));
    running.until("a slice gone", |running| matches!(running.changes.last(), Some(Change::SliceGone(_)))).await;
    api.apply(labelled(service("web"), proxy, "other"));
    running.until_services(&[]).await;
    api.apply(service("web"));
    running.until_services(&["web"]).await;
}

/// Otherwise a node that starts while the API server is ill would crash, or prune what it had served before.
#[tokio::test]
async fn a_server_that_fails_at_the_start_is_waited_for() {
    let api = KubeApi::start().await;
    api.apply(service("web"));
    api.fail(None, 500);
    let mut running = start("ill", &api.url(), &[]);
    eventually("a second attempt", || api.count(Resource::Services, Verb::List) >= 2).await;
    running.settle().await;
    assert_eq!((running.synced, running.changes.len()), (0, 0));
    api.heal();
    running.until("synced", |running| running.synced == 1).await;
    running.until_services(&["web"]).await;
}

/// Otherwise Services would be pruned although their endpoints were never read.
#[tokio::test]
async fn nothing_is_synced_before_every_kind_was_listed() {
    let api = KubeApi::start().await;
    api.apply(service("web"));
    api.fail(Some(Resource::EndpointSlices), 403);
    let mut running = start("forbidden", &api.url(), &[]);
    running.until_services(&["web"]).await;
    eventually("a second attempt", || api.count(Resource::EndpointSlices, Verb::List) >= 2).await;
    running.settle().await;
    assert_eq!(running.synced, 0);
    api.heal();
    running.until("synced", |running| running.synced == 1).await;
}

fn service_cidr(name: &str, cidrs: &[&str]) -> Value {
    json!({"kind": "ServiceCIDR", "metadata": {"name": name}, "spec": {"cidrs": cidrs}})
}

/// Where ClusterIPs come from; `None` as long as nobody has said so.
fn service_cidrs(follower: &Follower) -> Option<Vec<String>> {
    Some(follower.model.service_cidrs()?.iter().map(ToString::to_string).collect())
}

async fn until_service_cidrs(follower: &mut Follower, expected: &[&str]) {
    let is = |cidrs: Vec<String>| cidrs.iter().eq(expected.iter());
    follower.until(&format!("ServiceCIDRs {expected:?}"), |follower| service_cidrs(follower).is_some_and(is)).await;
}

/// Otherwise packets to service addresses that nobody has would leave the cluster, or be dropped after the range was given
/// up.
#[tokio::test]
async fn service_cidrs_are_followed() {
    let api = KubeApi::start().await;
    api.apply(service_cidr("kubernetes", &["10.96.0.0/16", "fd00:96::/112"]));
    let mut running = follow("cidrs", &api).await;
    until_service_cidrs(&mut running, &["10.96.0.0/16", "fd00:96::/112"]).await;
    api.apply(service_cidr("extra", &["10.97.0.0/16"]));
    until_service_cidrs(&mut running, &["10.96.0.0/16", "10.97.0.0/16", "fd00:96::/112"]).await;
    api.delete(Resource::ServiceCidrs, "", "kubernetes");
    until_service_cidrs(&mut running, &["10.97.0.0/16"]).await;
}

/// Otherwise a node of a cluster that keeps ServiceCIDRs from its proxies, or is too old to have them, would serve nothing.
#[tokio::test]
async fn service_cidrs_that_may_not_be_read_keep_nobody_waiting_and_are_read_when_they_may_be() {
    for status in [403, 404] {
        let api = KubeApi::start().await;
        api.apply(service("web"));
        api.apply(service_cidr("kubernetes", &["10.96.0.0/16"]));
        api.fail(Some(Resource::ServiceCidrs), status);
        let log = Log::default();
        let guard = log.follow();
        let mut running = follow(&format!("unreadable-{status}"), &api).await;
        assert_eq!(running.services(), BTreeSet::from(["web".to_owned()]));
        until_service_cidrs(&mut running, &[]).await;
        eventually("a third look", || api.count(Resource::ServiceCidrs, Verb::List) >= 3).await;
        assert_eq!(log.lines_with("ServiceCIDRs").len(), 1, "{:?}", log.lines_with(""));
        api.heal();
        until_service_cidrs(&mut running, &["10.96.0.0/16"]).await;
        drop(guard);
    }
}

/// Otherwise a right that was taken away would leave a node dropping what may have become somebody else's address.
#[tokio::test]
async fn service_cidrs_that_may_no_longer_be_read_count_no_more() {
    let api = KubeApi::start().await;
    api.apply(service_cidr("kubernetes", &["10.96.0.0/16"]));
    let mut running = follow("withdrawn", &api).await;
    until_service_cidrs(&mut running, &["10.96.0.0/16"]).await;
    eventually("a watch", || api.count(Resource::ServiceCidrs, Verb::Watch) >= 1).await;
    api.fail(Some(Resource::ServiceCidrs), 403);
    api.disconnect();
    until_service_cidrs(&mut running, &[]).await;
    api.heal();
    until_service_cidrs(&mut running, &["10.96.0.0/16"]).await;
}

/// Otherwise a failing server would let packets out to service addresses that nobody has, until it is well again.
#[tokio::test]
async fn service_cidrs_of_a_server_that_fails_stay_known_and_at_the_start_unknown() {
    let api = KubeApi::start().await;
    api.apply(service_cidr("kubernetes", &["10.96.0.0/16"]));
    api.fail(Some(Resource::ServiceCidrs), 500);
    let mut running = follow("ill-cidrs", &api).await;
    eventually("a second attempt", || api.count(Resource::ServiceCidrs, Verb::List) >= 2).await;
    running.settle().await;
    assert_eq!(service_cidrs(&running), None);
    api.heal();
    until_service_cidrs(&mut running, &["10.96.0.0/16"]).await;
    api.fail(Some(Resource::ServiceCidrs), 500);
    api.disconnect();
    running.settle().await;
    assert_eq!(service_cidrs(&running).map(|cidrs| cidrs.len()), Some(1));
}

/// Otherwise a failing API server would take down what already works.
#[tokio::test]
async fn a_server_that_fails_later_changes_nothing() {
    let api = KubeApi::start().await;
    api.apply(service("web"));
    let mut running = follow("later", &api).await;
    watches(&api, 1).await;
    api.fail(None, 503);
    api.disconnect();
    watches(&api, 3).await;
    running.settle().await;
    assert_eq!(running.services(), BTreeSet::from(["web".to_owned()]));
    api.heal();
    api.apply(service("other"));
    running.until_services(&["other", "web"]).await;
}

/// Otherwise a node could not start before its control plane.
#[tokio::test]
async fn a_server_that_is_not_there_yet_is_waited_for() {
    let reserved = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = reserved.local_addr().expect("its address");
    drop(reserved);
    let mut running = start("absent", &format!("http://{address}"), &[]);
    running.settle().await;
    assert!(!running.task.is_finished());
    let api = KubeApi::serve(TcpListener::bind(address).expect("the same port"));
    api.apply(service("web"));
    running.until("synced", |running| running.synced == 1).await;
    running.until_services(&["web"]).await;
}

/// Otherwise the loss of one API server would freeze the node although others answer.
#[tokio::test]
async fn the_next_of_several_servers_takes_over() {
    let apis = [KubeApi::start().await, KubeApi::start().await];
    for api in &apis {
        api.apply(service("web"));
    }
    apis[0].refuse(true);
    let servers = [apis[0].url(), apis[1].url()];
    // The kubeconfig's own server is replaced: it would never answer.
    let mut running = start("failover", "http://127.0.0.1:1", &servers);
    running.until("synced", |running| running.synced == 1).await;
    assert_eq!(apis[0].requests().len(), 0);
    watches(&apis[1], 1).await;
    apis[0].refuse(false);
    apis[1].refuse(true);
    watches(&apis[0], 1).await;
    for api in &apis {
        api.apply(service("other"));
    }
    running.until_services(&["other", "web"]).await;
    assert_eq!(apis[0].count(Resource::Services, Verb::List), 0, "the watch went on where it was");
}

/// The slice that names an API server.
fn naming(server: &KubeApi) -> Value {
    let mut slice = slice("kubernetes", "kubernetes");
    slice["ports"] = json!([{"name": "https", "port": server.address().port()}]);
    slice["endpoints"] = json!([{"addresses": [server.address().ip()]}]);
    slice
}

/// Otherwise one API server's end would freeze every node that was told of that one only.
#[tokio::test]
async fn a_server_that_only_the_cluster_names_takes_over_and_back() {
    let apis = [KubeApi::start().await, KubeApi::start().await];
    for api in &apis {
        api.apply(service("web"));
        api.apply(naming(&apis[1]));
    }
    let mut running = follow("named", &apis[0]).await;
    watches(&apis[0], 1).await;
    apis[0].refuse(true);
    watches(&apis[1], 1).await;
    for api in &apis {
        api.apply(service("other"));
    }
    running.until_services(&["other", "web"]).await;
    assert_eq!(apis[1].count(Resource::Services, Verb::List), 0, "the watch went on where it was");

    // An empty set is nothing to go by: the last servers that were named stay known.
    apis[0].refuse(false);
    apis.iter().for_each(|api| api.delete(Resource::EndpointSlices, "default", "kubernetes"));
    running.until("no slice", |running| matches!(running.changes.last(), Some(Change::SliceGone(_)))).await;
    apis[1].refuse(true);
    watches(&apis[0], 2).await;
    apis[0].refuse(true);
    apis[1].refuse(false);
    watches(&apis[1], 2).await;
    for api in &apis {
        api.apply(service("third"));
    }
    running.until_services(&["other", "third", "web"]).await;
}

/// Otherwise a server that is gone for good would be asked for ever, and one that came in its place never.
#[tokio::test]
async fn the_servers_that_the_cluster_names_are_those_it_named_last() {
    let apis = [KubeApi::start().await, KubeApi::start().await, KubeApi::start().await];
    for api in &apis {
        api.apply(service("web"));
        api.apply(naming(&apis[1]));
    }
    let mut running = follow("renamed", &apis[0]).await;
    watches(&apis[0], 1).await;
    for api in &apis {
        api.apply(naming(&apis[2]));
    }
    running.until("the slice", |running| matches!(running.changes.last(), Some(Change::Slice(_)))).await;
    apis[0].refuse(true);
    watches(&apis[2], 1).await;
    assert_eq!(apis[1].requests().len(), 0);
}

/// Otherwise a restart while the configured server is dead would leave a node without changes.
#[tokio::test]
async fn a_server_that_the_cluster_had_named_before_a_restart_is_asked() {
    let api = KubeApi::start().await;
    api.apply(service("web"));
    let known = BTreeSet::from([api.address()]);
    let mut running = start_knowing("known", "http://127.0.0.1:1", &[], known).synced().await;
    running.until_services(&["web"]).await;
}

/// Otherwise a cluster's API would not let Sheave in, or a wrong token would end the process.
#[tokio::test]
async fn the_kubeconfigs_token_is_used_and_a_refused_one_is_tried_again() {
    let api = KubeApi::start().await;
    api.require_token("another");
    let mut running = start("token", &api.url(), &[]);
    eventually("a second attempt", || api.count(Resource::Services, Verb::List) >= 2).await;
    assert_eq!(running.synced, 0);
    api.require_token("secret");
    running.until("synced", |running| running.synced == 1).await;
}

/// Otherwise a mistake in the configuration would look like a server that doesn't answer.
#[tokio::test]
async fn a_configuration_that_cannot_work_is_an_error_that_names_it() {
    let folder = Folder::new("broken");
    let (sender, _receiver) = tokio::sync::mpsc::channel(1);
    let run = |path: PathBuf, servers: &[&str]| {
        let servers = servers.iter().map(|server| (*server).to_owned()).collect();
        let sender = sender.clone();
        async move {
            let run = source::kubernetes::run(Some(path), servers, BTreeSet::new(), "here".to_owned(), sender);
            let result = timeout(PATIENCE, run).await.expect("an answer at once");
            result.expect_err("an error").to_string()
        }
    };
    let missing = folder.0.join("missing");
    assert!(run(missing.clone(), &[]).await.contains(&missing.display().to_string()));
    let broken = folder.0.join("broken");
    std::fs::write(&broken, "clusters: [").expect("a file can be written");
    assert!(run(broken.clone(), &[]).await.contains(&broken.display().to_string()));
    let sound = kubeconfig(&folder, "https://192.0.2.1:6443", "secret");
    assert!(run(sound, &["ftp://192.0.2.1"]).await.contains("ftp://192.0.2.1"));
}

/// Otherwise a controller that stops would leave its watches behind.
#[tokio::test]
async fn the_source_ends_when_nobody_listens() {
    let api = KubeApi::start().await;
    let mut running = follow("end", &api).await;
    running.receiver.close();
    let result = timeout(PATIENCE, &mut running.task).await.expect("ends in time").expect("no panic");
    assert!(result.is_ok());
}
