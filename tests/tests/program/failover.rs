//! A SYN that is sent again, because nothing has answered it, goes to another backend; and what must not go wrong with that.
//!
//! Nobody waits for a second here: a half-open flow is made older than it is.

use std::collections::HashSet;
use std::hash::Hash;
use std::net::SocketAddr;

use aya::Pod;
use sheave::model::desired::Algorithm;
use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::config::flags as config_flags;
use sheave_common::drop_reason::SYN_FAILOVERS;
use sheave_common::flow::{Flow, FlowKey, state};
use sheave_common::frontend::flags;
use sheave_common::load::Load;
use sheave_common::{Address, Ipv4Address, Ipv6Address, PROTOCOL_SCTP, PROTOCOL_TCP, names};
use sheave_tests::packet::{ACK, Packet, SYN, View};
use sheave_tests::program::{NEXT, Outcome, Programs, REDIRECT, Service, XDP_TX};

use crate::nodeport::{on_a_node, uplink};
use crate::{CLIENT, VIP, address, cluster_ip, edit_of, pod};

const BACKENDS: [&str; 4] = ["10.1.0.11:8080", "10.1.0.12:8080", "10.1.0.13:8080", "10.1.0.14:8080"];

/// Units of [`Flow::tried`] in a second: the time after which a client sends its SYN again.
const SECOND: u8 = 60;

/// Programs with a service of these backends behind [`VIP`].
fn programs(algorithm: Algorithm, backends: &[&str]) -> (Programs, Vec<u32>) {
    serving(algorithm, backends, 0)
}

fn serving(algorithm: Algorithm, backends: &[&str], affinity: u32) -> (Programs, Vec<u32>) {
    let mut programs = Programs::load().expect("programs load");
    programs.set_algorithm(algorithm);
    let ids = programs.service(&Service { affinity, ..cluster_ip(1, PROTOCOL_TCP, VIP, backends) }).expect("service");
    (programs, ids)
}

fn syn(programs: &mut Programs, from: &str) -> String {
    let out = pod(programs, "pod_ingress", &Packet::tcp(from, VIP, SYN).build());
    assert_eq!(out.action, NEXT);
    View(&out.packet).assert_checksums();
    View(&out.packet).destination().to_string()
}

fn answer(programs: &mut Programs, from: &str, to: &str) -> Outcome {
    pod(programs, "pod_egress", &Packet::tcp(from, to, SYN | ACK).build())
}

/// Makes all half-open flows of a family older by this much.
fn wait<A: Address + Hash>(programs: &mut Programs, map: &str, units: u8)
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    edit_of::<A>(programs, map, |flow| flow.tried = flow.tried.wrapping_sub(units));
}

fn a_second(programs: &mut Programs) {
    wait::<Ipv4Address>(programs, names::HALF_OPEN4, SECOND);
}

/// The client's SYN, once more a second after the last one.
fn again(programs: &mut Programs, from: &str) -> String {
    a_second(programs);
    syn(programs, from)
}

fn failovers(programs: &mut Programs) -> u64 {
    programs.counted(SYN_FAILOVERS).unwrap()
}

/// A client would hang for as long as the cluster takes to notice that a backend is dead.
#[test]
fn a_syn_sent_again_without_an_answer_goes_to_another_backend_and_connects() {
    let (mut programs, _) = programs(Algorithm::Random, &BACKENDS);
    let first = syn(&mut programs, CLIENT);
    let second = again(&mut programs, CLIENT);
    assert_ne!(second, first);
    assert_eq!(failovers(&mut programs), 1);
    let flows = programs.flows(names::HALF_OPEN4).unwrap();
    assert_eq!(flows.len(), 2, "of the first attempt nothing is left: {flows:?}");
    // The first backend's late answer is nobody's: the client resets it.
    let late = answer(&mut programs, &first, CLIENT);
    assert_eq!((late.action, View(&late.packet).tuple()), (NEXT, format!("{first} → {CLIENT}")));
    let answered = answer(&mut programs, &second, CLIENT);
    assert_eq!(View(&answered.packet).tuple(), format!("{VIP} → {CLIENT}"));
    let ack = pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, ACK).build());
    assert_eq!(View(&ack.packet).destination().to_string(), second);
    assert_eq!(programs.flows(names::CONNTRACK4).unwrap().len(), 2);
    assert!(programs.flows(names::HALF_OPEN4).unwrap().is_empty());
    // Nor does it disturb the connection once that is open.
    answer(&mut programs, &first, CLIENT);
    let data = pod(&mut programs, "pod_ingress", &Packet::tcp(CLIENT, VIP, ACK).payload(b"x").build());
    assert_eq!(View(&data.packet).destination().to_string(), second);
}

#[test]
fn the_same_holds_over_ipv6_and_for_sctp() {
    const FRONTEND: &str = "[fd00::10]:80";
    const FROM: &str = "[fd01::1]:40000";
    let backends = ["[fd01::11]:8080", "[fd01::12]:8080", "[fd01::13]:8080"];
    for protocol in [PROTOCOL_TCP, PROTOCOL_SCTP] {
        let mut programs = Programs::load().expect("programs load");
        programs.service(&cluster_ip(1, protocol, FRONTEND, &backends)).expect("service");
        let first = if protocol == PROTOCOL_TCP {
            Packet::tcp(FROM, FRONTEND, SYN)
        } else {
            // An INIT chunk.
            Packet::sctp(FROM, FRONTEND).payload(&[1, 0, 0, 4])
        };
        let mut seen = Vec::new();
        for _ in 0..3 {
            let out = pod(&mut programs, "pod_ingress", &first.build());
            seen.push(View(&out.packet).destination());
            wait::<Ipv6Address>(&mut programs, names::HALF_OPEN6, SECOND);
        }
        assert!(seen[0] != seen[1] && seen[1] != seen[2], "{protocol}: {seen:?}");
        assert_eq!(programs.flows6(names::HALF_OPEN6).unwrap().len(), 2);
        assert_eq!(failovers(&mut programs), 2);
    }
}

/// A network that delivers a SYN twice would have two backends answer one client, which resets one of them.
#[test]
fn a_copy_of_a_syn_goes_where_the_first_one_went() {
    let (mut programs, _) = programs(Algorithm::Random, &BACKENDS);
    let first = syn(&mut programs, CLIENT);
    for _ in 0..20 {
        assert_eq!(syn(&mut programs, CLIENT), first);
    }
    wait::<Ipv4Address>(&mut programs, names::HALF_OPEN4, SECOND / 4);
    assert_eq!(syn(&mut programs, CLIENT), first);
    // The same for a copy of the SYN that was sent again; a clock of another CPU may be a moment ahead.
    let second = again(&mut programs, CLIENT);
    assert_eq!(syn(&mut programs, CLIENT), second);
    wait::<Ipv4Address>(&mut programs, names::HALF_OPEN4, 1_u8.wrapping_neg());
    assert_eq!(syn(&mut programs, CLIENT), second);
    assert_eq!(failovers(&mut programs), 1);
}

/// After a lost SYN-ACK the client would open a second connection with another server, and the first one's would be reset.
#[test]
fn a_connection_that_was_answered_stays() {
    let (mut programs, _) = programs(Algorithm::Random, &BACKENDS);
    let first = syn(&mut programs, CLIENT);
    answer(&mut programs, &first, CLIENT);
    for _ in 0..5 {
        assert_eq!(again(&mut programs, CLIENT), first);
    }
    // What two CPUs leave when the answer comes at the very moment: only its own half knows of it yet.
    let (mut programs, _) = self::programs(Algorithm::Random, &BACKENDS);
    let first = syn(&mut programs, CLIENT);
    let mut map = programs.hash::<FlowKey<Ipv4Address>, Flow<Ipv4Address>>(names::HALF_OPEN4).unwrap();
    let flows: Vec<_> = map.iter().map(Result::unwrap).collect();
    for (key, mut flow) in flows {
        flow.state = if key.tuple.destination_port_be == 40_000_u16.to_be() { state::ANSWERED } else { state::NEW };
        map.insert(key, flow, 0).unwrap();
    }
    assert_eq!(again(&mut programs, CLIENT), first);
    assert_eq!(failovers(&mut programs), 0);
}

#[test]
fn with_one_backend_nothing_changes() {
    let (mut programs, _) = programs(Algorithm::Random, &BACKENDS[..1]);
    let of = |programs: &mut Programs| -> HashSet<_> {
        let flows = programs.flows(names::HALF_OPEN4).unwrap().into_iter();
        flows.map(|(key, flow)| (key, flow.rewrite, flow.backend_id, flow.state, flow.closing)).collect()
    };
    syn(&mut programs, CLIENT);
    let before = of(&mut programs);
    for _ in 0..3 {
        assert_eq!(again(&mut programs, CLIENT), BACKENDS[0]);
        assert_eq!(of(&mut programs), before);
    }
    assert_eq!(failovers(&mut programs), 0);
    assert_eq!(programs.counter(1).unwrap().connections, 1);
    let answered = answer(&mut programs, BACKENDS[0], CLIENT);
    assert_eq!(View(&answered.packet).tuple(), format!("{VIP} → {CLIENT}"));
}

#[test]
fn it_can_be_turned_off_and_is_off_while_another_proxy_takes_over() {
    for flags in [0, config_flags::SYN_FAILOVER | config_flags::LEAVING] {
        let (mut programs, _) = programs(Algorithm::Random, &BACKENDS);
        let first = syn(&mut programs, CLIENT);
        programs.configure(|config| config.flags = flags).unwrap();
        for _ in 0..5 {
            assert_eq!(again(&mut programs, CLIENT), first);
        }
    }
}

/// A client that tries again and again would come back to the dead backend each time, or see the same two only.
#[test]
fn every_way_to_choose_leaves_the_last_backend_out_and_reaches_the_others() {
    for algorithm in [Algorithm::Random, Algorithm::RoundRobin, Algorithm::Maglev, Algorithm::LeastConnections] {
        let (mut programs, _) = programs(algorithm, &BACKENDS);
        let mut last = syn(&mut programs, CLIENT);
        let mut seen = HashSet::from([last.clone()]);
        for _ in 0..40 {
            let next = again(&mut programs, CLIENT);
            assert_ne!(next, last, "{algorithm:?}");
            last.clone_from(&next);
            seen.insert(next);
        }
        assert_eq!(seen.len(), BACKENDS.len(), "{algorithm:?}: {seen:?}");
    }
}

/// The neighbour of a dead backend would get all of its clients.
#[test]
fn the_clients_of_a_dead_backend_are_spread_evenly() {
    let (mut programs, _) = programs(Algorithm::Random, &BACKENDS);
    let mut counts = [0; 4];
    for port in 0..600 {
        let client = format!("10.1.0.1:{}", 30_000 + port);
        if syn(&mut programs, &client) == BACKENDS[0] {
            let next = again(&mut programs, &client);
            counts[BACKENDS.iter().position(|backend| *backend == next).unwrap()] += 1;
        }
    }
    let total: i32 = counts.iter().sum();
    assert_eq!(counts[0], 0);
    assert!(counts[1..].iter().all(|count| *count > total / 5), "{counts:?}");
}

#[test]
fn the_first_backends_load_is_taken_back() {
    let (mut programs, ids) = programs(Algorithm::LeastConnections, &BACKENDS[..2]);
    let counted = |programs: &mut Programs| -> Vec<i64> {
        let loads = programs.hash::<u32, Load>(names::BACKEND_LOADS).expect("the map");
        ids.iter().map(|id| loads.get(id, 0).map_or(0, |load| load.connections)).collect()
    };
    let first = syn(&mut programs, CLIENT);
    let at_first = counted(&mut programs);
    assert_ne!(again(&mut programs, CLIENT), first);
    let then = counted(&mut programs);
    assert_eq!((at_first[0] + at_first[1], then), (1, vec![at_first[1], at_first[0]]));
}

fn bound_to(programs: &mut Programs) -> Vec<u32> {
    let map = programs.hash::<AffinityKey<Ipv4Address>, Affinity>(names::NEW_AFFINITY4).unwrap();
    map.iter().map(|entry| entry.unwrap().1.backend_id).collect()
}

/// A client with affinity would be sent to the dead backend for hours, each time for a second.
#[test]
fn affinity_follows_the_client_to_the_backend_that_took_over() {
    for algorithm in [Algorithm::Random, Algorithm::Maglev] {
        let (mut programs, ids) = serving(algorithm, &BACKENDS, 10_800);
        let ports: Vec<String> = (0..4).map(|port| format!("10.1.0.1:{}", 40_000 + port)).collect();
        let first = syn(&mut programs, &ports[0]);
        assert_eq!(syn(&mut programs, &ports[1]), first, "that is affinity");
        let second = again(&mut programs, &ports[0]);
        assert_ne!(second, first);
        assert_eq!(syn(&mut programs, &ports[2]), second, "the next connection");
        assert_eq!(syn(&mut programs, &ports[1]), second, "another one that waited, and tries again");
        let id = ids[BACKENDS.iter().position(|backend| *backend == second).unwrap()];
        assert_eq!(bound_to(&mut programs), [id]);
        assert_eq!(failovers(&mut programs), 2);
        // If that one doesn't answer either, the client goes on to a third.
        let third = again(&mut programs, &ports[0]);
        assert_ne!(third, second);
        assert_eq!(syn(&mut programs, &ports[3]), third);
    }
}

/// One lost SYN would cost a client its session, which only the living backend knows.
#[test]
fn a_client_with_affinity_stays_where_others_have_been_answered_since() {
    let (mut programs, _) = serving(Algorithm::Random, &BACKENDS, 10_800);
    let first = syn(&mut programs, CLIENT);
    // Another client has reached the same backend.
    let other = (2..250)
        .map(|host| format!("10.1.7.{host}:41000"))
        .find(|other| syn(&mut programs, other) == first)
        .expect("one of many clients");
    a_second(&mut programs);
    answer(&mut programs, &first, &other);
    assert_eq!(syn(&mut programs, CLIENT), first, "it lives, and the SYN was lost");
    assert_eq!(syn(&mut programs, "10.1.0.1:40001"), first);
    assert_eq!(failovers(&mut programs), 0);
}

/// A node port's service of three backends on other nodes, in place of what [`on_a_node`] made.
fn three_remote(programs: &mut Programs) {
    let endpoints = ["10.1.1.2:8080", "10.1.1.3:8080", "10.1.1.4:8080"];
    let service = Service {
        id: 1,
        frontends: vec![(address(NODE), flags::NODE_PORT)],
        protocol: PROTOCOL_TCP,
        endpoints: endpoints.iter().map(|endpoint| (address(endpoint), false)).collect(),
        affinity: 0,
    };
    programs.service(&service).expect("service");
}

const NODE: &str = "192.0.2.1:30080";
const OUTSIDE: &str = "198.51.100.7:40000";

fn ends(out: &Outcome) -> (SocketAddr, SocketAddr) {
    View(&out.packet).assert_checksums();
    (View(&out.packet).source(), View(&out.packet).destination())
}

/// A late answer to the old port would be taken for the new backend's, and break the connection.
#[test]
fn a_connection_with_snat_moves_and_its_old_port_is_nobodys() {
    on_a_node("10.1.1.2:8080", false, |programs, ifindex| {
        three_remote(programs);
        for xdp in [false, true] {
            let enter = |programs: &mut Programs, packet: &Packet| {
                if xdp {
                    programs.xdp(&packet.build(), ifindex).unwrap()
                } else {
                    uplink(programs, "uplink_ingress", &packet.build(), ifindex)
                }
            };
            let sent = if xdp { XDP_TX } else { REDIRECT };
            let outside = if xdp { "198.51.100.8:40000" } else { OUTSIDE };
            let first = enter(programs, &Packet::tcp(outside, NODE, SYN));
            assert_eq!(first.action, sent);
            let (port, backend) = ends(&first);
            a_second(programs);
            let second = enter(programs, &Packet::tcp(outside, NODE, SYN));
            assert_eq!(second.action, sent);
            let (new_port, new_backend) = ends(&second);
            assert_ne!(new_backend, backend);
            let late = enter(programs, &Packet::tcp(&backend.to_string(), &port.to_string(), SYN | ACK));
            assert_ne!(late.action, sent, "the node's own stack resets it");
            assert_eq!(ends(&late), (backend, port));
            let answered = enter(programs, &Packet::tcp(&new_backend.to_string(), &new_port.to_string(), SYN | ACK));
            assert_eq!(answered.action, sent);
            assert_eq!(ends(&answered), (address(NODE), address(outside)));
            let ack = enter(programs, &Packet::tcp(outside, NODE, ACK));
            assert_eq!(ends(&ack), (new_port, new_backend));
        }
    });
}

/// A pod whose connection to itself isn't answered gets another pod; its packets to that one keep its address.
#[test]
fn a_hairpin_moves_to_another_pod() {
    let (mut programs, _) = programs(Algorithm::Random, &BACKENDS[..2]);
    let client = (40_000..40_100)
        .map(|port| format!("10.1.0.11:{port}"))
        .find(|client| {
            let out = pod(&mut programs, "pod_ingress", &Packet::tcp(client, VIP, SYN).build());
            View(&out.packet).destination() == address(BACKENDS[0])
        })
        .expect("one connection to itself among many");
    a_second(&mut programs);
    let out = pod(&mut programs, "pod_ingress", &Packet::tcp(&client, VIP, SYN).build());
    assert_eq!((out.action, View(&out.packet).tuple()), (NEXT, format!("{client} → {}", BACKENDS[1])));
}
