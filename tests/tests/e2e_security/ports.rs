//! Sheave's own ports: metrics are for the node, health is for whom it is meant.

use std::io::{self, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use sheave_tests::client::{self, at};
use sheave_tests::family::Family;
use sheave_tests::http;
use sheave_tests::objects::{service, slice};
use sheave_tests::scenario::Scenario;
use sheave_tests::topology::Shape;

use super::WEB;

const HEALTH: u16 = 10_256;
const METRICS: u16 = 10_249;
/// More than a server has at a time.
const CROWD: usize = 300;

fn is_closed(target: SocketAddr) -> Result<()> {
    let kind = TcpStream::connect_timeout(&target, client::LIMIT).err().map(|error| error.kind());
    ensure!(kind == Some(io::ErrorKind::ConnectionRefused), "{target} is not closed: {kind:?}");
    Ok(())
}

/// A pod would read what the node serves, or every tenant's traffic.
#[test]
fn pods_reach_no_metrics_and_health_only_where_it_is_served_to_them() -> Result<()> {
    let shape = || Shape { pod_counts: [1, 1], ..Shape::default() };
    let scenario = Scenario::start_with_folder(shape(), &[])?;
    let (pod, node) = (&scenario.pod(1, 1).namespace, scenario.node());
    // Services that lead to the node's own ports and to its loopback.
    for (name, address, ip) in
        [("node", node.address, WEB), ("loopback", Ipv4Addr::LOCALHOST, Ipv4Addr::new(10, 96, 0, 11))]
    {
        let spec = json!({"clusterIP": ip, "ports": [{"name": "metrics", "port": METRICS}]});
        let endpoint = json!({"addresses": [address], "conditions": {"ready": true}});
        let slice = slice(name, 1, &[("metrics", METRICS)], &[endpoint]);
        scenario.manifests().objects(name, &[service(name, &spec), slice])?;
    }
    scenario.agent.wait_for_services("both Services", |shown| shown.as_array().is_some_and(|rows| rows.len() == 2))?;
    for family in Family::BOTH {
        pod.run(|| is_closed(at(node.address_of(family), METRICS)))?;
        let answer = pod.run(|| http::get(at(node.address_of(family), HEALTH), "/metrics"))?;
        ensure!(answer.status == 404, "the health port has metrics: {answer:?}");
    }
    pod.run(|| is_closed(at(WEB, METRICS)))?;
    let loopback = at(Ipv4Addr::new(10, 96, 0, 11), METRICS);
    let reached = pod.run(|| TcpStream::connect_timeout(&loopback, Duration::from_secs(1)));
    ensure!(reached.is_err(), "a Service leads to the node's loopback");
    // They are there for the node itself.
    let answer = node.namespace.run(|| http::get(at(Ipv4Addr::LOCALHOST, METRICS), "/metrics"))?;
    ensure!(answer.status == 200, "{answer:?}");
    drop(scenario);

    let scenario = Scenario::start_with_folder(shape(), &["--healthz-bind-address", "127.0.0.1:10256"])?;
    for family in Family::BOTH {
        scenario.pod(1, 1).namespace.run(|| is_closed(at(scenario.node().address_of(family), HEALTH)))?;
    }
    let answer = scenario.node().namespace.run(|| http::get(at(Ipv4Addr::LOCALHOST, HEALTH), "/healthz"))?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(())
}

/// A pod could make a kubelet believe that Sheave hangs, and restart it again and again.
#[test]
fn a_crowd_that_holds_connections_keeps_nobody_from_the_health_port() -> Result<()> {
    let scenario = Scenario::start_with_folder(Shape { pod_counts: [1, 1], ..Shape::default() }, &[])?;
    let health = at(scenario.node().address, HEALTH);
    let crowd = scenario.pod(1, 1).namespace.run(|| -> Result<Vec<TcpStream>> {
        let hold = |_| -> Result<TcpStream> {
            let mut stream = TcpStream::connect_timeout(&health, client::LIMIT)?;
            // Half a request.
            stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: ")?;
            Ok(stream)
        };
        (0..CROWD).map(hold).collect()
    });
    let crowd = crowd.context("the crowd")?;
    for path in ["/healthz", "/livez"] {
        let answer = scenario.node().namespace.run(|| http::get(health, path)).context("the kubelet")?;
        ensure!(answer.status == 200, "{path}: {answer:?}");
    }
    drop(crowd);
    Ok(())
}
