//! What every pinned map must look like: the loader's half of `ebpf/src/maps.rs`. A pin that differs is never reused.

use aya::Pod;
use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::backend::Backend;
use sheave_common::config::Config;
use sheave_common::counter::{RejectBudget, ServiceCounter};
use sheave_common::drop_reason::DROP_COUNTERS;
use sheave_common::flow::{Flow, FlowKey};
use sheave_common::fragment::{FragmentKey, FragmentPorts};
use sheave_common::frontend::{Frontend, FrontendKey};
use sheave_common::interface::Interface;
use sheave_common::prefix::{Prefix, SourceRange};
use sheave_common::service_name::ServiceName;
use sheave_common::socket::{SocketKey, SocketPeer};
use sheave_common::{Ipv4Address, Ipv6Address, names};

use super::syscall::MapInfo;
use crate::config::MapSizes;

const HASH: u32 = 1;
const ARRAY: u32 = 2;
const PER_CPU_ARRAY: u32 = 6;
const LRU_HASH: u32 = 9;
const LPM_TRIE: u32 = 11;
/// BPF_F_NO_PREALLOC.
const NO_PREALLOC: u32 = 1;
/// Interfaces that programs can be attached to at a time.
const INTERFACES: u32 = 4_096;
/// ServiceCIDRs per family.
const SERVICE_CIDRS: u32 = 256;
/// Fragmented packets under way, per family.
const FRAGMENTS: u32 = 16_384;

/// One map.
#[derive(Clone, Copy, Debug)]
pub(super) struct Definition {
    pub(super) name: &'static str,
    pub(super) map_type: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) flags: u32,
    pub(super) max_entries: u32,
    /// The flag that sets `max_entries`, if one does.
    pub(super) size_flag: Option<&'static str>,
}

impl Definition {
    /// What differs in the kernel's map, in words; `None` if nothing does.
    pub(super) fn difference(&self, info: &MapInfo) -> Option<String> {
        let fields = [
            ("type", info.map_type, self.map_type),
            ("key size", info.key_size, self.key_size),
            ("value size", info.value_size, self.value_size),
            ("flags", info.flags, self.flags),
            ("max_entries", info.max_entries, self.max_entries),
        ];
        let differs = fields.iter().filter(|(_, pinned, expected)| pinned != expected);
        let words: Vec<String> =
            differs.map(|(field, pinned, expected)| format!("{field} is {pinned}, not {expected}")).collect();
        (!words.is_empty()).then(|| words.join(", "))
    }
}

fn define<K: Pod, V: Pod>(
    name: &'static str,
    (map_type, flags): (u32, u32),
    max_entries: u32,
    size_flag: Option<&'static str>,
) -> Definition {
    let size = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
    let (key_size, value_size) = (size(size_of::<K>()), size(size_of::<V>()));
    Definition { name, map_type, key_size, value_size, flags, max_entries, size_flag }
}

/// Every pinned map, with the sizes that were asked for.
pub(super) fn definitions(sizes: &MapSizes) -> Vec<Definition> {
    type V4 = Ipv4Address;
    type V6 = Ipv6Address;
    let (hash, lru, array, per_cpu) = ((HASH, NO_PREALLOC), (LRU_HASH, 0), (ARRAY, 0), (PER_CPU_ARRAY, 0));
    let trie = (LPM_TRIE, NO_PREALLOC);
    let (frontends, backends) = (Some("--max-frontends"), Some("--max-backends"));
    let (services, table) = (Some("--max-services"), Some("--max-table"));
    let (conntrack, half_open) = (Some("--max-conntrack"), Some("--max-half-open"));
    let (affinity, sockets) = (Some("--max-affinity"), Some("--max-sockets"));
    let ranges = Some("--max-source-ranges");
    let drops = u32::try_from(DROP_COUNTERS).unwrap_or(u32::MAX);
    vec![
        define::<u32, Config>(names::CONFIG, array, 1, None),
        define::<FrontendKey<V4>, Frontend>(names::FRONTENDS4, hash, sizes.frontends, frontends),
        define::<FrontendKey<V6>, Frontend>(names::FRONTENDS6, hash, sizes.frontends, frontends),
        define::<u32, Backend<V4>>(names::BACKENDS4, hash, sizes.backends, backends),
        define::<u32, Backend<V6>>(names::BACKENDS6, hash, sizes.backends, backends),
        define::<u32, u32>(names::BACKEND_TABLE, array, sizes.table, table),
        define::<FlowKey<V4>, Flow<V4>>(names::CONNTRACK4, lru, sizes.conntrack, conntrack),
        define::<FlowKey<V6>, Flow<V6>>(names::CONNTRACK6, lru, sizes.conntrack, conntrack),
        define::<FlowKey<V4>, Flow<V4>>(names::HALF_OPEN4, lru, sizes.half_open, half_open),
        define::<FlowKey<V6>, Flow<V6>>(names::HALF_OPEN6, lru, sizes.half_open, half_open),
        define::<AffinityKey<V4>, Affinity>(names::AFFINITY4, lru, sizes.affinity, affinity),
        define::<AffinityKey<V6>, Affinity>(names::AFFINITY6, lru, sizes.affinity, affinity),
        define::<u32, Interface>(names::INTERFACES, hash, INTERFACES, None),
        define::<SocketKey<V4>, SocketPeer<V4>>(names::SOCK_FORWARD4, lru, sizes.sockets, sockets),
        define::<SocketKey<V6>, SocketPeer<V6>>(names::SOCK_FORWARD6, lru, sizes.sockets, sockets),
        define::<SocketKey<V4>, SocketPeer<V4>>(names::SOCK_REVERSE4, lru, sizes.sockets, sockets),
        define::<SocketKey<V6>, SocketPeer<V6>>(names::SOCK_REVERSE6, lru, sizes.sockets, sockets),
        define::<Prefix<SourceRange<V4>>, u32>(names::SOURCE_RANGES4, trie, sizes.source_ranges, ranges),
        define::<Prefix<SourceRange<V6>>, u32>(names::SOURCE_RANGES6, trie, sizes.source_ranges, ranges),
        define::<Prefix<V4>, u32>(names::SERVICE_CIDRS4, trie, SERVICE_CIDRS, None),
        define::<Prefix<V6>, u32>(names::SERVICE_CIDRS6, trie, SERVICE_CIDRS, None),
        define::<FragmentKey<V4>, FragmentPorts>(names::FRAGMENTS4, lru, FRAGMENTS, None),
        define::<FragmentKey<V6>, FragmentPorts>(names::FRAGMENTS6, lru, FRAGMENTS, None),
        define::<u32, ServiceName>(names::SERVICE_NAMES, hash, sizes.services, services),
        define::<u32, ServiceCounter>(names::SERVICE_COUNTERS, per_cpu, sizes.services, services),
        define::<u32, u64>(names::DROP_COUNTERS, per_cpu, drops, None),
        define::<u32, RejectBudget>(names::REJECT_BUDGET, per_cpu, 1, None),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pinned_map_has_a_definition() {
        let defined: Vec<_> = definitions(&MapSizes::default()).iter().map(|definition| definition.name).collect();
        assert_eq!(defined, names::MAPS);
    }

    #[test]
    fn a_difference_names_the_field_and_both_values() {
        let definition = definitions(&MapSizes::default())[0];
        let mut info = MapInfo {
            map_type: definition.map_type,
            id: 1,
            key_size: definition.key_size,
            value_size: definition.value_size,
            max_entries: definition.max_entries,
            flags: definition.flags,
        };
        assert_eq!(definition.difference(&info), None);
        info.value_size += 8;
        assert_eq!(definition.difference(&info).as_deref(), Some("value size is 112, not 104"));
    }
}
