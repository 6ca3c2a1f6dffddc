//! `cargo xtask demo`: two nodes, a client outside and four pods, made of network namespaces; Sheave on each node; real
//! HTTP and DNS servers, asked with curl and dig. Prints who asked what and who answered, then removes everything.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sheave_tests::agent::Agent;
use sheave_tests::manifests::{Endpoint, Manifests, Service};
use sheave_tests::netns::Namespace;
use sheave_tests::process::{Process, eventually};
use sheave_tests::server::{self, Server};
use sheave_tests::topology::{CLIENT, Cluster, Pod, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const SHOP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 20);
const DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 53);
const PICTURE: &str = "
      client (outside)            192.168.50.100
         │
    ─────┴──────┬───────────────────┬─────          a switch
             node-1              node-2             192.168.50.1, 192.168.50.2: Sheave runs on both
             │    │              │    │
       pod-1-1  pod-1-2    pod-2-1  pod-2-2         10.244.1.2, .3, 10.244.2.2, .3: each an HTTP server
";

fn main() -> ExitCode {
    let started = Instant::now();
    survive_interrupt();
    if let Err(error) = demonstrate() {
        eprintln!("\nThe demo failed, and what it had made is removed: {error:#}");
        return ExitCode::FAILURE;
    }
    heading("All of it is gone again");
    println!(
        "Namespaces, processes, pins, cgroups and manifests are removed. It took {:.1} s.",
        started.elapsed().as_secs_f64()
    );
    ExitCode::SUCCESS
}

/// Ctrl-C ends curl, dig and the others; the demo then fails, and removes what it has made on its way out.
fn survive_interrupt() {
    extern "C" fn nothing(_signal: libc::c_int) {}
    let handler: extern "C" fn(libc::c_int) = nothing;
    // SAFETY: the handler does nothing, so it may run at any point.
    unsafe { libc::signal(libc::SIGINT, handler as libc::sighandler_t) };
}

fn demonstrate() -> Result<()> {
    heading("A cluster in one machine");
    println!("{PICTURE}");
    let cluster = Cluster::build(Shape { pod_counts: [2, 2], ..Shape::default() })?;
    let pods: Vec<&Pod> = cluster.nodes.iter().flat_map(|node| &node.pods).collect();
    let mut servers = Vec::new();
    let mut resolvers = Vec::new();
    for pod in &pods {
        let mut server = Server::start(&pod.namespace, &pod.name)?;
        server.start_http(&pod.namespace, &pod.name)?;
        servers.push(server);
        resolvers.push(resolver(pod)?);
    }

    let manifests = Manifests::new()?;
    for node in &cluster.nodes {
        manifests.node(&node.name, &[node.address.into()])?;
    }
    let endpoints: Vec<Endpoint> = pods.iter().map(|pod| Endpoint::from(*pod)).collect();
    let web = Service::new("web", WEB).tcp("http", 80, server::HTTP).affinity(600);
    let shop = Service::new("shop", SHOP).tcp("http", 80, server::HTTP).target_name("http").node_port(30_500);
    let dns = Service::new("dns", DNS).udp("dns", 53, 53).tcp("dns-tcp", 53, 53);
    for service in [&web, &shop, &dns] {
        manifests.service(service, &endpoints)?;
    }
    println!("Three Services, four endpoints each, as YAML in a folder that both Sheaves watch. One of them:\n");
    indent(&shop.yaml(&endpoints[..1]));
    let agents = cluster.nodes.iter().map(|node| Agent::start(node, &manifests, &[])).collect::<Result<Vec<_>>>()?;
    for agent in &agents {
        for service in [WEB, SHOP, DNS] {
            agent.wait_for_services(&service.to_string(), |shown| shown.to_string().contains(&service.to_string()))?;
        }
    }

    heading("A pod asks a ClusterIP with session affinity: each client stays with one pod");
    for pod in [pods[0], pods[1], pods[2]] {
        show(&pod.name, &pod.namespace, "curl", &curl(&format!("http://{WEB}/?[1-20]")))?;
    }

    heading("The client outside asks nodePort 30500 of both nodes: every pod has its share");
    println!(
        "A pod on the node that was asked sees the client, {CLIENT}; one on the other node sees the node that was asked.\n"
    );
    for node in &cluster.nodes {
        let url = format!("http://{}:30500/?[1-200]", node.address);
        show("client", &cluster.client, "curl", &curl(&url))?;
    }

    heading("DNS on 53/UDP and 53/TCP, answered by dnsmasq in every pod");
    let server = format!("@{DNS}");
    for transport in ["+notcp", "+tcp"] {
        let arguments = ["+short", "+time=2", transport, server.as_str(), "who.sheave.test", "TXT"];
        for _ in 0..3 {
            show(&pods[3].name, &pods[3].namespace, "dig", &arguments.map(String::from))?;
        }
    }

    heading("A process of node-1 itself asks: balanced when it connects");
    for url in [format!("http://{SHOP}/?[1-40]"), "http://127.0.0.1:30500/?[1-40]".into()] {
        let mut command = agents[0].host_command("curl");
        show_command("node-1", "curl", &curl(&url), &mut command)?;
    }

    heading("pod-2-2 leaves the Service while the client goes on asking");
    manifests.service(&shop, &endpoints[..3])?;
    eventually(Duration::from_secs(5), || {
        let shown = agents[0].view("backends", &["-o", "json"])?;
        let backends: serde_json::Value = serde_json::from_str(&shown)?;
        let left = backends.as_array().into_iter().flatten().map(serde_json::Value::to_string);
        let left = left.filter(|backend| backend.contains("default/shop")).count();
        ensure!(left == 3, "{left} backends are left of three");
        Ok(())
    })?;
    show("client", &cluster.client, "curl", &curl("http://192.168.50.1:30500/?[1-200]"))?;

    heading("What node-1's kernel holds: `sheave services`");
    indent(&agents[0].view("services", &[])?);
    heading("The same seen with bpftool: bpftool map dump pinned …/frontends4 (its first entry)");
    let map = agents[0].pins().join("frontends4");
    let dump = cluster.nodes[0].namespace.output("bpftool", &["map", "dump", "pinned", &map.to_string_lossy()])?;
    let entry = dump.split("\n    },{").next().unwrap_or_default();
    indent(entry);
    println!();
    Ok(())
}

/// A DNS server in a pod that says in a TXT record which pod it is.
fn resolver(pod: &Pod) -> Result<Process> {
    let mut command = pod.namespace.command("dnsmasq");
    command.args([
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        "--user=root",
        "--pid-file",
    ]);
    command.arg("--log-facility=-").arg(format!("--txt-record=who.sheave.test,{}", pod.name));
    let mut process = Process::start("dnsmasq", &mut command)?;
    process.wait_for("started", Duration::from_secs(5))?;
    Ok(process)
}

/// A connection of its own for each request.
fn curl(url: &str) -> Vec<String> {
    ["--silent", "--show-error", "--max-time", "20", "--header", "Connection: close", url].map(String::from).to_vec()
}

fn show(who: &str, namespace: &Namespace, program: &str, arguments: &[String]) -> Result<()> {
    show_command(who, program, arguments, &mut namespace.command(program))
}

/// Runs a client and prints who answered how often, and which address the pods saw.
fn show_command(who: &str, program: &str, arguments: &[String], command: &mut Command) -> Result<()> {
    let shown: Vec<&str> = arguments.iter().map(String::as_str).filter(|argument| !plumbing(argument)).collect();
    println!("  {who}$ {program} {}", shown.join(" "));
    let output = Process::start(program, command.args(arguments))?.finish(Duration::from_secs(30));
    let output = output.with_context(|| format!("{who} asked with {program}"))?;
    let mut counts: BTreeMap<(String, String), usize> = BTreeMap::new();
    for line in output.lines() {
        let mut words = line.trim_matches('"').split_whitespace();
        let pod = words.next().context("an empty answer")?;
        let seen = words.next().and_then(|seen| Some(seen.rsplit_once(':')?.0)).unwrap_or_default();
        *counts.entry((pod.into(), seen.into())).or_default() += 1;
    }
    ensure!(!counts.is_empty(), "{who} asked with {program}, and nobody answered");
    let most = counts.values().copied().max().unwrap_or(1);
    for ((pod, seen), count) in &counts {
        let bar = "█".repeat((count * 30).div_ceil(most));
        match seen.as_str() {
            "" => println!("      {pod} answered"),
            seen => println!("      {pod} answered {count:>3} × and saw {seen:<15} {bar}"),
        }
    }
    Ok(())
}

/// Arguments that only make the output tidy.
fn plumbing(argument: &str) -> bool {
    ["--silent", "--show-error", "--max-time", "20", "--header", "Connection: close", "+time=2"].contains(&argument)
}

fn heading(text: &str) {
    println!("\n── {text} {}\n", "─".repeat(100_usize.saturating_sub(text.chars().count())));
}

fn indent(text: &str) {
    for line in text.lines() {
        println!("    {line}");
    }
}
