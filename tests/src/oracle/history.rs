//! A cluster's life, with packets after each of its changes: what the oracle says of them, and what Sheave does.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::SocketAddr;

use fastrand::Rng;

use super::answer::{Answer, Edge, Oracle, Packet, Protocol, Source};
use super::cluster::{Cluster, Options};
use super::generate;
use super::memory::{Expected, Memory};
use super::mutate::{Change, changes, mutate};
use super::packets::Clients;
use super::real::{Passage, Seen, Sheave, make_node};
use crate::netns::Namespace;

/// Random packets after each change.
const PACKETS: usize = 80;
/// Datagrams of before that come again after a change.
const REPEATED: usize = 12;
/// Changes until a cluster is replaced by another.
const LIFE: u64 = 12;

/// How many packets met which answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Packets that were compared.
    pub cases: u64,
    /// Those of IPv6.
    pub ipv6: u64,
    /// Those of SCTP.
    pub sctp: u64,
    /// Clusters, each after some changes.
    pub clusters: u64,
    /// Answers: left alone.
    pub not_ours: u64,
    /// Refused, either way.
    pub rejected: u64,
    /// Dropped.
    pub dropped: u64,
    /// Translated.
    pub translated: u64,
    /// Translated packets that were answered, with the handshake completed if it is one.
    pub answered: u64,
    /// Sets that were drawn from until every member had come.
    pub sets: u64,
}

/// What a failure shows, whatever it fails by.
struct Story {
    seed: u64,
    options: Options,
    cluster: Cluster,
    last_changes: Vec<Change>,
    packet: Option<Packet>,
    step: u64,
}

impl Drop for Story {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let mut text = String::new();
        let _ = writeln!(text, "{}", self.cluster);
        let _ = writeln!(text, "--- what changed last: {:?}", self.last_changes);
        let _ = writeln!(text, "--- {:?}", self.options);
        if let Some(packet) = &self.packet {
            let _ = writeln!(text, "--- packet: {packet}");
        }
        let _ = writeln!(text, "--- step {}; run again with SHEAVE_SEED={}", self.step, self.seed);
        eprintln!("{text}");
    }
}

struct History {
    rng: Rng,
    sheave: Sheave,
    oracle: Oracle,
    before: Oracle,
    memory: Memory,
    clients: Clients,
    story: Story,
    tally: Tally,
}

/// Plays so many changes of the history of a seed, in a network namespace of its own.
///
/// # Panics
/// If Sheave does something else than the rules say.
#[must_use]
pub fn play(seed: u64, changes: u64) -> Tally {
    let node = Namespace::new("node").expect("a namespace");
    make_node(&node);
    node.run(|| {
        let mut history = History::new(seed);
        (0..changes).for_each(|_| history.step());
        history.tally
    })
}

impl History {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let options = generate::options(&mut rng);
        let cluster = Cluster::default();
        let oracle = Oracle::new(&cluster, &options);
        let sheave = Sheave::start(&options);
        let (before, clients) = (oracle.clone(), Clients::default());
        let story = Story { seed, options, cluster, last_changes: Vec::new(), packet: None, step: 0 };
        Self { rng, sheave, oracle, before, memory: Memory::default(), clients, story, tally: Tally::default() }
    }

    /// Changes the cluster, and asks.
    fn step(&mut self) {
        let mut next = self.story.cluster.clone();
        if self.story.step.is_multiple_of(LIFE) {
            next = generate::cluster(&mut self.rng);
            self.sheave.forget_flows();
            self.memory.forget_flows();
        } else {
            mutate(&mut self.rng, &mut next);
        }
        self.story.step += 1;
        self.tally.clusters += 1;
        let changes = changes(&mut self.rng, &self.story.cluster, &next);
        let changed = changes.iter().filter_map(Change::service).collect();
        (self.story.cluster, self.story.last_changes, self.story.packet) = (next, changes, None);
        self.sheave.apply(&self.story.last_changes);
        if self.rng.u8(0..8) == 0 {
            self.sheave.reclaim();
        }
        if self.rng.u8(0..128) == 0 {
            self.sheave.restart();
        }
        let now = Oracle::new(&self.story.cluster, &self.story.options);
        self.before = std::mem::replace(&mut self.oracle, now);
        self.memory.changed(&self.oracle);
        self.repeat();
        self.go_on();
        for _ in 0..PACKETS {
            let packet = self.clients.packet(&mut self.rng, &self.oracle, &self.before, &changed);
            let (xdp, answered) = (self.rng.bool(), self.rng.bool());
            let Some(passage) = self.first(&packet, xdp) else { continue };
            if answered {
                self.answered(&packet, &passage);
            }
        }
        for services in [&changed, &BTreeSet::new()] {
            // Not every frontend has endpoints.
            let _ = (0..4).any(|_| self.draw(services));
        }
    }

    /// Datagrams of before the change come again.
    fn repeat(&mut self) {
        let mut datagrams = self.memory.take_datagrams();
        self.rng.shuffle(&mut datagrams);
        for datagram in datagrams.into_iter().take(REPEATED) {
            let expected = self.memory.again(&self.oracle, &datagram);
            let xdp = self.rng.bool();
            let seen = self.send(&datagram.packet, xdp);
            match (&expected, &seen) {
                (Expected::Stays { endpoint, sources }, Seen::Translated(passage))
                    if passage.to == *endpoint && sources.contains(&passage.source) => {}
                (Expected::Exactly(answer), seen) if agree(answer, seen) => {
                    self.began(&datagram.packet, seen);
                }
                _ => panic!("{}, again: expected {expected:?}, but {seen:?}", datagram.packet),
            }
        }
    }

    /// The first packet of a connection, and where it went.
    fn first(&mut self, packet: &Packet, xdp: bool) -> Option<Passage> {
        let answer = self.memory.first(&self.oracle, packet);
        let seen = self.send(packet, xdp);
        assert!(agree(&answer, &seen), "{packet}: expected {answer:?}, but {seen:?}");
        if let Seen::Translated(Passage { from, source: Source::Kept, .. }) = seen {
            assert!(from == packet.source || packet.shares_port, "{packet}: comes from {from}");
        }
        match answer {
            Answer::NotOurs => self.tally.not_ours += 1,
            Answer::Rejected(_) => self.tally.rejected += 1,
            Answer::Dropped => self.tally.dropped += 1,
            Answer::Translated(_) => self.tally.translated += 1,
        }
        self.began(packet, &seen)
    }

    fn began(&mut self, packet: &Packet, seen: &Seen) -> Option<Passage> {
        let Seen::Translated(passage) = seen else { return None };
        self.memory.began(&self.oracle, packet, passage);
        Some(*passage)
    }

    /// The client hears from whom it asked, and from nobody else.
    fn answered(&mut self, packet: &Packet, passage: &Passage) {
        let answer = self.sheave.answer(packet, passage);
        let expected = Some((packet.destination, packet.source));
        assert_eq!(answer, expected, "{packet}: the answer of {passage:?}");
        if packet.protocol != Protocol::Udp {
            assert_eq!(self.sheave.continue_open(packet), as_seen(packet, passage), "{packet}: after the handshake");
            self.memory.opened(&self.oracle, packet, passage);
        }
        self.tally.answered += 1;
    }

    /// Open connections go on, whatever became of their endpoints.
    fn go_on(&mut self) {
        for flow in self.memory.open() {
            self.story.packet = Some(flow.packet.clone());
            let seen = self.sheave.continue_open(&flow.packet);
            assert_eq!(seen, as_seen(&flow.packet, &flow.passage), "{}: an open connection", flow.packet);
            self.tally.cases += 1;
        }
    }

    fn send(&mut self, packet: &Packet, xdp: bool) -> Seen {
        self.story.packet = Some(packet.clone());
        self.tally.cases += 1;
        self.tally.ipv6 += u64::from(packet.destination.is_ipv6());
        self.tally.sctp += u64::from(packet.protocol == Protocol::Sctp);
        match self.sheave.send(packet, xdp) {
            // A Service's address may be a node's, whose own server is among the endpoints.
            Seen::Untouched if self.oracle.service_port(packet).is_some() => {
                Seen::Translated(Passage { to: packet.destination, from: packet.source, source: Source::Kept })
            }
            seen => seen,
        }
    }

    /// Asks one frontend until chance can no longer be the reason that an endpoint was not chosen.
    /// False if that one has none.
    fn draw(&mut self, services: &BTreeSet<String>) -> bool {
        let Some((destination, protocol)) = self.clients.frontend(&mut self.rng, &self.oracle, services) else {
            return false;
        };
        let edge = if self.rng.bool() { Edge::Pod } else { Edge::Uplink };
        // How many draws it takes is chance; what comes after them must not be, or no seed would play again.
        let mut rng = self.rng.fork();
        let mut chosen = BTreeSet::new();
        let (mut drawn, mut enough) = (0.0, 1.0);
        while drawn < enough {
            let packet = self.clients.stranger(&mut rng, edge, destination, protocol);
            let all = self.oracle.answer(&packet);
            let free = self.memory.first(&self.oracle, &packet) == all;
            let went = self.first(&packet, rng.bool());
            let Answer::Translated(choices) = all else { return false };
            // A client that affinity binds already says nothing about chance.
            if !free {
                continue;
            }
            drawn += 1.0;
            chosen.extend(went.map(|passage| passage.to));
            let members = choices.len() as f64;
            // The chance to miss one of n in d draws is at most n·e^(-d/n): one in 10^10.
            enough = if choices.len() == 1 { 1.0 } else { members * (members.ln() + 23.0) };
            if drawn >= enough {
                let expected: BTreeSet<SocketAddr> = choices.into_keys().collect();
                assert_eq!(chosen, expected, "{protocol:?} {destination} at the {edge:?} edge, {drawn} times");
            }
        }
        self.tally.sets += 1;
        true
    }
}

/// Whether that is what was seen.
pub(super) fn agree(answer: &Answer, seen: &Seen) -> bool {
    match (answer, seen) {
        (Answer::NotOurs, Seen::Untouched) | (Answer::Dropped, Seen::Dropped) => true,
        (Answer::Rejected(expected), Seen::Refused(refusal)) => expected == refusal,
        (Answer::Translated(choices), Seen::Translated(passage)) => choices.get(&passage.to) == Some(&passage.source),
        _ => false,
    }
}

/// What is seen of a packet that goes this way. To a Service's address that is also its endpoint's, that is nothing.
pub(super) fn as_seen(packet: &Packet, passage: &Passage) -> Seen {
    let same = (passage.from, passage.to) == (packet.source, packet.destination);
    if same { Seen::Untouched } else { Seen::Translated(*passage) }
}
