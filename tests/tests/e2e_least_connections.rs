//! New connections go where few are: `--algorithm least-connections`, with connections that last.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::Pod as Plain;
use aya::maps::{HashMap, Map, MapData};
use sheave_common::flow::{Flow, FlowKey};
use sheave_common::load::Load;
use sheave_common::{Ipv4Address, names};
use sheave_tests::client::{self, Conversation};
use sheave_tests::held::{Held, probe};
use sheave_tests::manifests::Service;
use sheave_tests::process::eventually;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{Pod, Shape};

const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
/// Longer than it takes until connections are counted again.
const COUNTED: Duration = Duration::from_secs(15);

fn service() -> Service {
    Service::new("busy", VIP).and(VIP6).tcp("echo", 80, server::ECHO).udp("udp", 53, server::UDP)
}

/// Two backends, and a third pod to ask from.
fn start(arguments: &[&str]) -> Result<Scenario> {
    let arguments = [&["--algorithm", "least-connections"], arguments].concat();
    Scenario::start(Shape { pod_counts: [3, 0], ..Shape::default() }, &arguments)
}

/// Conversations that stay open, from a pod.
fn converse(client: &Pod, target: SocketAddr, count: usize) -> Result<Vec<Conversation>> {
    client.namespace.run(|| (0..count).map(|_| Conversation::open(target)).collect())
}

fn answered<'a>(conversations: impl IntoIterator<Item = &'a Conversation>, pod: &Pod) -> usize {
    conversations.into_iter().filter(|conversation| conversation.answer.backend == pod.name).count()
}

fn map<K: Plain, V: Plain>(scenario: &Scenario, name: &str, of: fn(MapData) -> Map) -> Result<HashMap<MapData, K, V>> {
    Ok(of(MapData::from_pin(scenario.agent.pins().join(name))?).try_into()?)
}

/// What `sheave backends` shows: endpoint → backend id and connections.
fn loads(scenario: &Scenario) -> Result<BTreeMap<SocketAddr, (u32, i64)>> {
    let shown: serde_json::Value = serde_json::from_str(&scenario.agent.view("backends", &["-o", "json"])?)?;
    let row = |row: &serde_json::Value| {
        let (id, port) = (u32::try_from(row["id"].as_u64()?).ok()?, u16::try_from(row["port"].as_u64()?).ok()?);
        Some((SocketAddr::new(row["address"].as_str()?.parse().ok()?, port), (id, row["connections"].as_i64()?)))
    };
    Ok(shown.as_array().context("a list")?.iter().filter_map(row).collect())
}

/// Waits until an endpoint has so many connections.
fn wait_for(scenario: &Scenario, endpoint: SocketAddr, connections: i64) -> Result<()> {
    eventually(COUNTED, || {
        let loads = loads(scenario)?;
        let count = loads.get(&endpoint).map_or(0, |(_, count)| *count);
        ensure!(count == connections, "{endpoint} counts {count} connections, not {connections}: {loads:?}");
        Ok(())
    })
}

/// A pod that is full of connections that last would get its share of the new ones, too.
#[test]
fn new_connections_go_where_few_are_until_others_close() -> Result<()> {
    let scenario = start(&[])?;
    let (busy, idle, client) = (scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(1, 3));
    for target in [scenario.at(VIP, 80), scenario.at(VIP6, 80)] {
        scenario.publish(&service(), [busy])?;
        let mut first = converse(client, target, 20)?;
        ensure!(answered(&first, busy) == 20, "{target}");
        scenario.publish(&service(), [busy, idle])?;
        let second = converse(client, target, 20)?;
        let elsewhere = answered(&second, idle);
        ensure!(elsewhere == 20, "{target}: only {elsewhere} of 20 went to the idle pod");
        // Both are equally busy now, and then the first one is not.
        for conversation in first.drain(..15) {
            drop(conversation);
        }
        let endpoint =
            SocketAddr::new(if target.is_ipv4() { busy.address.into() } else { busy.address6.into() }, server::ECHO);
        wait_for(&scenario, endpoint, 5)?;
        let third = converse(client, target, 15)?;
        let back = answered(&third, busy);
        ensure!(back == 15, "{target}: only {back} of 15 went to the pod whose connections were closed");
        for conversation in first.into_iter().chain(second).chain(third) {
            conversation.reset()?;
        }
        wait_for(&scenario, endpoint, 0)?;
    }
    Ok(())
}

/// A pod whose connections went unseen (evicted from a full map, say) would count as busy for ever.
#[test]
fn connections_are_counted_again_now_and_then() -> Result<()> {
    let scenario = start(&["--timeout-udp-new", "2", "--timeout-udp-established", "2"])?;
    let (first, second, client) = (scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(1, 3));
    scenario.publish(&service(), [first, second])?;
    let conversations = converse(client, scenario.at(VIP, 80), 10)?;
    let endpoints = [first, second].map(|pod| SocketAddr::new(pod.address.into(), server::ECHO));
    for endpoint in endpoints {
        wait_for(&scenario, endpoint, 5)?;
    }
    let (id, _) = loads(&scenario)?[&endpoints[0]];
    map::<u32, Load>(&scenario, names::BACKEND_LOADS, Map::HashMap)?.insert(id, Load { connections: 1_000 }, 0)?;
    wait_for(&scenario, endpoints[0], 5).context("a count that was wrong")?;

    let mut flows = map::<FlowKey<Ipv4Address>, Flow<Ipv4Address>>(&scenario, names::CONNTRACK4, Map::LruHashMap)?;
    let evicted: Vec<_> = flows.iter().filter_map(Result::ok).filter(|(_, flow)| flow.backend_id == id).collect();
    ensure!(evicted.len() == 10, "{evicted:?}");
    for (key, _) in evicted {
        flows.remove(&key)?;
    }
    wait_for(&scenario, endpoints[0], 0).context("flows that were evicted")?;
    wait_for(&scenario, endpoints[1], 5)?;
    drop(conversations);

    let asked: Result<Vec<_>> =
        client.namespace.run(|| (0..10).map(|_| client::ask_udp(scenario.at(VIP, 53), "ping")).collect());
    asked?;
    for pod in [first, second] {
        wait_for(&scenario, SocketAddr::new(pod.address.into(), server::UDP), 0)
            .context("datagram flows that are idle")?;
    }
    Ok(())
}

/// A node's processes keep their connections for long, and no program sees them end.
#[test]
fn sockets_of_host_processes_count_while_they_are_connected() -> Result<()> {
    let scenario = start(&[])?;
    let (first, second) = (scenario.pod(1, 1), scenario.pod(1, 2));
    scenario.publish(&service(), [first, second])?;
    let held = |target| -> Result<Vec<Held>> {
        (0..4).map(|_| Held::connect(scenario.agent.host_command(probe()?), target)).collect()
    };
    for target in [scenario.at(VIP, 53), scenario.at(VIP6, 53)] {
        let sockets: Vec<Held> = held(target)?;
        let of = |pod: &Pod| {
            SocketAddr::new(if target.is_ipv4() { pod.address.into() } else { pod.address6.into() }, server::UDP)
        };
        let endpoints = [of(first), of(second)];
        let (id, count) = loads(&scenario)?[&endpoints[0]];
        ensure!(count == 2, "{endpoints:?}: {:?}", loads(&scenario)?);
        map::<u32, Load>(&scenario, names::BACKEND_LOADS, Map::HashMap)?.insert(id, Load { connections: 50 }, 0)?;
        for endpoint in endpoints {
            wait_for(&scenario, endpoint, 2).with_context(|| format!("sockets to {target}, counted again"))?;
        }
        drop(sockets);
        for endpoint in endpoints {
            wait_for(&scenario, endpoint, 0).with_context(|| format!("sockets to {target}, closed"))?;
        }
    }
    Ok(())
}
