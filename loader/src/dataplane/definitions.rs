//! What every pinned map must look like: the loader's half of `ebpf/src/maps.rs`. A pin that differs is never reused.

use std::sync::LazyLock;

use aya::Pod;
use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::backend::{Backend, IDS_PER_ELEMENT, TableElement};
use sheave_common::config::Config;
use sheave_common::counter::{RejectBudget, ServiceCounter};
use sheave_common::drop_reason::DROP_COUNTERS;
use sheave_common::flow::{Flow, FlowKey};
use sheave_common::fragment::{FragmentKey, FragmentPorts};
use sheave_common::frontend::{Frontend, FrontendKey};
use sheave_common::interface::Interface;
use sheave_common::load::Load;
use sheave_common::prefix::{Prefix, SourceRange};
use sheave_common::service_name::ServiceName;
use sheave_common::socket::{SocketKey, SocketPeer};
use sheave_common::{Ipv4Address, Ipv6Address, event, filter, names};

use super::syscall::MapInfo;
use crate::config::MapSizes;

const HASH: u32 = 1;
const ARRAY: u32 = 2;
const PER_CPU_ARRAY: u32 = 6;
const LRU_HASH: u32 = 9;
const LPM_TRIE: u32 = 11;
const RING_BUFFER: u32 = 27;
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
    /// `max_entries` is a default: a map that is pinned may have another.
    is_default: bool,
    /// The map takes the place of a pinned one of another size ([`super::resize`]).
    pub(super) resized: bool,
}

/// Maximum entries of a map.
#[derive(Clone, Copy)]
enum Size {
    Fixed(u32),
    /// By a flag, or else as the machine's memory allows: with much of it, the last number.
    Flag(&'static str, Option<u32>, u32),
}

impl Definition {
    /// Takes the size of the kernel's map over, unless a flag says another.
    pub(super) const fn adopt(&mut self, info: &MapInfo) {
        if self.is_default {
            self.max_entries = info.max_entries;
        }
    }

    /// Whether the kernel's map has another size than a flag asks for now.
    pub(super) const fn is_resized(&self, info: &MapInfo) -> bool {
        self.size_flag.is_some() && self.max_entries != info.max_entries
    }

    /// How many of what the flag counts are in one element: backend ids in the backend table.
    pub(super) fn flag_unit(&self) -> u32 {
        if self.name == names::BACKEND_TABLE { IDS_PER_ELEMENT } else { 1 }
    }

    /// What differs in the kernel's map, in words, but for a size that a flag sets; `None` if nothing does.
    pub(super) fn difference(&self, info: &MapInfo) -> Option<String> {
        let fields = [
            ("type", info.map_type, self.map_type),
            ("key size", info.key_size, self.key_size),
            ("value size", info.value_size, self.value_size),
            ("flags", info.flags, self.flags),
            ("max_entries", info.max_entries, self.max_entries),
        ];
        let fields = &fields[..if self.size_flag.is_some() { fields.len() - 1 } else { fields.len() }];
        let differs = fields.iter().filter(|(_, pinned, expected)| pinned != expected);
        let words: Vec<String> =
            differs.map(|(field, pinned, expected)| format!("{field} is {pinned}, not {expected}")).collect();
        (!words.is_empty()).then(|| words.join(", "))
    }
}

fn define<K: Pod, V: Pod>(name: &'static str, (map_type, flags): (u32, u32), entries: Size) -> Definition {
    let (key_size, value_size) = (most(size_of::<K>()), most(size_of::<V>()));
    let (max_entries, size_flag, is_default) = match entries {
        Size::Fixed(entries) => (entries, None, false),
        Size::Flag(flag, Some(given), _) => (given, Some(flag), false),
        Size::Flag(flag, None, most) => (scaled(most, memory()), Some(flag), true),
    };
    Definition { name, map_type, key_size, value_size, flags, max_entries, size_flag, is_default, resized: false }
}

/// A ring buffer of so many octets: it has neither keys nor values.
fn ring_buffer(name: &'static str, octets: usize) -> Definition {
    let (key_size, value_size, size_flag, is_default) = (0, 0, None, false);
    Definition {
        name,
        map_type: RING_BUFFER,
        key_size,
        value_size,
        flags: 0,
        max_entries: most(octets),
        size_flag,
        resized: false,
        is_default,
    }
}

fn most(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// A default size on a machine with this much memory: all with what an 8 GiB machine's kernel leaves, and half for each
/// halving. A full map costs work, a large one only memory.
fn scaled(most: u32, memory: u64) -> u32 {
    const PLENTY: u64 = 7 << 30;
    const SMALLEST: u64 = 16;
    let part = PLENTY.div_ceil(memory.max(1)).next_power_of_two().min(SMALLEST);
    most / u32::try_from(part).unwrap_or(1)
}

/// This machine's memory in bytes; if nobody says, plenty.
fn memory() -> u64 {
    static MEMORY: LazyLock<Option<u64>> = LazyLock::new(|| {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        Some(total.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
    });
    MEMORY.unwrap_or(u64::MAX)
}

/// Every pinned map, with the sizes that were asked for.
pub(super) fn definitions(sizes: &MapSizes) -> Vec<Definition> {
    type V4 = Ipv4Address;
    type V6 = Ipv6Address;
    let (hash, lru, array, per_cpu) = ((HASH, NO_PREALLOC), (LRU_HASH, 0), (ARRAY, 0), (PER_CPU_ARRAY, 0));
    let trie = (LPM_TRIE, NO_PREALLOC);
    let frontends = Size::Flag("--max-frontends", sizes.frontends, 131_072);
    let backends = Size::Flag("--max-backends", sizes.backends, 131_072);
    let services = Size::Flag("--max-services", sizes.services, 65_536);
    let ids = sizes.table.map(|ids| ids.div_ceil(IDS_PER_ELEMENT));
    let table = Size::Flag("--max-table", ids, 524_288 / IDS_PER_ELEMENT);
    let conntrack = Size::Flag("--max-conntrack", sizes.conntrack, 524_288);
    let half_open = Size::Flag("--max-half-open", sizes.half_open, 131_072);
    let affinity = Size::Flag("--max-affinity", sizes.affinity, 65_536);
    let sockets = Size::Flag("--max-sockets", sizes.sockets, 65_536);
    let ranges = Size::Flag("--max-source-ranges", sizes.source_ranges, 65_536);
    let drops = most(DROP_COUNTERS);
    vec![
        define::<u32, Config>(names::CONFIG, array, Size::Fixed(1)),
        define::<FrontendKey<V4>, Frontend>(names::FRONTENDS4, hash, frontends),
        define::<FrontendKey<V6>, Frontend>(names::FRONTENDS6, hash, frontends),
        define::<u32, Backend<V4>>(names::BACKENDS4, hash, backends),
        define::<u32, Backend<V6>>(names::BACKENDS6, hash, backends),
        define::<u32, TableElement>(names::BACKEND_TABLE, array, table),
        define::<u32, Load>(names::BACKEND_LOADS, hash, backends),
        define::<FlowKey<V4>, Flow<V4>>(names::CONNTRACK4, lru, conntrack),
        define::<FlowKey<V6>, Flow<V6>>(names::CONNTRACK6, lru, conntrack),
        define::<FlowKey<V4>, Flow<V4>>(names::HALF_OPEN4, lru, half_open),
        define::<FlowKey<V6>, Flow<V6>>(names::HALF_OPEN6, lru, half_open),
        define::<AffinityKey<V4>, Affinity>(names::AFFINITY4, lru, affinity),
        define::<AffinityKey<V6>, Affinity>(names::AFFINITY6, lru, affinity),
        define::<AffinityKey<V4>, Affinity>(names::NEW_AFFINITY4, lru, affinity),
        define::<AffinityKey<V6>, Affinity>(names::NEW_AFFINITY6, lru, affinity),
        define::<u32, Interface>(names::INTERFACES, hash, Size::Fixed(INTERFACES)),
        define::<SocketKey<V4>, SocketPeer<V4>>(names::SOCK_FORWARD4, lru, sockets),
        define::<SocketKey<V6>, SocketPeer<V6>>(names::SOCK_FORWARD6, lru, sockets),
        define::<SocketKey<V4>, SocketPeer<V4>>(names::SOCK_REVERSE4, lru, sockets),
        define::<SocketKey<V6>, SocketPeer<V6>>(names::SOCK_REVERSE6, lru, sockets),
        define::<Prefix<SourceRange<V4>>, u32>(names::SOURCE_RANGES4, trie, ranges),
        define::<Prefix<SourceRange<V6>>, u32>(names::SOURCE_RANGES6, trie, ranges),
        define::<Prefix<V4>, u32>(names::SERVICE_CIDRS4, trie, Size::Fixed(SERVICE_CIDRS)),
        define::<Prefix<V6>, u32>(names::SERVICE_CIDRS6, trie, Size::Fixed(SERVICE_CIDRS)),
        define::<FragmentKey<V4>, FragmentPorts>(names::FRAGMENTS4, lru, Size::Fixed(FRAGMENTS)),
        define::<FragmentKey<V6>, FragmentPorts>(names::FRAGMENTS6, lru, Size::Fixed(FRAGMENTS)),
        define::<u32, ServiceName>(names::SERVICE_NAMES, hash, services),
        define::<u32, ServiceCounter>(names::SERVICE_COUNTERS, per_cpu, services),
        define::<u32, u64>(names::DROP_COUNTERS, per_cpu, Size::Fixed(drops)),
        define::<u32, RejectBudget>(names::REJECT_BUDGET, per_cpu, Size::Fixed(1)),
        define::<u32, u32>(names::DESTINATIONS, array, Size::Fixed(filter::ELEMENTS)),
        define::<u32, u32>(names::SOURCES, array, Size::Fixed(filter::ELEMENTS)),
        ring_buffer(names::EVENTS, event::OCTETS),
        define::<u32, u64>(names::LISTENER, array, Size::Fixed(most(event::LISTENER))),
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
    fn small_machines_get_small_maps_and_a_flag_counts_everywhere() {
        let gigabytes = |number: u64| number * 1_000_000_000;
        for (memory, part) in [(64, 1), (8, 1), (4, 2), (2, 4), (1, 8)] {
            assert_eq!(scaled(65_536, gigabytes(memory)), 65_536 / part, "{memory} GB");
        }
        assert_eq!((scaled(65_536, 1), scaled(65_536, u64::MAX)), (4_096, 65_536));
        let sizes = MapSizes { services: Some(77), ..MapSizes::default() };
        let names = definitions(&sizes).into_iter().find(|definition| definition.name == names::SERVICE_NAMES);
        assert_eq!(names.map(|names| names.max_entries), Some(77));
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
        info = MapInfo { value_size: definition.value_size, max_entries: 2, ..info };
        assert_eq!(definition.difference(&info).as_deref(), Some("max_entries is 2, not 1"), "no flag sets it");
        assert!(!definition.is_resized(&info));
    }
}
