//! How a backend is chosen: in turn, by Maglev's hash, at random.

use std::collections::BTreeMap;

use sheave::model::desired::Algorithm;
use sheave_common::backend::Backend;
use sheave_common::load::Load;
use sheave_common::{Ipv4Address, PROTOCOL_TCP, PROTOCOL_UDP, names};
use sheave_tests::packet::{ACK, FIN, Packet, RST, SYN, View};
use sheave_tests::program::Programs;

use crate::{VIP, cluster_ip, pod};

const BACKENDS: [&str; 3] = ["10.1.0.11:8080", "10.1.0.12:8080", "10.1.0.13:8080"];

fn programs(how: Algorithm) -> Programs {
    let mut programs = Programs::load().expect("programs load");
    programs.set_algorithm(how);
    programs.service(&cluster_ip(1, PROTOCOL_TCP, VIP, &BACKENDS)).expect("service");
    programs
}

/// Where new connections from these clients go.
fn chosen(programs: &mut Programs, clients: impl Iterator<Item = String>) -> Vec<String> {
    clients
        .map(|client| {
            let out = pod(programs, "pod_ingress", &Packet::tcp(&client, VIP, SYN).build());
            View(&out.packet).destination().to_string()
        })
        .collect()
}

fn clients(count: u16) -> impl Iterator<Item = String> {
    (0..count).map(|index| format!("10.1.{}.{}:{}", index % 7, 1 + index % 200, 30_000 + index))
}

/// Pins the thread: each CPU takes turns for itself.
fn on_one_cpu() {
    // SAFETY: the set is a plain value, and the calls only read it.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut set);
        assert_eq!(libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set), 0);
    }
}

#[test]
fn round_robin_gives_every_backend_its_turn() {
    on_one_cpu();
    let mut programs = programs(Algorithm::RoundRobin);
    let chosen = chosen(&mut programs, clients(300));
    for turn in chosen.chunks(3) {
        let mut turn = turn.to_vec();
        turn.sort();
        assert_eq!(turn, BACKENDS);
    }
}

/// A client that meets another node, after a reroute upstream, would otherwise meet another backend.
#[test]
fn two_nodes_choose_the_same_backend_for_a_client_by_maglev() {
    let mut here = programs(Algorithm::Maglev);
    // The other node has served before, so its ids are others, and it heard of the endpoints in another order.
    let mut there = Programs::load().expect("programs load");
    there.service(&cluster_ip(7, PROTOCOL_UDP, "10.96.0.99:53", &["10.1.0.2:53", "10.1.0.3:53"])).expect("service");
    there.set_algorithm(Algorithm::Maglev);
    let [first, second, third] = BACKENDS;
    there.service(&cluster_ip(9, PROTOCOL_TCP, VIP, &[third, first, second])).expect("service");
    let first = chosen(&mut here, clients(500));
    assert_eq!(first, chosen(&mut there, clients(500)));
    let mut counts = BTreeMap::<&str, u32>::new();
    for backend in &first {
        *counts.entry(backend).or_default() += 1;
    }
    for backend in BACKENDS {
        let count = counts.get(backend).copied().unwrap_or(0);
        assert!((120..=215).contains(&count), "{counts:?}");
    }
}

#[test]
fn maglev_keeps_a_client_with_affinity_at_one_backend_whatever_its_port() {
    let mut programs = Programs::load().expect("programs load");
    programs.set_algorithm(Algorithm::Maglev);
    let mut service = cluster_ip(1, PROTOCOL_TCP, VIP, &BACKENDS);
    service.affinity = 1;
    programs.service(&service).expect("service");
    let chosen = chosen(&mut programs, (0..50).map(|index| format!("10.1.0.77:{}", 40_000 + index)));
    assert!(chosen.iter().all(|backend| *backend == chosen[0]), "{chosen:?}");
}

/// Connections that backends have, by their ids.
fn loads(programs: &mut Programs, ids: &[u32]) -> Vec<i64> {
    let loads = programs.hash::<u32, Load>(names::BACKEND_LOADS).expect("the map");
    ids.iter().map(|id| loads.get(id, 0).map_or(0, |load| load.connections)).collect()
}

fn set_load(programs: &mut Programs, id: u32, connections: i64) {
    let mut loads = programs.hash::<u32, Load>(names::BACKEND_LOADS).expect("the map");
    loads.insert(id, Load { connections }, 0).expect("room");
}

/// Programs with one service of these backends that are chosen by connections.
fn by_connections(protocol: u8, backends: &[&str]) -> (Programs, Vec<u32>) {
    let mut programs = Programs::load().expect("programs load");
    programs.set_algorithm(Algorithm::LeastConnections);
    let ids = programs.service(&cluster_ip(1, protocol, VIP, backends)).expect("service");
    (programs, ids)
}

#[test]
fn the_less_loaded_of_two_backends_is_chosen() {
    let (mut programs, ids) = by_connections(PROTOCOL_TCP, &BACKENDS[..2]);
    set_load(&mut programs, ids[0], 20);
    set_load(&mut programs, ids[1], 50);
    let first = chosen(&mut programs, clients(29));
    assert!(first.iter().all(|backend| backend == BACKENDS[0]), "{first:?}");
    assert_eq!(loads(&mut programs, &ids), [49, 50]);
    let next = chosen(&mut programs, clients(240).skip(29));
    let count = next.iter().filter(|backend| **backend == BACKENDS[0]).count();
    assert!((105..=107).contains(&count), "{count} of {}", next.len());
}

#[test]
fn of_many_backends_new_connections_go_where_few_are() {
    let (mut programs, ids) = by_connections(PROTOCOL_TCP, &BACKENDS);
    set_load(&mut programs, ids[0], 100_000);
    let spread = chosen(&mut programs, clients(300));
    assert!(spread.iter().all(|backend| backend != BACKENDS[0]), "the busiest is never the better of two");
    let loads = loads(&mut programs, &ids);
    assert_eq!((loads[0], loads[1] + loads[2]), (100_000, 300));
    assert!((loads[1] - loads[2]).abs() <= 60, "{loads:?}");
}

#[test]
fn a_backend_that_weighs_more_may_have_more_connections() {
    let (mut programs, ids) = by_connections(PROTOCOL_TCP, &BACKENDS[..2]);
    let mut backends = programs.hash::<u32, Backend<Ipv4Address>>(names::BACKENDS4).expect("the map");
    let backend = backends.get(&ids[1], 0).expect("a backend");
    backends.insert(ids[1], Backend { weight: 4, ..backend }, 0).expect("room");
    chosen(&mut programs, clients(200));
    let loads = loads(&mut programs, &ids);
    assert!((39..=41).contains(&loads[0]) && loads[0] + loads[1] == 200, "{loads:?}");
}

/// A backend would count as busy for ever, or as idle while it works.
#[test]
fn a_connection_counts_from_its_first_packet_until_both_sides_have_closed_it() {
    const CLIENT: &str = "10.1.0.5:40000";
    let (mut programs, ids) = by_connections(PROTOCOL_TCP, &BACKENDS[..1]);
    let forward =
        |programs: &mut Programs, flags| pod(programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, flags).build());
    let reply =
        |programs: &mut Programs, flags| pod(programs, "pod_egress", &Packet::tcp(BACKENDS[0], CLIENT, flags).build());
    forward(&mut programs, SYN);
    assert_eq!(loads(&mut programs, &ids), [1]);
    forward(&mut programs, SYN);
    reply(&mut programs, SYN | ACK);
    forward(&mut programs, ACK);
    assert_eq!(loads(&mut programs, &ids), [1], "a SYN again is the same connection");
    forward(&mut programs, FIN | ACK);
    assert_eq!(loads(&mut programs, &ids), [1], "half-closed");
    reply(&mut programs, FIN | ACK);
    assert_eq!(loads(&mut programs, &ids), [0]);
    forward(&mut programs, FIN | ACK);
    reply(&mut programs, FIN | ACK);
    forward(&mut programs, RST);
    assert_eq!(loads(&mut programs, &ids), [0], "it is taken away once");
    forward(&mut programs, SYN);
    assert_eq!(loads(&mut programs, &ids), [1], "the port again");
    reply(&mut programs, RST | ACK);
    assert_eq!(loads(&mut programs, &ids), [0]);
}

#[test]
fn datagram_flows_count_once_each() {
    let (mut programs, ids) = by_connections(PROTOCOL_UDP, &BACKENDS[..2]);
    for client in clients(40).chain(clients(40)) {
        pod(&mut programs, "pod_ingress", &Packet::udp(&client, VIP).build());
    }
    assert_eq!(loads(&mut programs, &ids), [20, 20]);
}

#[test]
fn other_algorithms_count_nothing() {
    let mut programs = programs(Algorithm::Random);
    chosen(&mut programs, clients(10));
    assert_eq!(programs.hash::<u32, Load>(names::BACKEND_LOADS).expect("the map").iter().count(), 0);
}
