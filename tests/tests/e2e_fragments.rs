//! Datagrams larger than any link, there and back, and pings of a Service's addresses; in both families.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sheave_tests::client;
use sheave_tests::manifests::Service;
use sheave_tests::netns::Namespace;
use sheave_tests::process::eventually;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{NodeNetwork, PodNetwork, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const WEB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
const NODE_PORT: u16 = 30_053;

fn web() -> Service {
    Service::new("web", WEB).and(WEB6).udp("udp", 53, server::UDP).node_port(NODE_PORT)
}

/// DNS answers with signatures, or anything else that is larger than a link's MTU, would never arrive.
#[test]
fn datagrams_larger_than_the_mtu_go_both_ways() -> Result<()> {
    for (nodes, pods, xdp) in [
        (NodeNetwork::Plain, PodNetwork::Bridged, true),
        (NodeNetwork::Vxlan, PodNetwork::Bridged, false),
        (NodeNetwork::Plain, PodNetwork::Routed, false),
    ] {
        let shape = Shape { nodes, pods, pod_counts: [2, 1], xdp };
        let scenario = Scenario::start(shape, &["--xdp", if xdp { "native" } else { "off" }])?;
        let node = scenario.node();
        for backend in [scenario.pod(1, 2), scenario.pod(2, 1)] {
            scenario.publish(&web(), [backend])?;
            let [asks, outside] = [&scenario.pod(1, 1).namespace, &scenario.cluster.client];
            let targets: [(&Namespace, SocketAddr); 8] = [
                (asks, scenario.at(WEB, 53)),
                (asks, scenario.at(WEB6, 53)),
                (asks, scenario.at(node.address, NODE_PORT)),
                (asks, scenario.at(node.address6, NODE_PORT)),
                (outside, scenario.at(WEB, 53)),
                (outside, scenario.at(WEB6, 53)),
                (outside, scenario.at(node.address, NODE_PORT)),
                (outside, scenario.at(node.address6, NODE_PORT)),
            ];
            // Nobody fragments what comes for a narrower link and is redirected there, or over IPv6 at all: the first datagram
            // only teaches its sender the road's width.
            let attempts = if nodes == NodeNetwork::Vxlan { 2 } else { 1 };
            for (client, target) in targets {
                for size in [1_000, 1_600, 8_000, 60_000] {
                    let ask = || client.run(|| client::ask_udp(target, &"x".repeat(size)));
                    let answer = (1..attempts).fold(ask(), |answer, _| answer.or_else(|_| ask()));
                    let answer = answer.with_context(|| {
                        format!(
                            "{nodes:?}, {pods:?}: {} sends {size} bytes to {target}, {}",
                            client.name(),
                            backend.name
                        )
                    })?;
                    ensure!(answer.backend == backend.name, "{answer:?}");
                }
            }
        }
    }
    Ok(())
}

/// People ping a Service to see whether it is there, and would be told that it is not.
#[test]
fn a_service_with_an_endpoint_answers_a_ping_and_one_without_does_not() -> Result<()> {
    let scenario = Scenario::start(Shape { pod_counts: [2, 1], ..Shape::default() }, &[])?;
    let [asks, outside] = [&scenario.pod(1, 1).namespace, &scenario.cluster.client];
    for client in [asks, outside] {
        client.sysctl("ipv4/ping_group_range", "0 2147483647")?;
    }
    for backends in [vec![scenario.pod(1, 2)], vec![scenario.pod(2, 1)], vec![]] {
        scenario.publish(&web(), backends.iter().copied())?;
        let addresses = [IpAddr::from(WEB), WEB6.into()].map(|address| scenario.at(address, 53).ip());
        for (client, address) in [asks, outside].into_iter().flat_map(|client| addresses.map(|one| (client, one))) {
            for length in [8, 1_200] {
                eventually(Duration::from_secs(5), || {
                    let answered = client.run(|| client::ping(address, length))?;
                    ensure!(
                        answered != backends.is_empty(),
                        "{} pings {address}, {} endpoints: {answered}",
                        client.name(),
                        backends.len()
                    );
                    Ok(())
                })?;
            }
        }
    }
    Ok(())
}
