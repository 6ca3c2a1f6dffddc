//! Maps of another size: what they hold stays, what is attached stays, and what can't be done is refused.

use std::collections::BTreeSet;
use std::fs;

use aya::maps::MapData;
use sheave::config::MapSizes;
use sheave::dataplane::{Dataplane, Features};
use sheave::interfaces::Role;
use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::config::flags;
use sheave_common::counter::ServiceCounter;
use sheave_common::{Ipv4Address, names};

use crate::bench::{Bench, chain, desired, edges, hash, in_namespace, insert_flow, interface, meaning, run};
use crate::links::tcx_programs;

fn twice(sizes: &MapSizes) -> MapSizes {
    let twice = |size: Option<u32>| size.map(|size| size * 2);
    MapSizes {
        services: twice(sizes.services),
        frontends: twice(sizes.frontends),
        backends: twice(sizes.backends),
        table: twice(sizes.table),
        conntrack: twice(sizes.conntrack),
        half_open: twice(sizes.half_open),
        affinity: twice(sizes.affinity),
        sockets: twice(sizes.sockets),
        source_ranges: twice(sizes.source_ranges),
    }
}

fn size(bench: &Bench, map: &str) -> u32 {
    MapData::from_pin(bench.pin(map)).expect("pinned").info().expect("map info").max_entries()
}

fn insert_affinity(bench: &Bench, map: &str, last_octet: u8) {
    let key = AffinityKey { service_id: 1, edge: 0, client: Ipv4Address { octets: [10, 0, 0, last_octet] } };
    let value = Affinity { backend_id: 1, last_new_connection: 1 };
    hash::<AffinityKey<Ipv4Address>, Affinity>(&bench.pin(map)).insert(key, value, 0).expect("inserted");
}

fn count_for_service_1(bench: &Bench) {
    let map = aya::maps::Map::PerCpuArray(MapData::from_pin(bench.pin("service_counters")).expect("pinned"));
    let mut map = aya::maps::PerCpuArray::<MapData, ServiceCounter>::try_from(map).expect("the counters");
    let mut values = map.get(&1, 0).expect("its element").to_vec();
    values[0] = ServiceCounter { connections: 7, packets: 8, bytes: 9 };
    map.set(1, values.try_into().expect("a value for each CPU"), 0).expect("written");
}

#[test]
fn maps_of_another_size_hold_what_the_old_ones_did_and_links_stay() {
    in_namespace(|| {
        let mut bench = Bench::new();
        run("ip link add pod0 type veth peer name peer0");
        let mut dataplane = bench.open();
        dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
        assert!(dataplane.apply_all(desired()).failed.is_empty());
        for map in ["conntrack4", "half_open4"] {
            insert_flow(&bench, map, 77, 1);
        }
        for map in ["affinity4", "new_affinity4"] {
            insert_affinity(&bench, map, 1);
        }
        count_for_service_1(&bench);
        let (before, links) = (meaning(&bench.view()), bench.links());
        drop(dataplane);

        let small = bench.config.sizes;
        bench.config.sizes = twice(&small);
        let mut dataplane = bench.open();
        assert_eq!(tcx_programs("pod0"), 2, "before the interface is attached again");
        dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
        assert_eq!(dataplane.apply_all(desired()).written, 0);
        assert_eq!((meaning(&bench.view()), bench.links()), (before, links));
        assert_eq!(edges(&bench.view().conntrack4().expect("a dump")), BTreeSet::from([77]));
        assert_eq!(edges(&bench.view().half_open4().expect("a dump")), BTreeSet::from([77]));
        assert_eq!(bench.view().affinity4().expect("a dump").len(), 1);
        assert_eq!(bench.view().new_affinity4().expect("a dump").len(), 1);
        let counted = bench.view().service_counters().expect("a dump");
        assert_eq!(counted.get(&1).map(|counter| (counter.connections, counter.bytes)), Some((7, 9)));
        assert_eq!((size(&bench, "conntrack6"), size(&bench, "backend_loads")), (2_048, 128));
        assert_eq!((size(&bench, "service_counters"), size(&bench, "frontends6")), (128, 128));
        assert_eq!(tcx_programs("pod0"), 2);
        assert!(!bench.pin("resizing").exists());
        let config = bench.view().config().expect("readable").expect("written");
        assert_eq!(config.flags & flags::DRAIN_FOREIGN, 0);
        drop(dataplane);

        // Back, but for arrays, whose elements may be in use wherever they are.
        bench.config.sizes = MapSizes { services: Some(128), table: Some(128), ..small };
        assert_eq!(bench.open().apply_all(desired()).written, 0);
        assert_eq!(edges(&bench.view().conntrack4().expect("a dump")), BTreeSet::from([77]));
        assert_eq!(size(&bench, "conntrack4"), 1_024);
    });
}

#[test]
fn a_size_without_room_for_what_is_there_is_refused_and_says_what_to_do() {
    in_namespace(|| {
        let mut bench = Bench::new();
        assert!(bench.open().apply_all(desired()).failed.is_empty());
        (1..=9).for_each(|octet| insert_affinity(&bench, "affinity4", octet));
        let small = bench.config.sizes;
        let refused = |bench: &Bench| chain(&Dataplane::open(&bench.config).err().expect("refused"));
        bench.config.sizes = MapSizes { affinity: Some(8), ..small };
        let text = refused(&bench);
        assert!(text.contains("/affinity4 holds 9 elements, more than the 8 that --max-affinity asks for"), "{text}");
        bench.config.sizes = MapSizes { table: Some(32), ..small };
        let text = refused(&bench);
        assert!(
            text.contains("/backend_table holds 64 elements, more than the 32 that --max-table asks for"),
            "{text}"
        );
        assert!(text.contains("give a larger number, or run `sheave cleanup`"), "{text}");
        bench.config.sizes = small;
        assert_eq!(bench.open().apply_all(desired()).written, 0, "nothing was touched");
    });
}

/// Where the maps are those of a version that had fewer, an upgrade with another size would fail until somebody takes the flag back.
#[test]
fn maps_that_an_earlier_version_did_not_have_are_made_with_whatever_size() {
    in_namespace(|| {
        let mut bench = Bench::new();
        assert!(bench.open().apply_all(desired()).failed.is_empty());
        let before = meaning(&bench.view());
        for map in ["new_affinity4", "new_affinity6"] {
            fs::remove_file(bench.pin(map)).expect("pinned");
        }
        let small = bench.config.sizes;
        bench.config.sizes = twice(&small);
        assert_eq!(bench.open().apply_all(desired()).written, 0);
        assert_eq!(meaning(&bench.view()), before);
        let Some(affinity) = bench.config.sizes.affinity else { panic!("a size of each map") };
        assert_eq!(size(&bench, "new_affinity6"), affinity);
    });
}

#[test]
fn kernels_whose_hooks_hold_one_program_of_ours_refuse_another_size() {
    in_namespace(|| {
        let mut bench = Bench::new();
        drop(bench.open());
        bench.config.sizes.backends = Some(128);
        let features = Features { tcx: false, ..Features::detect() };
        let text = chain(&Dataplane::open_with(&bench.config, features).err().expect("refused"));
        assert!(text.contains("/backends4 has 64 entries, not 128"), "{text}");
        assert!(text.contains("leave --max-backends as it was, or run `sheave cleanup`"), "{text}");
    });
}

#[test]
fn a_change_that_was_begun_is_finished_with_its_size_before_another_one() {
    in_namespace(|| {
        let mut bench = Bench::new();
        assert!(bench.open().apply_all(desired()).failed.is_empty());
        insert_flow(&bench, "conntrack4", 77, 1);
        // As a start leaves it that was killed when it had made the first of its maps.
        fs::create_dir_all(bench.pin("resizing/maps")).expect("a folder");
        let other = Bench::new();
        drop(other.open());
        let map = MapData::from_pin(other.pin(names::CONNTRACK4)).expect("pinned");
        map.pin(bench.pin("resizing/maps/conntrack4")).expect("pinned again");
        let begun = map.info().expect("map info").id();
        drop(bench.open());
        let pinned = MapData::from_pin(bench.pin("conntrack4")).expect("pinned");
        assert_eq!(pinned.info().expect("map info").id(), begun, "the new map took its place");
        assert_eq!(edges(&bench.view().conntrack4().expect("a dump")), BTreeSet::from([77]));
        assert!(!bench.pin("resizing").exists());
        bench.config.sizes.conntrack = Some(4_096);
        assert_eq!(bench.open().apply_all(desired()).written, 0);
        assert_eq!((size(&bench, "conntrack4"), size(&bench, "conntrack6")), (4_096, 4_096));
    });
}
