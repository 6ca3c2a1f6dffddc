//! What people try first: the Services of the usual tutorials, as their manifests are written (`tests/tutorials/*.yaml`),
//! made by kubectl, with real servers behind them.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sheave_tests::client::{Answer, parse_answer};
use sheave_tests::netns::Namespace;
use sheave_tests::process::{Process, eventually};
use sheave_tests::real_server::{DNS_LARGE, DNS_LARGE_LENGTH, DNS_SELF};
use sheave_tests::topology::{CLIENT, Pod, Shape};
use sheave_tests::tutorial::Tutorial;

const NODE: &str = "192.168.50.1";
/// Enough for each of two pods to have its turn, but for one time in 2^29.
const MANY: usize = 30;

fn start(file: &str) -> Result<Tutorial> {
    Tutorial::start(file, Shape { pod_counts: [3, 3], ..Shape::default() })
}

/// Asks by HTTP, with a connection each time; a line is one answer.
fn curl(from: &Namespace, target: &str, count: usize) -> Result<Vec<String>> {
    let url = format!("http://{target}/?[1-{count}]");
    let said =
        from.output("curl", &["-sS", "--fail-early", "--fail", "--max-time", "5", "-H", "Connection: close", &url])?;
    let lines: Vec<String> = said.lines().map(str::to_owned).collect();
    ensure!(lines.len() == count, "{target} gave {} answers of {count}:\n{said}", lines.len());
    Ok(lines)
}

fn answers(from: &Namespace, target: &str, count: usize) -> Result<Vec<Answer>> {
    curl(from, target, count)?.iter().map(|line| parse_answer(line.as_bytes())).collect()
}

/// Who answered, sorted.
fn who(answers: &[Answer]) -> BTreeSet<&str> {
    answers.iter().map(|answer| answer.backend.as_str()).collect()
}

fn names<'a>(pods: &[&'a Pod]) -> BTreeSet<&'a str> {
    pods.iter().map(|pod| pod.name.as_str()).collect()
}

/// A shop's cart would be empty at every other click.
#[test]
fn a_client_stays_with_its_pod_on_port_80_with_client_ip_affinity() -> Result<()> {
    let tutorial = start("affinity.yaml")?;
    let shop = tutorial.cluster_ip("shop")?;
    let pods = tutorial.pods("shop");
    for client in [tutorial.shell(), &tutorial.cluster.client, &pods[0].namespace, &pods[1].namespace] {
        let answers = answers(client, &shop, MANY)?;
        let who = who(&answers);
        ensure!(who.len() == 1 && who.is_subset(&names(&pods)), "{who:?} answered {}", client.name());
    }
    Ok(())
}

/// The first Service of many tutorials would not answer.
#[test]
fn port_8080_leads_to_the_containers_port_80() -> Result<()> {
    let tutorial = start("port-8080.yaml")?;
    let target = format!("{}:8080", tutorial.cluster_ip("my-nginx")?);
    for client in [tutorial.shell(), &tutorial.cluster.client] {
        let answers = answers(client, &target, MANY)?;
        ensure!(who(&answers) == names(&tutorial.pods("my-nginx")), "{answers:?}");
    }
    Ok(())
}

/// "Open http://NODE:30080 in your browser" would fail.
#[test]
fn node_ports_30080_and_30500_lead_to_named_ports() -> Result<()> {
    let tutorial = start("node-ports.yaml")?;
    for (port, service) in [(30080, "hello:80"), (30500, "hello-alt:5000")] {
        let (service, port_inside) = service.split_once(':').context("NAME:PORT")?;
        let inside = format!("{}:{port_inside}", tutorial.cluster_ip(service)?);
        let outside = format!("{NODE}:{port}");
        for (client, target) in [
            (&tutorial.cluster.client, &outside),
            (tutorial.shell(), &outside),
            (tutorial.shell(), &inside),
            (&tutorial.cluster.client, &inside),
        ] {
            let answers = answers(client, target, MANY).with_context(|| format!("{} asks {target}", client.name()))?;
            ensure!(who(&answers) == names(&tutorial.pods("hello")), "{target}: {answers:?}");
        }
    }
    Ok(())
}

/// The address that the cloud gives would lead nowhere.
#[test]
fn a_load_balancer_answers_at_its_node_port_and_at_the_address_that_it_is_given() -> Result<()> {
    let tutorial = start("load-balancer.yaml")?;
    let pods = tutorial.pods("hello-world");
    let client = &tutorial.cluster.client;
    let by_node_port = answers(client, &format!("{NODE}:30088"), MANY)?;
    ensure!(who(&by_node_port) == names(&pods), "{by_node_port:?}");

    client.ip(&[format!("route add 192.0.2.88/32 via {NODE}")])?;
    let given = r#"{"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.88", "ipMode": "VIP"}]}}}"#;
    tutorial.kubectl.run(&["patch", "service", "my-service", "--type=merge", "-p", given])?;
    tutorial.wait_for_services("192.0.2.88", |shown| shown.to_string().contains("192.0.2.88"))?;
    for client in [client, tutorial.shell()] {
        let by_address = answers(client, "192.0.2.88", MANY)?;
        ensure!(who(&by_address) == names(&pods), "{by_address:?}");
    }
    Ok(())
}

/// A database outside the cluster or a peer of a replicated one would be hidden, or the log be full of complaints.
#[test]
fn an_external_name_and_a_headless_service_are_left_alone() -> Result<()> {
    let tutorial = start("left-alone.yaml")?;
    // What comes after them has arrived, so they have.
    tutorial.kubectl.create("{apiVersion: v1, kind: Service, metadata: {name: last}, spec: {ports: [{port: 81}]}}")?;
    tutorial.wait_for_services("the last Service", |shown| shown.to_string().contains("default/last"))?;
    for agent in &tutorial.agents {
        let (shown, log) = (agent.services()?.to_string(), agent.log());
        for text in [shown, log] {
            ensure!(!text.contains("stateful") && !text.contains("my-database"), "{text}");
        }
    }
    for pod in tutorial.pods("web") {
        let answers = answers(tutorial.shell(), &pod.address.to_string(), 5)?;
        let own = IpAddr::from(tutorial.cluster.nodes[0].pods[0].address);
        ensure!(answers.iter().all(|answer| answer.backend == pod.name && answer.seen.ip() == own), "{answers:?}");
    }
    Ok(())
}

/// What an ingress said: its name, the client that it saw, and the pod that it asked.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Visit {
    ingress: String,
    client: IpAddr,
    behind: String,
}

fn visits(tutorial: &Tutorial, count: usize) -> Result<Vec<Visit>> {
    let lines = curl(&tutorial.cluster.client, &format!("{NODE}:30000"), count)?;
    let visit = |line: &String| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [behind, _, ingress, client] = words[..] else { anyhow::bail!("not through an ingress: {line:?}") };
        let client: std::net::SocketAddr = client.parse()?;
        Ok(Visit { ingress: ingress.to_owned(), client: client.ip(), behind: behind.to_owned() })
    };
    lines.iter().map(visit).collect()
}

/// The ingress' log and its rules by address would show one node instead of all clients.
#[test]
fn an_ingress_behind_node_port_30000_sees_the_client_as_its_traffic_policy_says() -> Result<()> {
    let tutorial = start("ingress.yaml")?;
    let (ingresses, web) = (tutorial.pods("ingress-nginx"), tutorial.pods("web"));
    let [local, remote] = [1, 2].map(|node| format!("node-{node}"));
    let on = |node: &str| ingresses.iter().find(|pod| pod.node == node).map(|pod| pod.name.clone());
    let (local, remote) = on(&local).zip(on(&remote)).context("an ingress on each node")?;
    let client = IpAddr::from(CLIENT);
    let node: IpAddr = NODE.parse()?;

    let seen = visits(&tutorial, 2 * MANY)?;
    for visit in &seen {
        // The client's address is kept where the ingress is on the node that the client asks.
        let expected = if visit.ingress == local { client } else { node };
        ensure!(visit.client == expected, "Cluster: {visit:?}");
    }
    let by_ingress: BTreeSet<&str> = seen.iter().map(|visit| visit.ingress.as_str()).collect();
    ensure!(by_ingress == BTreeSet::from([local.as_str(), remote.as_str()]), "{by_ingress:?}");
    let behind: BTreeSet<&str> = seen.iter().map(|visit| visit.behind.as_str()).collect();
    ensure!(behind == names(&web), "{behind:?}");

    let policy = r#"{"spec": {"externalTrafficPolicy": "Local"}}"#;
    tutorial.kubectl.run(&["patch", "service", "ingress-nginx", "--type=merge", "-p", policy])?;
    let all_local = |seen: &[Visit]| seen.iter().all(|visit| visit.ingress == local && visit.client == client);
    let seen = eventually(Duration::from_secs(5), || {
        let seen = visits(&tutorial, MANY)?;
        ensure!(all_local(&seen), "Local: {seen:?}");
        Ok(seen)
    })?;
    let behind: BTreeSet<&str> = seen.iter().map(|visit| visit.behind.as_str()).collect();
    ensure!(behind == names(&web), "the ingress itself asks {behind:?} only");
    Ok(())
}

fn dig(from: &Namespace, arguments: &[&str]) -> Result<String> {
    from.output("dig", &[&["+time=2", "+tries=1", "+short"], arguments].concat())
}

/// Nothing in the cluster would find anything.
#[test]
fn the_clusters_dns_answers_by_datagram_and_by_tcp() -> Result<()> {
    let mut tutorial = start("cluster-dns.yaml")?;
    let large = "x".repeat(DNS_LARGE_LENGTH);
    let addresses = |tutorial: &Tutorial| -> BTreeSet<String> {
        tutorial.pods("coredns").iter().map(|pod| pod.address.to_string()).collect()
    };
    for client in [tutorial.shell(), &tutorial.cluster.client] {
        for transport in ["+notcp", "+tcp"] {
            let mut answered = BTreeSet::new();
            for _ in 0..MANY {
                answered.insert(dig(client, &[transport, "@10.96.0.10", DNS_SELF])?.trim().to_owned());
            }
            ensure!(answered == addresses(&tutorial), "{transport} from {}: {answered:?}", client.name());
        }
        // By datagram first; the server says "truncated", and dig asks again by TCP.
        for transport in ["+notcp", "+tcp"] {
            let text = dig(client, &[transport, "@10.96.0.10", DNS_LARGE, "TXT"])?;
            let text: String = text.chars().filter(|one| *one == 'x').collect();
            ensure!(text == large, "{transport}: {} of {DNS_LARGE_LENGTH} bytes arrived", text.len());
        }
    }

    // The node's own resolver.
    for transport in ["+notcp", "+tcp"] {
        let mut command = tutorial.agents[0].host_command("dig");
        command.args(["+time=2", "+tries=1", "+short", transport, "@10.96.0.10", DNS_SELF]);
        let answered = Process::start("dig", &mut command)?.finish(Duration::from_secs(10))?;
        ensure!(addresses(&tutorial).contains(answered.trim()), "{transport} from the node: {answered:?}");
    }

    // A resolver that keeps its port: it would ask the pod that is gone until the flow timed out.
    for port in ["-b0.0.0.0#5000", "-b0.0.0.0#5001", "-b0.0.0.0#5002", "-b0.0.0.0#5003"] {
        dig(tutorial.shell(), &[port, "@10.96.0.10", DNS_SELF])?;
    }
    let old = tutorial.pods("coredns")[0].address.to_string();
    tutorial.replace_first_pod("coredns")?;
    for port in ["-b0.0.0.0#5000", "-b0.0.0.0#5001", "-b0.0.0.0#5002", "-b0.0.0.0#5003"] {
        let answered = dig(tutorial.shell(), &[port, "@10.96.0.10", DNS_SELF])?;
        let answered = answered.trim();
        ensure!(answered != old && addresses(&tutorial).contains(answered), "port {port}: {answered:?}");
    }
    Ok(())
}
