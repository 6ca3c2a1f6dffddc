//! SCTP associations between two endpoints of a library that knows nothing of Sheave: it makes the packets, and takes those that
//! come out only if their CRC32c is right. Its ports are 5000.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use sctp_proto::{
    Association, AssociationHandle, ClientConfig, DatagramEvent, Endpoint, EndpointConfig, Event, Payload,
    PayloadProtocolIdentifier, ServerConfig, StreamEvent,
};
use sheave_common::flow::closing;
use sheave_common::frontend::flags;
use sheave_common::{DropReason, PROTOCOL_SCTP, names};
use sheave_tests::family::Family;
use sheave_tests::packet::{Packet, View, join, split};
use sheave_tests::program::{DROP, NEXT, Outcome, Programs, REDIRECT, SkbContext, XDP_TX};

use crate::node::{Addresses, at, on_a_node, service, uplink};
use crate::pod;

/// The library's port, at both ends.
const PORT: u16 = 5_000;

/// Chunk types (RFC 9260, 3.2).
mod chunk {
    pub(super) const DATA: u8 = 0;
    pub(super) const INIT: u8 = 1;
    pub(super) const INIT_ACK: u8 = 2;
    pub(super) const ABORT: u8 = 6;
    pub(super) const SHUTDOWN: u8 = 7;
    pub(super) const SHUTDOWN_ACK: u8 = 8;
    pub(super) const COOKIE_ECHO: u8 = 10;
    pub(super) const COOKIE_ACK: u8 = 11;
}

/// One end of an association.
struct Peer {
    endpoint: Endpoint,
    association: Option<(AssociationHandle, Association)>,
    connected: bool,
    received: Vec<u8>,
    now: Instant,
}

impl Peer {
    fn server() -> Self {
        Self::with(Some(Arc::new(ServerConfig::new())))
    }

    fn client(server: SocketAddr) -> Self {
        let mut client = Self::with(None);
        client.association = Some(client.endpoint.connect(ClientConfig::new(), server).expect("an INIT"));
        client
    }

    fn with(server: Option<Arc<ServerConfig>>) -> Self {
        let endpoint = Endpoint::new(Arc::new(EndpointConfig::new()), server);
        Self { endpoint, association: None, connected: false, received: Vec::new(), now: Instant::now() }
    }

    fn association(&mut self) -> &mut Association {
        &mut self.association.as_mut().expect("an association").1
    }

    /// The packets that it wants to send.
    fn send(&mut self) -> Vec<Bytes> {
        let Some((_, association)) = &mut self.association else { return Vec::new() };
        let mut packets = Vec::new();
        while let Some(transmit) = association.poll_transmit(self.now) {
            match transmit.payload {
                Payload::RawEncode(encoded) => packets.extend(encoded),
                Payload::PartialDecode(_) => panic!("a packet that was received is to be sent"),
            }
        }
        packets
    }

    /// When it has something to do without a packet, such as a delayed acknowledgment.
    fn wakes(&mut self) -> Option<Instant> {
        self.association.as_mut().and_then(|(_, association)| association.poll_timeout())
    }

    /// Lets time pass.
    fn wake(&mut self, now: Instant) {
        self.now = now;
        if let Some((_, association)) = &mut self.association {
            association.handle_timeout(now);
        }
    }

    /// Takes a packet; false if the library throws it away.
    fn take(&mut self, from: SocketAddr, packet: &[u8]) -> bool {
        let packet = Bytes::copy_from_slice(packet);
        let Some((handle, event)) = self.endpoint.handle(self.now, from, None, None, packet) else {
            return false;
        };
        match event {
            DatagramEvent::NewAssociation(association) => self.association = Some((handle, association)),
            DatagramEvent::AssociationEvent(event) => self.association().handle_event(event),
        }
        while let Some(event) = self.association().poll() {
            match event {
                Event::Connected => self.connected = true,
                Event::Stream(StreamEvent::Readable { id }) => {
                    let mut stream = self.association().stream(id).expect("the stream");
                    if let Ok(Some(message)) = stream.read_sctp() {
                        let mut octets = vec![0; message.len()];
                        message.read(&mut octets).expect("the message");
                        self.received.extend(octets);
                    }
                }
                _ => {}
            }
        }
        true
    }

    /// Sends [`message`].
    fn say(&mut self) {
        self.association().stream(1).expect("the stream").write(&message()).expect("a message");
    }
}

/// Carries packets between two peers until something holds. `there` and `back` translate a frame.
fn converse(
    (client, server): (&mut Peer, &mut Peer),
    [from, frontend, backend]: [&str; 3],
    mut there: impl FnMut(&[u8]) -> Outcome,
    mut back: impl FnMut(&[u8]) -> Outcome,
    done: impl Fn(&Peer, &Peer) -> bool,
) {
    for _ in 0..10_000 {
        if done(client, server) {
            return;
        }
        let (questions, answers) = (client.send(), server.send());
        if questions.is_empty() && answers.is_empty() {
            let wake = [client.wakes(), server.wakes()].into_iter().flatten().min().expect("something to wait for");
            client.wake(wake);
            server.wake(wake);
        }
        for packet in questions {
            let out = there(&Packet::sctp(from, frontend).segment(&packet).build());
            let view = View(&out.packet);
            assert_eq!(view.destination().to_string(), backend);
            assert!(server.take(view.source(), view.transport()), "the server throws it away: {packet:02x?}");
        }
        for packet in answers {
            let to = server.association().remote_addr().to_string();
            let out = back(&Packet::sctp(backend, &to).segment(&packet).build());
            let view = View(&out.packet);
            assert_eq!(view.tuple(), format!("{frontend} → {from}"));
            assert!(client.take(view.source(), view.transport()), "the client throws it away: {packet:02x?}");
        }
    }
    panic!("they talk without end");
}

/// A client and a server get to know each other, and send each other a message of many packets.
fn talk(addresses: [&str; 3], mut there: impl FnMut(&[u8]) -> Outcome, mut back: impl FnMut(&[u8]) -> Outcome) {
    let (mut client, mut server) = (Peer::client(crate::address(addresses[1])), Peer::server());
    let connected = |client: &Peer, server: &Peer| client.connected && server.connected;
    converse((&mut client, &mut server), addresses, &mut there, &mut back, connected);
    client.association().open_stream(1, PayloadProtocolIdentifier::Binary).expect("a stream");
    client.say();
    let heard = |_: &Peer, server: &Peer| server.received.len() >= message().len();
    converse((&mut client, &mut server), addresses, &mut there, &mut back, heard);
    assert!(server.received == message());
    server.say();
    let heard = |client: &Peer, _: &Peer| client.received.len() >= message().len();
    converse((&mut client, &mut server), addresses, &mut there, &mut back, heard);
    assert!(client.received == message());
}

/// Programs with an SCTP service on the library's port of a ClusterIP.
fn cluster_ip(of: &Addresses, target: u16) -> Programs {
    let mut programs = Programs::load().expect("programs load");
    let (frontend, backend) = (at(of.vip, PORT), at(of.local, target));
    let service = service(1, PROTOCOL_SCTP, (&frontend, flags::CLUSTER_IP), &[(&backend, true)]);
    programs.service(&service).expect("service");
    programs
}

/// How many flows are half-open and how many established.
fn flows(programs: &mut Programs, family: Family) -> (usize, usize) {
    match family {
        Family::V4 => {
            (programs.flows(names::HALF_OPEN4).unwrap().len(), programs.flows(names::CONNTRACK4).unwrap().len())
        }
        Family::V6 => {
            (programs.flows6(names::HALF_OPEN6).unwrap().len(), programs.flows6(names::CONNTRACK6).unwrap().len())
        }
    }
}

/// What has closed a family's established flows, the same in all of them.
fn closed(programs: &mut Programs, family: Family) -> u8 {
    let closing: Vec<u8> = match family {
        Family::V4 => programs.flows(names::CONNTRACK4).unwrap().values().map(|flow| flow.closing).collect(),
        Family::V6 => programs.flows6(names::CONNTRACK6).unwrap().values().map(|flow| flow.closing).collect(),
    };
    assert!(closing.iter().all(|one| *one == closing[0]), "{closing:?}");
    closing[0]
}

/// A packet of one chunk with nothing in it, from a client to the service.
fn bare(from: &str, to: &str, kind: u8) -> Bytes {
    Packet::sctp(from, to).payload(&[kind, 0, 0, 4]).build()
}

/// A message of many packets.
fn message() -> Vec<u8> {
    (0..20_000_u32).map(|index| (index % 251) as u8).collect()
}

/// Associations would never come about: every packet's checksum covers its ports.
#[test]
fn the_library_talks_through_a_cluster_ip_with_the_port_changed_or_not() {
    for (of, target) in Addresses::BOTH.iter().flat_map(|of| [(of, PORT), (of, 6_000)]) {
        let programs = RefCell::new(cluster_ip(of, target));
        let translate = |program: &str, frame: &[u8]| {
            let out = pod(&mut programs.borrow_mut(), program, frame);
            assert_eq!(out.action, NEXT);
            out
        };
        let addresses = [at(of.pod, PORT), at(of.vip, PORT), at(of.local, target)];
        let (there, back) =
            (|frame: &[u8]| translate("pod_ingress", frame), |frame: &[u8]| translate("pod_egress", frame));
        talk(addresses.each_ref().map(String::as_str), there, back);
        assert_eq!(flows(&mut programs.borrow_mut(), of.family), (0, 2));
    }
}

/// The same where two nodes and SNAT are in between: both ports change, both ways, by tc and by XDP.
#[test]
fn the_library_talks_through_a_node_port_to_another_node() {
    for (of, xdp) in Addresses::BOTH.iter().flat_map(|of| [(of, false), (of, true)]) {
        let addresses = [at(of.client, PORT), at(of.node, PORT), at(of.remote, 6_000)];
        let [_, frontend, backend] = &addresses;
        let exposed = service(1, PROTOCOL_SCTP, (frontend, flags::NODE_PORT), &[(backend, false)]);
        on_a_node(&[exposed], |programs, ifindex| {
            let programs = RefCell::new(programs);
            let translate = |frame: &[u8]| {
                let mut programs = programs.borrow_mut();
                let (out, redirected) = if xdp {
                    (programs.xdp(frame, ifindex).unwrap(), XDP_TX)
                } else {
                    (uplink(&mut programs, "uplink_ingress", frame, ifindex), REDIRECT)
                };
                assert_eq!((out.action, View(&out.packet).ttl()), (redirected, 63));
                out
            };
            let back = |frame: &[u8]| {
                let to = View(frame).destination();
                assert!(to.ip() == of.node && to.port() != PORT, "{to} is SNATed");
                translate(frame)
            };
            talk(addresses.each_ref().map(String::as_str), translate, back);
        });
    }
}

/// A damaged packet would come out with a right checksum, and its receiver take it for sound.
#[test]
fn a_wrong_checksum_stays_wrong_by_the_same_difference_and_none_stays_none() {
    for (of, target) in Addresses::BOTH.iter().flat_map(|of| [(of, PORT), (of, 6_000)]) {
        let mut programs = cluster_ip(of, target);
        let (from, frontend) = (at(of.pod, PORT), at(of.vip, PORT));
        let mut client = Peer::client(crate::address(&frontend));
        let init = client.send().remove(0);
        let translated = |programs: &mut Programs, checksum: [u8; 4]| {
            let packet = [&init[..8], &checksum, &init[12..]].concat();
            let out = pod(programs, "pod_ingress", &Packet::sctp(&from, &frontend).segment(&packet).build());
            assert_eq!(View(&out.packet).destination().to_string(), at(of.local, target));
            let packet = View(&out.packet).transport().to_vec();
            (u32::from_le_bytes(packet[8..12].try_into().expect("four octets")), packet)
        };
        let sent = u32::from_le_bytes(init[8..12].try_into().expect("four octets"));
        let (right, packet) = translated(&mut programs, sent.to_le_bytes());
        assert!(Peer::server().take(crate::address(&from), &packet));
        for damage in [1, 0x8000_0000, 0x1234_5678] {
            let (wrong, packet) = translated(&mut programs, (sent ^ damage).to_le_bytes());
            assert_eq!(wrong, right ^ damage);
            assert!(!Peer::server().take(crate::address(&from), &packet));
        }
        // The sender left it to the device.
        assert_eq!(translated(&mut programs, [0; 4]).0, 0);
    }
}

#[test]
fn an_association_is_half_open_until_its_cookie_comes_back() {
    for of in &Addresses::BOTH {
        let mut programs = cluster_ip(of, 6_000);
        let (client, frontend, backend) = (at(of.pod, PORT), at(of.vip, PORT), at(of.local, 6_000));
        for (program, from, to, kind, expected) in [
            ("pod_ingress", &client, &frontend, chunk::INIT, (2, 0)),
            // A cookie that nobody has given out completes nothing.
            ("pod_ingress", &client, &frontend, chunk::COOKIE_ECHO, (2, 0)),
            ("pod_egress", &backend, &client, chunk::INIT_ACK, (2, 0)),
            ("pod_ingress", &client, &frontend, chunk::COOKIE_ECHO, (0, 2)),
            ("pod_egress", &backend, &client, chunk::COOKIE_ACK, (0, 2)),
        ] {
            assert_eq!(pod(&mut programs, program, &bare(from, to, kind)).action, NEXT, "chunk {kind}");
            assert_eq!(flows(&mut programs, of.family), expected, "after chunk {kind}");
        }
        assert_eq!(closed(&mut programs, of.family), 0);
    }
}

/// An association from the same port soon afterwards would be given to a backend that knows nothing of it, or to one that is
/// gone.
#[test]
fn an_association_ends_by_abort_or_by_shutdown_from_both_sides() {
    for of in &Addresses::BOTH {
        let (client, frontend, backend) = (at(of.pod, PORT), at(of.vip, PORT), at(of.local, 6_000));
        let there = |kind| ("pod_ingress", bare(&client, &frontend, kind));
        let back = |kind| ("pod_egress", bare(&backend, &client, kind));
        for (end, expected) in [
            (vec![there(chunk::ABORT)], closing::RESET),
            (vec![back(chunk::ABORT)], closing::RESET),
            (vec![there(chunk::SHUTDOWN)], closing::CLIENT_FIN),
            (vec![back(chunk::SHUTDOWN), there(chunk::SHUTDOWN_ACK)], closing::CLIENT_FIN | closing::BACKEND_FIN),
        ] {
            let mut programs = cluster_ip(of, 6_000);
            let open = [there(chunk::INIT), back(chunk::INIT_ACK), there(chunk::COOKIE_ECHO), back(chunk::DATA)];
            for (program, packet) in open.into_iter().chain(end) {
                assert_eq!(pod(&mut programs, program, &packet).action, NEXT);
            }
            assert_eq!(closed(&mut programs, of.family), expected);
            let (program, again) = there(chunk::INIT);
            assert_eq!(pod(&mut programs, program, &again).action, NEXT);
            assert_eq!(programs.counter(1).unwrap().connections, 2, "an association of its own");
        }
    }
}

/// TCP's reset would be nonsense to it, and what is not translated must not leave for a ClusterIP.
#[test]
fn packets_of_an_association_that_is_not_known_are_dropped_and_counted() {
    for of in &Addresses::BOTH {
        let mut programs = cluster_ip(of, 6_000);
        let (client, frontend) = (at(of.pod, PORT), at(of.vip, PORT));
        let strays = [chunk::DATA, chunk::INIT_ACK, chunk::ABORT, chunk::SHUTDOWN, chunk::COOKIE_ECHO];
        for kind in strays {
            let packet = bare(&client, &frontend, kind);
            let out = pod(&mut programs, "pod_ingress", &packet);
            assert_eq!((out.action, &out.packet[..]), (DROP, &packet[..]), "chunk {kind}");
        }
        assert_eq!(programs.dropped(DropReason::NoFlow).unwrap(), strays.len() as u64);
        assert_eq!(flows(&mut programs, of.family), (0, 0));
    }
}

#[test]
fn an_init_to_a_service_without_endpoints_is_refused() {
    for of in &Addresses::BOTH {
        let mut programs = Programs::load().unwrap();
        let frontend = at(of.vip, PORT);
        programs.service(&service(1, PROTOCOL_SCTP, (&frontend, flags::CLUSTER_IP), &[])).unwrap();
        let init = Peer::client(crate::address(&frontend)).send().remove(0);
        let init = Packet::sctp(&at(of.pod, PORT), &frontend).segment(&init).build();
        let out = pod(&mut programs, "pod_ingress", &init);
        let view = View(&out.packet);
        let port_unreachable = if of.family == Family::V4 { (3, 3) } else { (1, 4) };
        assert_eq!((out.action, view.icmp(), view.addresses()), (REDIRECT, port_unreachable, (of.vip, of.pod)));
        assert_eq!(view.quoted_tuple(), format!("{} → {frontend}", at(of.pod, PORT)));
        view.assert_checksums();
        assert_eq!(programs.dropped(DropReason::NoEndpoint).unwrap(), 1);
    }
}

/// A fragment's checksum would need the rest of its packet: better none than a wrong one.
#[test]
fn fragments_pass_if_their_ports_stay_and_are_dropped_if_they_change() {
    for of in &Addresses::BOTH {
        let (client, frontend) = (at(of.pod, PORT), at(of.vip, PORT));
        let large = [&[chunk::DATA, 3, 8, 0][..], &[7; 2_044]].concat();
        let fragments = split(&Packet::sctp(&client, &frontend).payload(&large).build(), 800, 7);
        for (target, actions) in [(PORT, [NEXT; 3]), (6_000, [DROP, NEXT, NEXT])] {
            let mut programs = cluster_ip(of, target);
            pod(&mut programs, "pod_ingress", &bare(&client, &frontend, chunk::INIT));
            let out: Vec<_> = fragments.iter().map(|one| pod(&mut programs, "pod_ingress", one)).collect();
            assert_eq!(out.iter().map(|one| one.action).collect::<Vec<_>>(), actions);
            if target == PORT {
                let whole = join(out.iter().map(|one| one.packet.as_slice()));
                assert_eq!(View(&whole).destination().to_string(), at(of.local, PORT));
                View(&whole).assert_checksums();
            } else {
                assert_eq!(programs.dropped(DropReason::RewriteFailed).unwrap(), 1);
            }
        }
    }
}

/// A sender that leaves it to its device to cut a message into packets says that they differ, and would be told that 64 KiB
/// are too much.
#[test]
fn packets_that_are_yet_to_be_cut_are_not_too_big() {
    for of in &Addresses::BOTH {
        let (client, frontend, backend) = (at(of.client, PORT), at(of.node, PORT), at(of.remote, 6_000));
        let exposed = service(1, PROTOCOL_SCTP, (&frontend, flags::NODE_PORT), &[(&backend, false)]);
        on_a_node(&[exposed], |programs, ifindex| {
            uplink(programs, "uplink_ingress", &bare(&client, &frontend, chunk::INIT), ifindex);
            let chunk = [&[chunk::DATA, 3, 3, 0][..], &[7; 764]].concat();
            let uncut = Packet::sctp(&client, &frontend).payload(&chunk.repeat(4)).build();
            let differ = SkbContext { ifindex, gso_size: 0xffff, gso_segs: 4 };
            let out = programs.tc("uplink_ingress", &uncut, differ).unwrap();
            assert_eq!((out.action, View(&out.packet).destination().to_string()), (REDIRECT, backend.clone()));
        });
    }
}
