//! Development builds: every packet and what became of it appears in the log.

use sheave_common::PROTOCOL_TCP;
use sheave_common::frontend::flags;
use sheave_tests::packet::{Packet, SYN};
use sheave_tests::program::{Programs, Service, SkbContext};

#[test]
fn every_packet_leaves_a_line_with_its_verdict() {
    let mut programs = Programs::load().expect("the object loads");
    programs.load_all().expect("programs load, the logging included");
    programs
        .service(&Service {
            id: 1,
            frontends: vec![("10.96.0.10:80".parse().unwrap(), flags::CLUSTER_IP)],
            protocol: PROTOCOL_TCP,
            endpoints: vec![],
            affinity: 0,
        })
        .expect("service");
    let packets = [Packet::tcp("10.1.0.1:40000", "10.96.0.10:80", SYN), Packet::udp("10.1.0.1:40000", "192.0.2.1:53")];
    for packet in &packets {
        programs.tc("pod_ingress", &packet.build(), SkbContext { ifindex: 1, ..SkbContext::default() }).unwrap();
    }
    let log = programs.take_log().expect("log");
    assert_eq!(log.len(), packets.len());
    let has = |record: &[u8], text: &str| record.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(has(&log[0], "action"), "the reject was sent back");
    assert!(has(&log[1], "pass"));
}
