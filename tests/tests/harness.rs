//! The clusters of the tests, before any Sheave runs in them: if these fail, no other namespace test means anything.

use anyhow::{Context as _, Result, ensure};
use sheave_tests::cgroup::Cgroup;
use sheave_tests::client::{self, Conversation, at};
use sheave_tests::family::Family;
use sheave_tests::manifests::{Endpoint, Manifests, Service};
use sheave_tests::netns::Namespace;
use sheave_tests::process::{Process, built};
use sheave_tests::server::{self, Server};
use sheave_tests::topology::{Cluster, NodeNetwork, PodNetwork, Shape, client_address};

/// A topology whose pods don't reach each other would be taken for a bug of Sheave's.
#[test]
fn pods_reach_pods_on_both_nodes_in_every_shape() -> Result<()> {
    for pods in [PodNetwork::Bridged, PodNetwork::Routed] {
        for nodes in [NodeNetwork::Plain, NodeNetwork::Vxlan] {
            for xdp in [false, true] {
                let shape = Shape { pods, nodes, pod_counts: [2, 1], xdp };
                let cluster = Cluster::build(shape)?;
                let [near, far] = [&cluster.nodes[0].pods[1], &cluster.nodes[1].pods[0]];
                let from = &cluster.nodes[0].pods[0];
                for to in [near, far] {
                    let _server = Server::start(&to.namespace, &to.name)?;
                    for family in Family::BOTH {
                        let (to, own) = (to.address_of(family), from.address_of(family));
                        from.namespace
                            .run(|| -> Result<()> {
                                let answer = client::who(at(to, server::WHO))?;
                                ensure!(answer.seen.ip() == own, "{answer:?}");
                                client::ask_udp(at(to, server::UDP), "ping")?;
                                Conversation::open(at(to, server::ECHO))?.transfer(1_000_000)
                            })
                            .with_context(|| format!("{shape:?}, {own} to {to}"))?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// NodePort tests would fail for want of a road to the node.
#[test]
fn the_client_reaches_a_node_and_is_seen_with_its_own_address() -> Result<()> {
    for xdp in [false, true] {
        let cluster = Cluster::build(Shape { xdp, ..Shape::default() })?;
        let node = &cluster.nodes[0];
        let _server = Server::start(&node.namespace, "node-1")?;
        for family in Family::BOTH {
            let answer = cluster.client.run(|| client::who(at(node.address_of(family), server::WHO)))?;
            ensure!(answer.seen.ip() == client_address(family), "{answer:?}");
        }
        ensure!(cluster.checksum_errors()? == 0, "checksum errors in an untouched cluster");
    }
    Ok(())
}

/// The clients of the load tests would run out of ports or of patience.
#[test]
fn thousands_of_connections_are_answered() -> Result<()> {
    let cluster = Cluster::build(Shape::default())?;
    let pods = &cluster.nodes[0].pods;
    let _server = Server::start(&pods[1].namespace, &pods[1].name)?;
    let answers = client::who_many(Some(&pods[0].namespace), at(pods[1].address, server::WHO), 5_000, 4);
    answers.all_answered()?;
    ensure!(answers.total() == 5_000, "{answers:?}");
    Ok(())
}

/// The manifests' folder must hold what `sheave run --manifests` is told to read.
#[test]
fn manifests_are_written_whole_and_removed() -> Result<()> {
    let manifests = Manifests::new()?;
    let service = Service::new("web", [10, 96, 0, 10])
        .and([0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0xa])
        .tcp("http", 80, server::WHO)
        .node_port(30_500)
        .affinity(60);
    let endpoint = |address: &str| -> Result<Endpoint> {
        let (address, node) = (address.parse()?, "node-1".into());
        Ok(Endpoint { address, node, ready: true, serving: true, terminating: false })
    };
    manifests.service(&service, &[endpoint("10.244.1.2")?, endpoint("fd00:10:244:1::2")?])?;
    let text = std::fs::read_to_string(manifests.path().join("web.yaml"))?;
    for line in [
        "nodePort: 30500",
        "targetPort: 8080",
        "timeoutSeconds: 60",
        "ipFamilies: [IPv4, IPv6]",
        "clusterIPs: [10.96.0.10, \"fd00:10:96::a\"]",
        "addressType: IPv4",
        "- addresses: [10.244.1.2]",
        "addressType: IPv6",
        "- addresses: [\"fd00:10:244:1::2\"]",
    ] {
        ensure!(text.contains(line), "no {line:?} in\n{text}");
    }
    let folder = manifests.path().to_owned();
    drop(manifests);
    ensure!(!folder.exists(), "{} is left behind", folder.display());
    Ok(())
}

/// Tests that measure with these tools would fail for want of the tools.
#[test]
fn iperf_curl_and_raw_sockets_work_in_namespaces() -> Result<()> {
    let cluster = Cluster::build(Shape { pod_counts: [2, 0], ..Shape::default() })?;
    let [client, backend] = [&cluster.nodes[0].pods[0], &cluster.nodes[0].pods[1]];
    let moved = server::iperf(&backend.namespace, &client.namespace, at(backend.address, 5201), 100_000_000)?;
    // What is still in socket buffers when the client ends is not counted.
    ensure!(moved >= 90_000_000, "only {moved} bytes arrived");

    let mut server = Server::start(&backend.namespace, &backend.name)?;
    server.start_http(&backend.namespace, &backend.name)?;
    let url = format!("http://{}:{}/?[1-3]", backend.address, server::HTTP);
    let said = client.namespace.output("curl", &["-sS", "-H", "Connection: close", &url])?;
    let line = format!("{} {}:", backend.name, client.address);
    ensure!(said.lines().count() == 3 && said.lines().all(|said| said.starts_with(&line)), "curl got {said}");

    let sniffer = backend.namespace.run(server::raw_udp)?;
    let port = client.namespace.run(|| -> Result<u16> {
        let socket = client::udp_without_checksum()?;
        socket.connect(at(backend.address, server::UDP))?;
        client::ask_udp_with(&socket, "ping")?;
        Ok(socket.local_addr()?.port())
    })?;
    ensure!(sniffer.checksum_from(port)? == 0, "SO_NO_CHECK had no effect");
    Ok(())
}

/// Tests of host processes would run in the wrong cgroup or leave it behind.
#[test]
fn a_process_runs_in_a_cgroup_of_its_own() -> Result<()> {
    let (cgroup, namespace) = (Cgroup::new()?, Namespace::new("host")?);
    let path = cgroup.path().to_owned();
    let _server = Server::start(&namespace, "host")?;
    let mut command = namespace.command(built("probe")?);
    cgroup.adopt(&mut command);
    command.args(["tcp", &format!("127.0.0.1:{}", server::WHO), "10"]);
    let output = Process::start("probe", &mut command)?.finish(client::LIMIT)?;
    let answers: client::Answers = serde_json::from_str(&output)?;
    ensure!(answers.total() == 10, "{output}");

    let mut command = namespace.command("cat");
    cgroup.adopt(&mut command);
    let own = Process::start("cat", command.arg("/proc/self/cgroup"))?.finish(client::LIMIT)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    ensure!(own.contains(name.as_ref()), "the process is in {own}, not in {name}");
    drop(cgroup);
    ensure!(!path.exists(), "{} is left behind", path.display());
    Ok(())
}
