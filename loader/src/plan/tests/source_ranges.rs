//! Who may use guarded frontends while lists of clients change, write by write.

use super::*;

/// Networks around [`clients`], of both families; often with overlaps, sometimes none.
pub(super) fn some(random: &mut Random) -> BTreeSet<Network> {
    let texts =
        ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "10.2.0.0/16", "::/0", "fd00::/64", "fd00::1/128"];
    (0..random.below(4)).map(|_| network(texts[random.below(texts.len())])).collect()
}

fn network(text: &str) -> Network {
    let (address, length) = text.split_once('/').expect("a network");
    Network::new(address.parse().expect("an address"), length.parse().expect("a length")).expect("a network")
}

fn networks(texts: &[&str]) -> BTreeSet<Network> {
    texts.iter().map(|text| network(text)).collect()
}

fn clients() -> [IpAddr; 6] {
    ["10.1.2.3", "10.1.9.9", "10.2.0.1", "192.0.2.1", "fd00::1", "fd01::1"]
        .map(|text| text.parse().expect("an address"))
}

impl Maps {
    /// What the programs decide: a client may use a frontend that is there and, if it is guarded, lets that client in.
    fn admits(&self, address: &FrontendAddress, client: IpAddr) -> bool {
        let Some(frontend) = self.frontends.get(address) else { return false };
        let ranges = self.source_ranges_of(frontend.service_id);
        let length = |range: &Network| Network::new(client, range.length());
        frontend.flags & SOURCE_RANGES == 0 || ranges.iter().any(|range| length(range).as_ref() == Some(range))
    }

    /// Every frontend with every client that it serves.
    fn admitted(&self) -> BTreeSet<(FrontendAddress, IpAddr)> {
        let frontends = self.frontends.keys().filter(|address| !address.is_mark());
        let pairs = frontends.flat_map(|address| clients().map(|client| (*address, client)));
        pairs
            .filter(|(address, client)| address.address.is_ipv4() == client.is_ipv4() && self.admits(address, *client))
            .collect()
    }
}

/// Changes one service port; each write is looked at. Returns the number of writes.
fn change_to(planner: &mut Planner, maps: &mut Maps, port: Option<ServicePort>) -> usize {
    let batch = planner.plan(BTreeMap::from([(name(1), port)]));
    let mut after = maps.clone();
    for operation in &batch.operations {
        after.write(&operation.write);
    }
    let stays =
        |address: &FrontendAddress| maps.frontends.contains_key(address) && after.frontends.contains_key(address);
    let staying: BTreeSet<FrontendAddress> = maps.frontends.keys().copied().filter(stays).collect();
    let (before, after) = (maps.admitted(), after.admitted());
    let always: BTreeSet<_> = before.intersection(&after).copied().collect();
    let sometimes: BTreeSet<_> = before.union(&after).copied().collect();
    let check = |maps: &Maps| {
        let now = maps.admitted();
        assert!(now.is_superset(&always), "a client who may all the time was refused");
        // One that comes or goes has the old list or the new one until the last write of the batch.
        let mut wrongly = now.difference(&sometimes).filter(|(address, _)| staying.contains(address));
        assert_eq!(wrongly.next(), None, "a client who may at no time was let in");
    };
    let mut steps = maps.clone();
    for operation in &batch.operations {
        steps.write(&operation.write);
        check(&steps);
    }
    let written = maps.run(planner, batch);
    let _ = maps.settle(planner);
    check(maps);
    written
}

fn guarded(ranges: &[&str]) -> ServicePort {
    let mut port = one_frontend(80, &[1]);
    port.frontends.values_mut().for_each(|flags| *flags = LOAD_BALANCER | SOURCE_RANGES);
    port.frontends.insert("[fd00::80]:80".parse().expect("an address"), LOAD_BALANCER | SOURCE_RANGES);
    ServicePort { source_ranges: networks(ranges), ..port }
}

#[test]
fn nobody_is_refused_or_let_in_wrongly_while_a_list_changes() {
    let mut maps = Maps::new(100);
    let mut planner = Planner::restore(maps.dump());
    change_to(&mut planner, &mut maps, Some(one_frontend(80, &[1])));
    for ranges in [
        &["10.0.0.0/8"][..],
        &["10.1.0.0/16", "192.0.2.0/24"],
        &["10.1.2.3/32", "fd00::/64"],
        &["0.0.0.0/0", "::/0"],
        &[],
        &["fd00::1/128"],
        &["10.0.0.0/8"],
    ] {
        change_to(&mut planner, &mut maps, Some(guarded(ranges)));
        let kept: BTreeSet<Network> = maps.source_ranges.iter().map(|(_, network)| *network).collect();
        assert_eq!(kept, networks(ranges));
    }
    change_to(&mut planner, &mut maps, Some(one_frontend(80, &[1])));
    assert!(maps.source_ranges.is_empty(), "no longer guarded");
    change_to(&mut planner, &mut maps, Some(guarded(&["10.0.0.0/8"])));
    change_to(&mut planner, &mut maps, None);
    assert!(maps.source_ranges.is_empty() && maps.names.is_empty(), "gone");
}

#[test]
fn any_change_of_a_guarded_service_refuses_and_lets_in_nobody_wrongly() {
    for seed in 1..300 {
        let random = &mut Random::new(seed);
        let mut maps = Maps::new(400);
        let mut planner = Planner::restore(maps.dump());
        for _ in 0..12 {
            let port = (random.below(6) > 0).then(|| service(random));
            change_to(&mut planner, &mut maps, port);
        }
    }
}

#[test]
fn a_list_without_entries_for_a_family_lets_nobody_of_that_family_in() {
    let mut maps = Maps::new(100);
    let mut planner = Planner::restore(maps.dump());
    change_to(&mut planner, &mut maps, Some(guarded(&["fd00::/64"])));
    let admitted: Vec<IpAddr> = maps.admitted().into_iter().map(|(_, client)| client).collect();
    assert_eq!(admitted, ["fd00::1".parse::<IpAddr>().expect("an address")]);
}

#[test]
fn a_changed_entry_costs_one_write_for_each_end() {
    let mut maps = Maps::new(100);
    let mut planner = Planner::restore(maps.dump());
    change_to(&mut planner, &mut maps, Some(guarded(&["10.0.0.0/8", "192.0.2.0/24"])));
    assert_eq!(change_to(&mut planner, &mut maps, Some(guarded(&["10.0.0.0/8", "198.51.100.0/24"]))), 2);
    assert_eq!(change_to(&mut planner, &mut maps, Some(guarded(&["10.0.0.0/8", "198.51.100.0/24"]))), 0);
}

#[test]
fn ranges_of_a_service_that_nobody_knows_any_more_are_removed_at_the_next_start() {
    let mut maps = Maps::new(100);
    maps.source_ranges.insert((7, network("10.0.0.0/8")));
    let mut planner = Planner::restore(maps.dump());
    let desired = BTreeMap::from([(name(1), guarded(&["192.0.2.0/24"]))]);
    let batch = planner.plan_all(desired.clone());
    maps.run(&mut planner, batch);
    assert!(!maps.names.contains_key(&7), "an id with ranges is in use");
    maps.settle(&mut planner);
    assert_tidy(&maps, &desired);
}
