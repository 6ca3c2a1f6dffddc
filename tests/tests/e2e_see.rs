//! What operators see of a running Sheave: `status`, `monitor`, `trace` and `report`.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData};
use serde_json::Value;
use sheave_common::{event, names};
use sheave_tests::client::{self, Conversation};
use sheave_tests::http;
use sheave_tests::kube_api::KubeApi;
use sheave_tests::leftovers::unique_name;
use sheave_tests::manifests::Service;
use sheave_tests::netns::Namespace;
use sheave_tests::process::{Process, built, eventually};
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{CLIENT, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 11);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
const SOON: Duration = Duration::from_secs(15);

/// Two pods here and one on the other node, all behind `default/web`; `default/nobody` has no endpoints. Small maps, because
/// they are dumped.
fn scenario() -> Result<(Scenario, Service)> {
    let shape = Shape { pod_counts: [2, 1], ..Shape::default() };
    let scenario = Scenario::start_with_folder(shape, &["--max-table", "4096", "--max-services", "64"])?;
    let web = Service::new("web", WEB).tcp("http", 80, server::WHO).tcp("talk", 81, server::ECHO).node_port(30_500);
    scenario.publish(&web, [scenario.pod(1, 2), scenario.pod(2, 1)])?;
    scenario.publish(&Service::new("nobody", NOBODY).tcp("http", 80, server::WHO), [])?;
    Ok((scenario, web))
}

fn sheave(scenario: &Scenario, arguments: &[&str]) -> Result<Command> {
    let mut command = scenario.node().namespace.command(built("sheave")?);
    command.args(arguments).arg("--pin-path").arg(scenario.agent.pins());
    Ok(command)
}

/// Exit code and standard output of a command.
fn run(scenario: &Scenario, arguments: &[&str]) -> Result<(i32, String)> {
    let output = sheave(scenario, arguments)?.output()?;
    let code = output.status.code().context("a signal")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(code == 0 || code == 3, "sheave {arguments:?} ended with {code}: {errors}");
    Ok((code, String::from_utf8(output.stdout)?))
}

fn json(scenario: &Scenario, arguments: &[&str]) -> Result<(i32, Value)> {
    let (code, text) = run(scenario, &[arguments, &["-o", "json"]].concat())?;
    Ok((code, serde_json::from_str(&text).with_context(|| text)?))
}

#[test]
fn status_shows_daemon_and_dataplane_and_says_when_the_daemon_is_down() -> Result<()> {
    let (mut scenario, _) = scenario()?;
    let pod = scenario.pod(1, 1).namespace.clone();
    pod.run(|| client::who(scenario.at(WEB, 80)))?;
    ensure!(pod.run(|| client::who(scenario.at(NOBODY, 80))).is_err());

    let (code, status) = json(&scenario, &["status"])?;
    ensure!(code == 0 && status["daemon"]["healthy"] == true, "{status:#}");
    ensure!(status["daemon"]["version"] == env!("CARGO_PKG_VERSION"), "{status:#}");
    ensure!(status["daemon"]["sync_age_seconds"].as_u64().is_some_and(|age| age < 60), "{status:#}");
    let dataplane = &status["dataplane"];
    ensure!((&dataplane["connect"], &dataplane["service_ports"]) == (&"host".into(), &3.into()), "{dataplane:#}");
    ensure!(dataplane["drops"]["no_endpoint"].as_u64() > Some(0), "{dataplane:#}");
    let roles: Vec<_> = dataplane["interfaces"].as_array().into_iter().flatten().map(|one| &one["role"]).collect();
    ensure!(roles.iter().filter(|role| **role == "pod").count() == 2 && roles.len() > 2, "{dataplane:#}");
    ensure!(dataplane["programs"]["tc"] == 2 * roles.len() && dataplane["programs"]["cgroup"] == 8, "{dataplane:#}");
    let maps: Vec<_> = dataplane["maps"].as_array().into_iter().flatten().collect();
    let entries = |name: &str| maps.iter().find(|map| map["map"] == name).and_then(|map| map["entries"].as_u64());
    ensure!(entries("service_names") == Some(3) && entries("conntrack4") == Some(2), "{dataplane:#}");

    // The same numbers for Prometheus.
    let metrics = scenario.node().namespace.run(|| http::get(([127, 0, 0, 1], 10_249).into(), "/metrics"))?.body;
    for line in [
        "sheave_map_entries{map=\"conntrack4\"} 2",
        "sheave_attached_programs{hook=\"cgroup\"} 8",
        "sheave_oldest_unapplied_change_seconds 0",
    ] {
        ensure!(metrics.lines().any(|own| own == line), "no {line} in {metrics}");
    }
    ensure!(metrics.contains("sheave_conntrack_flows{protocol=\"TCP\",state="), "{metrics}");

    let (_, text) = run(&scenario, &["status"])?;
    ensure!(text.contains("healthy") && text.contains("no_endpoint") && !text.contains('\x1b'), "{text}");
    scenario.agent.kill();
    let (code, text) = run(&scenario, &["status"])?;
    ensure!(code == 3 && text.contains("not running") && text.contains("3 service ports"), "{code}: {text}");
    Ok(())
}

/// Starts `sheave monitor`, does something, and returns what was shown.
fn monitored(scenario: &Scenario, filters: &[&str], act: impl FnOnce() -> Result<()>) -> Result<Vec<Value>> {
    let arguments = [&["monitor", "-o", "json", "--duration", "30"], filters].concat();
    let mut monitor = Process::start("sheave monitor", &mut sheave(scenario, &arguments)?)?;
    monitor.wait_for("listening", SOON)?;
    act()?;
    let shown = monitor.finish(Duration::from_secs(40))?;
    shown.lines().filter(|line| line.starts_with('{')).map(|line| Ok(serde_json::from_str(line)?)).collect()
}

#[test]
fn monitor_shows_who_asks_whom_and_what_is_dropped_while_it_runs() -> Result<()> {
    let (scenario, _) = scenario()?;
    let pod = scenario.pod(1, 1);
    let ask = |from: &Namespace, address: Ipv4Addr| from.run(|| client::who(scenario.at(address, 80)));
    let service = ["--service", "default/web:http", "--count"];
    let shown = monitored(&scenario, &[&service[..], &["2"]].concat(), || ask(&pod.namespace, WEB).map(drop))?;
    let [new, end] = &shown[..] else { anyhow::bail!("{shown:#?}") };
    ensure!((&new["event"], &end["event"]) == (&"new".into(), &"end".into()), "{shown:#?}");
    for one in &shown {
        ensure!(one["destination"] == "10.96.0.10:80" && one["protocol"] == "TCP", "{one:#}");
        let client = one["client"].as_str().unwrap_or_default();
        ensure!(client.starts_with(&format!("{}:", pod.address)) && one["edge"] == pod.host_link, "{one:#}");
        let pods = [scenario.pod(1, 2).address, scenario.pod(2, 1).address];
        let backend = one["backend"].as_str().unwrap_or_default();
        ensure!(pods.iter().any(|pod| backend == format!("{pod}:{}", server::WHO)), "{one:#}");
    }

    // What is asked of one Service is not shown of another, and a refusal has a reason.
    let shown = monitored(&scenario, &["--namespace", "default", "--event", "drop", "--count", "1"], || {
        ask(&pod.namespace, WEB)?;
        ensure!(ask(&pod.namespace, NOBODY).is_err());
        Ok(())
    })?;
    ensure!(shown.len() == 1 && shown[0]["service"] == "default/nobody:http", "{shown:#?}");
    ensure!(shown[0]["reason"] == "no_endpoint" && shown[0]["destination"] == "10.96.0.11:80", "{shown:#?}");

    // A host process meets no packet hook, and is seen at its socket.
    let shown = monitored(&scenario, &["--ports", "80", "--count", "1"], || {
        let target = scenario.at(WEB, 80).to_string();
        let mut probe = scenario.agent.host_command(built("probe")?);
        Process::start("probe", probe.args(["tcp", &target, "1"]))?.finish(SOON).map(drop)
    })?;
    ensure!(shown.len() == 1 && shown[0]["edge"] == "socket" && shown[0]["event"] == "new", "{shown:#?}");

    // Nobody listens any more, so nothing is written.
    let listener = MapData::from_pin(scenario.agent.pins().join(names::LISTENER))?;
    let listener: Array<_, u64> = Array::try_from(Map::Array(listener))?;
    ensure!(listener.get(&event::UNTIL, 0)? == 0);
    Ok(())
}

/// Every pinned map, as bpftool shows it.
fn dumps(scenario: &Scenario) -> Result<BTreeMap<&'static str, String>> {
    let shown = names::MAPS.iter().copied().filter(|name| *name != names::EVENTS);
    shown
        .map(|name| {
            let pin = scenario.agent.pins().join(name);
            let output = Command::new("bpftool").args(["--json", "map", "dump", "pinned"]).arg(&pin).output()?;
            ensure!(output.status.success(), "{name}: {output:?}");
            Ok((name, String::from_utf8(output.stdout)?))
        })
        .collect()
}

#[test]
fn trace_says_what_becomes_of_a_packet_and_why_and_changes_nothing() -> Result<()> {
    let (scenario, _) = scenario()?;
    let pod = scenario.pod(1, 1);
    let from = pod.address.to_string();
    let mut talk = pod.namespace.run(|| Conversation::open_from((pod.address, 45_678), scenario.at(WEB, 81)))?;
    talk.say(b"hello")?;
    let backends = [scenario.pod(1, 2).address, scenario.pod(2, 1).address].map(|pod| format!("{pod}:{}", server::WHO));
    // The last acknowledgment of what was said may come a moment later.
    let before = eventually(SOON, || {
        let (earlier, now) = (dumps(&scenario)?, dumps(&scenario)?);
        ensure!(earlier == now, "the maps don't come to rest");
        Ok(now)
    })?;
    let trace = |arguments: &[&str]| json(&scenario, &[&["trace"], arguments].concat());

    let (code, story) = trace(&["--from", &from, "--to", "10.96.0.10:80"])?;
    ensure!(code == 0 && story["verdict"] == "translated" && story["service"] == "default/web:http", "{story:#}");
    ensure!(backends.iter().any(|backend| story["backend"] == *backend), "{story:#}");
    ensure!(story["rewritten"][0] == format!("{from}:40000") && story["rewritten"][1] == story["backend"], "{story:#}");

    let known = format!("{from}:45678");
    let (_, story) = trace(&["--from", &known, "--to", "10.96.0.10:81", "--interface", &pod.host_link])?;
    let answered = format!("{}:{}", backend_address(&scenario, &talk.answer.backend)?, server::ECHO);
    ensure!(story["backend"] == answered && story["why"].to_string().contains("flow is known"), "{story:#}");

    let outside = CLIENT.to_string();
    let node_port = format!("{NODE}:30500");
    let (code, story) = trace(&["--from", &outside, "--to", &node_port])?;
    ensure!(code == 0 && story["why"].to_string().contains("a node port"), "{story:#}");

    for (to, verdict, reason) in [
        ("10.96.0.11:80", "rejected", Some("no_endpoint")),
        ("10.96.0.10:99", "rejected", Some("unknown_port")),
        ("10.96.0.10:80/udp", "rejected", Some("unknown_port")),
        ("192.0.2.1:80", "untouched", None),
    ] {
        let (code, story) = trace(&["--from", &from, "--to", to])?;
        ensure!((code, &story["verdict"]) == (3, &verdict.into()), "{to}: {story:#}");
        ensure!(story["reasons"][0].as_str() == reason, "{to}: {story:#}");
    }
    let after = dumps(&scenario)?;
    for (name, before) in before {
        ensure!(after[name] == before, "{name} has changed: {before}\n{}", after[name]);
    }
    talk.say(b"still there")?;
    Ok(())
}

/// The address of the pod of this name.
fn backend_address(scenario: &Scenario, name: &str) -> Result<Ipv4Addr> {
    let mut pods = scenario.cluster.nodes.iter().flat_map(|node| &node.pods);
    Ok(pods.find(|pod| pod.name == name).with_context(|| format!("no pod {name}"))?.address)
}

#[test]
fn a_report_holds_what_a_developer_needs_and_no_secret() -> Result<()> {
    const TOKEN: &str = "planted-token-7f3a";
    let api = KubeApi::serve(TcpListener::bind("127.0.0.1:0")?);
    let folder = std::env::temp_dir().join(unique_name());
    std::fs::create_dir(&folder)?;
    let kubeconfig = folder.join("kubeconfig");
    let mut config: Value = serde_saphyr::from_str(&api.kubeconfig())?;
    config["users"][0]["user"]["token"] = TOKEN.into();
    std::fs::write(&kubeconfig, config.to_string())?;
    let shape = Shape { pod_counts: [2, 0], ..Shape::default() };
    let scenario = Scenario::start_with_kubeconfig(shape, &kubeconfig, &[])?;
    scenario.publish(&Service::new("web", WEB).tcp("http", 80, server::WHO), [scenario.pod(1, 2)])?;

    let archive = folder.join("report.tar.gz");
    let file = archive.to_str().context("a path of letters")?;
    run(&scenario, &["report", "--file", file])?;
    let mut unpacked = Command::new("tar");
    let output = unpacked.arg("-xzf").arg(&archive).arg("-C").arg(&folder).output()?;
    ensure!(output.status.success(), "{output:?}");
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder.join("sheave-report"))? {
        let mut text = String::new();
        let path = entry?.path();
        std::fs::File::open(&path)?.read_to_string(&mut text)?;
        files.insert(path.file_name().unwrap_or_default().to_string_lossy().into_owned(), text);
    }
    let whole: String = files.values().cloned().collect();
    ensure!(!whole.contains(TOKEN), "the token is in it");
    for (name, part) in [
        ("README.txt", "no credentials"),
        ("services.json", "/web:http"),
        ("status.txt", "healthy"),
        ("metrics.txt", "sheave_build_info"),
        ("healthz.json", "nodeEligible"),
        ("daemon.txt", "--kubeconfig"),
        ("machine.txt", "net/ipv4/ip_forward = 1"),
        ("interfaces.txt", "veth"),
    ] {
        ensure!(files.get(name).is_some_and(|text| text.contains(part)), "{name} lacks {part}: {:?}", files.get(name));
    }
    // Nothing is written over.
    let again = eventually(SOON, || Ok(sheave(&scenario, &["report", "--file", file])?.output()?))?;
    ensure!(again.status.code() == Some(1), "{again:?}");
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}
