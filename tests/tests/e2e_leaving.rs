//! Pods that leave, and Services that go, under open connections and flows of datagrams. Sheave runs on node 1.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sheave_tests::client::{self, Conversation, at};
use sheave_tests::objects::{endpoint, ready, service, slice};
use sheave_tests::process::eventually;
use sheave_tests::scenario::Scenario;
use sheave_tests::server::{ECHO, UDP, WHO};
use sheave_tests::topology::{Pod, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
const TALK: u16 = 30_007;
const NAMES: u16 = 30_053;

fn web(scenario: &Scenario, endpoints: &[Value]) -> Result<()> {
    let spec = json!({"type": "NodePort", "clusterIP": WEB, "ports": [
        {"name": "http", "port": 80}, {"name": "talk", "port": 7, "nodePort": TALK},
        {"name": "names", "port": 53, "protocol": "UDP", "nodePort": NAMES}]});
    let mut slice = slice("web", 1, &[("http", WHO), ("talk", ECHO), ("names", UDP)], endpoints);
    slice["ports"][2]["protocol"] = "UDP".into();
    scenario.manifests().objects("web", &[service("web", &spec), slice])
}

fn backends(shown: &Value) -> usize {
    let rows = shown.as_array().into_iter().flatten();
    rows.filter_map(|row| row["cluster_backends"].as_array()).map(Vec::len).max().unwrap_or_default()
}

/// Downloads would break with every deployment, although the old pods wait for them.
#[test]
fn open_connections_stay_with_a_pod_that_terminates_and_that_is_gone_from_the_slices() -> Result<()> {
    let scenario = Scenario::start_with_folder(Shape { pod_counts: [3, 2], ..Shape::default() }, &[])?;
    let stays = scenario.pod(1, 3);
    let leaving =
        |pod: &Pod| endpoint(pod, json!({"conditions": {"ready": false, "serving": true, "terminating": true}}));
    for old in [scenario.pod(1, 2), scenario.pod(2, 1)] {
        let asks = &scenario.pod(1, 1).namespace;
        let open = |client: &sheave_tests::netns::Namespace, target| client.run(|| Conversation::open(target));
        web(&scenario, &ready(&[old]))?;
        scenario.until_answered(asks, at(WEB, 80), &[old])?;
        let mut conversations =
            vec![open(asks, at(WEB, 7))?, open(asks, at(NODE, TALK))?, open(&scenario.cluster.client, at(NODE, TALK))?];
        for endpoints in [vec![leaving(old), endpoint(stays, Value::Null)], ready(&[stays]), Vec::new()] {
            web(&scenario, &endpoints)?;
            let left = endpoints.len().min(1);
            scenario.agent.wait_for_services("the new endpoints", |shown| backends(shown) == left)?;
            if left == 1 {
                scenario.until_answered(asks, at(WEB, 80), &[stays])?;
            }
            for conversation in &mut conversations {
                ensure!(conversation.answer.backend == old.name, "{:?} answered", conversation.answer);
                conversation.transfer(100_000).with_context(|| format!("{} with {endpoints:?}", old.name))?;
            }
        }
        // Not even the Service's end ends them.
        scenario.manifests().remove("web.json")?;
        scenario.agent.wait_for_services("nothing", |shown| backends(shown) == 0)?;
        for conversation in &mut conversations {
            conversation.say(b"to the end")?;
        }
        scenario.until_fails(&scenario.cluster.client, at(NODE, TALK), ErrorKind::ConnectionRefused)?;
    }
    Ok(())
}

/// Resolvers would ask a DNS server that is gone until their flow's time is over.
#[test]
fn datagrams_go_to_another_pod_as_soon_as_theirs_no_longer_serves_also_after_there_was_none() -> Result<()> {
    let scenario = Scenario::start_with_folder(Shape { pod_counts: [3, 2], ..Shape::default() }, &[])?;
    let targets: [(&sheave_tests::netns::Namespace, SocketAddr); 3] = [
        (&scenario.pod(1, 1).namespace, at(WEB, 53)),
        (&scenario.pod(1, 1).namespace, at(NODE, NAMES)),
        (&scenario.cluster.client, at(NODE, NAMES)),
    ];
    for (client, target) in targets {
        let socket = client.run(|| UdpSocket::bind("0.0.0.0:0"))?;
        socket.connect(target)?;
        let asks = |pod: &Pod| -> Result<()> {
            eventually(Duration::from_secs(10), || {
                // A refusal that was on its way is reported by the next call.
                let answer = client::ask_udp_with(&socket, "who?")?;
                ensure!(answer.backend == pod.name, "{} asks {target}: {} answered", client.name(), answer.backend);
                Ok(())
            })
        };
        let gone =
            |pod: &Pod| endpoint(pod, json!({"conditions": {"ready": false, "serving": false, "terminating": true}}));
        let [one, two, three] = [scenario.pod(1, 2), scenario.pod(2, 1), scenario.pod(1, 3)];
        web(&scenario, &ready(&[one]))?;
        asks(one)?;
        web(&scenario, &[gone(one), endpoint(two, Value::Null)])?;
        asks(two)?;
        // None: refused. Then there is one again, and the same socket reaches it.
        web(&scenario, &[gone(one), gone(two)])?;
        eventually(Duration::from_secs(10), || {
            let error = client::ask_udp_with(&socket, "anybody?").err().context("somebody answered")?;
            let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
            ensure!(kind == Some(ErrorKind::ConnectionRefused), "{} asks {target}: {error:#}", client.name());
            Ok(())
        })?;
        web(&scenario, &ready(&[three]))?;
        asks(three)?;
        web(&scenario, &ready(&[one]))?;
        asks(one)?;
    }
    Ok(())
}
