//! Session affinity while others come that are nobody: a client is remembered for good when a connection of its is established.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::frontend::flags;
use sheave_common::{Ipv4Address, Ipv6Address, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP, names};
use sheave_tests::family::Family;
use sheave_tests::packet::{ACK, Packet, SYN, View};
use sheave_tests::program::{NEXT, Programs, Service};

use crate::node::{Addresses, at, service};
use crate::pod;

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
        let endpoints: Vec<String> = (1..=ENDPOINTS).map(|host| client(of, 0x0100 + u16::from(host), 8_080)).collect();
        let endpoints: Vec<(&str, bool)> = endpoints.iter().map(|endpoint| (endpoint.as_str(), true)).collect();
        let port = service(id, protocol, (&at(of.vip, 80), flags::CLUSTER_IP), &endpoints);
        programs.service(&Service { affinity: 10_800, ..port }).expect("service");
    }
    programs
}

/// One of many addresses, with a port.
fn client(of: &Addresses, number: u16, port: u16) -> String {
    let [high, low] = number.to_be_bytes();
    match of.family {
        Family::V4 => SocketAddr::from(([10, 7, high, low], port)),
        Family::V6 => SocketAddr::from(([0xfd00, 7, 0, 0, 0, 0, 0, number], port)),
    }
    .to_string()
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
        Family::V4 => programs.hash::<AffinityKey<Ipv4Address>, Affinity>(map).unwrap().keys().count(),
        Family::V6 => programs.hash::<AffinityKey<Ipv6Address>, Affinity>(map).unwrap().keys().count(),
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
                .map(|number| (number, manner.connect(&mut programs, of, &client(of, 0x8000 + number, 40_000))))
                .collect();
            assert_eq!(remembered(&mut programs, of), (usize::from(CLIENTS), 0), "protocol {}", manner.protocol);
            for number in 0..FLOOD {
                manner.ask(&mut programs, of, &client(of, 0x1000 + number, 50_000));
            }
            let (established, newcomers) = remembered(&mut programs, of);
            assert_eq!(established, usize::from(CLIENTS));
            assert!(newcomers >= SIZE as usize / 4, "{newcomers} newcomers: the flood has filled their map");
            for (number, backend) in known {
                let again = manner.ask(&mut programs, of, &client(of, 0x8000 + number, 40_001));
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
            let ports: Vec<String> = (0..8).map(|port| client(of, 0x8000, 40_000 + port)).collect();
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
