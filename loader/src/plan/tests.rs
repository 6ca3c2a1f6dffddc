//! Random sequences of desired states against simulated maps: order invariants at every write, equality with a fresh
//! plan after every batch, restarts that write nothing, and repair after a crash at any write.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use sheave_common::backend::IDS_PER_ELEMENT;
use sheave_common::backend::flags::{IN_CLUSTER_SET, SERVING};
use sheave_common::frontend::BackendSet;
use sheave_common::frontend::flags::{
    CLUSTER_IP, EXTERNAL_IP, HAS_ENDPOINT, LOAD_BALANCER, NODE_PORT, SERVICE_ADDRESS, SOURCE_RANGES, WHOLE_ADDRESS,
};

use super::*;
use crate::model::desired::{Endpoint, EndpointSets, Protocol, ServiceKey, ServicePort, ServicePortName};
use crate::model::network::Network;

mod marks;
mod source_ranges;

/// Xorshift: enough randomness for a test, and repeatable.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as usize % limit
    }
}

type Desired = BTreeMap<ServicePortName, ServicePort>;

/// Maps as the kernel has them, with the invariants of every write.
#[derive(Clone, Default)]
struct Maps {
    frontends: BTreeMap<FrontendAddress, Frontend>,
    backends: BTreeMap<u32, Backend>,
    names: BTreeMap<u32, ServicePortName>,
    source_ranges: BTreeSet<(u32, Network)>,
    table: Vec<u32>,
    written: BTreeSet<u32>,
    next_backend_id: u32,
    next_service_id: u32,
    ever_used_backend_ids: BTreeSet<u32>,
}

fn elements(set: BackendSet) -> std::ops::Range<u32> {
    set.first..set.first + set.length
}

impl Maps {
    fn new(table: usize) -> Self {
        Self { table: vec![0; table], ..Self::default() }
    }

    fn dump(&self) -> Dump {
        Dump {
            frontends: self.frontends.iter().map(|(k, v)| (*k, *v)).collect(),
            backends: self.backends.iter().map(|(k, v)| (*k, *v)).collect(),
            names: self.names.iter().map(|(k, v)| (*k, Some(v.clone()))).collect(),
            source_ranges: self.source_ranges.iter().copied().collect(),
            table: self.table.clone(),
            table_size: self.table.len() as u32,
            next_backend_id: self.next_backend_id,
            next_service_id: self.next_service_id,
            service_limit: 1_000,
        }
    }

    fn write(&mut self, write: &Write) {
        match write {
            Write::Reserve { next_backend_id, next_service_id } => {
                assert!(*next_backend_id >= self.next_backend_id && *next_service_id >= self.next_service_id);
                (self.next_backend_id, self.next_service_id) = (*next_backend_id, *next_service_id);
            }
            Write::PutName { service_id, name } => {
                assert!(*service_id > 0 && *service_id < self.next_service_id, "id used before it is reserved");
                assert!(!self.names.values().any(|n| n == name), "two ids for one service port");
                assert!(self.names.insert(*service_id, name.clone()).is_none(), "a name is overwritten");
            }
            Write::PutBackend { id, backend } => {
                assert!(*id > 0 && *id < self.next_backend_id, "id used before it is reserved");
                match self.backends.insert(*id, *backend) {
                    Some(old) => assert_eq!(
                        (old.service_id, old.address, old.port),
                        (backend.service_id, backend.address, backend.port),
                        "a backend id names another endpoint"
                    ),
                    None => assert!(self.ever_used_backend_ids.insert(*id), "a backend id is used again"),
                }
                assert!(self.names.contains_key(&backend.service_id));
            }
            Write::WriteRun { first, ids } => {
                // Whole elements are written.
                assert!(first.is_multiple_of(IDS_PER_ELEMENT), "a run begins within an element");
                let run = *first..*first + (ids.len() as u32).next_multiple_of(IDS_PER_ELEMENT);
                for frontend in self.frontends.values() {
                    for set in [frontend.cluster, frontend.local] {
                        assert!(!elements(set).any(|e| run.contains(&e)), "a run is overwritten while it is named");
                    }
                }
                for (index, id) in run.zip(ids.iter().map(Some).chain([None])) {
                    assert!(
                        id.is_none_or(|id| self.backends.contains_key(id)),
                        "a run names a backend that is not there"
                    );
                    self.table[index as usize] = id.copied().unwrap_or(0);
                    self.written.insert(index);
                }
            }
            Write::PutSourceRange { service_id, network } => {
                assert!(self.names.contains_key(service_id));
                assert!(self.source_ranges.insert((*service_id, *network)), "written again");
            }
            Write::DeleteSourceRange { service_id, network } => {
                assert!(self.source_ranges.remove(&(*service_id, *network)));
            }
            Write::PutFrontend { address, frontend } => {
                assert_eq!(address.is_mark(), frontend.service_id == 0);
                assert!(frontend.service_id == 0 || self.names.contains_key(&frontend.service_id));
                self.frontends.insert(*address, *frontend);
            }
            Write::DeleteFrontend { address } => {
                assert!(self.frontends.remove(address).is_some());
            }
            Write::DeleteBackend { id, service_id, endpoint } => {
                let old = self.backends.remove(id).expect("the backend is there");
                assert_eq!((old.service_id, old.address, old.port), (*service_id, endpoint.ip(), endpoint.port()));
            }
            Write::DeleteName { service_id } => {
                assert!(self.names.remove(service_id).is_some());
                assert!(!self.backends.values().any(|b| b.service_id == *service_id));
                assert!(!self.frontends.values().any(|f| f.service_id == *service_id));
                assert!(!self.source_ranges.iter().any(|(id, _)| id == service_id), "the id's next owner gets ranges");
            }
        }
        for (address, frontend) in &self.frontends {
            for element in elements(frontend.cluster).chain(elements(frontend.local)) {
                assert!(self.written.contains(&element), "{address:?} names an element that was never written");
                let backend = self.backends.get(&self.table[element as usize]).expect("every named backend is there");
                assert_eq!(backend.service_id, frontend.service_id, "{address:?} leads to another service");
                assert_eq!(backend.address.is_ipv4(), address.address.is_ipv4());
            }
        }
    }

    /// What a client sees: frontends with their backends' values, without ids.
    fn meaning(&self) -> BTreeMap<FrontendAddress, String> {
        let set = |set: BackendSet| -> Vec<String> {
            let ids = elements(set).map(|element| self.table[element as usize]);
            ids.map(|id| format!("{:?}", Backend { service_id: 0, ..self.backends[&id] })).collect()
        };
        let describe = |f: &Frontend| {
            let name = self.names.get(&f.service_id).map(ToString::to_string);
            let clients = (f.flags & SOURCE_RANGES != 0).then(|| self.source_ranges_of(f.service_id));
            format!("{name:?} {} {} {clients:?} {:?} {:?}", f.flags, f.affinity_seconds, set(f.cluster), set(f.local))
        };
        self.frontends.iter().map(|(key, frontend)| (*key, describe(frontend))).collect()
    }

    fn source_ranges_of(&self, service_id: u32) -> Vec<Network> {
        self.source_ranges.iter().filter(|(id, _)| *id == service_id).map(|(_, network)| *network).collect()
    }

    fn run(&mut self, planner: &mut Planner, batch: Batch) -> usize {
        let outcome = planner.execute(batch, |write| {
            self.write(write);
            Ok::<(), std::convert::Infallible>(())
        });
        assert!(outcome.failed.is_empty() && outcome.other.is_none());
        self.assert_counted(planner);
        outcome.written
    }

    fn assert_counted(&self, planner: &Planner) {
        let by_family = |addresses: &mut dyn Iterator<Item = IpAddr>| {
            let (v4, v6): (Vec<_>, Vec<_>) = addresses.partition(IpAddr::is_ipv4);
            [v4.len(), v6.len()]
        };
        let counts = Counts {
            frontends: by_family(&mut self.frontends.keys().map(|key| key.address)),
            backends: by_family(&mut self.backends.values().map(|backend| backend.address)),
            names: self.names.len(),
            source_ranges: by_family(&mut self.source_ranges.iter().map(|(_, network)| network.address())),
            ..planner.counts()
        };
        assert_eq!(planner.counts(), counts);
    }

    fn settle(&mut self, planner: &mut Planner) -> usize {
        let Some(grace) = planner.begin_grace() else { return 0 };
        let batch = planner.reclaim(grace);
        let written = self.run(planner, batch);
        assert!(planner.begin_grace().is_none(), "one grace period is enough");
        written
    }
}

fn name(number: usize) -> ServicePortName {
    let protocol = if number.is_multiple_of(3) { Protocol::Udp } else { Protocol::Tcp };
    let service = ServiceKey { namespace: "default".into(), name: format!("web{}", number / 2).into() };
    ServicePortName { service, port: if number.is_multiple_of(2) { "" } else { "http" }.into(), protocol }
}

fn set(random: &mut Random, ipv6: bool) -> Vec<Endpoint> {
    let mut endpoints = BTreeMap::new();
    for _ in 0..random.below(5) {
        let host = random.below(6) as u8;
        let address = match ipv6 {
            true => IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, host.into())),
            false => IpAddr::V4(Ipv4Addr::new(10, 1, 0, host)),
        };
        endpoints.insert(address, Endpoint { address, port: 8080, local: host < 2, terminating: false, weight: 1 });
    }
    endpoints.into_values().collect()
}

fn service(random: &mut Random) -> ServicePort {
    let mut port = ServicePort { affinity_seconds: random.below(2) as u32 * 10, ..ServicePort::default() };
    let guard = if random.below(2) == 0 { SOURCE_RANGES } else { 0 };
    for ipv6 in [false, true] {
        let cluster = set(random, ipv6);
        let local = if random.below(2) == 0 { cluster.clone() } else { set(random, ipv6) };
        let terminating = random.below(4) == 0;
        let flag = |set: Vec<Endpoint>| set.into_iter().map(|e| Endpoint { terminating, ..e }).collect();
        let sets = EndpointSets { cluster: flag(cluster), local: flag(local), kept: [].into() };
        for _ in 0..random.below(3) {
            let host = random.below(4) as u16;
            let address = match ipv6 {
                true => IpAddr::V6(Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, host)),
                false => IpAddr::V4(Ipv4Addr::new(10, 96, 0, host as u8)),
            };
            let flags = match host {
                0 | 1 => CLUSTER_IP,
                2 => EXTERNAL_IP,
                _ => LOAD_BALANCER | guard,
            };
            port.frontends.insert(SocketAddr::new(address, 80 + random.below(2) as u16), flags);
        }
        if ipv6 { port.endpoints6 = sets } else { port.endpoints4 = sets }
    }
    if port.frontends.values().any(|flags| flags & SOURCE_RANGES != 0) {
        port.source_ranges = source_ranges::some(random);
    }
    port
}

fn change(random: &mut Random, desired: &mut Desired) -> BTreeMap<ServicePortName, Option<ServicePort>> {
    let mut changed = BTreeMap::new();
    for _ in 0..=random.below(3) {
        let name = name(random.below(8));
        let port = (random.below(4) > 0).then(|| service(random));
        match &port {
            Some(port) => drop(desired.insert(name.clone(), port.clone())),
            None => drop(desired.remove(&name)),
        }
        changed.insert(name, port);
    }
    changed
}

fn fresh(desired: &Desired) -> Maps {
    let mut maps = Maps::new(400);
    let mut planner = Planner::restore(maps.dump());
    let batch = planner.plan_all(desired.clone());
    maps.run(&mut planner, batch);
    maps
}

fn assert_tidy(maps: &Maps, desired: &Desired) {
    assert_eq!(maps.meaning(), fresh(desired).meaning());
    let names: BTreeSet<_> = maps.names.values().collect();
    assert_eq!(names, desired.keys().collect(), "exactly the desired service ports have names");
    assert_eq!(maps.backends.len(), fresh(desired).backends.len(), "no backend is left over");
    assert_eq!(maps.source_ranges.len(), fresh(desired).source_ranges.len(), "no source range is left over");
}

#[test]
fn any_sequence_of_changes_ends_where_a_fresh_plan_does() {
    for seed in 1..60 {
        let random = &mut Random::new(seed);
        let (mut desired, mut maps) = (Desired::new(), Maps::new(400));
        let mut planner = Planner::restore(maps.dump());
        for _ in 0..60 {
            let changed = change(random, &mut desired);
            let batch = planner.plan(changed.clone());
            maps.run(&mut planner, batch);
            assert_eq!(maps.meaning(), fresh(&desired).meaning());
            let again = planner.plan(changed);
            assert!(again.operations.is_empty(), "seed {seed}: nothing is left to write: {again:?}");
            if random.below(3) == 0 {
                maps.settle(&mut planner);
                assert_tidy(&maps, &desired);
            }
            if random.below(10) == 0 {
                planner = Planner::restore(maps.dump());
                let before = maps.meaning();
                let batch = planner.plan_all(desired.clone());
                assert!(batch.operations.is_empty(), "seed {seed}: a restart writes nothing: {batch:?}");
                maps.run(&mut planner, batch);
                assert_eq!(before, maps.meaning());
            }
        }
        maps.settle(&mut planner);
        assert_tidy(&maps, &desired);
    }
}

/// Wherever a batch is cut short, a fresh start on what was written ends as desired.
fn assert_crashes_are_repaired(maps: &Maps, batch: &Batch, desired: &Desired) {
    for crash in 0..batch.operations.len() {
        let mut crashed = maps.clone();
        for operation in &batch.operations[..crash] {
            crashed.write(&operation.write);
        }
        let mut restarted = Planner::restore(crashed.dump());
        let batch = restarted.plan_all(desired.clone());
        crashed.run(&mut restarted, batch);
        crashed.settle(&mut restarted);
        assert_tidy(&crashed, desired);
    }
}

#[test]
fn a_crash_after_any_write_is_repaired_by_the_next_plan() {
    for seed in 1..25 {
        let random = &mut Random::new(seed);
        let (mut desired, mut maps) = (Desired::new(), Maps::new(400));
        let mut planner = Planner::restore(maps.dump());
        for _ in 0..12 {
            let changed = change(random, &mut desired);
            let batch = planner.plan(changed);
            assert_crashes_are_repaired(&maps, &batch, &desired);
            maps.run(&mut planner, batch);
            if let Some(grace) = planner.begin_grace() {
                let batch = planner.reclaim(grace);
                assert_crashes_are_repaired(&maps, &batch, &desired);
                maps.run(&mut planner, batch);
            }
        }
    }
}

#[test]
fn writes_that_fail_hurt_only_their_service_port_and_are_made_good_later() {
    for seed in 1..40 {
        let random = &mut Random::new(seed);
        let (mut desired, mut maps) = (Desired::new(), Maps::new(400));
        let mut planner = Planner::restore(maps.dump());
        for _ in 0..30 {
            let batch = planner.plan(change(random, &mut desired));
            planner.execute(batch, |write| {
                if random.below(6) == 0 {
                    return Err(());
                }
                maps.write(write);
                Ok(())
            });
            if random.below(2) == 0
                && let Some(grace) = planner.begin_grace()
            {
                let batch = planner.reclaim(grace);
                planner.execute(batch, |write| {
                    if random.below(6) == 0 {
                        return Err(());
                    }
                    maps.write(write);
                    Ok(())
                });
            }
        }
        let mut healed = Planner::restore(maps.clone().dump());
        let mut healed_maps = maps.clone();
        let batch = healed.plan_all(desired.clone());
        healed_maps.run(&mut healed, batch);
        healed_maps.settle(&mut healed);
        assert_tidy(&healed_maps, &desired);
        // Without a restart, the next plans do.
        let batch = planner.plan(desired.iter().map(|(name, port)| (name.clone(), Some(port.clone()))).collect());
        maps.run(&mut planner, batch);
        assert!(!planner.is_unfinished());
        let frontends =
            |maps: &Maps| -> BTreeMap<_, _> { maps.meaning().into_iter().filter(|(key, _)| !key.is_mark()).collect() };
        assert_eq!(frontends(&maps), frontends(&fresh(&desired)));
    }
}

fn one_frontend(port: u16, backends: &[u8]) -> ServicePort {
    let endpoint = |host: &u8| Endpoint {
        address: Ipv4Addr::new(10, 1, 0, *host).into(),
        port: 80,
        local: false,
        terminating: false,
        weight: 1,
    };
    let cluster: Box<[_]> = backends.iter().map(endpoint).collect();
    ServicePort {
        frontends: BTreeMap::from([(SocketAddr::from(([192, 0, 2, 1], port)), NODE_PORT)]),
        endpoints4: EndpointSets { cluster, ..EndpointSets::default() },
        ..ServicePort::default()
    }
}

#[test]
fn two_services_that_swap_ports_on_a_shared_address_leave_no_gap() {
    let mut maps = Maps::new(100);
    let mut planner = Planner::restore(maps.dump());
    let batch =
        planner.plan_all(BTreeMap::from([(name(1), one_frontend(80, &[1])), (name(2), one_frontend(81, &[2]))]));
    maps.run(&mut planner, batch);
    let swapped = BTreeMap::from([(name(1), one_frontend(81, &[1])), (name(2), one_frontend(80, &[2]))]);
    let batch = planner.plan(swapped.into_iter().map(|(name, port)| (name, Some(port))).collect());
    let writes: Vec<_> = batch.operations.iter().map(|operation| &operation.write).collect();
    assert!(matches!(writes[..], [Write::PutFrontend { .. }, Write::PutFrontend { .. }]), "{writes:?}");
    maps.run(&mut planner, batch);
}

#[test]
fn one_changed_endpoint_writes_two_backends_one_run_and_the_services_frontends() {
    let mut maps = Maps::new(10_000);
    let mut planner = Planner::restore(maps.dump());
    let mut desired: Desired = (10..500).map(|n| (name(n), one_frontend(n as u16, &[1, 2, 3]))).collect();
    let batch = planner.plan_all(desired.clone());
    maps.run(&mut planner, batch);
    let changed = one_frontend(11, &[1, 2, 4]);
    desired.insert(name(11), changed.clone());
    let batch = planner.plan(BTreeMap::from([(name(11), Some(changed))]));
    assert_eq!(maps.run(&mut planner, batch), 4);
    assert_eq!(maps.settle(&mut planner), 1, "the backend that left");
    assert_tidy_large(&maps, &desired);
}

fn assert_tidy_large(maps: &Maps, desired: &Desired) {
    assert_eq!(maps.names.len(), desired.len());
    assert_eq!(maps.backends.len(), desired.len() * 3);
}

#[test]
fn an_endpoint_that_flaps_within_a_grace_period_keeps_its_backend_and_its_run() {
    let mut maps = Maps::new(100);
    let mut planner = Planner::restore(maps.dump());
    let plan = |planner: &mut Planner, backends: &[u8]| {
        planner.plan(BTreeMap::from([(name(1), Some(one_frontend(80, backends)))]))
    };
    let batch = plan(&mut planner, &[1, 2]);
    maps.run(&mut planner, batch);
    let before = maps.clone();
    let batch = plan(&mut planner, &[1]);
    maps.run(&mut planner, batch);
    let grace = planner.begin_grace().expect("a run and a backend wait");
    let batch = plan(&mut planner, &[1, 2]);
    assert_eq!(maps.run(&mut planner, batch), 2, "the backend is in the set, and the frontend names the old run again");
    let batch = planner.reclaim(grace);
    assert!(batch.operations.is_empty());
    assert_eq!((&maps.frontends, &maps.backends), (&before.frontends, &before.backends));
}

/// A client that affinity binds to it would go on being sent there until the grace period is over.
#[test]
fn an_endpoint_that_leaves_is_in_no_set_as_soon_as_the_frontends_say_so() {
    let mut maps = Maps::new(100);
    let mut planner = Planner::restore(maps.dump());
    let mut plan = |backends: &[u8]| {
        let batch = planner.plan(BTreeMap::from([(name(1), Some(one_frontend(80, backends)))]));
        let last = batch.operations.last().map(|operation| operation.write.clone());
        maps.run(&mut planner, batch);
        let backend = maps.backends.values().find(|backend| backend.address.to_string() == "10.1.0.2").copied();
        (last, backend.expect("it is there until a grace period is over").flags)
    };
    assert_eq!(plan(&[1, 2]).1, IN_CLUSTER_SET | SERVING);
    let (last, flags) = plan(&[1]);
    assert_eq!(flags, 0);
    assert!(matches!(last, Some(Write::PutBackend { .. })), "after the frontend: {last:?}");
    assert_eq!(plan(&[1, 2]).1, IN_CLUSTER_SET | SERVING);
}

#[test]
fn a_full_table_refuses_one_service_and_spares_the_others() {
    let mut maps = Maps::new(4);
    let mut planner = Planner::restore(maps.dump());
    let desired = BTreeMap::from([(name(1), one_frontend(80, &[1, 2, 3, 4, 5])), (name(2), one_frontend(81, &[1]))]);
    let batch = planner.plan_all(desired);
    let outcome = planner.execute(batch, |write| {
        maps.write(write);
        Ok::<(), ()>(())
    });
    assert!(matches!(outcome.failed[&name(1)], Failure::Plan(PlanError::TableFull { needed: 5, capacity: 4 })));
    assert_eq!(maps.frontends.len(), 1);
    assert!(planner.is_unfinished());
    let batch = planner.plan(BTreeMap::new());
    assert!(batch.operations.is_empty(), "an attempt uses up no ids: {batch:?}");
    let batch = planner.plan(BTreeMap::from([(name(1), Some(one_frontend(80, &[1, 2])))]));
    maps.run(&mut planner, batch);
    assert!(!planner.is_unfinished());
    assert_eq!(maps.frontends.len(), 2);
}

#[test]
fn a_service_that_claims_a_taken_frontend_gets_it_when_the_first_one_leaves() {
    let mut maps = Maps::new(100);
    let mut planner = Planner::restore(maps.dump());
    let batch =
        planner.plan_all(BTreeMap::from([(name(1), one_frontend(80, &[1])), (name(2), one_frontend(80, &[2]))]));
    maps.run(&mut planner, batch);
    let owner = |maps: &Maps| maps.names[&maps.frontends.values().next().expect("one frontend").service_id].clone();
    assert_eq!(owner(&maps), name(1));
    let batch = planner.plan(BTreeMap::from([(name(1), None)]));
    maps.run(&mut planner, batch);
    assert_eq!(owner(&maps), name(2));
}

/// A datagram's backend would vanish although it still serves what it has.
#[test]
fn an_endpoint_that_comes_back_to_serve_only_what_it_has_is_not_reclaimed() {
    let mut maps = Maps::new(400);
    let mut planner = Planner::restore(maps.dump());
    let mut run = |port: ServicePort| {
        let batch = planner.plan(BTreeMap::from([(name(0), Some(port))]));
        maps.run(&mut planner, batch);
    };
    run(one_frontend(80, &[1, 2]));
    run(one_frontend(80, &[1]));
    let mut kept = one_frontend(80, &[1]);
    kept.endpoints4.kept = one_frontend(80, &[2]).endpoints4.cluster;
    run(kept);
    maps.settle(&mut planner);
    assert_eq!(maps.backends.len(), 2);
    assert!(maps.backends.values().all(|backend| backend.flags & SERVING != 0), "{:?}", maps.backends);
}
