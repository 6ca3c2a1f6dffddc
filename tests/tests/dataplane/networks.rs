//! Source ranges and ServiceCIDRs in the kernel's tries.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use sheave::dataplane::{Dataplane, PinnedMaps};
use sheave::model::desired::ServicePort;
use sheave::model::network::Network;
use sheave_common::config::flags::{SERVICE_CIDRS4, SERVICE_CIDRS6};
use sheave_common::frontend::flags::{LOAD_BALANCER, SOURCE_RANGES};

use crate::bench::{Bench, in_namespace, name, service};

fn networks(texts: &[&str]) -> BTreeSet<Network> {
    let network = |text: &&str| {
        let (address, length) = text.split_once('/').expect("a network");
        Network::new(address.parse().expect("an address"), length.parse().expect("a length")).expect("a network")
    };
    texts.iter().map(network).collect()
}

fn guarded(host: u8, ranges: &[&str]) -> ServicePort {
    let address = SocketAddr::from(([192, 0, 2, host], 80));
    let frontends = BTreeMap::from([(address, LOAD_BALANCER | SOURCE_RANGES)]);
    ServicePort { frontends, source_ranges: networks(ranges), ..service(host, &[1]) }
}

fn apply(dataplane: &mut Dataplane, port: Option<ServicePort>) {
    let applied = dataplane.apply(BTreeMap::from([(name("web"), port)]));
    assert!(applied.failed.is_empty() && applied.other.is_none(), "{applied:?}");
    if let Some(grace) = dataplane.begin_grace() {
        assert!(dataplane.reclaim(grace).expect("reclaimed").other.is_none());
    }
}

fn ranges(view: &PinnedMaps) -> Vec<BTreeSet<Network>> {
    view.source_ranges().expect("a dump").into_values().collect()
}

#[test]
fn source_ranges_follow_their_service_and_a_restart_writes_none() {
    in_namespace(|| {
        let bench = Bench::new();
        let mut dataplane = bench.open();
        let view = bench.view();
        let wide: &[&str] =
            &["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "::/0", "fd00::/64", "fd00::1/128"];
        for list in [wide, &["10.1.0.0/16"], &[], &["fd00::/64", "192.0.2.0/31"]] {
            apply(&mut dataplane, Some(guarded(1, list)));
            let expected = if list.is_empty() { vec![] } else { vec![networks(list)] };
            assert_eq!(ranges(&view), expected);
        }
        drop(dataplane);
        let mut dataplane = bench.open();
        let before = dataplane.map_writes();
        let applied = dataplane.apply_all(BTreeMap::from([(name("web"), guarded(1, &["fd00::/64", "192.0.2.0/31"]))]));
        assert_eq!((applied.written, dataplane.map_writes()), (0, before));
        apply(&mut dataplane, None);
        assert!(ranges(&view).is_empty());
    });
}

#[test]
fn a_full_map_of_source_ranges_refuses_one_service_and_names_the_map() {
    in_namespace(|| {
        let mut bench = Bench::new();
        bench.config.sizes.source_ranges = Some(2);
        let mut dataplane = bench.open();
        apply(&mut dataplane, Some(guarded(1, &["10.0.0.0/8"])));
        let greedy = guarded(2, &["10.1.0.0/16", "10.2.0.0/16"]);
        let applied = dataplane.apply(BTreeMap::from([(name("greedy"), Some(greedy))]));
        let failure = applied.failed[&name("greedy")].to_string();
        assert!(failure.contains("source_ranges4"), "{failure}");
        assert_eq!(bench.view().frontends4().expect("a dump").iter().filter(|(_, f)| f.service_id != 0).count(), 1);
        let applied = dataplane.apply(BTreeMap::from([(name("greedy"), Some(guarded(2, &["10.1.0.0/16"])))]));
        assert!(applied.failed.is_empty(), "{applied:?}");
        assert_eq!(ranges(&bench.view()), [networks(&["10.0.0.0/8"]), networks(&["10.1.0.0/16"])]);
    });
}

#[test]
fn service_cidrs_are_replaced_and_survive_a_restart_that_does_not_know_them_yet() {
    in_namespace(|| {
        let bench = Bench::new();
        let mut dataplane = bench.open();
        let view = bench.view();
        let flags = || view.config().expect("a read").expect("written").flags & (SERVICE_CIDRS4 | SERVICE_CIDRS6);
        for (cidrs, expected) in [
            (&["10.96.0.0/16"][..], SERVICE_CIDRS4),
            (&["10.96.0.0/16", "10.97.0.0/16", "fd00:96::/112"], SERVICE_CIDRS4 | SERVICE_CIDRS6),
            (&["fd00:96::/112"], SERVICE_CIDRS6),
            (&[], 0),
            (&["10.96.0.0/12"], SERVICE_CIDRS4),
        ] {
            dataplane.set_service_cidrs(&networks(cidrs)).expect("written");
            assert_eq!((view.service_cidrs().expect("a dump"), flags()), (networks(cidrs), expected));
        }
        drop(dataplane);
        let mut dataplane = bench.open();
        assert_eq!(flags(), SERVICE_CIDRS4);
        dataplane.set_service_cidrs(&networks(&["10.96.0.0/12"])).expect("written");
        assert_eq!(dataplane.map_writes(), 0);
    });
}
