//! The life of flows under real traffic: what the maps say of them, and what becomes of connections when entries are lost,
//! flooded, or idle for too long.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use serde_json::Value;
use sheave_common::Ipv4Address;
use sheave_common::flow::{Flow, FlowKey, flags};
use sheave_tests::client::{self, Conversation};
use sheave_tests::family::Family;
use sheave_tests::manifests::Service;
use sheave_tests::packet::{Packet, SYN};
use sheave_tests::raw_packets::RawSocket;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{PodNetwork, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const WEB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
/// Where [`Ticker`] listens.
const TICK: u16 = 9_000;

fn web() -> Service {
    Service::new("web", WEB)
        .and(WEB6)
        .tcp("echo", 7, server::ECHO)
        .tcp("tick", 9, TICK)
        .udp("udp", 53, server::UDP)
        .node_port(30_053)
}

type Flows = HashMap<MapData, FlowKey<Ipv4Address>, Flow<Ipv4Address>>;

fn conntrack(scenario: &Scenario) -> Result<Flows> {
    let data = MapData::from_pin(scenario.agent.pins().join(sheave_common::names::CONNTRACK4))?;
    Ok(HashMap::try_from(Map::LruHashMap(data))?)
}

/// Removes one half of every flow, as LRU eviction might. Returns how many there were.
fn evict(flows: &mut Flows, reply: bool) -> Result<usize> {
    let keys: Vec<_> = flows
        .iter()
        .filter_map(Result::ok)
        .filter(|(_, flow)| (flow.flags & flags::REPLY != 0) == reply)
        .map(|(key, _)| key)
        .collect();
    for key in &keys {
        flows.remove(key)?;
    }
    Ok(keys.len())
}

/// Longer than the second after which a flow looks for its other half.
const IDLE: Duration = Duration::from_millis(1_200);

/// A full connection table would break connections that are alive.
#[test]
fn a_connection_survives_the_loss_of_either_half_of_its_flow() -> Result<()> {
    let scenario = Scenario::start(Shape { pod_counts: [1, 1], ..Shape::default() }, &[])?;
    let backend = scenario.pod(2, 1);
    scenario.publish(&web(), [backend])?;
    let listener = backend.namespace.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, TICK)))?;
    let ticker = std::thread::spawn(move || -> io::Result<()> {
        let (mut connection, _) = listener.accept()?;
        for _ in 0..3 {
            std::thread::sleep(2 * IDLE);
            connection.write_all(b"t")?;
        }
        Ok(())
    });
    scenario.pod(1, 1).namespace.run(|| -> Result<()> {
        let mut flows = conntrack(&scenario)?;
        // The backend speaks, and the client's half is gone.
        let mut ticks = TcpStream::connect(scenario.at(WEB, 9))?;
        ticks.set_read_timeout(Some(Duration::from_secs(10)))?;
        for tick in 0..3 {
            std::thread::sleep(IDLE);
            ensure!(evict(&mut flows, false)? == 1, "tick {tick}: no client's half to lose");
            ticks.read_exact(&mut [0]).with_context(|| format!("tick {tick}"))?;
        }
        // The client speaks, and the backend's half is gone.
        let mut conversation = Conversation::open(scenario.at(WEB, 7))?;
        for words in [&b"one"[..], b"two"] {
            std::thread::sleep(IDLE);
            ensure!(evict(&mut flows, true)? >= 1, "no backend's half to lose");
            conversation.say(words)?;
        }
        Ok(())
    })?;
    ticker.join().map_err(|_| anyhow::anyhow!("the ticker panicked"))?.context("the backend's connection")
}

/// A SYN flood would push out the connections of everybody else.
#[test]
fn a_flood_of_syns_pushes_out_other_syns_only() -> Result<()> {
    let sizes = ["--max-half-open", "2048", "--max-conntrack", "2048"];
    let scenario = Scenario::start(Shape { pod_counts: [3, 1], ..Shape::default() }, &sizes)?;
    scenario.publish(&web(), [scenario.pod(1, 2)])?;
    let client = &scenario.pod(1, 1).namespace;
    let mut conversations: Vec<Conversation> =
        client.run(|| (0..20).map(|_| Conversation::open(scenario.at(WEB, 7))).collect::<Result<_>>())?;
    scenario.pod(1, 3).namespace.run(|| -> Result<()> {
        let (socket, web) = (RawSocket::open()?, scenario.cluster_ip(WEB));
        for n in 0..30_000_u32 {
            let [_, _, high, low] = n.to_be_bytes();
            let source = format!("10.66.{high}.{low}:{}", 1_024 + n % 60_000);
            // A full device queue loses some of a flood; that is no failure.
            let _ = socket.send(&Packet::tcp(&source, &format!("{web}:7"), SYN).build());
        }
        Ok(())
    })?;
    let half_open: Value = serde_json::from_str(&scenario.agent.view("conntrack", &["-o", "json"])?)?;
    let spoofed = half_open.as_array().into_iter().flatten().filter(|row| row.to_string().contains("10.66.")).count();
    ensure!(spoofed > 100, "the flood did not arrive: {spoofed} of its flows are there");
    for conversation in &mut conversations {
        conversation.say(b"still here")?;
    }
    client.run(|| Conversation::open(scenario.at(WEB, 7))?.say(b"new ones, too"))
}

/// Connections that the service port behind a ClusterIP frontend has had.
fn connections(scenario: &Scenario, port: u16) -> Result<u64> {
    let services: Value = serde_json::from_str(&scenario.agent.view("services", &["-o", "json", "--counters"])?)?;
    let mut rows = services.as_array().into_iter().flatten();
    let row = rows.find(|row| row["address"] == scenario.cluster_ip(WEB).to_string() && row["port"] == port);
    let row = row.with_context(|| format!("port {port} is not in {services:#}"))?;
    row["counters"]["connections"].as_u64().with_context(|| format!("no counters in {row:#}"))
}

/// Dead UDP clients would fill the table, and their ports could never be used for something else.
#[test]
fn an_idle_flow_is_forgotten_in_its_time_and_an_active_one_is_not() -> Result<()> {
    let timeouts = ["--timeout-udp-new", "2s", "--timeout-udp-established", "3s"];
    let scenario = Scenario::start(Shape { pod_counts: [2, 1], ..Shape::default() }, &timeouts)?;
    scenario.publish(&web(), [scenario.pod(1, 2)])?;
    scenario.pod(1, 1).namespace.run(|| -> Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(scenario.at(WEB, 53))?;
        for _ in 0..4 {
            client::ask_udp_with(&socket, "active")?;
            std::thread::sleep(Duration::from_millis(1_500));
        }
        ensure!(connections(&scenario, 53)? == 1, "six seconds of traffic were more than one flow");
        std::thread::sleep(Duration::from_millis(5_000));
        client::ask_udp_with(&socket, "back again")?;
        ensure!(connections(&scenario, 53)? == 2, "after five idle seconds it was still the old flow");
        Ok(())
    })
}

/// Asks a remote backend with a TTL or hop limit; the error, if a router says that it ran out.
fn ask_with_ttl(target: SocketAddr, ttl: libc::c_int) -> Result<Option<io::Error>> {
    let socket = client::udp_to(target)?;
    let (level, limit, errors) = match Family::of(target.ip()) {
        Family::V4 => (libc::SOL_IP, libc::IP_TTL, libc::IP_RECVERR),
        Family::V6 => (libc::SOL_IPV6, libc::IPV6_UNICAST_HOPS, libc::IPV6_RECVERR),
    };
    for (option, value) in [(errors, 1), (limit, ttl)] {
        // SAFETY: the value is as long as is said and outlives the call.
        let set = unsafe {
            let (value, size) = ((&raw const value).cast(), size_of_val(&value) as u32);
            libc::setsockopt(socket.as_raw_fd(), level, option, value, size)
        };
        ensure!(set == 0, "socket option {option}: {}", io::Error::last_os_error());
    }
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.send(b"how far")?;
    match socket.recv(&mut [0; 100]) {
        Ok(_) => Ok(None),
        Err(error) => Ok(Some(error)),
    }
}

/// A routing loop would go on for ever, and traceroute would not show this node.
#[test]
fn a_redirected_packet_is_a_hop_older_and_dies_of_age() -> Result<()> {
    for xdp in [false, true] {
        let shape = Shape { pods: PodNetwork::Routed, pod_counts: [1, 1], xdp, ..Shape::default() };
        let scenario = Scenario::start(shape, &["--xdp", if xdp { "native" } else { "off" }])?;
        scenario.publish(&web(), [scenario.pod(2, 1)])?;
        for family in Family::BOTH {
            let target = scenario.at(scenario.node().address_of(family), 30_053);
            scenario.cluster.client.run(|| -> Result<()> {
                // Both neighbours are known from here on, so XDP does what it can.
                ensure!(ask_with_ttl(target, 64)?.is_none());
                // 1 dies at this node, 2 at the other one, which forwards it to its pod.
                for ttl in [1, 2] {
                    let error = ask_with_ttl(target, ttl)?.with_context(|| format!("TTL {ttl} was enough"))?;
                    ensure!(error.raw_os_error() == Some(libc::EHOSTUNREACH), "{target}, {ttl}, XDP {xdp}: {error}");
                }
                ensure!(ask_with_ttl(target, 3)?.is_none(), "{target}: 3 hops were not enough, XDP {xdp}");
                Ok(())
            })?;
        }
    }
    Ok(())
}
