//! Every map. Names, keys and values are `sheave_common`'s; sizes here are defaults that the loader overrides.

use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::macros::btf_map;
use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::backend::{Backend, TableElement};
use sheave_common::config::{Config, flags as config_flags};
use sheave_common::counter::{RejectBudget, ServiceCounter};
use sheave_common::drop_reason::DROP_COUNTERS as DROP_COUNTER_COUNT;
use sheave_common::flow::{Flow, FlowKey};
use sheave_common::fragment::{FragmentKey, FragmentPorts};
use sheave_common::frontend::{Frontend, FrontendKey, flags as frontend_flags};
use sheave_common::interface::Interface;
use sheave_common::load::Load;
use sheave_common::prefix::SourceRange;
use sheave_common::service_name::ServiceName;
use sheave_common::socket::{SocketKey, SocketPeer};
use sheave_common::{Address, Ipv4Address, Ipv6Address, event, filter};

use crate::{route, scratch};

/// BPF_F_NO_PREALLOC: memory as entries come; for maps that only the controller writes.
const NO_PREALLOC: usize = 1;

const SERVICES: usize = 65_536;
const FRONTENDS: usize = 131_072;
const BACKENDS: usize = 262_144;
const TABLE: usize = 262_144;
const CONNTRACK: usize = 524_288;
const HALF_OPEN: usize = 131_072;
const AFFINITY: usize = 65_536;
const SOCKETS: usize = 65_536;
const SOURCE_RANGES: usize = 65_536;
const SERVICE_CIDRS: usize = 256;
const FRAGMENTS: usize = 16_384;
const INTERFACES: usize = 4_096;

macro_rules! maps {
    ($($name:ident = $export:literal : $type:ty;)+) => {
        $(
            #[btf_map(name = $export)]
            pub static $name: $type = <$type>::new();
        )+
    };
}

maps! {
    CONFIG = "config": Array<Config, 1>;
    FRONTENDS4 = "frontends4": HashMap<FrontendKey<Ipv4Address>, Frontend, FRONTENDS, NO_PREALLOC>;
    FRONTENDS6 = "frontends6": HashMap<FrontendKey<Ipv6Address>, Frontend, FRONTENDS, NO_PREALLOC>;
    BACKENDS4 = "backends4": HashMap<u32, Backend<Ipv4Address>, BACKENDS, NO_PREALLOC>;
    BACKENDS6 = "backends6": HashMap<u32, Backend<Ipv6Address>, BACKENDS, NO_PREALLOC>;
    BACKEND_TABLE = "backend_table": Array<TableElement, TABLE>;
    BACKEND_LOADS = "backend_loads": HashMap<u32, Load, BACKENDS, NO_PREALLOC>;
    CONNTRACK4 = "conntrack4": LruHashMap<FlowKey<Ipv4Address>, Flow<Ipv4Address>, CONNTRACK>;
    CONNTRACK6 = "conntrack6": LruHashMap<FlowKey<Ipv6Address>, Flow<Ipv6Address>, CONNTRACK>;
    HALF_OPEN4 = "half_open4": LruHashMap<FlowKey<Ipv4Address>, Flow<Ipv4Address>, HALF_OPEN>;
    HALF_OPEN6 = "half_open6": LruHashMap<FlowKey<Ipv6Address>, Flow<Ipv6Address>, HALF_OPEN>;
    AFFINITY4 = "affinity4": LruHashMap<AffinityKey<Ipv4Address>, Affinity, AFFINITY>;
    AFFINITY6 = "affinity6": LruHashMap<AffinityKey<Ipv6Address>, Affinity, AFFINITY>;
    NEW_AFFINITY4 = "new_affinity4": LruHashMap<AffinityKey<Ipv4Address>, Affinity, AFFINITY>;
    NEW_AFFINITY6 = "new_affinity6": LruHashMap<AffinityKey<Ipv6Address>, Affinity, AFFINITY>;
    INTERFACES_MAP = "interfaces": HashMap<u32, Interface, INTERFACES, NO_PREALLOC>;
    SOCK_FORWARD4 = "sock_forward4": LruHashMap<SocketKey<Ipv4Address>, SocketPeer<Ipv4Address>, SOCKETS>;
    SOCK_FORWARD6 = "sock_forward6": LruHashMap<SocketKey<Ipv6Address>, SocketPeer<Ipv6Address>, SOCKETS>;
    SOCK_REVERSE4 = "sock_reverse4": LruHashMap<SocketKey<Ipv4Address>, SocketPeer<Ipv4Address>, SOCKETS>;
    SOCK_REVERSE6 = "sock_reverse6": LruHashMap<SocketKey<Ipv6Address>, SocketPeer<Ipv6Address>, SOCKETS>;
    SOURCE_RANGES4 = "source_ranges4": LpmTrie<SourceRange<Ipv4Address>, u32, SOURCE_RANGES>;
    SOURCE_RANGES6 = "source_ranges6": LpmTrie<SourceRange<Ipv6Address>, u32, SOURCE_RANGES>;
    SERVICE_CIDRS4 = "service_cidrs4": LpmTrie<Ipv4Address, u32, SERVICE_CIDRS>;
    SERVICE_CIDRS6 = "service_cidrs6": LpmTrie<Ipv6Address, u32, SERVICE_CIDRS>;
    FRAGMENTS4 = "fragments4": LruHashMap<FragmentKey<Ipv4Address>, FragmentPorts, FRAGMENTS>;
    FRAGMENTS6 = "fragments6": LruHashMap<FragmentKey<Ipv6Address>, FragmentPorts, FRAGMENTS>;
    SERVICE_NAMES = "service_names": HashMap<u32, ServiceName, SERVICES, NO_PREALLOC>;
    SERVICE_COUNTERS = "service_counters": PerCpuArray<ServiceCounter, SERVICES>;
    DROP_COUNTERS = "drop_counters": PerCpuArray<u64, DROP_COUNTER_COUNT>;
    SCRATCH4 = "scratch4": PerCpuArray<[u64; scratch::WORDS], 1>;
    SCRATCH6 = "scratch6": PerCpuArray<[u64; scratch::WORDS], 1>;
    ROUTES4 = "routes4": PerCpuArray<[u64; route::WORDS], { route::ROUTES }>;
    ROUTES6 = "routes6": PerCpuArray<[u64; route::WORDS], { route::ROUTES }>;
    DESTINATIONS = "destinations": Array<u32, { filter::ELEMENTS as usize }>;
    SOURCES = "sources": Array<u32, { filter::ELEMENTS as usize }>;
    REJECT_BUDGET = "reject_budget": PerCpuArray<RejectBudget, 1>;
    EVENTS = "events": RingBuf<event::Event, { event::OCTETS }>;
    LISTENER = "listener": Array<u64, { event::LISTENER }>;
}

/// Which of the two maps of flows, or of clients.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// `conntrack4/6`, `affinity4/6`
    Established,
    /// `half_open4/6`, `new_affinity4/6`
    HalfOpen,
}

/// An address family's maps behind one set of names, so that everything above is written once.
pub trait Family: Address {
    /// A frontend's element.
    fn frontend(key: &FrontendKey<Self>) -> Option<*const Frontend>;
    /// A backend's element.
    fn backend(id: u32) -> Option<*const Backend<Self>>;
    /// A flow's element.
    fn flow(table: Table, key: &FlowKey<Self>) -> Option<*mut Flow<Self>>;
    /// Inserts a flow; `flags` are the kernel's BPF_ANY or BPF_NOEXIST.
    fn insert_flow(table: Table, key: &FlowKey<Self>, flow: &Flow<Self>, flags: u64) -> Result<(), i32>;
    /// Removes a flow, if it is there.
    fn remove_flow(table: Table, key: &FlowKey<Self>);
    /// A client's affinity.
    fn affinity(table: Table, key: &AffinityKey<Self>) -> Option<*const Affinity>;
    /// Remembers a client's backend; `flags` are the kernel's BPF_ANY, BPF_NOEXIST or BPF_EXIST.
    fn insert_affinity(table: Table, key: &AffinityKey<Self>, affinity: &Affinity, flags: u64) -> Result<(), i32>;
    /// Forgets it, if it is there.
    fn remove_affinity(table: Table, key: &AffinityKey<Self>);
    /// What an unconnected socket chose for a frontend.
    fn socket_backend(key: &SocketKey<Self>) -> Option<*const SocketPeer<Self>>;
    /// Remembers that.
    fn insert_socket_backend(key: &SocketKey<Self>, peer: &SocketPeer<Self>) -> Result<(), i32>;
    /// Which frontend a socket's backend stands for.
    fn socket_frontend(key: &SocketKey<Self>) -> Option<*const SocketPeer<Self>>;
    /// Remembers that.
    fn insert_socket_frontend(key: &SocketKey<Self>, peer: &SocketPeer<Self>) -> Result<(), i32>;
    /// Whether a client may use a service port's load-balancer IPs.
    fn in_source_ranges(service_id: u32, client: Self) -> bool;
    /// Whether an address lies inside a ServiceCIDR.
    fn in_service_cidr(config: &Config, address: Self) -> bool;
    /// The ports of a fragmented packet.
    fn fragment(key: &FragmentKey<Self>) -> Option<*const FragmentPorts>;
    /// Remembers them.
    fn insert_fragment(key: &FragmentKey<Self>, ports: &FragmentPorts) -> Result<(), i32>;
    /// This CPU's [`crate::scratch::Scratch`].
    fn scratch() -> Option<*mut [u64; scratch::WORDS]>;
    /// A place of this CPU for a [`crate::route::Route`].
    fn route(place: u32) -> Option<*mut [u64; route::WORDS]>;
    /// The source of hairpin packets.
    fn hairpin(config: &Config) -> Self;
    /// This node's own address: the affinity key of its processes.
    fn node(config: &Config) -> Self;
    /// The SNAT source of an interface.
    fn source(interface: &Interface) -> Self;
}

/// BPF_ANY: insert or replace.
pub const ANY: u64 = 0;
/// BPF_NOEXIST: insert only if absent.
pub const NOEXIST: u64 = 1;
/// BPF_EXIST: replace only.
pub const EXIST: u64 = 2;

/// A method of one of a table's two maps.
macro_rules! of_table {
    ($table:expr, $established:ident, $half_open:ident, $method:ident($($argument:expr),+)) => {
        match $table {
            Table::Established => $established.$method($($argument),+),
            Table::HalfOpen => $half_open.$method($($argument),+),
        }
    };
}

macro_rules! family {
    ($address:ty, $frontends:ident, $backends:ident, $conntrack:ident, $half_open:ident, $affinity:ident,
     $new_affinity:ident, $sock_forward:ident, $sock_reverse:ident, $source_ranges:ident, $service_cidrs:ident, $fragments:ident,
     $scratch:ident, $routes:ident, $hairpin:ident, $node:ident, $source:ident) => {
        impl Family for $address {
            #[inline(always)]
            fn frontend(key: &FrontendKey<Self>) -> Option<*const Frontend> {
                $frontends.get_ptr(key)
            }

            #[inline(always)]
            fn backend(id: u32) -> Option<*const Backend<Self>> {
                $backends.get_ptr(id)
            }

            #[inline(always)]
            fn flow(table: Table, key: &FlowKey<Self>) -> Option<*mut Flow<Self>> {
                of_table!(table, $conntrack, $half_open, get_ptr_mut(key))
            }

            #[inline(always)]
            fn insert_flow(table: Table, key: &FlowKey<Self>, flow: &Flow<Self>, flags: u64) -> Result<(), i32> {
                of_table!(table, $conntrack, $half_open, insert(key, flow, flags))
            }

            #[inline(always)]
            fn remove_flow(table: Table, key: &FlowKey<Self>) {
                // Removing what another CPU has just removed is no error.
                let _ = of_table!(table, $conntrack, $half_open, remove(key));
            }

            #[inline(always)]
            fn affinity(table: Table, key: &AffinityKey<Self>) -> Option<*const Affinity> {
                of_table!(table, $affinity, $new_affinity, get_ptr(key))
            }

            #[inline(always)]
            fn insert_affinity(
                table: Table,
                key: &AffinityKey<Self>,
                affinity: &Affinity,
                flags: u64,
            ) -> Result<(), i32> {
                of_table!(table, $affinity, $new_affinity, insert(key, affinity, flags))
            }

            #[inline(always)]
            fn remove_affinity(table: Table, key: &AffinityKey<Self>) {
                let _ = of_table!(table, $affinity, $new_affinity, remove(key));
            }

            #[inline(always)]
            fn socket_backend(key: &SocketKey<Self>) -> Option<*const SocketPeer<Self>> {
                $sock_forward.get_ptr(key)
            }

            #[inline(always)]
            fn insert_socket_backend(key: &SocketKey<Self>, peer: &SocketPeer<Self>) -> Result<(), i32> {
                $sock_forward.insert(key, peer, ANY)
            }

            #[inline(always)]
            fn socket_frontend(key: &SocketKey<Self>) -> Option<*const SocketPeer<Self>> {
                $sock_reverse.get_ptr(key)
            }

            #[inline(always)]
            fn insert_socket_frontend(key: &SocketKey<Self>, peer: &SocketPeer<Self>) -> Result<(), i32> {
                $sock_reverse.insert(key, peer, ANY)
            }

            #[inline(always)]
            fn in_source_ranges(service_id: u32, client: Self) -> bool {
                const BITS: u32 = size_of::<SourceRange<$address>>() as u32 * 8;
                $source_ranges.get(&Key::new(BITS, SourceRange { service_id, address: client })).is_some()
            }

            #[inline(always)]
            fn in_service_cidr(config: &Config, address: Self) -> bool {
                const BITS: u32 = size_of::<$address>() as u32 * 8;
                config.flags & config_flags::$service_cidrs != 0
                    && $service_cidrs.get(&Key::new(BITS, address)).is_some()
            }

            #[inline(always)]
            fn fragment(key: &FragmentKey<Self>) -> Option<*const FragmentPorts> {
                $fragments.get_ptr(key)
            }

            #[inline(always)]
            fn insert_fragment(key: &FragmentKey<Self>, ports: &FragmentPorts) -> Result<(), i32> {
                $fragments.insert(key, ports, ANY)
            }

            #[inline(always)]
            fn scratch() -> Option<*mut [u64; scratch::WORDS]> {
                $scratch.get_ptr_mut(0)
            }

            #[inline(always)]
            fn route(place: u32) -> Option<*mut [u64; route::WORDS]> {
                $routes.get_ptr_mut(place)
            }

            #[inline(always)]
            fn hairpin(config: &Config) -> Self {
                config.$hairpin
            }

            #[inline(always)]
            fn node(config: &Config) -> Self {
                config.$node
            }

            #[inline(always)]
            fn source(interface: &Interface) -> Self {
                interface.$source
            }
        }
    };
}

family!(
    Ipv4Address,
    FRONTENDS4,
    BACKENDS4,
    CONNTRACK4,
    HALF_OPEN4,
    AFFINITY4,
    NEW_AFFINITY4,
    SOCK_FORWARD4,
    SOCK_REVERSE4,
    SOURCE_RANGES4,
    SERVICE_CIDRS4,
    FRAGMENTS4,
    SCRATCH4,
    ROUTES4,
    hairpin4,
    node4,
    source4
);
family!(
    Ipv6Address,
    FRONTENDS6,
    BACKENDS6,
    CONNTRACK6,
    HALF_OPEN6,
    AFFINITY6,
    NEW_AFFINITY6,
    SOCK_FORWARD6,
    SOCK_REVERSE6,
    SOURCE_RANGES6,
    SERVICE_CIDRS6,
    FRAGMENTS6,
    SCRATCH6,
    ROUTES6,
    hairpin6,
    node6,
    source6
);

/// The configuration; `None` only if the verifier's view of an array were true.
#[inline(always)]
pub fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

/// The mark on an address: `WHOLE_ADDRESS` or `SERVICE_ADDRESS` of [`frontend_flags`], with `HAS_ENDPOINT`; or 0.
#[inline(always)]
pub fn mark<A: Family>(address: A) -> u32 {
    let flags = A::frontend(&FrontendKey::mark(address))
        // SAFETY: a map value stays readable while the program runs, and one word of it is never torn.
        .map_or(0, |element| unsafe { (&raw const (*element).flags).read_volatile() });
    flags & (frontend_flags::WHOLE_ADDRESS | frontend_flags::SERVICE_ADDRESS | frontend_flags::HAS_ENDPOINT)
}

/// Copies a map value word by word. The element may be evicted, reused or rewritten meanwhile, so it is read exactly once,
/// and what matters of the copy is checked or harmless.
///
/// # Safety
///
/// `element` is a value of one of this object's maps, found in this run of the program; such memory stays readable until
/// the run ends. Map values are 8-byte aligned, made of integers, and a multiple of 4 bytes long.
#[inline(always)]
pub unsafe fn copy<V: Copy>(element: *const V) -> V {
    let mut value = core::mem::MaybeUninit::<V>::uninit();
    for word in 0..size_of::<V>() / 4 {
        // SAFETY: by the caller's promise; both ranges hold this word.
        unsafe {
            value.as_mut_ptr().cast::<u32>().add(word).write(element.cast::<u32>().add(word).read_volatile());
        }
    }
    // SAFETY: every word was written.
    unsafe { value.assume_init() }
}

/// Compares two values word by word: a comparison of octets would be a call.
#[inline(always)]
pub fn same_words<V: Copy>(left: &V, right: &V) -> bool {
    const { assert!(size_of::<V>() % 4 == 0 && align_of::<V>() % 4 == 0) };
    let (left, right) = (core::ptr::from_ref(left).cast::<u32>(), core::ptr::from_ref(right).cast::<u32>());
    // SAFETY: both values hold this word.
    (0..size_of::<V>() / 4).all(|word| unsafe { left.add(word).read() == right.add(word).read() })
}

/// Copies a value word by word, without a value on the way, which would take as much again of the stack.
#[inline(always)]
pub fn copy_words<V: Copy>(from: *const V, to: *mut V) {
    const { assert!(size_of::<V>() % 4 == 0 && align_of::<V>() % 4 == 0) };
    for word in 0..size_of::<V>() / 4 {
        // SAFETY: callers pass pointers to values, which hold this word.
        unsafe { to.cast::<u32>().add(word).write_volatile(from.cast::<u32>().add(word).read_volatile()) };
    }
}
