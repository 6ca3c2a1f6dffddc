//! Pins: what a restart finds, what it refuses, and what a cleanup leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;

use aya::maps::{Array, Map, MapData};
use sheave::dataplane::{self, Dataplane, DataplaneError};
use sheave::interfaces::Role;
use sheave_common::config::{Config, flags};
use sheave_common::frontend::flags::CLUSTER_IP;
use sheave_tests::process::built;

use crate::bench::{Bench, chain, desired, in_namespace, interface, interface_index, name, run, service};

#[test]
fn service_ports_become_map_elements_and_a_restart_writes_nothing() {
    in_namespace(|| {
        let bench = Bench::new();
        let mut dataplane = bench.open();
        let applied = dataplane.apply_all(desired());
        assert!(applied.failed.is_empty() && applied.other.is_none(), "{applied:?}");
        let view = bench.view();
        assert_eq!(view.frontends4().expect("a dump").len(), 4, "two frontends and the marks of their addresses");
        assert_eq!(view.backends4().expect("a dump").len(), 4);
        let names: BTreeSet<String> = view
            .service_names()
            .expect("a dump")
            .iter()
            .filter_map(|(_, name)| name.as_str().map(str::to_owned))
            .collect();
        assert_eq!(names, BTreeSet::from(["default/db:http".to_owned(), "default/web:http".to_owned()]));
        drop(dataplane);
        let mut dataplane = bench.open();
        let applied = dataplane.apply_all(desired());
        assert_eq!((applied.written, dataplane.map_writes()), (0, 0));
        assert!(dataplane.begin_grace().is_none());
    });
}

#[test]
fn versions_and_backend_ids_are_never_used_again_after_a_restart() {
    in_namespace(|| {
        let bench = Bench::new();
        let mut seen = BTreeSet::new();
        let mut versions = BTreeSet::new();
        for round in 1..5 {
            let mut dataplane = bench.open();
            let applied = dataplane.apply_all(BTreeMap::from([(name("web"), service(1, &[round]))]));
            assert!(applied.failed.is_empty());
            let grace = dataplane.begin_grace();
            if let Some(grace) = grace {
                dataplane.reclaim(grace).expect("reclaimed");
            }
            let view = bench.view();
            let backends = view.backends4().expect("a dump");
            assert_eq!(backends.len(), 1);
            assert!(seen.insert(backends[0].0), "backend id {} was used before", backends[0].0);
            assert!(versions.insert(backends[0].1.version), "version used before");
            for (_, frontend) in view.frontends4().expect("a dump") {
                assert!(frontend.service_id < 2, "the service keeps its id");
                if frontend.service_id == 1 {
                    assert!(versions.insert(frontend.version), "version used before");
                }
            }
        }
    });
}

#[test]
fn the_settings_and_the_nodes_addresses_are_in_the_config_map() {
    in_namespace(|| {
        let mut bench = Bench::new();
        bench.config.timeouts.udp_new = 7;
        bench.config.snat_ports = (40_000, 40_100);
        bench.config.drain_foreign = sheave::config::DrainForeign::On;
        let mut dataplane = bench.open();
        dataplane.set_node_addresses(Some([192, 0, 2, 9].into()), None).expect("written");
        let config = bench.view().config().expect("readable").expect("written");
        assert_eq!((config.timeouts.udp_new, config.snat_port_first, config.snat_port_last), (7, 40_000, 40_100));
        assert_eq!(config.node4.octets, [192, 0, 2, 9]);
        assert_eq!(config.layout_version, sheave_common::LAYOUT_VERSION);
        assert_ne!(config.host_netns_cookie, 0, "this kernel tells the namespace's cookie");
        assert_eq!(config.flags, flags::CONNECT_HOST | flags::DRAIN_FOREIGN | flags::SYN_FAILOVER);
        drop(dataplane);
        let mut dataplane = bench.open();
        dataplane.set_node_addresses(Some([192, 0, 2, 9].into()), None).expect("written");
        assert_eq!(dataplane.map_writes(), 0);
    });
}

#[test]
fn pins_of_another_layout_are_refused_and_say_what_to_do_and_that_works() {
    in_namespace(|| {
        let bench = Bench::new();
        drop(bench.open());
        let map = Map::Array(MapData::from_pin(bench.pin("config")).expect("pinned"));
        let mut map = Array::<MapData, Config>::try_from(map).expect("the config map");
        let config = map.get(&0, 0).expect("its element");
        map.set(0, Config { layout_version: 999, ..config }, 0).expect("written");
        let error = Dataplane::open(&bench.config).err().expect("refused");
        let expected = sheave_common::LAYOUT_VERSION;
        assert!(
            matches!(error, DataplaneError::IncompatibleLayout { found: 999, expected: e, .. } if e == expected),
            "{error}"
        );
        assert!(error.to_string().contains("sheave cleanup"), "{error}");
        dataplane::cleanup(&bench.config.pin_path).expect("cleaned up");
        drop(bench.open());
    });
}

#[test]
fn a_pin_of_another_shape_is_refused_and_says_what_to_do_and_that_works() {
    in_namespace(|| {
        let bench = Bench::new();
        drop(bench.open());
        let pin = bench.pin("frontends4");
        std::fs::remove_file(&pin).expect("removed");
        MapData::from_pin(bench.pin("backends4")).expect("pinned").pin(&pin).expect("pinned again");
        let text = chain(&Dataplane::open(&bench.config).err().expect("refused"));
        assert!(text.contains(&pin.display().to_string()) && text.contains("key size is 4, not"), "{text}");
        assert!(text.contains("sheave cleanup"), "{text}");
        dataplane::cleanup(&bench.config.pin_path).expect("cleaned up");
        drop(bench.open());
    });
}

#[test]
fn two_instances_work_side_by_side_and_a_pin_path_has_one_user() {
    in_namespace(|| {
        let (one, two) = (Bench::new(), Bench::new());
        let mut first = one.open();
        let mut second = two.open();
        assert!(first.apply_all(desired()).failed.is_empty());
        assert!(second.apply_all(BTreeMap::new()).failed.is_empty());
        assert_eq!(two.view().frontends4().expect("a dump").len(), 0);
        assert_eq!(one.view().frontends4().expect("a dump").len(), 4);
        let error = Dataplane::open(&one.config).err().expect("refused");
        assert!(matches!(error, DataplaneError::Busy { .. }), "{error}");
        assert!(matches!(dataplane::cleanup(&one.config.pin_path), Err(DataplaneError::Busy { .. })));
        drop(first);
        drop(one.open());
    });
}

#[test]
fn cleanup_leaves_nothing_and_may_be_repeated() {
    in_namespace(|| {
        let bench = Bench::new();
        run("ip link add pod0 type veth peer name peer0");
        let mut dataplane = bench.open();
        dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
        drop(dataplane);
        assert_eq!(crate::links::tcx_programs("pod0"), 2);
        dataplane::cleanup(&bench.config.pin_path).expect("cleaned up");
        assert!(!bench.config.pin_path.exists());
        crate::links::await_no_programs("pod0");
        dataplane::cleanup(&bench.config.pin_path).expect("again is no error");
        assert_ne!(interface_index("pod0"), 0);
    });
}

#[test]
fn a_process_without_the_capabilities_is_told_which_ones_it_needs() {
    in_namespace(|| {
        let bench = Bench::new();
        let daemon = || std::process::Command::new(built("sheave").expect("sheave is built"));
        let mut refused = daemon();
        refused.args(["run", "--manifests", "/tmp", "--node-name", "node", "--pin-path"]).arg(&bench.config.pin_path);
        // Nobody: neither on the BPF file system, nor with bpf(2).
        let output = refused.uid(65_534).gid(65_534).output().expect("started");
        let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success() && text.contains("CAP_BPF"), "{text}");
    });
}

#[test]
fn a_large_cluster_fits_and_one_change_in_it_is_one_change() {
    in_namespace(|| {
        let mut bench = Bench::new();
        bench.config.sizes =
            sheave::config::MapSizes { conntrack: Some(1024), half_open: Some(1024), ..Default::default() };
        let mut dataplane = bench.open();
        let port = |number: u32, backends: &[u8]| {
            let mut port = service(0, backends);
            let address = std::net::Ipv4Addr::from(0x0a60_0000 + number);
            port.frontends = BTreeMap::from([(SocketAddr::new(address.into(), 80), CLUSTER_IP)]);
            port
        };
        let backends: Vec<u8> = (1..=20).collect();
        let all = (0..5_000).map(|number| (name(&format!("s{number}")), port(number, &backends))).collect();
        let applied = dataplane.apply_all(all);
        assert!(applied.failed.is_empty() && applied.other.is_none());
        assert_eq!(bench.view().backends4().expect("a dump").len(), 100_000);
        let before = dataplane.map_writes();
        let applied = dataplane.apply(BTreeMap::from([(name("s77"), Some(port(77, &backends[1..])))]));
        assert_eq!((applied.written, dataplane.map_writes() - before), (3, 3), "a run, a frontend, the backend");
        let grace = dataplane.begin_grace().expect("a backend waits");
        assert_eq!(dataplane.reclaim(grace).expect("reclaimed").written, 1);
    });
}
