//! Maps that are full: those of flows and of clients make room, so nobody new is turned away; events get lost, and are counted.

use aya::Pod;
use aya::maps::RingBuf;
use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::flow::{Flow, FlowKey};
use sheave_common::fragment::{FragmentKey, FragmentPorts};
use sheave_common::frontend::flags;
use sheave_common::{Address, Ipv4Address, Ipv6Address, PROTOCOL_TCP, PROTOCOL_UDP, event, names};
use sheave_tests::packet::{ACK, Packet, SYN, View, split};
use sheave_tests::program::{NEXT, Programs, Service};

use crate::node::{Addresses, at, client, elements, service};
use crate::pod;

/// Elements of each map.
const SIZE: u32 = 256;
/// Clients that come, one after the other.
const CLIENTS: u16 = 1_000;

/// A TCP service port with affinity, and one of UDP.
fn programs(sizes: &[(&'static str, u32)], of: &Addresses) -> Programs {
    let mut programs = Programs::load_sized(sizes, |_| {}).expect("programs load");
    for (id, protocol, port) in [(1, PROTOCOL_TCP, 80), (2, PROTOCOL_UDP, 53)] {
        let (frontend, backend) = (at(of.vip, port), at(of.local, 8_000 + port));
        let port = service(id, protocol, (&frontend, flags::CLUSTER_IP), &[(&backend, true)]);
        programs.service(&Service { affinity: 600, ..port }).expect("service");
    }
    programs
}

/// Sends a packet through a hook of the client's edge, and returns from whom to whom it goes on.
fn through(programs: &mut Programs, hook: &str, frame: &[u8]) -> String {
    let outcome = pod(programs, hook, frame);
    assert_eq!(outcome.action, NEXT);
    View(&outcome.packet).tuple()
}

/// A SYN only.
fn ask(programs: &mut Programs, of: &Addresses, client: &str) {
    let syn = Packet::tcp(client, &at(of.vip, 80), SYN).build();
    assert_eq!(through(programs, "pod_ingress", &syn), format!("{client} → {}", at(of.local, 8_080)));
}

/// A handshake, and an answer.
fn connect(programs: &mut Programs, of: &Addresses, client: &str) {
    let (frontend, backend) = (at(of.vip, 80), at(of.local, 8_080));
    let (there, back) = (format!("{client} → {backend}"), format!("{frontend} → {client}"));
    let answer = |flags| Packet::tcp(&backend, client, flags).build();
    ask(programs, of, client);
    assert_eq!(through(programs, "pod_egress", &answer(SYN | ACK)), back);
    assert_eq!(through(programs, "pod_ingress", &Packet::tcp(client, &frontend, ACK).build()), there);
    assert_eq!(through(programs, "pod_egress", &answer(ACK)), back);
}

/// A datagram in fragments, the last of which never comes.
fn fragments(programs: &mut Programs, of: &Addresses, client: &str) {
    let datagram = Packet::udp(client, &at(of.vip, 53)).payload(&[7; 3_000]).build();
    for fragment in &split(&datagram, 1_432, 7)[..2] {
        let outcome = pod(programs, "pod_ingress", fragment);
        assert_eq!((outcome.action, View(&outcome.packet).destination().ip()), (NEXT, of.local), "{client}");
    }
}

type Client = fn(&mut Programs, &Addresses, &str);
type Count = fn(&mut Programs, &str) -> usize;

/// Each map that packets fill, what a client does that fills it, and how its elements are counted.
fn maps<A: Address>(names: [&'static str; 5]) -> [(&'static str, Client, Count); 5]
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
    AffinityKey<A>: Pod,
    FragmentKey<A>: Pod,
{
    let [half_open, conntrack, affinity, new_affinity, fragmented] = names;
    [
        (half_open, ask, elements::<FlowKey<A>, Flow<A>>),
        (conntrack, connect, elements::<FlowKey<A>, Flow<A>>),
        (affinity, connect, elements::<AffinityKey<A>, Affinity>),
        (new_affinity, ask, elements::<AffinityKey<A>, Affinity>),
        (fragmented, fragments, elements::<FragmentKey<A>, FragmentPorts>),
    ]
}

/// When a node has seen more clients than its maps hold, the next ones would be turned away.
#[test]
fn full_maps_of_flows_and_clients_turn_nobody_away() {
    let v4 = maps::<Ipv4Address>([
        names::HALF_OPEN4,
        names::CONNTRACK4,
        names::AFFINITY4,
        names::NEW_AFFINITY4,
        names::FRAGMENTS4,
    ]);
    let v6 = maps::<Ipv6Address>([
        names::HALF_OPEN6,
        names::CONNTRACK6,
        names::AFFINITY6,
        names::NEW_AFFINITY6,
        names::FRAGMENTS6,
    ]);
    for (of, maps) in Addresses::BOTH.iter().zip([v4, v6]) {
        for (map, come, count) in maps {
            let mut programs = programs(&[(map, SIZE)], of);
            for number in 0..CLIENTS {
                come(&mut programs, of, &client(of.family, number, 40_000));
            }
            let entries = count(&mut programs, map);
            assert!((SIZE as usize / 4..=SIZE as usize).contains(&entries), "{map}: {entries} elements");
        }
    }
}

/// Who watches a busy node would slow it down, or not know that there was more.
#[test]
fn a_full_ring_of_events_loses_events_only_and_counts_them() {
    let of = &Addresses::BOTH[0];
    let told = |octets: usize| {
        let mut programs = programs(&[(names::EVENTS, octets as u32)], of);
        programs.array::<u64>(names::LISTENER).unwrap().set(event::UNTIL, u64::from(u32::MAX), 0).unwrap();
        for number in 0..CLIENTS {
            connect(&mut programs, of, &client(of.family, number, 40_000));
        }
        let lost = programs.array::<u64>(names::LISTENER).unwrap().get(&event::LOST, 0).unwrap();
        let mut ring = RingBuf::try_from(programs.share(names::EVENTS).unwrap()).unwrap();
        let mut read = 0;
        while ring.next().is_some() {
            read += 1;
        }
        (read, lost)
    };
    assert_eq!(told(event::OCTETS), (u64::from(CLIENTS), 0), "each connection is told");
    let (read, lost) = told(4_096);
    assert!(read > 0 && lost > 0, "{read} read, {lost} lost");
    assert_eq!(read + lost, u64::from(CLIENTS));
}
