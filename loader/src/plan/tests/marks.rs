//! Marks on addresses.

use super::*;

/// A service port with one frontend of this kind, and as many endpoints.
fn with(port: u16, flags: u32, endpoints: &[u8]) -> Option<ServicePort> {
    let mut service = one_frontend(port, endpoints);
    service.frontends.values_mut().for_each(|all| *all = flags);
    Some(service)
}

fn mark(maps: &Maps) -> (Option<u32>, Option<u32>) {
    let mut marks = maps.frontends.iter().filter(|(key, _)| key.is_mark()).map(|(_, frontend)| frontend.flags);
    (marks.next(), marks.next())
}

#[test]
fn an_address_is_marked_by_the_strongest_of_its_frontends_and_a_nodes_own_address_is_not() {
    let mut maps = Maps::new(100);
    let mut planner = Planner::restore(maps.dump());
    for (first, second, expected) in [
        (with(80, EXTERNAL_IP, &[]), None, Some(SERVICE_ADDRESS)),
        (with(80, EXTERNAL_IP, &[]), with(81, CLUSTER_IP, &[]), Some(WHOLE_ADDRESS)),
        (with(80, NODE_PORT, &[]), with(81, CLUSTER_IP, &[]), Some(WHOLE_ADDRESS)),
        (with(80, LOAD_BALANCER, &[]), with(81, NODE_PORT, &[1]), Some(SERVICE_ADDRESS)),
        (with(80, NODE_PORT, &[]), None, None),
    ] {
        let batch = planner.plan(BTreeMap::from([(name(1), first), (name(2), second)]));
        maps.run(&mut planner, batch);
        assert_eq!(mark(&maps), (expected, None));
    }
}

/// Pings of the address would go unanswered, or be answered for nobody.
#[test]
fn a_mark_says_whether_any_frontend_of_its_address_has_an_endpoint() {
    let mut maps = Maps::new(100);
    let mut planner = Planner::restore(maps.dump());
    for (first, second, expected) in [
        (with(80, CLUSTER_IP, &[]), with(81, CLUSTER_IP, &[]), WHOLE_ADDRESS),
        (with(80, CLUSTER_IP, &[1]), with(81, CLUSTER_IP, &[]), WHOLE_ADDRESS | HAS_ENDPOINT),
        (with(80, CLUSTER_IP, &[1, 2]), with(81, CLUSTER_IP, &[3]), WHOLE_ADDRESS | HAS_ENDPOINT),
        (with(80, CLUSTER_IP, &[]), with(81, CLUSTER_IP, &[3]), WHOLE_ADDRESS | HAS_ENDPOINT),
        (with(80, CLUSTER_IP, &[]), None, WHOLE_ADDRESS),
        (with(80, EXTERNAL_IP, &[4]), None, SERVICE_ADDRESS | HAS_ENDPOINT),
    ] {
        let batch = planner.plan(BTreeMap::from([(name(1), first), (name(2), second)]));
        maps.run(&mut planner, batch);
        assert_eq!(mark(&maps), (Some(expected), None));
    }
}

/// The IPv6 address of a Service would answer pings for IPv4 endpoints.
#[test]
fn endpoints_of_one_family_say_nothing_of_addresses_of_the_other() {
    let mut maps = Maps::new(100);
    let mut planner = Planner::restore(maps.dump());
    let mut port = with(80, CLUSTER_IP, &[1]).expect("a service port");
    port.frontends.insert("[fd00::1]:80".parse().expect("an address"), CLUSTER_IP);
    let batch = planner.plan(BTreeMap::from([(name(1), Some(port))]));
    maps.run(&mut planner, batch);
    assert_eq!(mark(&maps), (Some(WHOLE_ADDRESS | HAS_ENDPOINT), Some(WHOLE_ADDRESS)));
}

/// A busy Service would cost a mark for each of its endpoints.
#[test]
fn endpoints_that_come_and_go_leave_the_mark_alone_while_there_is_one() {
    let mut maps = Maps::new(100);
    let mut planner = Planner::restore(maps.dump());
    let marks = |planner: &mut Planner, maps: &mut Maps, endpoints: &[u8]| {
        let batch = planner.plan(BTreeMap::from([(name(1), with(80, CLUSTER_IP, endpoints))]));
        let is_mark = |write: &Write| matches!(write, Write::PutFrontend { address, .. } if address.is_mark());
        let marks = batch.operations.iter().filter(|operation| is_mark(&operation.write)).count();
        maps.run(planner, batch);
        marks
    };
    for (endpoints, expected) in [(&[1][..], 1), (&[1, 2], 0), (&[2, 3, 4], 0), (&[], 1), (&[], 0), (&[5], 1)] {
        assert_eq!(marks(&mut planner, &mut maps, endpoints), expected, "{endpoints:?}");
    }
}

/// The address of a Service would be nobody's because of one port of it that finds no room.
#[test]
fn a_refused_service_port_does_not_keep_the_mark_from_the_others_on_its_address() {
    let mut maps = Maps::new(4);
    let mut planner = Planner::restore(maps.dump());
    let both = [(name(1), with(80, CLUSTER_IP, &[1, 2, 3, 4, 5])), (name(2), with(81, CLUSTER_IP, &[6]))];
    let batch = planner.plan(BTreeMap::from(both));
    assert_eq!(batch.refused.keys().collect::<Vec<_>>(), [&name(1)]);
    let outcome = planner.execute(batch, |write| {
        maps.write(write);
        Ok::<(), std::convert::Infallible>(())
    });
    assert_eq!(outcome.failed.len(), 1);
    assert_eq!(mark(&maps), (Some(WHOLE_ADDRESS | HAS_ENDPOINT), None));
}
