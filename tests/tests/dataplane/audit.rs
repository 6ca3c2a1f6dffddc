//! The audit: what somebody else did to maps, links and pins is found, put right and told; what was right is left alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::time::Duration;

use aya::maps::{Array, Map, MapData};
use sheave::dataplane::{Audit, Dataplane, Features, FindingKind};
use sheave::interfaces::{Interface, Role};
use sheave::model::desired::{ServicePort, ServicePortName};
use sheave::model::network::Network;
use sheave_common::backend::{Backend, TableElement};
use sheave_common::config::Config;
use sheave_common::frontend::flags::{LOAD_BALANCER, SOURCE_RANGES};
use sheave_common::frontend::{Frontend, FrontendKey};
use sheave_common::interface;
use sheave_common::service_name::ServiceName;
use sheave_common::{Ipv4Address, filter};

use crate::bench::{
    Bench, desired, edges, hash, in_namespace, insert_flow, interface, meaning, name, output, run, service,
};
use crate::links::tcx_programs;

/// Audits from beginning to end, with what the grace period afterwards takes away.
fn audit(dataplane: &mut Dataplane, interfaces: &[Interface]) -> Audit {
    let interfaces: BTreeMap<u32, Interface> = interfaces.iter().map(|one| (one.index, one.clone())).collect();
    let mut audit = Audit::default();
    while !audit.is_done() {
        dataplane.audit(&mut audit, &interfaces, &BTreeSet::new()).expect("audited");
    }
    settle(dataplane);
    audit
}

fn settle(dataplane: &mut Dataplane) {
    while let Some(grace) = dataplane.begin_grace() {
        let applied = dataplane.reclaim(grace).expect("reclaimed");
        assert!(applied.failed.is_empty() && applied.other.is_none(), "{applied:?}");
    }
}

/// How much an audit found, by place and kind.
fn found(audit: &Audit) -> BTreeMap<(&'static str, FindingKind), u64> {
    assert!(audit.troubles.is_empty(), "{:?}", audit.troubles);
    audit.findings.iter().map(|(place, finding)| (*place, finding.number)).collect()
}

fn nothing() -> BTreeMap<(&'static str, FindingKind), u64> {
    BTreeMap::new()
}

/// Service ports of which one lets only some clients in.
fn guarded() -> BTreeMap<ServicePortName, ServicePort> {
    let network = |octets: [u8; 4], length| Network::new(octets.into(), length).expect("a network");
    let frontends = BTreeMap::from([((([192, 0, 2, 9], 80).into()), LOAD_BALANCER | SOURCE_RANGES)]);
    let source_ranges = BTreeSet::from([network([10, 0, 0, 0], 8), network([172, 16, 0, 0], 12)]);
    let port = ServicePort { frontends, source_ranges, ..service(9, &[7, 8]) };
    desired().into_iter().chain([(name("guarded"), port)]).collect()
}

fn array<V: aya::Pod>(bench: &Bench, map: &str) -> Array<MapData, V> {
    let map = Map::Array(MapData::from_pin(bench.pin(map)).expect("the map is pinned"));
    Array::try_from(map).expect("an array of this type")
}

#[test]
fn what_somebody_changed_in_the_maps_is_put_right_and_named() {
    use FindingKind::{Changed, Strange};
    in_namespace(|| {
        let bench = Bench::new();
        run("ip link add pod0 type veth peer name peer0");
        let pod = interface("pod0", Role::Pod);
        let mut dataplane = bench.open();
        dataplane.attach(&pod).expect("attached");
        assert!(dataplane.apply_all(guarded()).failed.is_empty());
        settle(&mut dataplane);
        let view = bench.view();
        let (before, config) = (meaning(&view), view.config().expect("readable"));
        let ranges = view.source_ranges().expect("a dump");
        assert_eq!(found(&audit(&mut dataplane, std::slice::from_ref(&pod))), nothing());

        let mut frontends = hash::<FrontendKey<Ipv4Address>, Frontend>(&bench.pin("frontends4"));
        let mut backends = hash::<u32, Backend<Ipv4Address>>(&bench.pin("backends4"));
        let mut names = hash::<u32, ServiceName>(&bench.pin("service_names"));
        let all = view.frontends4().expect("a dump");
        let at = |last: u8, port: u16| {
            let wanted =
                |key: &FrontendKey<Ipv4Address>| (key.address.octets[3], u16::from_be(key.port_be)) == (last, port);
            *all.iter().find(|(key, _)| wanted(key)).expect("it is there")
        };
        let ((web, value), (db, _), (mark, _)) = (at(1, 80), at(2, 80), at(1, 0));
        frontends.insert(web, Frontend { service_id: 3, ..value }, 0).expect("changed");
        frontends.remove(&db).expect("removed");
        frontends.remove(&mark).expect("removed");
        let stranger = FrontendKey::new(Ipv4Address { octets: [203, 0, 113, 1] }, 80_u16.to_be(), 6);
        frontends.insert(stranger, value, 0).expect("inserted");
        let endpoint = |last: u8| {
            let all = view.backends4().expect("a dump").into_iter();
            all.into_iter().find(|(_, backend)| backend.address.octets[3] == last).expect("it is there")
        };
        let ((missing, _), (moved, backend), (lighter, light)) = (endpoint(1), endpoint(2), endpoint(3));
        backends.remove(&missing).expect("removed");
        let address = Ipv4Address { octets: [203, 0, 113, 7] };
        backends.insert(moved, Backend { address, ..backend }, 0).expect("changed");
        backends.insert(lighter, Backend { weight: 77, ..light }, 0).expect("changed");
        backends.insert(900, backend, 0).expect("inserted");
        let id = |text: &str| {
            let names = view.service_names().expect("a dump").into_iter();
            names.into_iter().find(|(_, name)| name.as_str() == Some(text)).expect("it is there").0
        };
        names
            .insert(id("default/web:http"), ServiceName::new(6, "default/db:http").expect("it fits"), 0)
            .expect("changed");
        names.insert(50, ServiceName::new(6, "no service port").expect("it fits"), 0).expect("inserted");
        let mut table = array::<TableElement>(&bench, "backend_table");
        let guarded_run = at(9, 80).1.cluster.first / 2;
        table.set(guarded_run, TableElement::default(), 0).expect("changed");
        let mut destinations = array::<u32>(&bench, "destinations");
        destinations.set(filter::element(&web.address), 0, 0).expect("cleared");
        let config = config.expect("written");
        array::<Config>(&bench, "config")
            .set(0, Config { flags: 0, snat_port_first: 1, ..config }, 0)
            .expect("changed");
        hash::<u32, interface::Interface>(&bench.pin("interfaces")).remove(&pod.index).expect("removed");
        let trie = bench.pin("source_ranges4");
        let (service_id, trie) = (id("default/guarded:http"), trie.display());
        run(&format!("bpftool map delete pinned {trie} key 40 0 0 0 {service_id} 0 0 0 10 0 0 0"));
        run(&format!("bpftool map update pinned {trie} key 64 0 0 0 {service_id} 0 0 0 9 9 9 9 value 1 0 0 0"));
        assert_ne!(view.source_ranges().expect("a dump"), ranges);

        let first = audit(&mut dataplane, std::slice::from_ref(&pod));
        let expected = [
            (("frontends4", Changed), 3),
            (("frontends4", Strange), 1),
            (("backends4", Changed), 3),
            // The other endpoint's backend had one of ours ids.
            (("backends4", Strange), 2),
            (("service_names", Changed), 1),
            (("service_names", Strange), 1),
            (("backend_table", Changed), 1),
            (("destinations", Changed), 1),
            (("config", Changed), 1),
            (("interfaces", Changed), 1),
            (("source_ranges4", Changed), 1),
            (("source_ranges4", Strange), 1),
        ];
        // A frontend that names a new run is written in passing: those of web and guarded.
        let mut seen = found(&first);
        let in_passing = seen.insert(("frontends4", Changed), 3).expect("some frontend was found");
        assert!((2..=3).contains(&in_passing), "{in_passing}");
        assert_eq!(seen, expected.into_iter().collect());
        let named: Vec<&String> = first.findings.values().flat_map(|finding| &finding.names).collect();
        for text in ["10.96.0.2:80/TCP", "203.0.113.1:80/TCP", "of default/web:http", "10.0.0.0/8 of default/guarded"] {
            assert!(named.iter().any(|name| name.contains(text)), "{text} is not in {named:?}");
        }
        assert_eq!(meaning(&view), before);
        assert_eq!(view.source_ranges().expect("a dump"), ranges);
        assert_eq!((view.backends4().expect("a dump").len(), view.service_names().expect("a dump").len()), (6, 3));
        let now = view.config().expect("readable").expect("written");
        assert_eq!((now.flags, now.snat_port_first), (config.flags, config.snat_port_first));
        assert_eq!(destinations.get(&filter::element(&web.address), 0).expect("read"), 1);
        assert_eq!(view.interfaces().expect("a dump").len(), 1);

        assert_eq!(found(&audit(&mut dataplane, std::slice::from_ref(&pod))), nothing(), "all is well again");
        drop(dataplane);
        let mut dataplane = bench.open();
        assert_eq!(dataplane.apply_all(guarded()).written, 0, "as a restart sees it, too");
    });
}

#[test]
fn maps_that_were_emptied_are_filled_again() {
    in_namespace(|| {
        let bench = Bench::new();
        let mut dataplane = bench.open();
        assert!(dataplane.apply_all(desired()).failed.is_empty());
        let view = bench.view();
        let before = meaning(&view);
        let mut frontends = hash::<FrontendKey<Ipv4Address>, Frontend>(&bench.pin("frontends4"));
        let mut backends = hash::<u32, Backend<Ipv4Address>>(&bench.pin("backends4"));
        let mut names = hash::<u32, ServiceName>(&bench.pin("service_names"));
        view.frontends4().expect("a dump").iter().for_each(|(key, _)| frontends.remove(key).expect("removed"));
        view.backends4().expect("a dump").iter().for_each(|(id, _)| backends.remove(id).expect("removed"));
        view.service_names().expect("a dump").iter().for_each(|(id, _)| names.remove(id).expect("removed"));
        audit(&mut dataplane, &[]);
        assert_eq!(meaning(&view), before);
        assert_eq!(found(&audit(&mut dataplane, &[])), nothing());
    });
}

#[test]
fn changes_between_the_slices_of_an_audit_are_not_taken_for_drift() {
    in_namespace(|| {
        let mut bench = Bench::new();
        (bench.config.sizes.frontends, bench.config.sizes.services) = (Some(512), Some(512));
        (bench.config.sizes.backends, bench.config.sizes.table) = (Some(1_024), Some(2_048));
        let mut dataplane = bench.open();
        let port = |number: u8, round: u8| service(number, &[round % 7 + 1, round % 5 + 10, number % 3 + 20]);
        let all = (1..=100).map(|number| (name(&format!("s{number}")), port(number, number))).collect();
        assert!(dataplane.apply_all(all).failed.is_empty());
        let (mut slices, mut current) = (0, Audit::default());
        for round in 0..=255_u8 {
            if current.is_done() {
                assert_eq!(found(&std::mem::take(&mut current)), nothing());
            }
            dataplane.audit(&mut current, &BTreeMap::new(), &BTreeSet::new()).expect("audited");
            slices += 1;
            let changed = (0..5_u8).map(|step| {
                let number = round.wrapping_mul(31).wrapping_add(step * 53) % 120 + 1;
                (name(&format!("s{number}")), (round % 4 != 0).then(|| port(number, round)))
            });
            assert!(dataplane.apply(changed.collect()).failed.is_empty());
            if round % 3 == 0 {
                settle(&mut dataplane);
            }
        }
        assert!(slices > 100);
        assert_eq!(found(&audit(&mut dataplane, &[])), nothing());
    });
}

/// A pod's connections would end if its flows were taken for a predecessor's.
#[test]
fn programs_that_were_detached_are_attached_again_and_flows_stay() {
    in_namespace(|| {
        let bench = Bench::new();
        run("ip link add pod0 index 77 type veth peer name peer0");
        let pod = interface("pod0", Role::Pod);
        let mut dataplane = bench.open();
        dataplane.attach(&pod).expect("attached");
        insert_flow(&bench, "conntrack4", 77, 1);
        let link = |pin: &str| bench.pin("links").join(pin).display().to_string();
        let detach = |pin: &str| run(&format!("bpftool link detach pinned {}", link(pin)));
        detach("77_ingress");
        detach("cgroup_connect4");
        assert_eq!(tcx_programs("pod0"), 1);
        let found_now = found(&audit(&mut dataplane, std::slice::from_ref(&pod)));
        assert_eq!(found_now, BTreeMap::from([(("links", FindingKind::Detached), 2)]));
        assert_eq!(tcx_programs("pod0"), 2);
        assert_eq!(edges(&bench.view().conntrack4().expect("a dump")), BTreeSet::from([77]));
        let on_cgroup = output(&format!("bpftool cgroup show {}", bench.cgroup.display()));
        assert!(on_cgroup.contains("sock_connect4"), "{on_cgroup}");
        assert_eq!(found(&audit(&mut dataplane, std::slice::from_ref(&pod))), nothing());
        // An interface that has gone meanwhile is nobody's drift once the notification is there.
        run("ip link del pod0");
        assert_eq!(found(&audit(&mut dataplane, &[])), nothing());
    });
}

#[test]
fn filters_that_were_removed_from_a_kernel_without_tcx_come_back() {
    in_namespace(|| {
        let bench = Bench::new();
        run("ip link add pod0 type veth peer name peer0");
        let pod = interface("pod0", Role::Pod);
        let old_kernel = Features { tcx: false, ..Features::detect() };
        let mut dataplane = Dataplane::open_with(&bench.config, old_kernel).expect("opened");
        dataplane.attach(&pod).expect("attached");
        assert_eq!(found(&audit(&mut dataplane, std::slice::from_ref(&pod))), nothing());
        run("tc qdisc del dev pod0 clsact");
        let found_now = found(&audit(&mut dataplane, std::slice::from_ref(&pod)));
        assert_eq!(found_now, BTreeMap::from([(("links", FindingKind::Detached), 2)]));
        for hook in ["ingress", "egress"] {
            assert_eq!(output(&format!("tc filter show dev pod0 {hook}")).matches("direct-action").count(), 1);
        }
        dataplane.detach(pod.index).expect("detached");
    });
}

/// Mounts a BPF file system of its own there, in a mount namespace of the calling thread's own.
fn mount_at(directory: &std::path::Path) {
    // SAFETY: unshare(2) takes no addresses; only this thread moves.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0, "{}", io::Error::last_os_error());
    run("mount --make-rprivate /");
    run(&format!("mount -t bpf bpf {}", directory.display()));
}

#[test]
fn pins_that_are_lost_with_their_file_system_are_made_again_when_there_is_one() {
    in_namespace(|| {
        let mut bench = Bench::new();
        let mount = std::env::temp_dir().join(sheave_tests::leftovers::unique_name());
        fs::create_dir_all(&mount).expect("a folder");
        mount_at(&mount);
        bench.config.pin_path = mount.join("sheave");
        run("ip link add pod0 type veth peer name peer0");
        let pod = interface("pod0", Role::Pod);
        let mut dataplane = bench.open();
        dataplane.attach(&pod).expect("attached");
        assert!(dataplane.apply_all(desired()).failed.is_empty());
        let before = (meaning(&bench.view()), bench.links());
        insert_flow(&bench, "conntrack4", pod.index, 1);

        run(&format!("umount -l {}", mount.display()));
        let lost = audit(&mut dataplane, std::slice::from_ref(&pod));
        assert!(lost.findings.is_empty(), "{:?}", lost.findings);
        assert!(lost.troubles[0].contains("mount -t bpf"), "{:?}", lost.troubles);
        assert_eq!(tcx_programs("pod0"), 2, "programs stay where they are");
        run("ip link add pod1 type veth peer name peer1");
        let late = interface("pod1", Role::Pod);
        dataplane.attach(&late).expect("attached all the same");
        let both = [pod, late];

        run(&format!("mount -t bpf bpf {}", mount.display()));
        let found_now = found(&audit(&mut dataplane, &both));
        assert!(found_now[&("pins", FindingKind::Unpinned)] > 40, "{found_now:?}");
        let now = (meaning(&bench.view()), bench.links());
        assert_eq!((&now.0, now.1.len()), (&before.0, before.1.len() + 2));
        assert_eq!(found(&audit(&mut dataplane, &both)), nothing());
        assert!(
            Dataplane::open(&bench.config).err().expect("refused").to_string().contains("another"),
            "it is ours again"
        );

        // Each pin by itself, and a pin of something else in its place.
        fs::remove_dir_all(&bench.config.pin_path).expect("removed");
        assert!(found(&audit(&mut dataplane, &both))[&("pins", FindingKind::Unpinned)] > 40);
        fs::remove_file(bench.pin("frontends4")).expect("removed");
        MapData::from_pin(bench.pin("backends4")).expect("pinned").pin(bench.pin("frontends4")).expect("pinned");
        assert_eq!(found(&audit(&mut dataplane, &both)), BTreeMap::from([(("pins", FindingKind::Unpinned), 1)]));

        drop(dataplane);
        let mut dataplane = bench.open();
        both.iter().for_each(|pod| dataplane.attach(pod).expect("attached"));
        assert_eq!(dataplane.apply_all(desired()).written, 0, "a restart finds everything");
        assert_eq!((tcx_programs("pod0"), tcx_programs("pod1")), (2, 2));
        assert_eq!(bench.view().conntrack4().expect("a dump").len(), 1);
        drop(dataplane);
        sheave::dataplane::cleanup(&bench.config.pin_path).expect("cleaned up");
        run(&format!("umount -l {}", mount.display()));
        fs::remove_dir(&mount).expect("removed");
    });
}

#[test]
fn an_audit_of_a_large_cluster_takes_little_and_never_long_at_a_time() {
    in_namespace(|| {
        let mut bench = Bench::new();
        bench.config.sizes =
            sheave::config::MapSizes { conntrack: Some(1024), half_open: Some(1024), ..Default::default() };
        let mut dataplane = bench.open();
        let port = |number: u32| {
            let mut port = service(0, &(1..=10).collect::<Vec<u8>>());
            let address = std::net::Ipv4Addr::from(0x0a60_0000 + number);
            port.frontends = BTreeMap::from([((address, 80).into(), sheave_common::frontend::flags::CLUSTER_IP)]);
            port
        };
        let all = (0..2_000).map(|number| (name(&format!("s{number}")), port(number))).collect();
        assert!(dataplane.apply_all(all).failed.is_empty());
        let (mut audit, mut slices) = (Audit::default(), Vec::new());
        while !audit.is_done() {
            let started = std::time::Instant::now();
            dataplane.audit(&mut audit, &BTreeMap::new(), &BTreeSet::new()).expect("audited");
            slices.push(started.elapsed());
        }
        slices.sort_unstable();
        let at = |part: usize| slices[(slices.len() - 1) * part / 100];
        println!(
            "audit of 2 000 × 10: {:?} in {} slices: {:?}, at most {:?}",
            audit.busy,
            slices.len(),
            at(50),
            at(100)
        );
        assert_eq!(found(&audit), nothing());
        assert!(at(90) < Duration::from_millis(20), "{:?}", at(90));
    });
}
