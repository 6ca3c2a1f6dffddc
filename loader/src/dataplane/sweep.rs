//! Deletes flows and affinity entries of what is gone, before its number is given to something else.

use std::collections::BTreeSet;

use aya::Pod;
use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::config::Timeouts;
use sheave_common::flow::{Flow, FlowKey};
use sheave_common::{Address, PROTOCOL_UDP};

use super::error::MapError;
use super::loads;
use super::map::Map;
use super::maps::{FamilyMaps, Maps};

/// Deletes the flows of these edges. Returns how many there were.
pub(super) fn edges(maps: &Maps, edges: &BTreeSet<u32>) -> Result<usize, MapError> {
    let gone = |edge: u32, _: u32| edges.contains(&edge);
    Ok(flows(&maps.v4, gone)? + flows(&maps.v6, gone)?)
}

/// The service ids among these that connections carry which are still open: those of a Service that is gone go on until they
/// end. Datagrams have none: their flows end with the Service.
pub(super) fn in_use(
    maps: &Maps,
    services: &BTreeSet<u32>,
    timeouts: &Timeouts,
    now: u32,
) -> Result<BTreeSet<u32>, MapError> {
    let mut used = carried(&maps.v4, services, timeouts, now)?;
    used.append(&mut carried(&maps.v6, services, timeouts, now)?);
    Ok(used)
}

fn carried<A: Address>(
    maps: &FamilyMaps<A>,
    services: &BTreeSet<u32>,
    timeouts: &Timeouts,
    now: u32,
) -> Result<BTreeSet<u32>, MapError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let used = |key: &FlowKey<A>, flow: &Flow<A>| {
        let used = key.protocol != PROTOCOL_UDP
            && services.contains(&flow.service_id)
            && loads::is_open(key, flow, timeouts, now);
        used.then_some(flow.service_id)
    };
    let established = maps.conntrack.dump_as(used)?;
    Ok(established.into_iter().chain(maps.half_open.dump_as(used)?).collect())
}

/// Deletes the flows and the affinity entries of these service ids. Returns how many there were.
pub(super) fn services(maps: &Maps, services: &BTreeSet<u32>) -> Result<usize, MapError> {
    let gone = |_: u32, service_id: u32| services.contains(&service_id);
    let flows = flows(&maps.v4, gone)? + flows(&maps.v6, gone)?;
    Ok(flows + affinity(&maps.v4, services)? + affinity(&maps.v6, services)?)
}

/// Deletes every flow. Returns how many there were.
pub(super) fn all_flows(maps: &Maps) -> Result<usize, MapError> {
    Ok(flows(&maps.v4, |_, _| true)? + flows(&maps.v6, |_, _| true)?)
}

/// `gone` is told a flow's edge and service id.
fn flows<A: Address>(maps: &FamilyMaps<A>, gone: impl Fn(u32, u32) -> bool) -> Result<usize, MapError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let gone = |key: &FlowKey<A>, flow: &Flow<A>| gone(key.edge, flow.service_id);
    Ok(delete(&maps.conntrack, gone)? + delete(&maps.half_open, gone)?)
}

fn affinity<A: Address>(maps: &FamilyMaps<A>, services: &BTreeSet<u32>) -> Result<usize, MapError>
where
    AffinityKey<A>: Pod,
{
    let gone = |key: &AffinityKey<A>, _: &Affinity| services.contains(&key.service_id);
    // Newcomers first: one that is established meanwhile is in the other map then.
    Ok(delete(&maps.new_affinity, gone)? + delete(&maps.affinity, gone)?)
}

fn delete<K: Pod, V: Pod>(map: &Map<K, V>, gone: impl Fn(&K, &V) -> bool) -> Result<usize, MapError> {
    let mut deleted = 0;
    for key in map.dump_as(|key, value| gone(key, value).then_some(*key))? {
        deleted += usize::from(map.delete(&key)?);
    }
    Ok(deleted)
}
