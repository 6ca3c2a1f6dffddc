//! Loaded programs across restarts: kept when nothing about them has changed, loaded anew when something has.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use aya::maps::MapData;
use aya::programs::tc::{SchedClassifier, TcAttachType};
use sheave::dataplane::{Dataplane, Features};
use sheave::interfaces::Role;

use crate::bench::{Bench, desired, in_namespace, interface, run};

/// Programs in the object.
const PROGRAMS: usize = 15;

/// The folders of pinned programs.
fn shelves(bench: &Bench) -> Vec<PathBuf> {
    let entries = fs::read_dir(bench.pin("programs")).expect("the folder of programs");
    entries.map(|entry| entry.expect("an entry").path()).collect()
}

/// Name → the kernel's id, which no two loads share.
fn ids(bench: &Bench) -> BTreeMap<String, u32> {
    let [shelf] = &shelves(bench)[..] else { panic!("one build's programs: {:?}", shelves(bench)) };
    let pins = fs::read_dir(shelf).expect("a shelf").map(|pin| pin.expect("a pin").path());
    pins.map(|pin| {
        let name = pin.file_name().expect("a name").to_string_lossy().into_owned();
        let id = aya::programs::ProgramInfo::from_pin(&pin).expect("a program").id();
        (name, id)
    })
    .collect()
}

fn attached(hook: TcAttachType) -> u32 {
    SchedClassifier::query_tcx("pod0", hook).expect("a TCX query").1[0].id()
}

#[test]
fn a_restart_takes_the_loaded_programs_over() {
    in_namespace(|| {
        let bench = Bench::new();
        assert!(bench.open().apply_all(desired()).failed.is_empty());
        let before = ids(&bench);
        assert_eq!(before.len(), PROGRAMS);
        let mut dataplane = bench.open();
        assert_eq!(dataplane.apply_all(desired()).written, 0);
        assert_eq!(ids(&bench), before);
    });
}

#[test]
fn another_build_or_constant_loads_them_anew_and_swaps_them_below_their_links() {
    in_namespace(|| {
        let bench = Bench::new();
        run("ip link add pod0 type veth peer name peer0");
        bench.open().attach(&interface("pod0", Role::Pod)).expect("attached");
        let (before, links) = (ids(&bench), bench.links());
        assert_eq!(attached(TcAttachType::Ingress), before["pod_ingress"]);
        // Whatever changes the object or its constants changes the key; a constant is what a test can change.
        let features = Features { fib_mtu: !Features::detect().fib_mtu, ..Features::detect() };
        let mut dataplane = Dataplane::open_with(&bench.config, features).expect("opened");
        let after = ids(&bench);
        assert!(before.iter().all(|(name, id)| after[name] != *id), "{before:?} {after:?}");
        assert_eq!(attached(TcAttachType::Ingress), before["pod_ingress"], "until the interface's turn comes");
        dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
        assert_eq!(attached(TcAttachType::Ingress), after["pod_ingress"]);
        assert_eq!(attached(TcAttachType::Egress), after["pod_egress"]);
        assert_eq!(bench.links(), links);
    });
}

#[test]
fn programs_on_a_map_that_is_no_longer_pinned_are_not_used() {
    in_namespace(|| {
        let bench = Bench::new();
        drop(bench.open());
        let before = ids(&bench);
        fs::remove_file(bench.pin("frontends4")).expect("removed");
        drop(bench.open());
        let after = ids(&bench);
        assert!(before.iter().all(|(name, id)| after[name] != *id), "{before:?} {after:?}");
    });
}

#[test]
fn a_missing_or_foreign_pin_is_replaced_with_all_the_others() {
    in_namespace(|| {
        let bench = Bench::new();
        drop(bench.open());
        let pin = shelves(&bench)[0].join("pod_ingress");
        let other = shelves(&bench)[0].join("pod_egress");
        let nothing = || ();
        let map = || {
            let map = MapData::from_pin(bench.pin("config")).expect("pinned");
            map.pin(&pin).expect("pinned again");
        };
        let program = || SchedClassifier::from_pin(&other).expect("a program").pin(&pin).map(drop).expect("pinned");
        let damages: [&dyn Fn(); 3] = [&nothing, &map, &program];
        for damage in damages {
            let before = ids(&bench);
            fs::remove_file(&pin).expect("removed");
            damage();
            drop(bench.open());
            let after = ids(&bench);
            assert_eq!(after.len(), PROGRAMS);
            assert!(before.iter().all(|(name, id)| after[name] != *id), "{before:?} {after:?}");
        }
    });
}
