//! Whatever happened on the way, the kernel ends with what the objects say.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use sheave_tests::agent::Agent;
use sheave_tests::manifests::{Endpoint, Manifests, Service};
use sheave_tests::process::eventually;
use sheave_tests::topology::{Cluster, Shape};

const CHANGES: u32 = 1_000;
const SERVICES: u32 = 12;

/// A node that has run for months would serve something else than one that was just started.
#[test]
fn after_a_thousand_changes_the_maps_equal_those_of_a_fresh_start() -> Result<()> {
    let cluster = Cluster::build(Shape { pod_counts: [1, 0], ..Shape::default() })?;
    let node = &cluster.nodes[0];
    let manifests = Manifests::for_node(node)?;
    let mut agent = Agent::start(node, &manifests, &[])?;
    let mut random = Random(0x5eed_5eed_5eed_5eed);
    let mut present = [false; SERVICES as usize];
    for change in 0..CHANGES {
        let number = random.below(SERVICES);
        let exists = &mut present[number as usize];
        if *exists && random.below(5) == 0 {
            manifests.remove(&format!("service-{number}.yaml"))?;
            *exists = false;
        } else {
            let (service, endpoints) = any_service(number, &mut random);
            manifests.service(&service, &endpoints)?;
            *exists = true;
        }
        match random.below(40) {
            // Now and then it is killed in the midst of it all.
            0 => {
                agent.kill();
                agent.restart().with_context(|| format!("after change {change}"))?;
            }
            1..10 => std::thread::sleep(Duration::from_millis(5)),
            _ => {}
        }
    }
    // A last Service tells when everything before it has been seen.
    let last = Ipv4Addr::new(10, 96, 9, 99);
    manifests.service(&Service::new("last", last).tcp("http", 80, 80), &[endpoint(99, true)])?;
    agent.wait_for_services("the last Service", |shown| shown.to_string().contains(&last.to_string()))?;

    let fresh = Agent::start(node, &manifests, &[])?;
    eventually(Duration::from_secs(10), || {
        for view in ["services", "backends"] {
            let (old, new) = (contents(&agent, view)?, contents(&fresh, view)?);
            ensure!(old == new, "sheave {view} differs\nafter the changes: {old:#?}\nfresh: {new:#?}");
        }
        Ok(())
    })
}

fn any_service(number: u32, random: &mut Random) -> (Service, Vec<Endpoint>) {
    let address = Ipv4Addr::from(0x0a60_0100 + number);
    // Ports and node ports wander between Services.
    let mut service = Service::new(&format!("service-{number}"), address).tcp("http", 80, 8_080);
    if random.below(2) == 0 {
        service = service.node_port(u16::try_from(30_000 + number).unwrap_or(30_000));
    }
    if random.below(3) == 0 {
        service = service.udp("dns", 53, 5_353);
    }
    if random.below(4) == 0 {
        service = service.affinity(60 + random.below(3));
    }
    if random.below(4) == 0 {
        service = service.external_local();
    }
    let endpoints = (0..random.below(9)).map(|_| endpoint(random.below(40), random.below(5) > 0)).collect();
    (service, endpoints)
}

fn endpoint(number: u32, ready: bool) -> Endpoint {
    Endpoint {
        address: Ipv4Addr::from(0x0af4_0102 + number).into(),
        node: if number.is_multiple_of(2) { "node-1".into() } else { "node-2".into() },
        ready,
        serving: true,
        terminating: !ready,
    }
}

/// What a view shows, without what differs by nature: ids, versions and counters; in a fixed order.
fn contents(agent: &Agent, view: &str) -> Result<Value> {
    let mut shown: Value = serde_json::from_str(&agent.view(view, &["-o", "json"])?)?;
    normalise(&mut shown);
    Ok(shown)
}

fn normalise(value: &mut Value) {
    match value {
        Value::Array(elements) => {
            elements.iter_mut().for_each(normalise);
            elements.sort_by_key(Value::to_string);
        }
        Value::Object(fields) => {
            fields.retain(|name, _| {
                !["id", "version", "connections", "packets", "bytes", "first"].contains(&name.as_str())
            });
            fields.retain(|name, _| !name.ends_with("_id") && !name.ends_with("Id") && !name.ends_with("Ids"));
            fields.values_mut().for_each(normalise);
        }
        _ => {}
    }
}

/// Xorshift: the same changes in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        u32::try_from((self.0 >> 33) % u64::from(limit)).unwrap_or(0)
    }
}
