//! Full maps: one service port is refused and says why, the others go on, and what was refused comes when there is room.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sheave::config::MapSizes;
use sheave::dataplane::{Dataplane, Usage};
use sheave::interfaces::Role;
use sheave::model::desired::{ServicePort, ServicePortName};
use sheave::model::network::Network;
use sheave_common::frontend::flags::SOURCE_RANGES;
use sheave_common::{interface as element, names};
use sheave_tests::gate::Copy;

use crate::bench::{Bench, desired, hash, in_namespace, interface, meaning, name, run, service};
use crate::links::tcx_programs;

/// A size that [`all`] just fits into.
struct Tight {
    map: &'static str,
    flag: &'static str,
    set: fn(&mut MapSizes),
}

const TIGHT: [Tight; 5] = [
    Tight { map: names::FRONTENDS4, flag: "--max-frontends", set: |sizes| sizes.frontends = Some(4) },
    Tight { map: names::BACKENDS4, flag: "--max-backends", set: |sizes| sizes.backends = Some(4) },
    // The cluster sets, and the local set of the one that has an endpoint here; each in elements of its own.
    Tight { map: names::BACKEND_TABLE, flag: "--max-table", set: |sizes| sizes.table = Some(8) },
    Tight { map: names::SERVICE_NAMES, flag: "--max-services", set: |sizes| sizes.services = Some(3) },
    Tight { map: names::SOURCE_RANGES4, flag: "--max-source-ranges", set: |sizes| sizes.source_ranges = Some(2) },
];

/// A service port whose frontend is guarded by one source range.
fn guarded(host: u8, backends: &[u8]) -> ServicePort {
    let mut port = service(host, backends);
    port.frontends.values_mut().for_each(|bits| *bits |= SOURCE_RANGES);
    port.source_ranges = BTreeSet::from([Network::new([10, host, 0, 0].into(), 16).expect("a network")]);
    port
}

fn all() -> BTreeMap<ServicePortName, ServicePort> {
    BTreeMap::from([(name("web"), guarded(1, &[1, 2, 3])), (name("db"), guarded(2, &[4]))])
}

fn usage(dataplane: &Dataplane, map: &str) -> Usage {
    dataplane.usage().into_iter().find(|usage| usage.map == map).expect("a map that services fill")
}

fn one(name: ServicePortName, port: Option<ServicePort>) -> BTreeMap<ServicePortName, Option<ServicePort>> {
    BTreeMap::from([(name, port)])
}

fn settle(dataplane: &mut Dataplane) {
    while let Some(grace) = dataplane.begin_grace() {
        dataplane.reclaim(grace).expect("reclaimed");
    }
}

#[test]
fn a_full_map_refuses_one_service_port_names_its_flag_and_recovers() {
    in_namespace(|| {
        for Tight { map, flag, set } in TIGHT {
            let mut bench = Bench::new();
            set(&mut bench.config.sizes);
            let mut dataplane = bench.open();
            assert!(dataplane.apply_all(all()).failed.is_empty(), "{map}: it fits");
            let full = usage(&dataplane, map);
            assert_eq!((full.entries, full.refused), (full.capacity as usize, 0), "{full:?}");

            let applied = dataplane.apply(one(name("late"), Some(guarded(3, &[1]))));
            let [(refused, failure)] = &applied.failed.iter().collect::<Vec<_>>()[..] else { panic!("{applied:?}") };
            let text = failure.to_string();
            assert!(**refused == name("late") && text.contains(flag), "{map}: {text}");
            assert!(text.contains(map) || map == names::SERVICE_NAMES, "{map}: {text}");
            assert_eq!(usage(&dataplane, map).refused, 1);

            let with_affinity = ServicePort { affinity_seconds: 60, ..guarded(1, &[1, 2, 3]) };
            let applied = dataplane.apply(one(name("web"), Some(with_affinity)));
            assert!(!applied.failed.contains_key(&name("web")), "{map}: {applied:?}");
            let frontends = bench.view().frontends4().expect("a dump");
            assert!(frontends.iter().any(|(_, frontend)| frontend.affinity_seconds == 60), "{map}: others go on");

            let _ = dataplane.apply(one(name("db"), None));
            settle(&mut dataplane);
            let applied = dataplane.apply(BTreeMap::new());
            assert!(applied.failed.is_empty() && !dataplane.is_unfinished(), "{map}: there is room: {applied:?}");
            settle(&mut dataplane);
            let names = bench.view().service_names().expect("a dump");
            assert!(names.iter().any(|(_, name)| name.as_str() == Some("default/late:http")), "{map}");
            assert_eq!(names.len(), 2);
        }
    });
}

/// Maps whose size no flag sets have room for more than a node has; all the same, a full one hurts only what it has no room for.
#[test]
fn full_maps_of_interfaces_and_service_cidrs_hurt_nobody_else_and_recover() {
    in_namespace(|| {
        let bench = Bench::new();
        for name in ["pod0", "pod1"] {
            run(&format!("ip link add {name} type veth peer name peer-{name}"));
        }
        let mut dataplane = bench.open();
        dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
        let mut interfaces = hash::<u32, element::Interface>(&bench.pin(names::INTERFACES));
        let template = bench.view().interfaces().expect("a dump")[0].1;
        let strangers: Vec<u32> = (1_000_000..).take(4_095).collect();
        strangers.iter().for_each(|index| interfaces.insert(index, template, 0).expect("there is room"));
        let error = dataplane.attach(&interface("pod1", Role::Pod)).expect_err("there is no room");
        assert!(error.to_string().contains("interfaces is full (4096"), "{error}");
        assert_eq!(
            (tcx_programs("pod0"), tcx_programs("pod1")),
            (2, 0),
            "a program would not find its interface's role"
        );
        strangers.iter().for_each(|index| interfaces.remove(index).expect("removed"));
        dataplane.attach(&interface("pod1", Role::Pod)).expect("there is room");
        assert_eq!(tcx_programs("pod1"), 2);

        let networks = |number: u16| -> BTreeSet<Network> {
            let network = |number: u16| {
                let [high, low] = number.to_be_bytes();
                Network::new([100, 64 + high, low, 0].into(), 24).expect("a network")
            };
            (0..number).map(network).collect()
        };
        let error = dataplane.set_service_cidrs(&networks(257)).expect_err("there is no room");
        assert!(error.to_string().contains("service_cidrs4 is full (256"), "{error}");
        assert!(dataplane.apply_all(desired()).failed.is_empty(), "Services go on");
        dataplane.set_service_cidrs(&networks(256)).expect("there is room");
    });
}

#[test]
fn a_size_that_nobody_asked_for_is_that_of_the_pinned_map() {
    in_namespace(|| {
        let mut bench = Bench::new();
        let asked = bench.config.sizes;
        drop(bench.open());
        bench.config.sizes = MapSizes::default();
        let dataplane = bench.open();
        for (map, size) in [(names::FRONTENDS4, asked.frontends), (names::BACKEND_TABLE, asked.table)] {
            assert_eq!(Some(usage(&dataplane, map).capacity), size, "{map}");
        }
    });
}

/// A node that is short of memory for a while would keep Services in part.
#[test]
fn writes_that_find_no_memory_now_and_then_are_made_up_for() {
    in_namespace(|| {
        let (bench, undisturbed) = (Bench::new(), Bench::new());
        assert!(undisturbed.open().apply_all(desired()).failed.is_empty());
        let mut dataplane = bench.open();
        let (daemon, gate) = Copy::start(|| {
            let mut applied = dataplane.apply_all(desired());
            let mut tries = 0;
            while dataplane.is_unfinished() {
                assert!(applied.other.is_some() || !applied.failed.is_empty(), "it says what is missing");
                applied = dataplane.apply(BTreeMap::new());
                tries += 1;
            }
            assert!((2..100).contains(&tries), "{tries} further attempts");
        })
        .expect("a daemon");
        let mut number = 0;
        while let Some(write) = gate.next(Duration::from_secs(60)).expect("the gate tells") {
            // A few pass, and then for longer than anybody waits at once, none.
            let short = number < 400 && number % 40 >= 5;
            number += 1;
            if short { gate.fail(&write, libc::ENOMEM) } else { gate.pass(&write) }.expect("it waits");
        }
        daemon.finish().expect("in the end it is as desired");
        assert_eq!(meaning(&bench.view()), meaning(&undisturbed.view()));
        drop(dataplane);
        let mut dataplane = bench.open();
        assert_eq!(dataplane.apply_all(desired()).written, 0, "nothing is left to do");
    });
}
