//! Floods from made-up senders: who is connected stays so, and who comes meanwhile is served.
//!
//! The nodes' netfilter tracks no connections here, so what is full, or isn't, is Sheave's.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use sheave::dataplane::PinnedMaps;
use sheave_common::DropReason;
use sheave_common::flow::state;
use sheave_tests::client::{self, Answer, Conversation};
use sheave_tests::family::Family;
use sheave_tests::manifests::Service;
use sheave_tests::netns::Namespace;
use sheave_tests::packet::{ACK, Packet, SYN};
use sheave_tests::patience::patient;
use sheave_tests::process::eventually;
use sheave_tests::scenario::Scenario;
use sheave_tests::topology::{PodNetwork, Shape};
use sheave_tests::{flood, server};

/// The Service whose pod is on the flooded node, and the one whose pod is on the other.
const NEAR: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(10, 96, 0, 10), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10));
const FAR: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(10, 96, 0, 11), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x11));
/// Their ports: who, echo, UDP. Those that are nodePorts have these numbers, and ten more for the second Service.
const PORTS: [(u16, u16); 3] = [(80, 30_080), (7, 30_007), (53, 30_053)];

fn service(name: &str, (v4, v6): (Ipv4Addr, Ipv6Addr), above: u16) -> Service {
    let [who, echo, udp] = PORTS;
    Service::new(name, v4)
        .and(v6)
        .tcp("who", who.0, server::WHO)
        .node_port(who.1 + above)
        .tcp("echo", echo.0, server::ECHO)
        .node_port(echo.1 + above)
        .udp("udp", udp.0, server::UDP)
        .node_port(udp.1 + above)
}

/// A cluster with both Services.
fn start(arguments: &[&str]) -> Result<Scenario> {
    let shape = Shape { pods: PodNetwork::Routed, pod_counts: [3, 1], ..Shape::default() };
    let scenario = Scenario::start(shape, arguments)?;
    scenario.publish(&service("near", NEAR, 0), [scenario.pod(1, 2)])?;
    scenario.publish(&service("far", FAR, 10), [scenario.pod(2, 1)])?;
    Ok(scenario)
}

/// A way to a Service, its ports in the order of [`PORTS`], and who is there at its beginning: honest clients and a flood.
struct Way<'a> {
    name: &'static str,
    targets: [SocketAddr; 3],
    client: &'a Namespace,
    flooder: &'a Namespace,
}

/// Ways to node ports, with the backend here and behind SNAT there, and from a pod to a ClusterIP.
fn ways(scenario: &Scenario, family: Family) -> [Way<'_>; 3] {
    let node = scenario.node().address_of(family);
    let outside = &scenario.cluster.client;
    let node_ports = |above: u16| PORTS.map(|(_, port)| scenario.at(node, port + above));
    let cluster_ip = family.pick(NEAR.0, NEAR.1);
    [
        Way { name: "nodePort, local backend", targets: node_ports(0), client: outside, flooder: outside },
        Way { name: "nodePort, remote backend", targets: node_ports(10), client: outside, flooder: outside },
        Way {
            name: "pod to ClusterIP",
            targets: PORTS.map(|(port, _)| scenario.at(cluster_ip, port)),
            client: &scenario.pod(1, 1).namespace,
            flooder: &scenario.pod(1, 3).namespace,
        },
    ]
}

/// Clients that were there before the flood.
#[derive(Default)]
struct Bystanders {
    connections: Vec<Conversation>,
    /// Sockets that have been answered, and who saw them as whom.
    datagrams: Vec<(UdpSocket, Answer)>,
}

impl Bystanders {
    /// Connects on a way, so many times by TCP and ten times by UDP.
    fn join(&mut self, way: &Way, connections: usize) -> Result<()> {
        let [_, echo, udp] = way.targets;
        way.client.run(|| {
            for _ in 0..connections {
                self.connections.push(Conversation::open(echo)?);
            }
            for _ in 0..10 {
                let socket = client::udp_to(udp)?;
                client::ask_udp_with(&socket, "first")?;
                let answer = client::ask_udp_with(&socket, "second")?;
                self.datagrams.push((socket, answer));
            }
            Ok(())
        })
    }

    /// Everybody says something, and is answered on the same connection. Returns how many.
    fn talk(&mut self) -> Result<usize> {
        for connection in &mut self.connections {
            connection.say(b"still here")?;
        }
        Ok(self.connections.len())
    }

    /// Whoever uses UDP asks again, and is seen by the same server as the same client: another flow would have another port.
    /// Not while a server's queue is full of a flood.
    fn ask(&self) -> Result<()> {
        for (socket, before) in &self.datagrams {
            let now = client::ask_udp_with(socket, "still here")?;
            ensure!(now == *before, "a flow was lost: {before:?} became {now:?}");
        }
        Ok(())
    }
}

/// Floods a way with copies of a frame, while everybody else goes on: bystanders lose nothing, and of the clients that come
/// meanwhile 99 % are served. Returns how long it took.
fn withstand(way: &Way, frame: &[u8], packets: u32, bystanders: &mut Bystanders) -> Result<()> {
    let over = AtomicBool::new(false);
    let (took, said, honest) = std::thread::scope(|scope| {
        let honest = scope.spawn(|| client::until(Some(way.client), &over, 2, &|| client::who(way.targets[0])));
        let flood = scope.spawn(|| way.flooder.run(|| flood::send(frame, packets)));
        let mut said = Ok(0);
        while let Ok(before) = said
            && !flood.is_finished()
        {
            said = bystanders.talk().map(|now| before + now);
        }
        let took = flood.join().expect("the flood does not panic");
        over.store(true, Ordering::Relaxed);
        (took, said, honest.join().expect("the clients do not panic"))
    });
    let (took, said) = (took?, said.with_context(|| format!("during a flood by {}", way.name))?);
    let asked = honest.total() + honest.failed;
    println!(
        "{} to {}: {packets} packets in {:.1} s; {said} exchanges, {} of {asked} new connections",
        way.name,
        way.targets[0],
        took.as_secs_f64(),
        honest.total()
    );
    ensure!(asked >= 20, "{}: nobody tried in {took:?}", way.name);
    ensure!(honest.failed * 100 <= asked, "{}: {} of {asked} failed: {:#?}", way.name, honest.failed, honest.errors);
    bystanders.talk().and_then(|_| bystanders.ask()).with_context(|| format!("after a flood by {}", way.name))
}

/// An address that is nobody's, of the target's family; the flood varies its end.
fn nobody(target: SocketAddr) -> String {
    if target.is_ipv4() { "10.66.0.1:1024".into() } else { "[fd00:66::1]:1024".into() }
}

/// Connections to service ports by now, and how many flows there are in the established maps.
fn opened(scenario: &Scenario) -> Result<(u64, usize)> {
    let maps = PinnedMaps::open(scenario.agent.pins())?;
    let established = maps.conntrack4()?.len() + maps.conntrack6()?.len();
    Ok((maps.service_counters()?.values().map(|counter| counter.connections).sum(), established))
}

/// Floods every way in both families; a fifth may get lost in full queues.
fn flood_every_way(packets: u32, connections: usize, frame: impl Fn(&Way) -> Bytes) -> Result<()> {
    // However long a flood takes on a slow machine, who waits meanwhile is not forgotten.
    let scenario = start(&["--timeout-udp-established", "1h"])?;
    let mut bystanders = Bystanders::default();
    for family in Family::BOTH {
        for way in ways(&scenario, family) {
            bystanders.join(&way, connections.div_ceil(6))?;
        }
    }
    bystanders.talk()?;
    let maps = PinnedMaps::open(scenario.agent.pins())?;
    for family in Family::BOTH {
        for way in ways(&scenario, family) {
            let before = opened(&scenario)?.0;
            withstand(&way, &frame(&way), packets, &mut bystanders)?;
            let arrived = opened(&scenario)?.0 - before;
            ensure!(arrived > u64::from(packets) * 4 / 5, "{}: {arrived} of {packets} arrived", way.name);
        }
    }
    // What is there of the flood has not become established.
    let made_up = maps.conntrack4()?.iter().filter(|(key, _)| key.tuple.source.octets[..2] == [10, 66]).count();
    ensure!(made_up == 0, "{made_up} made-up flows are established");
    let half_open = maps.half_open4()?;
    ensure!(half_open.iter().any(|(_, flow)| flow.state == state::NEW || flow.state == state::ANSWERED));
    println!("{:?}", maps.drop_counters()?.iter().filter(|(_, count)| *count > 0).collect::<Vec<_>>());
    Ok(())
}

fn syns(packets: u32) -> Result<()> {
    flood_every_way(packets, 1_000, |way| {
        let [who, ..] = way.targets;
        Packet::tcp(&nobody(who), &who.to_string(), SYN).build()
    })
}

fn datagrams(packets: u32) -> Result<()> {
    flood_every_way(packets, 300, |way| {
        let [_, _, udp] = way.targets;
        Packet::udp(&nobody(udp), &udp.to_string()).build()
    })
}

/// One sender could cut everybody off.
#[test]
fn a_flood_of_syns_costs_nobody_a_connection() -> Result<()> {
    syns(40_000)
}

#[test]
#[ignore = "slow: six floods of a million packets"]
fn a_million_syns_cost_nobody_a_connection() -> Result<()> {
    syns(1_000_000)
}

/// Datagrams can be made up as easily, and a server that answers each of them makes them look honest.
#[test]
fn a_flood_of_datagrams_costs_nobody_a_connection() -> Result<()> {
    datagrams(40_000)
}

#[test]
#[ignore = "slow: six floods of a million packets"]
fn a_million_datagrams_cost_nobody_a_connection() -> Result<()> {
    datagrams(1_000_000)
}

/// A Service with affinity.
const STICKY: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(10, 96, 0, 12), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x12));

/// One sender could end everybody's sessions: whoever comes back would be sent to another backend.
#[test]
fn a_flood_makes_no_client_with_affinity_forgotten() -> Result<()> {
    const PACKETS: u32 = 20_000;
    const REMEMBERED: usize = 1_024;
    for bypass in ["false", "force"] {
        let shape = Shape { pods: PodNetwork::Routed, pod_counts: [6, 4], ..Shape::default() };
        let remembered = REMEMBERED.to_string();
        let bypass = format!("--bypass-netfilter={bypass}");
        // A SYN that is lost in the servers' full queues moves its client, as it should.
        let arguments = ["--max-affinity", &remembered, "--syn-failover=false", &bypass];
        let scenario = Scenario::start(shape, &arguments)?;
        let backends = (3..=6).map(|pod| scenario.pod(1, pod)).chain((1..=4).map(|pod| scenario.pod(2, pod)));
        scenario.publish(&service("sticky", STICKY, 0).affinity(600), backends)?;
        let maps = PinnedMaps::open(scenario.agent.pins())?;
        for family in Family::BOTH {
            let node = scenario.node().address_of(family);
            let [outside, inside, other] =
                [&scenario.cluster.client, &scenario.pod(1, 1).namespace, &scenario.pod(1, 2).namespace];
            let cluster_ip = family.pick(STICKY.0, STICKY.1);
            for (client, flooder, target) in [
                (outside, outside, PORTS.map(|(_, port)| scenario.at(node, port))),
                (inside, other, PORTS.map(|(port, _)| scenario.at(cluster_ip, port))),
            ] {
                let [who, _, udp] = target;
                let ask = || -> Result<[String; 2]> {
                    client.run(|| {
                        let socket = client::udp_to(udp)?;
                        client::ask_udp_with(&socket, "first")?;
                        Ok([client::who(who)?.backend, client::ask_udp_with(&socket, "second")?.backend])
                    })
                };
                let before = ask()?;
                let syn = Packet::tcp(&nobody(who), &who.to_string(), SYN).build();
                let datagram = Packet::udp(&nobody(udp), &udp.to_string()).build();
                let known = opened(&scenario)?.0;
                for frame in [syn, datagram] {
                    flooder.run(|| flood::send(&frame, PACKETS))?;
                }
                let arrived = opened(&scenario)?.0 - known;
                let sent = 2 * u64::from(PACKETS);
                ensure!(arrived > sent * 4 / 5, "{who}: {arrived} of {sent} arrived");
                let newcomers = match family {
                    Family::V4 => maps.new_affinity4()?.len(),
                    Family::V6 => maps.new_affinity6()?.len(),
                };
                ensure!(newcomers > REMEMBERED / 4, "{newcomers} newcomers: the flood has not filled their map");
                for _ in 0..4 {
                    // When the servers have read what they have of the flood.
                    let now = eventually(Duration::from_secs(10), ask)?;
                    ensure!(now == before, "{who}, {bypass}: {before:?} became {now:?}");
                }
            }
        }
    }
    Ok(())
}

/// What can't open a connection must leave no trace, nor be answered with more than came, or without a limit.
#[test]
fn floods_of_anything_else_make_no_flows_and_are_answered_with_measure() -> Result<()> {
    const PACKETS: u32 = 40_000;
    const LIMIT: u64 = 100;
    let scenario = start(&["--rejects-per-second", &LIMIT.to_string()])?;
    let mut bystanders = Bystanders::default();
    let maps = PinnedMaps::open(scenario.agent.pins())?;
    let counted = |reason: DropReason| -> Result<u64> {
        let counters = maps.drop_counters()?;
        counters.iter().find(|(known, _)| *known == reason).map(|(_, count)| *count).context("a counter")
    };
    let flows = || -> Result<usize> {
        let half_open = maps.half_open4()?.len() + maps.half_open6()?.len();
        Ok(half_open + maps.conntrack4()?.len() + maps.conntrack6()?.len())
    };
    let cpus = std::thread::available_parallelism()?.get() as u64;
    for family in Family::BOTH {
        let [_, _, way] = ways(&scenario, family);
        bystanders.join(&way, 20)?;
        let [who, _, udp] = way.targets;
        let source = nobody(who);
        let (from, to) = (source.parse::<SocketAddr>()?.ip().to_string(), who.ip().to_string());
        let (echo, unreachable) = if family == Family::V4 { ((8, 0), (3, 3)) } else { ((128, 0), (1, 4)) };
        let quoted = Packet::udp(&udp.to_string(), &format!("{}:7", bracketed(&from))).build();
        let mid_flow = Packet::tcp(&source, &who.to_string(), ACK).build();
        let no_port = Packet::tcp(&source, &SocketAddr::new(who.ip(), 81).to_string(), SYN).build();
        let floods = [
            ("pings", Packet::icmp_message(&from, &to, echo.0, echo.1, &[0; 12]).build(), None),
            ("errors", Packet::icmp(&from, &to, unreachable.0, unreachable.1, &quoted[14..]).build(), None),
            ("segments of no connection", mid_flow, Some(DropReason::NoFlow)),
            ("SYNs to no port", no_port, Some(DropReason::UnknownPort)),
        ];
        for (what, frame, reason) in floods {
            let refused = || reason.map_or(Ok(0), counted);
            let before = (flows()?, refused()?, counted(DropReason::RejectLimited)?);
            let started = Instant::now();
            way.flooder.run(|| flood::send(&frame, PACKETS))?;
            bystanders.talk()?;
            bystanders.ask()?;
            let seconds = started.elapsed().as_secs() + 2;
            ensure!(flows()? == before.0, "{what}: {} flows became {}", before.0, flows()?);
            let (answered, limited) = (refused()? - before.1, counted(DropReason::RejectLimited)? - before.2);
            println!("{family:?}, {what}: {answered} answered, {limited} not, in {:?}", started.elapsed());
            if reason.is_some() {
                ensure!(answered <= LIMIT * cpus * seconds, "{what}: {answered} were answered");
                ensure!(answered + limited == u64::from(PACKETS), "{what}: {answered} answered, {limited} not");
            }
        }
        // First fragments remember their ports, and those of others' packets are theirs.
        let fragment = Packet::udp(&source, &udp.to_string()).payload(&[7; 64]).fragment(1).build();
        way.flooder.run(|| flood::send(&fragment, PACKETS))?;
        bystanders.talk()?;
        bystanders.ask()?;
        let long = "x".repeat(4_000);
        way.client.run(|| client::ask_udp(udp, &long)).context("a datagram in fragments after others")?;
    }
    Ok(())
}

/// An address as it is written before a port.
fn bracketed(address: &str) -> String {
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

/// Connections beyond the ports of SNAT would fail, nobody would know why, and it would last.
#[test]
fn when_source_ports_run_out_people_are_told_and_one_that_is_freed_is_used_at_once() -> Result<()> {
    const PORTS: usize = 16;
    let scenario = start(&["--snat-ports", "20000-20015"])?;
    let exhausted = || -> Result<u64> {
        let counters = PinnedMaps::open(scenario.agent.pins())?.drop_counters()?;
        let of_it = |(reason, count): (DropReason, u64)| (reason == DropReason::SnatPortsExhausted).then_some(count);
        counters.into_iter().find_map(of_it).context("a counter")
    };
    for family in Family::BOTH {
        let [_, far, _] = ways(&scenario, family);
        let [_, echo, _] = far.targets;
        let before = exhausted()?;
        let mut open = far.client.run(|| (0..PORTS).map(|_| Conversation::open(echo)).collect::<Result<Vec<_>>>())?;
        ensure!(exhausted()? == before, "{PORTS} connections have a port each");
        let waiting = std::thread::scope(|scope| -> Result<Duration> {
            let next = scope.spawn(|| far.client.run(|| TcpStream::connect_timeout(&echo, patient(client::LIMIT))));
            eventually(Duration::from_secs(5), || {
                ensure!(exhausted()? > before, "a connection without a port was not counted");
                Ok(())
            })?;
            for connection in &mut open {
                connection.say(b"no port was taken away")?;
            }
            open.pop().context("a connection")?.reset()?;
            let freed = Instant::now();
            next.join().expect("the client does not panic").context("there was a free port")?;
            Ok(freed.elapsed())
        })?;
        println!("{family:?}: connected {waiting:?} after a port was free");
        // By its next SYN, of which the first comes after a second and the second after two more.
        ensure!(waiting < patient(Duration::from_secs(4)), "{family:?}: it took {waiting:?}");
    }
    // It looks at the counter now and then, and says what it finds once.
    let backends = Family::BOTH.map(|family| scenario.pod(2, 1).address_of(family).to_string());
    eventually(Duration::from_secs(20), || {
        let log = scenario.agent.log();
        let names_one = |line: &&str| backends.iter().any(|backend| line.contains(backend));
        let line = log.lines().filter(|line| line.contains("--snat-ports")).find(names_one);
        line.map(drop).with_context(|| format!("the log does not say which backend has no port:\n{log}"))
    })
}
