//! What only IPv6 has, and what a Service of both families promises. What holds for either family is in the other end-to-end
//! tests, which ask in both.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sheave_tests::client::{self, Conversation, at};
use sheave_tests::family::Family;
use sheave_tests::manifests::{Endpoint, Service};
use sheave_tests::netns::Namespace;
use sheave_tests::patience::patient;
use sheave_tests::process::eventually;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{NodeNetwork, PodNetwork, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const WEB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
const HTTP: u16 = 30_500;

fn web() -> Service {
    with_ports(Service::new("web", WEB).and(WEB6))
}

fn with_ports(service: Service) -> Service {
    service
        .tcp("http", 80, server::WHO)
        .node_port(HTTP)
        .tcp("echo", 7, server::ECHO)
        .udp("udp", 53, server::UDP)
        .node_port(30_053)
}

/// Who answers at a target.
fn who(namespace: &Namespace, target: SocketAddr) -> Result<String> {
    namespace.run(|| client::who(target)).map(|answer| answer.backend)
}

fn refused(namespace: &Namespace, target: SocketAddr) -> Result<()> {
    let attempt = namespace.run(|| TcpStream::connect_timeout(&target, patient(client::LIMIT)));
    let error = attempt.err().with_context(|| format!("{target} accepted a connection"))?;
    ensure!(error.kind() == io::ErrorKind::ConnectionRefused, "{target}: {error}");
    Ok(())
}

/// A client of one family would be sent to the other family's endpoints, or lose its own when those of the other go.
#[test]
fn each_family_of_a_service_has_its_own_endpoints() -> Result<()> {
    let scenario = Scenario::start(Shape { pod_counts: [3, 1], ..Shape::default() }, &[])?;
    let [pod, four, six] = [scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(2, 1)];
    let publish = |endpoints: &[Endpoint]| -> Result<()> {
        scenario.update(&web(), endpoints)?;
        scenario.wait_until_published(&web(), endpoints)
    };
    let (own4, own6) = (Endpoint::of(four, Family::V4), Endpoint::of(six, Family::V6));
    publish(&[own4.clone(), own6.clone()])?;
    let targets = |family: Family| {
        let node = scenario.node().address_of(family);
        [(&pod.namespace, scenario.at(family.pick(WEB, WEB6), 80)), (&scenario.cluster.client, scenario.at(node, HTTP))]
    };
    for (family, backend) in [(Family::V4, four), (Family::V6, six)] {
        for (from, target) in targets(family) {
            for _ in 0..5 {
                let answered = who(from, target)?;
                ensure!(answered == backend.name, "{answered} answered at {target}");
            }
        }
    }

    publish(&[own4])?;
    for (from, target) in targets(Family::V6) {
        refused(from, target)?;
    }
    for (from, target) in targets(Family::V4) {
        who(from, target)?;
    }
    publish(&[own6])?;
    for (from, target) in targets(Family::V4) {
        refused(from, target)?;
    }
    for (from, target) in targets(Family::V6) {
        who(from, target)?;
    }
    Ok(())
}

/// A Service of IPv6 alone would not work, or take its nodePort in the other family, too.
#[test]
fn a_service_of_one_family_leaves_the_other_alone() -> Result<()> {
    let scenario = Scenario::start(Shape { pod_counts: [2, 1], ..Shape::default() }, &[])?;
    let backend = scenario.pod(1, 2);
    let only = with_ports(Service::new("only", WEB6)).affinity(600);
    scenario.publish(&only, [backend, scenario.pod(2, 1)])?;
    let node = scenario.node();
    for (from, target) in [
        (&scenario.pod(1, 1).namespace, scenario.at(WEB6, 80)),
        (&scenario.cluster.client, scenario.at(WEB6, 80)),
        (&scenario.cluster.client, scenario.at(node.address6, HTTP)),
    ] {
        let answers = client::who_many(Some(from), target, 40, 2);
        answers.all_answered()?;
        ensure!(answers.by_backend.len() == 1, "one client was sent to {:?}", answers.by_backend);
    }
    // Here the node itself answers, first because nobody listens, then because somebody does.
    let (outside, own) = (&scenario.cluster.client, scenario.at(node.address, HTTP));
    refused(outside, own)?;
    let _listener = node.namespace.run(|| TcpListener::bind(own)).context("the port is the node's own by IPv4")?;
    outside.run(|| TcpStream::connect_timeout(&own, patient(client::LIMIT))).context("the node's own server")?;
    Ok(())
}

/// Links would go dead: neighbours are found, and duplicate addresses too, by ICMPv6 on the very interfaces that Sheave
/// watches.
#[test]
fn neighbours_are_found_again_and_duplicate_addresses_noticed() -> Result<()> {
    for (pods, nodes, xdp) in [
        (PodNetwork::Bridged, NodeNetwork::Plain, true),
        (PodNetwork::Routed, NodeNetwork::Plain, false),
        (PodNetwork::Bridged, NodeNetwork::Vxlan, true),
    ] {
        let shape = Shape { pods, nodes, pod_counts: [2, 1], xdp };
        let scenario = Scenario::start(shape, &["--xdp", if xdp { "native" } else { "off" }])?;
        let (pod, beside, there) = (scenario.pod(1, 1), scenario.pod(1, 2), scenario.pod(2, 1));
        scenario.publish(&web(), [there])?;
        let node = scenario.node();
        for round in 0..3 {
            for namespace in scenario.cluster.namespaces() {
                namespace.ip(&["neighbour flush all"])?;
            }
            for (from, target) in [
                (&scenario.cluster.client, scenario.at(node.address6, HTTP)),
                (&pod.namespace, scenario.at(WEB6, 80)),
                (&pod.namespace, at(beside.address6, server::WHO)),
                (&there.namespace, at(pod.address6, server::WHO)),
            ] {
                who(from, target).with_context(|| format!("{shape:?}, round {round}, {target}"))?;
            }
        }
        if pods == PodNetwork::Bridged {
            pod.namespace.sysctl("ipv6/conf/eth0/accept_dad", "1")?;
            pod.namespace.ip(&[format!("address add {}/64 dev eth0", beside.address6)])?;
            eventually(Duration::from_secs(5), || {
                let shown = pod.namespace.output("ip", &["-6", "address", "show", "dev", "eth0"])?;
                ensure!(shown.contains("dadfailed"), "the other pod did not defend its address: {shown}");
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// Options of `struct ipv6_opt_hdr`: eight bytes of padding. The kernel fills the next header in.
const PADDING: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];

/// Hosts that send extension headers would not reach a Service, or find their options in place of their data.
#[test]
fn packets_with_extension_headers_reach_their_backends() -> Result<()> {
    for xdp in [false, true] {
        let shape = Shape { pod_counts: [2, 1], xdp, ..Shape::default() };
        let scenario = Scenario::start(shape, &["--xdp", if xdp { "native" } else { "off" }])?;
        let node_port = scenario.node().address6;
        for backend in [scenario.pod(1, 2), scenario.pod(2, 1)] {
            scenario.publish(&web(), [backend])?;
            for (from, target) in [
                (&scenario.pod(1, 1).namespace, scenario.at(WEB6, 53)),
                (&scenario.cluster.client, scenario.at(node_port, 30_053)),
            ] {
                for options in
                    [&[libc::IPV6_DSTOPTS][..], &[libc::IPV6_HOPOPTS], &[libc::IPV6_HOPOPTS, libc::IPV6_DSTOPTS]]
                {
                    let answer = from.run(|| -> Result<_> {
                        let socket = client::udp_to(target)?;
                        for option in options {
                            // SAFETY: the value is as long as is said and outlives the call.
                            let set = unsafe {
                                let (value, size) = (PADDING.as_ptr().cast(), size_of_val(&PADDING) as u32);
                                libc::setsockopt(socket.as_raw_fd(), libc::SOL_IPV6, *option, value, size)
                            };
                            ensure!(set == 0, "socket option {option}: {}", io::Error::last_os_error());
                        }
                        client::ask_udp_with(&socket, "with options")
                    });
                    let answer = answer.with_context(|| format!("{target}, options {options:?}, XDP {xdp}"))?;
                    ensure!(answer.backend == backend.name, "{answer:?}");
                }
            }
        }
        ensure!(scenario.cluster.checksum_errors()? == 0, "checksum errors");
    }
    Ok(())
}

/// Over a tunnel whose packets carry less than the client's, long answers and uploads would hang: nobody but the node can
/// tell the sender, and IPv6 routers never fragment.
#[test]
fn transfers_learn_the_width_of_a_tunnel() -> Result<()> {
    for xdp in [false, true] {
        let shape = Shape { nodes: NodeNetwork::Vxlan, pod_counts: [1, 1], xdp, ..Shape::default() };
        let scenario = Scenario::start(shape, &["--xdp", if xdp { "native" } else { "off" }])?;
        scenario
            .publish(&Service::new("echo", WEB6).tcp("echo", 7, server::ECHO).node_port(HTTP), [scenario.pod(2, 1)])?;
        // Narrower than the pods' own links, so that the backend has to learn it as well.
        for node in &scenario.cluster.nodes {
            node.namespace.ip(&["link set flannel-v6.1 mtu 1340"])?;
        }
        for (from, target) in [
            (&scenario.cluster.client, scenario.at(scenario.node().address6, HTTP)),
            (&scenario.pod(1, 1).namespace, scenario.at(WEB6, 7)),
        ] {
            let transfer = from.run(|| Conversation::open(target)?.transfer(3_000_000));
            transfer.with_context(|| format!("{target}, XDP {xdp}"))?;
        }
    }
    Ok(())
}
