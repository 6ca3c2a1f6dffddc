//! Packets in fragments, of which only the first has ports.

use sheave_common::fragment::{FragmentKey, FragmentPorts};
use sheave_common::frontend::flags;
use sheave_common::{Address, DropReason, Ipv4Address, Ipv6Address, PROTOCOL_TCP, PROTOCOL_UDP, names};
use sheave_tests::family::Family;
use sheave_tests::packet::{ACK, FRAGMENT, PSH, Packet, SYN, View, join, split};
use sheave_tests::program::{DROP, NEXT, Outcome, Programs, REDIRECT, XDP_PASS};

use crate::node::{Addresses, at, on_a_node, service, uplink};
use crate::pod;

/// As much as a link of 1500 octets takes, in either family.
const PAYLOAD: usize = 1_432;

/// A datagram of a few fragments.
fn datagram(from: &str, to: &str) -> Packet {
    let payload: Vec<u8> = (0..4_001_u32).map(|index| (index % 251) as u8).collect();
    Packet::udp(from, to).payload(&payload)
}

/// Programs with a ClusterIP whose UDP ports 53 and 54 are served by two local pods.
fn cluster_ip(of: &Addresses) -> Programs {
    let mut programs = Programs::load().expect("programs load");
    for (id, port, backend) in [(1, 53, at(of.local, 5_353)), (2, 54, at(of.remote, 5_354))] {
        let frontend = at(of.vip, port);
        let service = service(id, PROTOCOL_UDP, (&frontend, flags::CLUSTER_IP), &[(&backend, true)]);
        programs.service(&service).expect("service");
    }
    programs
}

/// The packet that comes out when these fragments go in.
fn whole(out: &[Outcome]) -> Vec<u8> {
    join(out.iter().map(|outcome| outcome.packet.as_slice()))
}

/// The fragments of a packet, with what a program did to each, all with this verdict.
fn through(fragments: &[Vec<u8>], action: i32, mut run: impl FnMut(&[u8]) -> Outcome) -> Vec<Outcome> {
    let outcomes: Vec<_> = fragments.iter().map(|fragment| run(fragment)).collect();
    for (index, outcome) in outcomes.iter().enumerate() {
        assert_eq!(outcome.action, action, "fragment {index}");
    }
    outcomes
}

/// Large DNS answers would never arrive.
#[test]
fn a_large_question_and_its_answer_pass_through_a_cluster_ip() {
    for of in &Addresses::BOTH {
        let mut programs = cluster_ip(of);
        let (client, frontend, backend) = (at(of.pod, 40_000), at(of.vip, 53), at(of.local, 5_353));
        let question = datagram(&client, &frontend).build();
        let fragments = split(&question, PAYLOAD, 7);
        assert_eq!(fragments.len(), 3);
        let there = whole(&through(&fragments, NEXT, |fragment| pod(&mut programs, "pod_ingress", fragment)));
        assert_eq!(View(&there).tuple(), format!("{client} → {backend}"));
        assert_eq!(View(&there).transport()[8..], View(&question).transport()[8..]);
        View(&there).assert_checksums();
        let answer = datagram(&backend, &client).build();
        let fragments = split(&answer, PAYLOAD, 7);
        let back = whole(&through(&fragments, NEXT, |fragment| pod(&mut programs, "pod_egress", fragment)));
        assert_eq!(View(&back).tuple(), format!("{frontend} → {client}"));
        View(&back).assert_checksums();
        assert_eq!(programs.counter(1).unwrap().packets, 6, "each fragment is a packet");
        assert_eq!(programs.dropped(DropReason::Fragment).unwrap(), 0);
    }
}

#[test]
fn tcp_segments_in_fragments_follow_their_connection() {
    for of in &Addresses::BOTH {
        let mut programs = Programs::load().unwrap();
        let (client, frontend, backend) = (at(of.pod, 40_000), at(of.vip, 80), at(of.local, 8_080));
        let web = service(1, PROTOCOL_TCP, (&frontend, flags::CLUSTER_IP), &[(&backend, true)]);
        programs.service(&web).unwrap();
        pod(&mut programs, "pod_ingress", &Packet::tcp(&client, &frontend, SYN).build());
        pod(&mut programs, "pod_egress", &Packet::tcp(&backend, &client, SYN | ACK).build());
        pod(&mut programs, "pod_ingress", &Packet::tcp(&client, &frontend, ACK).build());
        let segment = Packet::tcp(&client, &frontend, PSH | ACK).payload(&[7; 2_000]).build();
        let there = through(&split(&segment, 800, 9), NEXT, |fragment| pod(&mut programs, "pod_ingress", fragment));
        let there = whole(&there);
        assert_eq!(View(&there).tuple(), format!("{client} → {backend}"));
        View(&there).assert_checksums();
    }
}

#[test]
fn a_pod_that_is_its_own_backend_gets_its_fragments_back() {
    for of in &Addresses::BOTH {
        let mut programs = Programs::load().unwrap();
        let (client, frontend, backend) = (at(of.pod, 40_000), at(of.vip, 53), at(of.pod, 5_353));
        let dns = service(1, PROTOCOL_UDP, (&frontend, flags::CLUSTER_IP), &[(&backend, true)]);
        programs.service(&dns).unwrap();
        let question = split(&datagram(&client, &frontend).build(), PAYLOAD, 7);
        let there = whole(&through(&question, REDIRECT, |fragment| pod(&mut programs, "pod_ingress", fragment)));
        assert_eq!(View(&there).destination().to_string(), backend);
        View(&there).assert_checksums();
        let answer = split(&datagram(&backend, &View(&there).source().to_string()).build(), PAYLOAD, 8);
        let back = whole(&through(&answer, REDIRECT, |fragment| pod(&mut programs, "pod_ingress", fragment)));
        assert_eq!(View(&back).tuple(), format!("{frontend} → {client}"));
        View(&back).assert_checksums();
    }
}

/// Clients outside would get no large answer from a pod of another node.
#[test]
fn fragments_go_through_this_node_to_another_ones_pod_and_back() {
    for of in &Addresses::BOTH {
        let (client, frontend, backend) = (at(of.client, 40_000), at(of.node, 30_053), at(of.remote, 5_353));
        let dns = service(1, PROTOCOL_UDP, (&frontend, flags::NODE_PORT), &[(&backend, false)]);
        on_a_node(&[dns], |programs, ifindex| {
            let question = split(&datagram(&client, &frontend).build(), PAYLOAD, 7);
            let there = through(&question, REDIRECT, |fragment| uplink(programs, "uplink_ingress", fragment, ifindex));
            assert!(there.iter().all(|outcome| View(&outcome.packet).ttl() == 63));
            let whole_there = whole(&there);
            let snat = View(&whole_there).source();
            assert_eq!((snat.ip(), View(&whole_there).destination().to_string()), (of.node, backend.clone()));
            View(&whole_there).assert_checksums();
            let answer = split(&datagram(&backend, &snat.to_string()).build(), PAYLOAD, 7);
            let back = through(&answer, REDIRECT, |fragment| uplink(programs, "uplink_ingress", fragment, ifindex));
            let whole_back = whole(&back);
            assert_eq!(View(&whole_back).tuple(), format!("{frontend} → {client}"));
            View(&whole_back).assert_checksums();
            // What was redirected meets the egress hook, which must not turn it again.
            for Outcome { packet, .. } in there.iter().chain(&back) {
                let out = uplink(programs, "uplink_egress", packet, ifindex);
                assert_eq!((out.action, &out.packet), (NEXT, packet));
            }
        });
    }
}

/// The stack would forward it by the default route, with a Service's address in it.
#[test]
fn a_fragment_that_overtakes_its_first_is_dropped_and_counted() {
    for of in &Addresses::BOTH {
        let mut programs = cluster_ip(of);
        let question = split(&datagram(&at(of.pod, 40_000), &at(of.vip, 53)).build(), PAYLOAD, 7);
        for fragment in &question[1..] {
            assert_eq!(pod(&mut programs, "pod_ingress", fragment).action, DROP);
        }
        assert_eq!(programs.dropped(DropReason::Fragment).unwrap(), 2);
        // Those that come after the first pass, in any order.
        for index in [0, 2, 1] {
            assert_eq!(pod(&mut programs, "pod_ingress", &question[index]).action, NEXT, "fragment {index}");
        }
        assert_eq!(programs.dropped(DropReason::Fragment).unwrap(), 2);
    }
}

#[test]
fn fragments_that_are_no_services_are_left_alone() {
    for of in &Addresses::BOTH {
        let mut programs = cluster_ip(of);
        for (from, to) in [(at(of.pod, 40_000), at(of.local, 53)), (at(of.local, 53), at(of.pod, 40_000))] {
            for fragment in split(&datagram(&from, &to).build(), PAYLOAD, 7) {
                for program in ["pod_ingress", "pod_egress", "uplink_ingress", "uplink_egress"] {
                    let out = pod(&mut programs, program, &fragment);
                    assert_eq!((out.action, &out.packet), (NEXT, &fragment), "{program}");
                }
            }
        }
        assert_eq!(remembered(&mut programs, of.family), 0, "nor are they remembered");
    }
}

/// A fragment header alone does not make a fragment (RFC 6946).
#[test]
fn an_atomic_fragment_is_a_whole_packet() {
    let of = &Addresses::BOTH[1];
    let mut programs = cluster_ip(of);
    let (client, frontend) = (at(of.pod, 40_000), at(of.vip, 53));
    let atomic = Packet::udp(&client, &frontend).extension(FRAGMENT, &[0, 0, 0, 0, 0x12, 0x34]).build();
    let out = pod(&mut programs, "pod_ingress", &atomic);
    assert_eq!((out.action, View(&out.packet).tuple()), (NEXT, format!("{client} → {}", at(of.local, 5_353))));
    View(&out.packet).assert_checksums();
    assert_eq!(remembered(&mut programs, of.family), 0);
    let unknown = Packet::udp(&client, &at(of.vip, 99)).extension(FRAGMENT, &[0, 0, 0, 0, 0x12, 0x34]).build();
    let out = pod(&mut programs, "pod_ingress", &unknown);
    assert_eq!((out.action, View(&out.packet).icmp()), (REDIRECT, (1, 4)), "and is answered like one");
}

/// The rest of a packet would go to another Service's pod.
#[test]
fn a_packet_that_reuses_an_identification_has_its_own_ports() {
    for of in &Addresses::BOTH {
        let mut programs = cluster_ip(of);
        for (port, backend) in [(53, at(of.local, 5_353)), (54, at(of.remote, 5_354)), (53, at(of.local, 5_353))] {
            let client = at(of.pod, 40_000);
            let question = split(&datagram(&client, &at(of.vip, port)).build(), PAYLOAD, 7);
            let there = whole(&through(&question, NEXT, |fragment| pod(&mut programs, "pod_ingress", fragment)));
            assert_eq!(View(&there).tuple(), format!("{client} → {backend}"));
            View(&there).assert_checksums();
        }
    }
}

#[test]
fn an_identification_is_forgotten_as_soon_as_the_kernel_gives_its_packet_up() {
    for of in &Addresses::BOTH {
        let mut programs = cluster_ip(of);
        let question = split(&datagram(&at(of.pod, 40_000), &at(of.vip, 53)).build(), PAYLOAD, 7);
        assert_eq!(pod(&mut programs, "pod_ingress", &question[0]).action, NEXT);
        age(&mut programs, of.family, 20);
        assert_eq!(pod(&mut programs, "pod_ingress", &question[1]).action, NEXT, "within net.ipv4.ipfrag_time");
        age(&mut programs, of.family, 11);
        assert_eq!(pod(&mut programs, "pod_ingress", &question[2]).action, DROP);
        assert_eq!(programs.dropped(DropReason::Fragment).unwrap(), 1);
    }
}

/// An ICMP error about a fragment without ports would find no socket, and is forbidden (RFC 1122, 3.2.2).
#[test]
fn only_a_first_fragment_is_answered() {
    for of in &Addresses::BOTH {
        let (client, frontend, backend) = (at(of.client, 40_000), at(of.node, 30_053), at(of.remote, 5_353));
        let port_unreachable = if of.family == Family::V4 { (3, 3) } else { (1, 4) };
        let services = [
            service(1, PROTOCOL_UDP, (&frontend, flags::NODE_PORT), &[(&backend, false)]),
            service(2, PROTOCOL_UDP, (&at(of.vip, 53), flags::CLUSTER_IP), &[]),
        ];
        on_a_node(&services, |programs, ifindex| {
            let time_exceeded = if of.family == Family::V4 { (11, 0) } else { (3, 0) };
            let last_hop = split(&datagram(&client, &frontend).ttl(1).build(), PAYLOAD, 7);
            let first = uplink(programs, "uplink_ingress", &last_hop[0], ifindex);
            assert_eq!((first.action, View(&first.packet).icmp()), (REDIRECT, time_exceeded));
            View(&first.packet).assert_checksums();
            for fragment in &last_hop[1..] {
                let out = uplink(programs, "uplink_ingress", fragment, ifindex);
                assert_eq!((out.action, &out.packet), (DROP, fragment));
            }
            assert_eq!(programs.dropped(DropReason::TtlExceeded).unwrap(), 3);

            let refused = split(&datagram(&client, &at(of.vip, 53)).build(), PAYLOAD, 8);
            let first = uplink(programs, "uplink_ingress", &refused[0], ifindex);
            assert_eq!((first.action, View(&first.packet).icmp()), (REDIRECT, port_unreachable));
            for fragment in &refused[1..] {
                let out = uplink(programs, "uplink_ingress", fragment, ifindex);
                assert_eq!((out.action, &out.packet), (DROP, fragment));
            }
            assert_eq!(programs.dropped(DropReason::Fragment).unwrap(), 2);

            let status = std::process::Command::new("ip").args(["link", "set", "up0", "mtu", "1400"]).status().unwrap();
            assert!(status.success());
            let large = split(&datagram(&client, &frontend).build(), PAYLOAD, 9);
            let first = uplink(programs, "uplink_ingress", &large[0], ifindex);
            let view = View(&first.packet);
            let too_big = if of.family == Family::V4 { (3, 4) } else { (2, 0) };
            assert_eq!((first.action, view.icmp(), view.icmp_mtu()), (REDIRECT, too_big, 1_400));
            let out = uplink(programs, "uplink_ingress", &large[1], ifindex);
            assert_eq!((out.action, &out.packet), (DROP, &large[1]));
            assert_eq!(programs.dropped(DropReason::TooBig).unwrap(), 2);
        });
    }
}

/// A client whose first datagram is too large for the road would never learn the road's width, nor get an answer.
#[test]
fn the_very_first_packet_of_a_flow_may_be_too_big_and_is_answered_with_the_mtu() {
    for of in &Addresses::BOTH {
        let (client, frontend, backend) = (at(of.client, 40_000), at(of.node, 30_053), at(of.remote, 5_353));
        let dns = service(1, PROTOCOL_UDP, (&frontend, flags::NODE_PORT), &[(&backend, false)]);
        let too_big = if of.family == Family::V4 { (3, 4) } else { (2, 0) };
        on_a_node(&[dns], |programs, ifindex| {
            let status = std::process::Command::new("ip").args(["link", "set", "up0", "mtu", "1400"]).status().unwrap();
            assert!(status.success());
            let whole = Packet::udp(&client, &frontend).payload(&[7; PAYLOAD]).build();
            let fragment = split(&datagram(&at(of.client, 40_001), &frontend).build(), PAYLOAD, 7).remove(0);
            for packet in [&whole[..], &fragment[..]] {
                let out = uplink(programs, "uplink_ingress", packet, ifindex);
                let view = View(&out.packet);
                assert_eq!((out.action, view.icmp(), view.icmp_mtu()), (REDIRECT, too_big, 1_400));
                view.assert_checksums();
            }
            assert_eq!(programs.dropped(DropReason::TooBig).unwrap(), 2);
        });
    }
}

#[test]
fn xdp_leaves_fragments_to_tc() {
    for of in &Addresses::BOTH {
        let (client, frontend, backend) = (at(of.client, 40_000), at(of.node, 30_053), at(of.remote, 5_353));
        let dns = service(1, PROTOCOL_UDP, (&frontend, flags::NODE_PORT), &[(&backend, false)]);
        on_a_node(&[dns], |programs, ifindex| {
            let question = split(&datagram(&client, &frontend).build(), PAYLOAD, 7);
            for fragment in &question {
                let up = programs.xdp(fragment, ifindex).unwrap();
                assert_eq!((up.action, &up.packet), (XDP_PASS, fragment));
            }
            assert_eq!(remembered(programs, of.family), 0);
            through(&question, REDIRECT, |fragment| uplink(programs, "uplink_ingress", fragment, ifindex));
            for fragment in &question[1..] {
                let up = programs.xdp(fragment, ifindex).unwrap();
                assert_eq!((up.action, &up.packet), (XDP_PASS, fragment), "also when the packet is known");
            }
        });
    }
}

/// How many packets' ports are remembered.
fn remembered(programs: &mut Programs, family: Family) -> usize {
    match family {
        Family::V4 => entries::<Ipv4Address>(programs, names::FRAGMENTS4).len(),
        Family::V6 => entries::<Ipv6Address>(programs, names::FRAGMENTS6).len(),
    }
}

/// Makes everything remembered older by so many seconds.
fn age(programs: &mut Programs, family: Family, seconds: u32) {
    match family {
        Family::V4 => age_in::<Ipv4Address>(programs, names::FRAGMENTS4, seconds),
        Family::V6 => age_in::<Ipv6Address>(programs, names::FRAGMENTS6, seconds),
    }
}

fn age_in<A: Address>(programs: &mut Programs, map: &str, seconds: u32)
where
    FragmentKey<A>: aya::Pod,
{
    for (key, mut ports) in entries::<A>(programs, map) {
        ports.seen = ports.seen.wrapping_sub(seconds);
        programs.hash::<FragmentKey<A>, FragmentPorts>(map).unwrap().insert(key, ports, 0).unwrap();
    }
}

fn entries<A: Address>(programs: &mut Programs, map: &str) -> Vec<(FragmentKey<A>, FragmentPorts)>
where
    FragmentKey<A>: aya::Pod,
{
    let map = programs.hash::<FragmentKey<A>, FragmentPorts>(map).unwrap();
    map.iter().map(|entry| entry.unwrap()).collect()
}
