//! How a backend is chosen: in turn, by Maglev's hash, at random.

use std::collections::BTreeMap;

use sheave::model::desired::Algorithm;
use sheave_common::{PROTOCOL_TCP, PROTOCOL_UDP};
use sheave_tests::packet::{Packet, SYN, View};
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
