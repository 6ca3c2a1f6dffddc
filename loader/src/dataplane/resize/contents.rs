//! What a map holds, brought into the one of another size that takes its place.

use std::path::Path;

use aya::Pod;
use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::backend::{Backend, TableElement};
use sheave_common::counter::ServiceCounter;
use sheave_common::flow::{Flow, FlowKey, closing};
use sheave_common::frontend::{Frontend, FrontendKey};
use sheave_common::load::Load;
use sheave_common::prefix::{Prefix, SourceRange};
use sheave_common::service_name::ServiceName;
use sheave_common::socket::{SocketKey, SocketPeer};
use sheave_common::{Address, Ipv4Address, Ipv6Address, names};

use super::super::error::MapError;
use super::super::map::Map;
use super::super::views::possible_cpus;

type V4 = Ipv4Address;
type V6 = Ipv6Address;

/// How many elements a map holds that can be full; an array has all of its elements.
pub(super) fn count(name: &'static str, folder: &Path) -> Result<usize, MapError> {
    match name {
        names::FRONTENDS4 => elements::<FrontendKey<V4>, Frontend>(name, folder),
        names::FRONTENDS6 => elements::<FrontendKey<V6>, Frontend>(name, folder),
        names::BACKENDS4 => elements::<u32, Backend<V4>>(name, folder),
        names::BACKENDS6 => elements::<u32, Backend<V6>>(name, folder),
        names::BACKEND_TABLE => Ok(table(folder)?.max_entries() as usize),
        names::BACKEND_LOADS => elements::<u32, Load>(name, folder),
        names::SERVICE_NAMES => elements::<u32, ServiceName>(name, folder),
        names::SOURCE_RANGES4 => elements::<Prefix<SourceRange<V4>>, u32>(name, folder),
        names::SOURCE_RANGES6 => elements::<Prefix<SourceRange<V6>>, u32>(name, folder),
        names::CONNTRACK4 | names::HALF_OPEN4 => elements::<FlowKey<V4>, Flow<V4>>(name, folder),
        names::CONNTRACK6 | names::HALF_OPEN6 => elements::<FlowKey<V6>, Flow<V6>>(name, folder),
        names::AFFINITY4 | names::NEW_AFFINITY4 => elements::<AffinityKey<V4>, Affinity>(name, folder),
        names::AFFINITY6 | names::NEW_AFFINITY6 => elements::<AffinityKey<V6>, Affinity>(name, folder),
        names::SOCK_FORWARD4 | names::SOCK_REVERSE4 => elements::<SocketKey<V4>, SocketPeer<V4>>(name, folder),
        names::SOCK_FORWARD6 | names::SOCK_REVERSE6 => elements::<SocketKey<V6>, SocketPeer<V6>>(name, folder),
        names::SERVICE_COUNTERS => {
            let map: Map<u32, ServiceCounter> = Map::open_per_cpu(folder, name, true, possible_cpus())?;
            Ok(map.max_entries() as usize)
        }
        // No flag sets the size of any other.
        _ => Ok(0),
    }
}

/// Makes a new map, in which nobody writes yet, hold what the old one does.
pub(super) fn copy(name: &'static str, from: &Path, to: &Path) -> Result<(), MapError> {
    match name {
        names::FRONTENDS4 => same::<FrontendKey<V4>, Frontend>(name, from, to),
        names::FRONTENDS6 => same::<FrontendKey<V6>, Frontend>(name, from, to),
        names::BACKENDS4 => same::<u32, Backend<V4>>(name, from, to),
        names::BACKENDS6 => same::<u32, Backend<V6>>(name, from, to),
        names::BACKEND_TABLE => same_array(&table(from)?, name, to),
        names::BACKEND_LOADS => same::<u32, Load>(name, from, to),
        names::SERVICE_NAMES => same::<u32, ServiceName>(name, from, to),
        names::SOURCE_RANGES4 => same::<Prefix<SourceRange<V4>>, u32>(name, from, to),
        names::SOURCE_RANGES6 => same::<Prefix<SourceRange<V6>>, u32>(name, from, to),
        names::CONNTRACK4 | names::HALF_OPEN4 => same_where::<FlowKey<V4>, Flow<V4>>(name, from, to, is_open),
        names::CONNTRACK6 | names::HALF_OPEN6 => same_where::<FlowKey<V6>, Flow<V6>>(name, from, to, is_open),
        names::AFFINITY4 | names::NEW_AFFINITY4 => same::<AffinityKey<V4>, Affinity>(name, from, to),
        names::AFFINITY6 | names::NEW_AFFINITY6 => same::<AffinityKey<V6>, Affinity>(name, from, to),
        names::SOCK_FORWARD4 | names::SOCK_REVERSE4 => same::<SocketKey<V4>, SocketPeer<V4>>(name, from, to),
        names::SOCK_FORWARD6 | names::SOCK_REVERSE6 => same::<SocketKey<V6>, SocketPeer<V6>>(name, from, to),
        names::SERVICE_COUNTERS => same_counters(name, from, to),
        _ => Ok(()),
    }
}

/// Adds to a new map what programs have written to the old one since [`copy`], while others write to the new one.
pub(super) fn catch_up(name: &'static str, from: &Path, to: &Path) -> Result<(), MapError> {
    match name {
        names::CONNTRACK4 | names::HALF_OPEN4 => later::<FlowKey<V4>, Flow<V4>>(name, from, to),
        names::CONNTRACK6 | names::HALF_OPEN6 => later::<FlowKey<V6>, Flow<V6>>(name, from, to),
        names::AFFINITY4 | names::NEW_AFFINITY4 => later::<AffinityKey<V4>, Affinity>(name, from, to),
        names::AFFINITY6 | names::NEW_AFFINITY6 => later::<AffinityKey<V6>, Affinity>(name, from, to),
        names::SOCK_FORWARD4 | names::SOCK_REVERSE4 => later::<SocketKey<V4>, SocketPeer<V4>>(name, from, to),
        names::SOCK_FORWARD6 | names::SOCK_REVERSE6 => later::<SocketKey<V6>, SocketPeer<V6>>(name, from, to),
        // Only the controller writes them, or they are counts, of which those of these milliseconds are lost.
        _ => Ok(()),
    }
}

/// By itself: another version may lack other maps.
fn table(folder: &Path) -> Result<Map<u32, TableElement>, MapError> {
    Map::open(folder, names::BACKEND_TABLE, true)
}

fn elements<K: Pod, V: Pod>(name: &'static str, folder: &Path) -> Result<usize, MapError> {
    Ok(Map::<K, V>::open(folder, name, true)?.dump()?.len())
}

fn same<K: Pod, V: Pod>(name: &'static str, from: &Path, to: &Path) -> Result<(), MapError> {
    same_where::<K, V>(name, from, to, |_| true)
}

/// [`same`] with the values alone that are wanted.
fn same_where<K: Pod, V: Pod>(
    name: &'static str,
    from: &Path,
    to: &Path,
    wanted: fn(&V) -> bool,
) -> Result<(), MapError> {
    let (old, new): (Map<K, V>, Map<K, V>) = (Map::open(from, name, true)?, Map::open(to, name, false)?);
    for (key, _) in new.dump()? {
        if !old.get(&key)?.is_some_and(|value| wanted(&value)) {
            new.delete(&key)?;
        }
    }
    let mut elements = old.dump()?;
    elements.retain(|(_, value)| wanted(value));
    new.put_all(&elements)
}

/// Whether a flow's connection goes on. One that is over would hide a newer one of the same client port, which only the other map
/// knows.
fn is_open<A: Address>(flow: &Flow<A>) -> bool {
    !closing::is_over(flow.closing)
}

fn same_array<V: Pod>(old: &Map<u32, V>, name: &'static str, to: &Path) -> Result<(), MapError> {
    let new: Map<u32, V> = Map::open(to, name, false)?;
    new.put_all(&old.dump()?)
}

fn same_counters(name: &'static str, from: &Path, to: &Path) -> Result<(), MapError> {
    let old: Map<u32, ServiceCounter> = Map::open_per_cpu(from, name, true, possible_cpus())?;
    let new: Map<u32, ServiceCounter> = Map::open_per_cpu(to, name, false, possible_cpus())?;
    let elements = old.dump_wide()?.into_iter();
    let counted = |(_, values): &(u32, Vec<ServiceCounter>)| values.iter().any(|v| *v != ServiceCounter::default());
    elements.filter(counted).try_for_each(|(id, values)| new.put_wide(&id, &values))
}

fn later<K: Pod, V: Written>(name: &'static str, from: &Path, to: &Path) -> Result<(), MapError> {
    let (old, new): (Map<K, V>, Map<K, V>) = (Map::open(from, name, true)?, Map::open(to, name, false)?);
    for (key, value) in old.dump()? {
        match new.get(&key)? {
            None if value.is_wanted() => new.insert(&key, &value)?,
            None => {}
            Some(other) => {
                if let Some(value) = V::later(&value, &other) {
                    new.put(&key, &value)?;
                }
            }
        }
    }
    Ok(())
}

/// A value that programs write.
trait Written: Pod {
    /// Whether the new map needs it, if it has nothing in its place.
    fn is_wanted(&self) -> bool {
        true
    }

    /// What the new map has to hold instead of what it holds, given what the old one does; `None` if nothing.
    fn later(old: &Self, new: &Self) -> Option<Self>;
}

impl<A: Address> Written for Flow<A>
where
    Self: Pod,
{
    fn is_wanted(&self) -> bool {
        is_open(self)
    }

    /// Of one connection, as programs unite what its two halves know; of two, the one that was seen last.
    fn later(old: &Self, new: &Self) -> Option<Self> {
        if old.rewrite != new.rewrite {
            return (old.last_seen > new.last_seen).then_some(*old);
        }
        let united = Self {
            last_seen: new.last_seen.max(old.last_seen),
            state: new.state.max(old.state),
            closing: new.closing | old.closing,
            ..*new
        };
        (united != *new).then_some(united)
    }
}

impl Written for Affinity {
    fn later(old: &Self, new: &Self) -> Option<Self> {
        (old.last_new_connection > new.last_new_connection).then_some(*old)
    }
}

impl<A: Address> Written for SocketPeer<A>
where
    Self: Pod,
{
    /// A socket's choice in the new map is its last one.
    fn later(_: &Self, _: &Self) -> Option<Self> {
        None
    }
}

#[cfg(test)]
mod tests {
    use sheave_common::flow::{Tuple, state};

    use super::*;

    fn flow(port_be: u16, last_seen: u32, state: u8, closing: u8) -> Flow<V4> {
        let address = V4 { octets: [10, 0, 0, 1] };
        let rewrite = Tuple { source: address, destination: address, source_port_be: port_be, destination_port_be: 1 };
        Flow { rewrite, service_id: 1, backend_id: 1, last_seen, state, flags: 0, closing, tried: 0 }
    }

    #[test]
    fn of_a_flow_that_both_maps_hold_nothing_that_either_knows_is_lost() {
        let old = flow(1, 7, state::ESTABLISHED, closing::CLIENT_FIN);
        let new = flow(1, 9, state::ANSWERED, closing::BACKEND_FIN);
        let both = closing::CLIENT_FIN | closing::BACKEND_FIN;
        assert_eq!(Flow::later(&old, &new), Some(flow(1, 9, state::ESTABLISHED, both)));
        assert_eq!(Flow::later(&new, &new), None);
    }

    #[test]
    fn of_two_connections_with_one_tuple_the_last_one_stays() {
        let (first, second) = (flow(1, 7, state::ESTABLISHED, 0), flow(2, 9, state::NEW, 0));
        assert_eq!(Flow::later(&second, &first), Some(second));
        assert_eq!(Flow::later(&first, &second), None);
    }
}
