//! A map without room: what people are told, and that the rest of the cluster does not notice.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sheave_tests::client::{self, Answers, Conversation};
use sheave_tests::http;
use sheave_tests::manifests::Service;
use sheave_tests::process::{Process, built, eventually};
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::Shape;

const SOON: Duration = Duration::from_secs(40);

fn service(number: u8) -> Service {
    Service::new(&format!("s{number}"), Ipv4Addr::new(10, 96, 0, number)).tcp("http", 80, server::WHO)
}

/// A value of `/metrics`, by its line's beginning.
fn metric(scenario: &Scenario, name: &str) -> Result<f64> {
    let answer = scenario.node().namespace.run(|| http::get(([127, 0, 0, 1], 10_249).into(), "/metrics"))?;
    let line = answer.body.lines().find_map(|line| line.strip_prefix(name));
    Ok(line.with_context(|| format!("no {name} in {}", answer.body))?.trim().parse()?)
}

/// Services beyond the map's size would be missing, and nobody would know why.
#[test]
fn services_beyond_a_maps_size_are_named_with_the_flag_and_come_when_there_is_room() -> Result<()> {
    // Service id 0 is nobody's: room for two.
    let shape = Shape { pod_counts: [2, 0], ..Shape::default() };
    let scenario = Scenario::start_with_folder(shape, &["--max-services", "3"])?;
    let client = scenario.pod(1, 1).namespace.clone();
    let ask = |number: u8| client.run(|| client::who(scenario.at(Ipv4Addr::new(10, 96, 0, number), 80)));
    for number in [10, 11] {
        scenario.publish(&service(number), [scenario.pod(1, 2)])?;
        ask(number)?;
    }
    scenario.update(&service(12), &[scenario.pod(1, 2).into()])?;
    eventually(SOON, || {
        let log = scenario.agent.log();
        let line = log.lines().find(|line| line.contains("default/s12:http") && line.contains("--max-services"));
        line.map(drop).with_context(|| format!("the log does not say that s12 has no room:\n{log}"))
    })?;
    eventually(SOON, || {
        let full = "{map=\"service_names\"}";
        let [entries, capacity, refused] = ["entries", "capacity", "refused_writes_total"]
            .map(|metric_name| metric(&scenario, &format!("sheave_map_{metric_name}{full}")));
        let (entries, capacity, refused) = (entries?, capacity?, refused?);
        ensure!((entries, capacity) == (2.0, 2.0) && refused > 0.0, "{entries} of {capacity}, {refused} refused");
        Ok(())
    })?;
    ask(10)?;
    ask(11)?;

    scenario.manifests().remove("s11.yaml")?;
    eventually(SOON, || ask(12).map(drop))?;
    ask(10)?;
    Ok(())
}

/// Clients beyond the size of the tables would be turned away, and nobody would see that the tables are full.
#[test]
fn tables_of_flows_and_sockets_that_are_full_turn_nobody_away_and_are_seen() -> Result<()> {
    // So many that the kernel, which makes room for a hundred at a time, still knows who was last seen long ago.
    const SIZE: &str = "1024";
    let flags = ["--max-conntrack", "--max-half-open", "--max-sockets"];
    let arguments = flags.iter().flat_map(|flag| [*flag, SIZE]).collect::<Vec<_>>();
    let scenario = Scenario::start_with_folder(Shape { pod_counts: [2, 0], ..Shape::default() }, &arguments)?;
    let web = service(10).tcp("echo", 7, server::ECHO).udp("dns", 53, server::UDP);
    scenario.publish(&web, [scenario.pod(1, 2)])?;
    let address = Ipv4Addr::new(10, 96, 0, 10);
    let pod = scenario.pod(1, 1).namespace.clone();
    // All of them stay open, two elements each.
    let open = pod.run(|| (0..700).map(|_| Conversation::open(scenario.at(address, 7))).collect::<Result<Vec<_>>>())?;
    // A socket each, one element.
    let target = scenario.at(address, 53).to_string();
    let mut probe = scenario.agent.host_command(built("probe")?);
    let answers = Process::start("probe", probe.args(["udp", &target, "1200"]))?.finish(SOON)?;
    serde_json::from_str::<Answers>(&answers)?.all_answered()?;
    client::who_many(Some(&pod), scenario.at(address, 80), 300, 2).all_answered()?;
    eventually(SOON, || {
        for map in ["conntrack4", "sock_reverse4"] {
            let [entries, capacity] =
                ["entries", "capacity"].map(|name| metric(&scenario, &format!("sheave_map_{name}{{map=\"{map}\"}}")));
            let (entries, capacity) = (entries?, capacity?);
            ensure!(capacity.to_string() == SIZE && entries > capacity / 4.0, "{map}: {entries} of {capacity}");
        }
        Ok(())
    })?;
    drop(open);
    Ok(())
}
