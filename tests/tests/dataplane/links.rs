//! Links: what is attached where, across restarts and when interfaces come and go.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::ensure;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{SchedClassifier, TcAttachType};
use sheave::config::{ConnectMode, XdpMode};
use sheave::dataplane::{Dataplane, Features};
use sheave::interfaces::Role;
use sheave_common::config;
use sheave_common::interface::flags;
use sheave_tests::process::eventually;

use crate::bench::{Bench, edges, in_namespace, insert_flow, interface, interface_index, output, run};

/// Programs on both tc hooks of an interface.
pub(crate) fn tcx_programs(name: &str) -> usize {
    let hooks = [TcAttachType::Ingress, TcAttachType::Egress].into_iter();
    hooks.map(|hook| SchedClassifier::query_tcx(name, hook).expect("a TCX query").1.len()).sum()
}

/// Nothing is on an interface any more. The kernel detaches a moment after a link's last holder is gone.
pub(crate) fn await_no_programs(name: &str) {
    let gone = eventually(Duration::from_secs(10), || {
        let programs = tcx_programs(name);
        ensure!(programs == 0, "{programs} programs on {name}");
        Ok(())
    });
    gone.expect("links end");
}

fn link_id(bench: &Bench, pin: &str) -> u32 {
    let link = FdLink::from(PinnedLink::from_pin(bench.pin("links").join(pin)).expect("a pinned link"));
    link.info().expect("link info").id()
}

#[test]
fn programs_are_attached_by_role_and_a_restart_keeps_their_links() {
    in_namespace(|| {
        let bench = Bench::new();
        run("ip link add pod0 type veth peer name peer0");
        run("ip link add up0 type veth peer name peer1");
        let mut dataplane = bench.open();
        dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
        dataplane.attach(&interface("up0", Role::Uplink)).expect("attached");
        let (pod, uplink) = (interface_index("pod0"), interface_index("up0"));
        let hooks = ["connect", "sendmsg", "recvmsg", "getpeername"];
        let mut expected: BTreeSet<String> =
            hooks.iter().flat_map(|hook| [4, 6].map(|family| format!("cgroup_{hook}{family}"))).collect();
        expected.extend([pod, uplink].iter().flat_map(|i| [format!("{i}_ingress"), format!("{i}_egress")]));
        assert_eq!(bench.links(), expected);
        let ids = |bench: &Bench| expected.iter().map(|pin| link_id(bench, pin)).collect::<Vec<_>>();
        let before = ids(&bench);
        let program = |hook| SchedClassifier::query_tcx("pod0", hook).expect("a TCX query").1[0].id();
        let old_program = program(TcAttachType::Ingress);
        drop(dataplane);
        let mut dataplane = bench.open();
        dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
        dataplane.attach(&interface("up0", Role::Uplink)).expect("attached");
        assert_eq!(ids(&bench), before, "the same links");
        assert_eq!((tcx_programs("pod0"), tcx_programs("up0")), (2, 2), "nothing is attached twice");
        assert_eq!(program(TcAttachType::Ingress), old_program, "and the same program, which the kernel has verified");
        assert_eq!(dataplane.map_writes(), 0);
        let interfaces = bench.view().interfaces().expect("a dump");
        let roles: BTreeSet<(u32, u32)> = interfaces.iter().map(|(index, i)| (*index, i.flags)).collect();
        assert_eq!(roles, BTreeSet::from([(pod, flags::POD), (uplink, flags::UPLINK)]));
    });
}

#[test]
fn a_reused_index_gets_new_links_and_none_of_the_old_flows() {
    for restart in [false, true] {
        in_namespace(move || {
            let bench = Bench::new();
            run("ip link add pod0 index 77 type veth peer name peer0");
            let mut dataplane = bench.open();
            dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
            for map in ["conntrack4", "half_open4"] {
                for edge in [0, 77, 78] {
                    insert_flow(&bench, map, edge, 1);
                }
            }
            if restart {
                drop(dataplane);
                run("ip link del pod0");
                run("ip link add pod1 index 77 type veth peer name peer1");
                dataplane = bench.open();
            } else {
                run("ip link del pod0");
                dataplane.detach(77).expect("detached");
                assert!(!bench.links().contains("77_ingress"));
                run("ip link add pod1 index 77 type veth peer name peer1");
            }
            dataplane.attach(&interface("pod1", Role::Pod)).expect("attached");
            assert_eq!(tcx_programs("pod1"), 2);
            let view = bench.view();
            assert_eq!(edges(&view.conntrack4().expect("a dump")), BTreeSet::from([0, 78]));
            assert_eq!(edges(&view.half_open4().expect("a dump")), BTreeSet::from([0, 78]));
            insert_flow(&bench, "conntrack4", 77, 1);
            dataplane.attach(&interface("pod1", Role::Pod)).expect("attached");
            assert!(edges(&view.conntrack4().expect("a dump")).contains(&77), "a live interface keeps its flows");
        });
    }
}

#[test]
fn interfaces_that_went_away_while_the_daemon_was_down_are_pruned_with_their_flows() {
    in_namespace(|| {
        let bench = Bench::new();
        run("ip link add pod0 type veth peer name peer0");
        run("ip link add up0 type veth peer name peer1");
        let mut dataplane = bench.open();
        dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
        dataplane.attach(&interface("up0", Role::Uplink)).expect("attached");
        let (pod, uplink) = (interface_index("pod0"), interface_index("up0"));
        for edge in [0, pod] {
            insert_flow(&bench, "conntrack4", edge, 1);
        }
        drop(dataplane);
        run("ip link del pod0");
        let mut dataplane = bench.open();
        dataplane.attach(&interface("up0", Role::Uplink)).expect("attached");
        dataplane.prune_interfaces(&BTreeSet::from([uplink])).expect("pruned");
        dataplane.sweep().expect("swept");
        let view = bench.view();
        assert_eq!(edges(&view.conntrack4().expect("a dump")), BTreeSet::from([0]));
        assert_eq!(view.interfaces().expect("a dump").len(), 1);
        assert!(!bench.links().iter().any(|pin| pin.starts_with(&format!("{pod}_"))));
    });
}

#[test]
fn pins_of_another_network_namespace_are_not_taken_for_this_ones() {
    in_namespace(|| {
        let bench = std::sync::Arc::new(Bench::new());
        run("ip link add pod0 index 91 type veth peer name peer0");
        let mut dataplane = bench.open();
        dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
        insert_flow(&bench, "conntrack4", 91, 1);
        drop(dataplane);
        let other = std::sync::Arc::clone(&bench);
        in_namespace(move || {
            run("ip link add pod0 index 91 type veth peer name peer0");
            let mut dataplane = other.open();
            assert!(other.view().conntrack4().expect("a dump").is_empty());
            dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
            assert_eq!(tcx_programs("pod0"), 2);
        });
        await_no_programs("pod0");
    });
}

#[test]
fn connect_time_programs_are_removed_when_they_are_switched_off() {
    in_namespace(|| {
        let mut bench = Bench::new();
        drop(bench.open());
        assert_eq!(bench.links().len(), 8);
        bench.config.connect = ConnectMode::Off;
        drop(bench.open());
        assert_eq!(bench.links().len(), 0);
        assert_eq!(bench.view().config().expect("readable").expect("written").flags, config::flags::SYN_FAILOVER);
    });
}

#[test]
fn xdp_goes_where_it_is_asked_for_and_its_mode_can_change() {
    in_namespace(|| {
        let mut bench = Bench::new();
        run("ip link add up0 type veth peer name peer0");
        let index = interface_index("up0");
        for (mode, pin) in [
            (XdpMode::Generic, Some("xdp_generic")),
            (XdpMode::Native, Some("xdp_native")),
            (XdpMode::Native, Some("xdp_native")),
            (XdpMode::Auto, None),
            (XdpMode::Generic, Some("xdp_generic")),
            (XdpMode::Off, None),
        ] {
            bench.config.xdp = mode;
            let mut dataplane = bench.open();
            dataplane.attach(&interface("up0", Role::Uplink)).expect("attached");
            let links = bench.links();
            let xdp: Vec<_> = links.iter().filter(|link| link.contains("_xdp_")).cloned().collect();
            assert_eq!(xdp, pin.map(|pin| format!("{index}_{pin}")).into_iter().collect::<Vec<_>>(), "{mode:?}");
            let element = bench.view().interfaces().expect("a dump")[0].1;
            assert_eq!(element.flags & flags::XDP != 0, pin.is_some());
        }
        // A physical uplink without native XDP is no error in mode auto.
        run("ip link add br0 type bridge");
        bench.config.xdp = XdpMode::Auto;
        let mut dataplane = bench.open();
        let mut bridge = interface("br0", Role::Uplink);
        bridge.physical = true;
        dataplane.attach(&bridge).expect("attached");
        drop(dataplane);
        bench.config.xdp = XdpMode::Native;
        let error = bench.open().attach(&bridge).expect_err("a bridge has no native XDP");
        assert!(error.to_string().contains("uplink_xdp"), "{error}");
    });
}

/// Filters of another tool would vanish with ours, or keep them from being found.
#[test]
fn filters_of_others_stay_where_they_are_on_a_kernel_without_tcx() {
    in_namespace(|| {
        let bench = Bench::new();
        run("ip link add pod0 type veth peer name peer0");
        let old_kernel = Features { tcx: false, ..Features::detect() };
        let mut dataplane = Dataplane::open_with(&bench.config, old_kernel).expect("opened");
        // Any program will do for another tool's.
        let shelf =
            std::fs::read_dir(bench.pin("programs")).expect("a folder").next().expect("a shelf").expect("an entry");
        let program = shelf.path().join("uplink_egress");
        run("tc qdisc add dev pod0 clsact");
        for hook in ["ingress", "egress"] {
            for priority in [1, 60_000] {
                let filter = format!("bpf direct-action object-pinned {}", program.display());
                run(&format!("tc filter add dev pod0 {hook} prio {priority} {filter}"));
            }
        }
        // Filters of others, and ours.
        let filters = || {
            let shown = ["ingress", "egress"].map(|hook| output(&format!("tc filter show dev pod0 {hook}")));
            let all = shown.iter().flat_map(|text| text.lines()).filter(|line| line.contains("direct-action"));
            let (others, ours): (Vec<&str>, Vec<&str>) =
                all.partition(|line| line.contains("pref 1 ") || line.contains("pref 60000 "));
            (others.len(), ours.len())
        };
        assert_eq!(filters(), (4, 0));
        dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
        dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
        assert_eq!(filters(), (4, 2));
        run("tc filter del dev pod0 ingress prio 1");
        assert_eq!(filters(), (3, 2), "ours stay when theirs go");
        dataplane.detach(interface_index("pod0")).expect("detached");
        assert_eq!(filters(), (3, 0));
    });
}

#[test]
fn a_kernel_without_tcx_gets_filters_that_a_restart_replaces_and_a_cleanup_removes() {
    in_namespace(|| {
        let bench = Bench::new();
        run("ip link add pod0 index 55 type veth peer name peer0");
        let old_kernel = Features { tcx: false, ..Features::detect() };
        let filters = |hook: &str| output(&format!("tc filter show dev pod0 {hook}")).matches("direct-action").count();
        for _ in 0..3 {
            let mut dataplane = Dataplane::open_with(&bench.config, old_kernel).expect("opened");
            dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
            assert_eq!((filters("ingress"), filters("egress")), (1, 1));
            drop(dataplane);
            assert_eq!((filters("ingress"), filters("egress")), (1, 1), "they outlive the process");
        }
        insert_flow(&bench, "conntrack4", 55, 1);
        let mut dataplane = Dataplane::open_with(&bench.config, old_kernel).expect("opened");
        dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
        assert_eq!(bench.view().conntrack4().expect("a dump").len(), 1, "a live interface keeps its flows");
        run("ip link del pod0");
        run("ip link add pod0 index 55 type veth peer name peer0");
        dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
        assert_eq!(bench.view().conntrack4().expect("a dump").len(), 0, "a new one has none of the old flows");
        dataplane.detach(55).expect("detached");
        assert_eq!((filters("ingress"), filters("egress")), (0, 0));
        dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
        drop(dataplane);
        sheave::dataplane::cleanup(&bench.config.pin_path).expect("cleaned up");
        assert_eq!((filters("ingress"), filters("egress")), (0, 0));
    });
}
