//! Who may use a load-balancer IP (loadBalancerSourceRanges), and where service addresses lie that nobody has
//! (ServiceCIDRs): pods, host processes and clients outside, in both families.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sheave_common::{DropReason, names};
use sheave_tests::agent::Agent;
use sheave_tests::client::{self, Answers};
use sheave_tests::family::Family;
use sheave_tests::kube_api::{KubeApi, Resource};
use sheave_tests::leftovers::unique_name;
use sheave_tests::netns::Namespace;
use sheave_tests::process::{Process, built, eventually};
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{CLIENT, CLIENT6, Pod, PodNetwork, Shape};

/// Load-balancer IPs; the client and the pods have routes to node 1 for them.
const LOAD_BALANCER: [&str; 2] = ["203.0.113.10", "fd00:203::10"];
const EXTERNAL: &str = "203.0.113.11";
const NODE_PORT: u16 = 30_500;
/// Addresses of ServiceCIDRs that no Service has.
const UNALLOCATED: [&str; 2] = ["10.96.200.1", "fd00:10:96::200"];
/// More than a change takes on a busy machine.
const SOON: Duration = Duration::from_secs(10);
/// What is dropped is not answered in this time.
const SILENCE: Duration = Duration::from_millis(700);

/// One pod to ask from, one on the other node to answer.
fn start(pods: PodNetwork, xdp: bool) -> Result<Scenario> {
    let arguments: &[&str] = if xdp { &["--xdp", "native"] } else { &[] };
    let shape = Shape { pods, pod_counts: [2, 1], xdp, ..Shape::default() };
    let scenario = Scenario::start_with_folder(shape, arguments)?;
    scenario
        .cluster
        .client
        .ip(&["route add 203.0.113.0/24 via 192.168.50.1", "route add fd00:203::/64 via fd00:50::1"])?;
    Ok(scenario)
}

/// A load-balancer Service with these loadBalancerSourceRanges, of both families.
fn web(ranges: &[&str]) -> Value {
    let ingress: Vec<Value> = LOAD_BALANCER.iter().map(|ip| json!({"ip": ip})).collect();
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd00:10:96::10"],
            "externalIPs": [EXTERNAL], "loadBalancerSourceRanges": ranges,
            "ports": [{"name": "http", "port": 80, "targetPort": server::WHO, "nodePort": NODE_PORT}],
        },
        "status": {"loadBalancer": {"ingress": ingress}},
    })
}

fn slice(scenario: &Scenario, family: Family) -> Value {
    let pod = scenario.pod(2, 1);
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("web-{family}"), "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": family.to_string(), "ports": [{"name": "http", "port": server::WHO}],
        "endpoints": [{"addresses": [pod.address_of(family)], "nodeName": pod.node}],
    })
}

fn write(scenario: &Scenario, file: &str, object: &Value) -> Result<()> {
    scenario.manifests().write(file, &object.to_string())
}

/// Publishes the Service with these ranges, and waits until both load-balancer IPs show those of their family.
fn publish(scenario: &Scenario, ranges: &[&str], shown: [Option<&[&str]>; 2]) -> Result<()> {
    for family in Family::BOTH {
        write(scenario, &format!("web-{family}.json"), &slice(scenario, family))?;
    }
    write(scenario, "web.json", &web(ranges))?;
    scenario.agent.wait_for_services(&format!("{shown:?}"), |services| {
        let rows = services.as_array().map_or(&[][..], Vec::as_slice);
        LOAD_BALANCER.iter().zip(shown).all(|(address, shown)| {
            let row = rows.iter().find(|row| row["address"] == *address);
            row.is_some_and(|row| {
                let is_right =
                    shown.map_or(row["source_ranges"].is_null(), |shown| row["source_ranges"] == json!(shown));
                is_right && row["cluster_backends"].as_array().is_some_and(|backends| backends.len() == 1)
            })
        })
    })
}

fn target(address: &str, port: u16) -> SocketAddr {
    client::at(address.parse::<IpAddr>().expect("an address"), port)
}

/// Whether a client in a namespace is served. One that is refused or gets an error is neither.
fn is_served(from: &Namespace, target: SocketAddr) -> Result<bool> {
    from.run(|| match TcpStream::connect_timeout(&target, SILENCE) {
        Ok(_) => client::who(target).map(|_| true),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(false),
        Err(error) => Err(error).with_context(|| format!("{target} must be served or dropped")),
    })
}

/// The same for a process of the node.
fn serves_host(agent: &Agent, target: SocketAddr) -> Result<bool> {
    let mut command: Command = agent.host_command(built("probe")?);
    command.args(["tcp", &target.to_string(), "1"]);
    let output = Process::start("probe", &mut command)?.finish(Duration::from_secs(60))?;
    let answers: Answers = serde_json::from_str(&output).with_context(|| format!("the probe printed {output}"))?;
    if answers.failed == 0 {
        return Ok(true);
    }
    ensure!(answers.errors.iter().all(|error| error.contains("not permitted")), "{target}: {:?}", answers.errors);
    Ok(false)
}

/// Packets and calls that were dropped for a reason, by now.
fn dropped(agent: &Agent, reason: DropReason) -> Result<u64> {
    let data = aya::maps::MapData::from_pin(agent.pins().join(names::DROP_COUNTERS))?;
    let counters: aya::maps::PerCpuArray<_, u64> = aya::maps::PerCpuArray::try_from(aya::maps::Map::PerCpuArray(data))?;
    Ok(counters.get(&(reason as u32), 0)?.iter().sum())
}

/// A database that is open to an office would be open to everybody, or to nobody.
#[test]
fn a_load_balancer_ip_serves_its_ranges_alone_and_node_ports_and_external_ips_serve_all() -> Result<()> {
    for (pods, xdp) in [(PodNetwork::Bridged, false), (PodNetwork::Routed, true)] {
        let scenario = start(pods, xdp)?;
        let (client, pod) = (&scenario.cluster.client, scenario.pod(1, 1));
        let (own4, own6) = (format!("{CLIENT}/32"), format!("{CLIENT6}/128"));
        let (pod4, pod6) = (format!("{}/32", pod.address), format!("{}/128", pod.address6));
        // Who is in the list: the client, the pod, the node.
        for (ranges, expected) in [
            (vec![own4.as_str(), &own6], [true, false, false]),
            (vec![&pod4, &pod6], [false, true, false]),
            (vec!["192.168.50.1/32", "fd00:50::1/128"], [false, false, true]),
            (vec!["192.168.50.0/24", "fd00:50::/64", "10.244.0.0/16", "fd00:10:244::/48"], [true, true, true]),
        ] {
            let of = |v6: bool| -> Vec<&str> {
                let mut mine: Vec<&str> = ranges.iter().copied().filter(|range| range.contains(':') == v6).collect();
                mine.sort_by_key(|range| range.split('/').next().and_then(|address| address.parse::<IpAddr>().ok()));
                mine
            };
            let (of4, of6) = (of(false), of(true));
            publish(&scenario, &ranges, [Some(&of4), Some(&of6)])?;
            let before = dropped(&scenario.agent, DropReason::SourceRange)?;
            for address in LOAD_BALANCER {
                let target = target(address, 80);
                let served = [
                    is_served(client, target)?,
                    is_served(&pod.namespace, target)?,
                    serves_host(&scenario.agent, target)?,
                ];
                ensure!(
                    served == expected,
                    "{pods:?}, {ranges:?}, {target}: client, pod, host {served:?}, not {expected:?}"
                );
            }
            let counted = dropped(&scenario.agent, DropReason::SourceRange)? > before;
            ensure!(counted == expected.contains(&false), "{ranges:?}: counted {counted}");
            for (address, port) in [("192.168.50.1", NODE_PORT), (EXTERNAL, 80), ("fd00:50::1", NODE_PORT)] {
                let target = target(address, port);
                ensure!(is_served(client, target)? && is_served(&pod.namespace, target)?, "{ranges:?}, {target}");
                ensure!(serves_host(&scenario.agent, target)?, "{ranges:?}, {target} from the host");
            }
        }
    }
    Ok(())
}

/// A pod whose sockets are balanced when they connect has no address yet, and would be judged by the node's or by none.
#[test]
fn a_pod_that_is_balanced_at_connect_time_is_judged_by_its_own_address() -> Result<()> {
    let shape = Shape { pod_counts: [2, 1], ..Shape::default() };
    let scenario = Scenario::start_with_folder(shape, &["--connect", "all"])?;
    let [friend, stranger] = [scenario.pod(1, 1), scenario.pod(1, 2)];
    let friends = [format!("{}/32", friend.address), format!("{}/128", friend.address6)];
    let [of4, of6] = friends.each_ref().map(|range| [range.as_str()]);
    publish(&scenario, &[of4[0], of6[0]], [Some(&of4), Some(&of6)])?;
    for address in LOAD_BALANCER {
        let ask = |pod: &Pod| -> Result<Answers> {
            let mut command = scenario.agent.bystander_command(&pod.namespace, built("probe")?);
            command.args(["tcp", &target(address, 80).to_string(), "1"]);
            let output = Process::start("probe", &mut command)?.finish(Duration::from_secs(60))?;
            serde_json::from_str(&output).with_context(|| format!("the probe printed {output}"))
        };
        ask(friend)?.all_answered().with_context(|| address.to_owned())?;
        let refused = ask(stranger)?;
        ensure!(refused.errors.iter().any(|error| error.contains("timed out")), "{address}: {refused:?}");
    }
    Ok(())
}

/// A list that grows would cut those off who were on it, one that shrinks would cut open connections.
#[test]
fn ranges_change_live_and_nobody_on_both_lists_is_refused() -> Result<()> {
    let scenario = start(PodNetwork::Bridged, false)?;
    let client = &scenario.cluster.client;
    let [target, _] = LOAD_BALANCER.map(|address| target(address, 80));
    let lists: [&[&str]; 3] = [&["192.168.50.0/24"], &["192.168.50.100/32", "198.51.100.0/24"], &["0.0.0.0/0"]];
    publish(&scenario, lists[0], [Some(lists[0]), Some(&[])])?;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let answers = std::thread::scope(|scope| {
        let asking = scope.spawn(|| client::until(Some(client), &stop, 2, &|| client::who(target)));
        let changed = (0..20).try_for_each(|round| {
            let list = lists[round % lists.len()];
            publish(&scenario, list, [Some(list), Some(&[])])
        });
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let answers = asking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        changed.map(|()| answers)
    })?;
    ensure!(answers.total() > 0, "nobody asked");
    answers.all_answered()?;

    publish(&scenario, &["198.51.100.0/24"], [Some(&["198.51.100.0/24"]), Some(&[])])?;
    ensure!(!is_served(client, target)?, "no longer on the list");
    publish(&scenario, &[], [None, None])?;
    ensure!(is_served(client, target)?, "there is no list any more");
    ensure!(is_served(client, self::target(LOAD_BALANCER[1], 80))?, "there is no list any more");
    Ok(())
}

/// A slip of the pen in a list would open a Service to everybody, or stop the others.
#[test]
fn white_space_is_no_matter_and_an_entry_that_cannot_be_read_admits_nobody_and_is_reported_once() -> Result<()> {
    let scenario = start(PodNetwork::Bridged, false)?;
    let client = &scenario.cluster.client;
    let [target4, target6] = LOAD_BALANCER.map(|address| target(address, 80));
    publish(
        &scenario,
        &[" 192.168.50.0/24\n", "\tfd00:50::/64"],
        [Some(&["192.168.50.0/24"]), Some(&["fd00:50::/64"])],
    )?;
    ensure!(is_served(client, target4)? && is_served(client, target6)?, "white space");
    let reports = |scenario: &Scenario| scenario.agent.log().matches("spec.loadBalancerSourceRanges[0]").count();
    ensure!(reports(&scenario) == 0, "{}", scenario.agent.log());

    publish(&scenario, &["192.168.50.0/240"], [Some(&[]), Some(&[])])?;
    ensure!(!is_served(client, target4)? && !is_served(client, target6)?, "an entry that admits nobody");
    publish(&scenario, &["192.168.50.0/240", "fd00:50::/64"], [Some(&[]), Some(&["fd00:50::/64"])])?;
    ensure!(!is_served(client, target4)? && is_served(client, target6)?, "the other entry counts");
    ensure!(reports(&scenario) == 1, "{}", scenario.agent.log());
    ensure!(is_served(client, target("192.168.50.1", NODE_PORT))?, "nodePorts are not guarded");
    Ok(())
}

/// Nothing, in silence.
fn is_dropped(from: &Namespace, target: SocketAddr) -> Result<()> {
    from.run(|| {
        let error = TcpStream::connect_timeout(&target, SILENCE).err().with_context(|| format!("{target} answers"))?;
        ensure!(error.kind() == io::ErrorKind::TimedOut, "TCP to {target}: {error}");
        let socket = UdpSocket::bind(if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
        socket.set_read_timeout(Some(SILENCE))?;
        socket.connect(target)?;
        socket.send(b"question")?;
        let error = socket.recv(&mut [0; 64]).err().with_context(|| format!("{target} answers"))?;
        ensure!(error.kind() == io::ErrorKind::WouldBlock, "UDP to {target}: {error}");
        Ok(())
    })
}

/// What is dropped for the sake of ServiceCIDRs is counted; without one, it is not.
fn until_unallocated_is_dropped(agent: &Agent, from: &Namespace, address: &str, expected: bool) -> Result<()> {
    eventually(SOON, || {
        let before = dropped(agent, DropReason::Unallocated)?;
        from.run(|| -> Result<()> {
            let target = target(address, 9);
            let socket = UdpSocket::bind(if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            socket.send_to(b"question", target)?;
            Ok(())
        })?;
        std::thread::sleep(Duration::from_millis(20));
        let counted = dropped(agent, DropReason::Unallocated)? > before;
        ensure!(counted == expected, "{address}: dropped {counted}, not {expected}");
        Ok(())
    })
}

fn cidr(name: &str, cidrs: &[&str]) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": name}, "spec": {"cidrs": cidrs}})
}

/// What was meant for a Service that is gone would wander off to the default gateway, and may be answered there.
#[test]
fn an_unallocated_service_address_is_dropped_for_pods_the_host_and_clients_outside() -> Result<()> {
    for (pods, xdp) in [(PodNetwork::Bridged, false), (PodNetwork::Routed, true)] {
        let scenario = start(pods, xdp)?;
        let (agent, client, pod) = (&scenario.agent, &scenario.cluster.client, &scenario.pod(1, 1).namespace);
        publish(&scenario, &[], [None, None])?;
        for address in UNALLOCATED {
            until_unallocated_is_dropped(agent, pod, address, false)?;
        }
        write(&scenario, "cidr.json", &cidr("kubernetes", &["10.96.0.0/16", "fd00:10:96::/112"]))?;
        for address in UNALLOCATED {
            until_unallocated_is_dropped(agent, pod, address, true)?;
            let target = target(address, 80);
            for from in [pod, client] {
                is_dropped(from, target).with_context(|| format!("{pods:?} from {}", from.name()))?;
            }
            let before = dropped(agent, DropReason::Unallocated)?;
            ensure!(!serves_host(agent, target)?, "{target} answers the host");
            ensure!(dropped(agent, DropReason::Unallocated)? == before + 1, "the host's call is not counted");
        }
        // A port that a live ClusterIP does not have is still refused, and one that it has is served.
        for address in ["10.96.0.10", "fd00:10:96::10"] {
            let refused = pod.run(|| TcpStream::connect_timeout(&target(address, 81), SOON));
            let refused = refused.err().context("a connection")?;
            ensure!(refused.kind() == io::ErrorKind::ConnectionRefused, "{address}: {refused}");
            ensure!(is_served(pod, target(address, 80))? && serves_host(agent, target(address, 80))?, "{address}");
        }
        write(&scenario, "cidr.json", &cidr("kubernetes", &["fd00:10:96::/112"]))?;
        until_unallocated_is_dropped(agent, pod, UNALLOCATED[0], false)?;
        until_unallocated_is_dropped(agent, pod, UNALLOCATED[1], true)?;
        scenario.manifests().remove("cidr.json")?;
        until_unallocated_is_dropped(agent, pod, UNALLOCATED[1], false)?;
    }
    Ok(())
}

/// Who has no right to read ServiceCIDRs would serve nothing, or learn of them only after a restart.
#[test]
fn service_cidrs_of_an_api_server_count_as_soon_as_they_may_be_read() -> Result<()> {
    let api = KubeApi::serve(TcpListener::bind("127.0.0.1:0")?);
    api.apply(cidr("kubernetes", &["10.96.0.0/16"]));
    api.fail(Some(Resource::ServiceCidrs), 403);
    let kubeconfig = std::env::temp_dir().join(unique_name());
    std::fs::write(&kubeconfig, api.kubeconfig())?;
    let shape = Shape { pod_counts: [1, 1], ..Shape::default() };
    let started = Scenario::start_with_kubeconfig(shape, &kubeconfig, &[]);
    std::fs::remove_file(&kubeconfig)?;
    let mut scenario = started?;
    let pod = &scenario.cluster.nodes[0].pods[0].namespace;
    until_unallocated_is_dropped(&scenario.agent, pod, UNALLOCATED[0], false)?;
    api.heal();
    until_unallocated_is_dropped(&scenario.agent, pod, UNALLOCATED[0], true)?;
    // What the kernel knows stays while it can't be read again.
    api.fail(Some(Resource::ServiceCidrs), 500);
    scenario.agent.restart()?;
    let pod = &scenario.cluster.nodes[0].pods[0].namespace;
    until_unallocated_is_dropped(&scenario.agent, pod, UNALLOCATED[0], true)?;
    api.heal();
    api.delete(Resource::ServiceCidrs, "", "kubernetes");
    until_unallocated_is_dropped(&scenario.agent, pod, UNALLOCATED[0], false)
}

/// What the kernel still knows of a folder's ServiceCIDR would outlive it.
#[test]
fn a_service_cidr_that_left_the_folder_while_nobody_looked_counts_no_more() -> Result<()> {
    let mut scenario = start(PodNetwork::Bridged, false)?;
    write(&scenario, "cidr.json", &cidr("kubernetes", &["10.96.0.0/16"]))?;
    until_unallocated_is_dropped(&scenario.agent, &scenario.pod(1, 1).namespace, UNALLOCATED[0], true)?;
    scenario.agent.kill();
    until_unallocated_is_dropped(&scenario.agent, &scenario.pod(1, 1).namespace, UNALLOCATED[0], true)?;
    scenario.manifests().remove("cidr.json")?;
    scenario.agent.restart()?;
    until_unallocated_is_dropped(&scenario.agent, &scenario.pod(1, 1).namespace, UNALLOCATED[0], false)
}
