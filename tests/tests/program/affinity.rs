//! Session affinity while others come that are nobody: a client is remembered for good when a connection of its is established.

use std::collections::BTreeMap;

use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::frontend::flags;
use sheave_common::{Ipv4Address, Ipv6Address, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP, names};
use sheave_tests::family::Family;
use sheave_tests::packet::{ACK, Packet, SYN, View};
use sheave_tests::program::{NEXT, Programs, Service};

use crate::node::{Addresses, at, client, elements, on_a_node, service, uplink};
use crate::{edit, edit_of, pod};

/// Elements of each map of clients.
const SIZE: u32 = 256;
/// Clients that have connections. An LRU map evicts in batches, so some of a few more would go without a flood.
const CLIENTS: u16 = 64;
/// Addresses that a flood claims to come from.
const FLOOD: u16 = 4_000;
/// Endpoints.
const ENDPOINTS: u8 = 16;

fn programs(of: &Addresses) -> Programs {
    let maps = [names::AFFINITY4, names::AFFINITY6, names::NEW_AFFINITY4, names::NEW_AFFINITY6];
    let mut programs = Programs::load_sized(&maps.map(|map| (map, SIZE)), |_| {}).expect("programs load");
    for (id, protocol) in [(1, PROTOCOL_TCP), (2, PROTOCOL_UDP), (3, PROTOCOL_SCTP)] {
        let endpoints: Vec<String> =
            (1..=ENDPOINTS).map(|host| client(of.family, 0x0100 + u16::from(host), 8_080)).collect();
        let endpoints: Vec<(&str, bool)> = endpoints.iter().map(|endpoint| (endpoint.as_str(), true)).collect();
        let port = service(id, protocol, (&at(of.vip, 80), flags::CLUSTER_IP), &endpoints);
        programs.service(&Service { affinity: 10_800, ..port }).expect("service");
    }
    programs
}

/// How a connection is established: what the client sends first, what the backend answers, what the client says to that.
struct Manner {
    protocol: u8,
    first: fn(&str, &str) -> Packet,
    answer: fn(&str, &str) -> Packet,
    then: fn(&str, &str) -> Packet,
}

const MANNERS: [Manner; 3] = [
    Manner {
        protocol: PROTOCOL_TCP,
        first: |from, to| Packet::tcp(from, to, SYN),
        answer: |from, to| Packet::tcp(from, to, SYN | ACK),
        then: |from, to| Packet::tcp(from, to, ACK),
    },
    Manner { protocol: PROTOCOL_UDP, first: Packet::udp, answer: Packet::udp, then: Packet::udp },
    Manner {
        protocol: PROTOCOL_SCTP,
        // INIT, INIT ACK and COOKIE ECHO (RFC 9260, 3.2)
        first: |from, to| Packet::sctp(from, to).payload(&[1, 0, 0, 4]),
        answer: |from, to| Packet::sctp(from, to).payload(&[2, 0, 0, 4]),
        then: |from, to| Packet::sctp(from, to).payload(&[10, 0, 0, 4]),
    },
];

impl Manner {
    /// The first packet of a new connection; the backend that it goes to.
    fn ask(&self, programs: &mut Programs, of: &Addresses, client: &str) -> String {
        let outcome = pod(programs, "pod_ingress", &(self.first)(client, &at(of.vip, 80)).build());
        assert_eq!(outcome.action, NEXT, "protocol {}", self.protocol);
        View(&outcome.packet).destination().to_string()
    }

    /// A connection; its backend.
    fn connect(&self, programs: &mut Programs, of: &Addresses, client: &str) -> String {
        let backend = self.ask(programs, of, client);
        pod(programs, "pod_egress", &(self.answer)(&backend, client).build());
        pod(programs, "pod_ingress", &(self.then)(client, &at(of.vip, 80)).build());
        backend
    }
}

/// Clients that are known, and newcomers.
fn remembered(programs: &mut Programs, of: &Addresses) -> (usize, usize) {
    let mut count = |map: &str| match of.family {
        Family::V4 => elements::<AffinityKey<Ipv4Address>, Affinity>(programs, map),
        Family::V6 => elements::<AffinityKey<Ipv6Address>, Affinity>(programs, map),
    };
    match of.family {
        Family::V4 => (count(names::AFFINITY4), count(names::NEW_AFFINITY4)),
        Family::V6 => (count(names::AFFINITY6), count(names::NEW_AFFINITY6)),
    }
}

/// Whoever sends with made-up addresses would have everybody's sessions end.
#[test]
fn a_flood_of_clients_that_are_none_makes_nobody_forgotten() {
    for of in &Addresses::BOTH {
        for manner in MANNERS {
            let mut programs = programs(of);
            let known: BTreeMap<u16, String> = (0..CLIENTS)
                .map(|number| (number, manner.connect(&mut programs, of, &client(of.family, 0x8000 + number, 40_000))))
                .collect();
            assert_eq!(remembered(&mut programs, of), (usize::from(CLIENTS), 0), "protocol {}", manner.protocol);
            for number in 0..FLOOD {
                // Twice, in two connections: who is a newcomer already is remembered again.
                for port in [50_000, 50_001] {
                    manner.ask(&mut programs, of, &client(of.family, 0x1000 + number, port));
                }
            }
            let (established, newcomers) = remembered(&mut programs, of);
            assert_eq!(established, usize::from(CLIENTS));
            assert!(newcomers >= SIZE as usize / 4, "{newcomers} newcomers: the flood has filled their map");
            for (number, backend) in known {
                let again = manner.ask(&mut programs, of, &client(of.family, 0x8000 + number, 40_001));
                assert_eq!(again, backend, "client {number}, protocol {}", manner.protocol);
            }
            assert_eq!(remembered(&mut programs, of).0, usize::from(CLIENTS));
        }
    }
}

/// A browser opens several connections before the first is answered.
#[test]
fn connections_at_once_go_to_one_backend_and_are_remembered_when_one_is_established() {
    for of in &Addresses::BOTH {
        for manner in MANNERS {
            let mut programs = programs(of);
            let ports: Vec<String> = (0..7).map(|port| client(of.family, 0x8000, 40_000 + port)).collect();
            let first = manner.ask(&mut programs, of, &ports[0]);
            assert_eq!(remembered(&mut programs, of), (0, 1));
            for port in &ports[1..4] {
                assert_eq!(manner.ask(&mut programs, of, port), first);
            }
            assert_eq!(manner.connect(&mut programs, of, &ports[4]), first);
            assert_eq!(remembered(&mut programs, of), (1, 0));
            assert_eq!(manner.connect(&mut programs, of, &ports[5]), first);
            assert_eq!(manner.ask(&mut programs, of, &ports[6]), first);
            assert_eq!(remembered(&mut programs, of), (1, 0));
        }
    }
}

/// Who asks once and is told more by and by is as real as who asks again. Only the answers say so, wherever they come by.
#[test]
fn a_client_that_goes_on_being_told_is_remembered() {
    for of in &Addresses::BOTH {
        let udp = |id, frontend: (&str, u32), endpoint: (&str, bool)| Service {
            affinity: 600,
            ..service(id, PROTOCOL_UDP, frontend, &[endpoint])
        };
        let (near, own, far) = (at(of.vip, 80), at(of.vip, 81), at(of.node, 30_080));
        let services = [
            udp(1, (&near, flags::CLUSTER_IP), (&at(of.local, 8_080), true)),
            udp(2, (&own, flags::CLUSTER_IP), (&at(of.pod, 8_080), true)),
            udp(3, (&far, flags::NODE_PORT), (&at(of.remote, 8_080), false)),
        ];
        on_a_node(&services, |programs, ifindex| {
            let enter = |programs: &mut Programs, hook: &str, from: &str, to: &str| {
                let packet = Packet::udp(from, to).build();
                let outcome = match hook {
                    "uplink_xdp" => programs.xdp(&packet, ifindex).expect("test run"),
                    "uplink_ingress" => uplink(programs, hook, &packet, ifindex),
                    _ => pod(programs, hook, &packet),
                };
                let view = View(&outcome.packet);
                (view.source().to_string(), view.destination().to_string())
            };
            for (known, (client, frontend, there, back)) in [
                (at(of.pod, 40_000), &near, "pod_ingress", "pod_egress"),
                (at(of.pod, 40_000), &own, "pod_ingress", "pod_ingress"),
                (at(of.client, 40_000), &far, "uplink_ingress", "uplink_ingress"),
                (client(of.family, 1, 40_000), &far, "uplink_xdp", "uplink_xdp"),
            ]
            .into_iter()
            .enumerate()
            {
                let (seen, backend) = enter(programs, there, &client, frontend);
                assert_ne!(backend, *frontend, "{client} by {there}");
                let answer = |programs: &mut Programs| {
                    assert_eq!(enter(programs, back, &backend, &seen), (frontend.clone(), client.clone()), "by {back}");
                };
                answer(programs);
                assert_eq!(remembered(programs, of), (known, 1), "one answer may be a flood's: {client} by {there}");
                match of.family {
                    Family::V4 => edit(programs, names::HALF_OPEN4, |flow| flow.last_seen -= 2),
                    Family::V6 => edit_of::<Ipv6Address>(programs, names::HALF_OPEN6, |flow| flow.last_seen -= 2),
                }
                answer(programs);
                assert_eq!(remembered(programs, of), (known + 1, 0), "{client} by {there}");
            }
        });
    }
}

/// Who comes during a flood would be the next whom nobody remembers.
#[test]
fn a_newcomer_that_was_forgotten_during_its_handshake_is_remembered_after_it() {
    for of in &Addresses::BOTH {
        for manner in MANNERS {
            let mut programs = programs(of);
            let ports = [client(of.family, 0x8000, 40_000), client(of.family, 0x8000, 40_001)];
            let backend = manner.ask(&mut programs, of, &ports[0]);
            for number in 0..FLOOD {
                manner.ask(&mut programs, of, &client(of.family, 0x1000 + number, 50_000));
            }
            pod(&mut programs, "pod_egress", &(manner.answer)(&backend, &ports[0]).build());
            pod(&mut programs, "pod_ingress", &(manner.then)(&ports[0], &at(of.vip, 80)).build());
            assert_eq!(remembered(&mut programs, of).0, 1, "protocol {}", manner.protocol);
            assert_eq!(manner.ask(&mut programs, of, &ports[1]), backend);
        }
    }
}
