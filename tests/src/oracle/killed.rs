//! A daemon that is killed before each of the writes that a change takes, and another one that takes over.
//!
//! A copy of this process makes the change behind a [`Gate`](crate::gate::Gate) and is killed there; maps, programs and packets
//! are the kernel's. What a batch writes is written one by one, so that it can be cut as well.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use fastrand::Rng;
use sheave::dataplane::PinnedMaps;

use super::answer::{Answer, Edge, Oracle, Packet, Protocol};
use super::cluster::{Cluster, Options};
use super::generate;
use super::history::{agree, as_seen};
use super::mutate::{Change, changes, mutate};
use super::packets::Clients;
use super::real::{Passage, Seen, Sheave, make_node};
use crate::gate::Copy;
use crate::netns::Namespace;
use crate::patience::patient;
use crate::process::built;

/// Service ids in all: so few that they have to be used again.
const SERVICE_IDS: u32 = 160;
/// Clients that ask each frontend, at either edge.
const CLIENTS: usize = 2;
/// Connections that stay open over a change.
const OPEN: usize = 6;

/// What was tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Changes of the cluster.
    pub changes: u64,
    /// Daemons killed.
    pub killed: u64,
    /// Packets that were compared.
    pub packets: u64,
    /// Packets of connections that were open before.
    pub of_open: u64,
    /// Calls that would have made many writes at once.
    pub batches: u64,
    /// Service ids that became another service port's.
    pub ids_again: u64,
}

/// A change of a cluster, and what it is called.
pub type Step<'a> = (&'a str, &'a (dyn Fn(&mut Cluster) + Sync));

/// Makes changes, one after the other, each of them as often as it has writes, and once undisturbed.
///
/// # Panics
/// If packets or maps are not as they have to be.
#[must_use]
pub fn steps(cluster: Cluster, options: Options, steps: &[Step<'_>]) -> Tally {
    on_a_node(|| {
        let mut trial = Trial::new(1, options);
        trial.change("everything is new", cluster);
        for (name, step) in steps {
            let mut next = trial.cluster.clone();
            step(&mut next);
            trial.change(name, next);
        }
        trial.tally
    })
}

/// The same with so many random changes of a random cluster.
///
/// # Panics
/// If packets or maps are not as they have to be.
#[must_use]
pub fn random(seed: u64, changes: u64) -> Tally {
    on_a_node(|| {
        let mut rng = Rng::with_seed(seed);
        let mut trial = Trial::new(seed, generate::options(&mut rng));
        trial.change("everything is new", generate::cluster(&mut rng));
        for number in 1..changes {
            let mut next = trial.cluster.clone();
            mutate(&mut rng, &mut next);
            trial.change(&format!("change {number} of SHEAVE_SEED={seed}"), next);
        }
        trial.tally
    })
}

fn on_a_node<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let node = Namespace::new("node").expect("a namespace");
    make_node(&node);
    node.run(work)
}

/// Says where a test failed, whatever it failed by.
struct Place(String);

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {}", self.0);
        }
    }
}

struct Trial {
    rng: Rng,
    options: Options,
    cluster: Cluster,
    /// The one whose daemon is killed.
    sheave: Sheave,
    /// One that nothing happens to.
    undisturbed: Sheave,
    clients: Clients,
    ids: Ids,
    place: Place,
    tally: Tally,
}

impl Trial {
    fn new(seed: u64, options: Options) -> Self {
        Self {
            rng: Rng::with_seed(seed),
            sheave: Sheave::start_with(&options, SERVICE_IDS),
            undisturbed: on_a_node(|| Sheave::start_with(&options, SERVICE_IDS)),
            options,
            cluster: Cluster::default(),
            clients: Clients::default(),
            ids: Ids::default(),
            place: Place(String::new()),
            tally: Tally::default(),
        }
    }

    fn change(&mut self, name: &str, next: Cluster) {
        let forth = changes(&mut self.rng, &self.cluster, &next);
        let back = changes(&mut self.rng, &next, &self.cluster);
        self.undisturbed.apply(&forth);
        self.undisturbed.reclaim();
        let (services, usage) = (services(&self.undisturbed), self.undisturbed.usage());
        let around = Around::new(&self.cluster, &next, &self.options, &forth);
        self.sheave.forget_flows();
        for writes in 0.. {
            self.place.0 = format!("{name}, killed after {writes} writes");
            let done = self.cut(writes, &forth, &around);
            assert_eq!(self::services(&self.sheave), services, "not what it is without a crash");
            assert_eq!(self.sheave.usage(), usage, "something was left behind");
            self.tally.ids_again += self.ids.check(&self.sheave);
            self.tally.killed += 1;
            if done {
                break;
            }
            self.sheave.apply(&back);
            self.sheave.reclaim();
            self.tally.ids_again += self.ids.check(&self.sheave);
        }
        self.cluster = next;
        self.tally.changes += 1;
    }

    /// Kills a daemon when it has made so many writes of a change, and starts another one. True if those were all.
    fn cut(&mut self, writes: usize, changes: &[Change], around: &Around) -> bool {
        let open = self.open(around);
        let sheave = &mut self.sheave;
        let daemon = Copy::start(|| {
            sheave.apply(changes);
            sheave.reclaim();
        });
        let (daemon, gate) = daemon.expect("a daemon");
        let mut made = 0;
        let done = loop {
            let Some(write) = gate.next(patient(Duration::from_secs(60))).expect("the gate tells") else { break true };
            if write.is_batch() {
                // As a kernel without batches says.
                gate.fail(&write, libc::EINVAL).expect("it waits");
                self.tally.batches += 1;
                continue;
            }
            if made == writes {
                self.place.0 = format!("{}, before {write}", self.place.0);
                break false;
            }
            gate.pass(&write).expect("it waits");
            made += 1;
        };
        // It stands still while clients ask.
        self.ask(around, &around.all);
        self.go_on(&open, around);
        if done {
            daemon.finish().expect("the change is made");
        } else {
            daemon.kill();
        }
        self.sheave.reopen();
        self.ask(around, &around.all);
        self.go_on(&open, around);
        self.sheave.catch_up(changes);
        self.ask(around, &around.all[2..]);
        self.go_on(&open, around);
        done
    }

    /// Opens a few connections to what is about to change.
    fn open(&mut self, around: &Around) -> Vec<(Packet, Passage)> {
        let [before, ..] = &around.all;
        let mut open = Vec::new();
        let mut destinations = around.destinations.clone();
        self.rng.shuffle(&mut destinations);
        for (destination, protocol) in destinations {
            if open.len() == OPEN || protocol == Protocol::Udp {
                continue;
            }
            let edge = if self.rng.bool() { Edge::Pod } else { Edge::Uplink };
            let packet = self.clients.stranger(&mut self.rng, edge, destination, protocol);
            if !matches!(before.answer(&packet), Answer::Translated(_)) {
                continue;
            }
            let Seen::Translated(passage) = self.sheave.send(&packet, false) else { continue };
            assert_eq!(self.sheave.answer(&packet, &passage), Some((packet.destination, packet.source)), "{packet}");
            assert_eq!(self.sheave.continue_open(&packet), as_seen(&packet, &passage), "{packet}: after the handshake");
            open.push((packet, passage));
        }
        open
    }

    /// Open connections go on. Flows of a Service that is gone are forgotten by and by.
    fn go_on(&mut self, open: &[(Packet, Passage)], around: &Around) {
        let [before, _, after] = &around.all;
        let stays = |packet: &Packet| after.service_port(packet) == before.service_port(packet);
        for (packet, passage) in open.iter().filter(|(packet, _)| stays(packet)) {
            let seen = self.sheave.continue_open(packet);
            assert_eq!(seen, as_seen(packet, passage), "{packet}: an open connection");
            self.tally.of_open += 1;
        }
    }

    /// New clients ask every frontend, and get an answer that one of these clusters gives.
    fn ask(&mut self, around: &Around, clusters: &[Oracle]) {
        for (destination, protocol) in &around.destinations {
            for edge in [Edge::Pod, Edge::Uplink].into_iter().flat_map(|edge| [edge; CLIENTS]) {
                let packet = self.clients.stranger(&mut self.rng, edge, *destination, *protocol);
                let seen = self.sheave.send(&packet, self.rng.bool());
                let answers: Vec<Answer> = clusters.iter().map(|cluster| cluster.answer(&packet)).collect();
                let right = answers.iter().any(|answer| agree(answer, &seen));
                assert!(right, "{packet}: expected one of {answers:?}, but {seen:?}");
                self.tally.packets += 1;
            }
        }
    }
}

/// A change, as clients see it.
struct Around {
    /// What there was, what there is when Services are changed and ServiceCIDRs are not yet, and what there will be.
    all: [Oracle; 3],
    /// The frontends of what changes, of before and of afterwards.
    destinations: Vec<(SocketAddr, Protocol)>,
}

impl Around {
    fn new(before: &Cluster, after: &Cluster, options: &Options, changes: &[Change]) -> Self {
        let between = Cluster { service_cidrs: before.service_cidrs.clone(), ..after.clone() };
        let all = [before, &between, after].map(|cluster| Oracle::new(cluster, options));
        let changed: BTreeSet<String> = changes.iter().filter_map(Change::service).collect();
        let both = all.iter().flat_map(|oracle| oracle.destinations(&changed));
        let destinations = both.collect::<BTreeSet<_>>().into_iter().collect();
        Self { all, destinations }
    }
}

/// Which ids were whose.
#[derive(Default)]
struct Ids {
    backends: BTreeMap<u32, SocketAddr>,
    gone: BTreeSet<u32>,
    services: BTreeMap<u32, String>,
}

impl Ids {
    /// Looks whether a backend id came back. Returns how many service ids have become others'.
    fn check(&mut self, sheave: &Sheave) -> u64 {
        let maps = PinnedMaps::open(sheave.pins()).expect("the maps are pinned");
        let mut backends = BTreeMap::new();
        for (id, backend) in maps.backends4().expect("a dump") {
            let address = Ipv4Addr::from(backend.address);
            backends.insert(id, SocketAddr::new(address.into(), u16::from_be(backend.port_be)));
        }
        for (id, backend) in maps.backends6().expect("a dump") {
            let address = Ipv6Addr::from(backend.address);
            backends.insert(id, SocketAddr::new(address.into(), u16::from_be(backend.port_be)));
        }
        for (id, endpoint) in &backends {
            assert!(!self.gone.contains(id), "backend id {id} is used again");
            assert_eq!(self.backends.get(id).unwrap_or(endpoint), endpoint, "backend id {id} is another endpoint's");
        }
        self.gone.extend(self.backends.keys().filter(|id| !backends.contains_key(id)));
        self.backends = backends;
        let mut again = 0;
        for (id, name) in maps.service_names().expect("a dump") {
            let name = name.as_str().expect("UTF-8").to_owned();
            again += u64::from(self.services.insert(id, name.clone()).is_some_and(|before| before != name));
        }
        again
    }
}

/// `sheave services -o json`.
fn services(sheave: &Sheave) -> String {
    let mut command = Command::new(built("sheave").expect("sheave is built"));
    let output = command.args(["services", "-o", "json", "--pin-path"]).arg(sheave.pins()).output().expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}
