//! Every map. Names, keys and values are `sheave_common`'s; sizes here are defaults that the loader overrides.

use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, PerCpuArray};
use aya_ebpf::macros::btf_map;
use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::backend::Backend;
use sheave_common::config::Config;
use sheave_common::counter::{RejectBudget, ServiceCounter};
use sheave_common::drop_reason::DROP_COUNTERS as DROP_COUNTER_COUNT;
use sheave_common::flow::{Flow, FlowKey};
use sheave_common::frontend::{Frontend, FrontendKey};
use sheave_common::interface::Interface;
use sheave_common::service_name::ServiceName;
use sheave_common::socket::{SocketKey, SocketPeer};
use sheave_common::{Ipv4Address, Ipv6Address};

/// BPF_F_NO_PREALLOC: memory as entries come; for maps that only the controller writes.
const NO_PREALLOC: usize = 1;

const SERVICES: usize = 65_536;
const FRONTENDS: usize = 131_072;
const BACKENDS: usize = 262_144;
const TABLE: usize = 524_288;
const CONNTRACK: usize = 524_288;
const HALF_OPEN: usize = 131_072;
const AFFINITY: usize = 65_536;
const SOCKETS: usize = 65_536;
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
    BACKEND_TABLE = "backend_table": Array<u32, TABLE>;
    CONNTRACK4 = "conntrack4": LruHashMap<FlowKey<Ipv4Address>, Flow<Ipv4Address>, CONNTRACK>;
    CONNTRACK6 = "conntrack6": LruHashMap<FlowKey<Ipv6Address>, Flow<Ipv6Address>, CONNTRACK>;
    HALF_OPEN4 = "half_open4": LruHashMap<FlowKey<Ipv4Address>, Flow<Ipv4Address>, HALF_OPEN>;
    HALF_OPEN6 = "half_open6": LruHashMap<FlowKey<Ipv6Address>, Flow<Ipv6Address>, HALF_OPEN>;
    AFFINITY4 = "affinity4": LruHashMap<AffinityKey<Ipv4Address>, Affinity, AFFINITY>;
    AFFINITY6 = "affinity6": LruHashMap<AffinityKey<Ipv6Address>, Affinity, AFFINITY>;
    INTERFACES_MAP = "interfaces": HashMap<u32, Interface, INTERFACES, NO_PREALLOC>;
    SOCK_FORWARD4 = "sock_forward4": LruHashMap<SocketKey<Ipv4Address>, SocketPeer<Ipv4Address>, SOCKETS>;
    SOCK_FORWARD6 = "sock_forward6": LruHashMap<SocketKey<Ipv6Address>, SocketPeer<Ipv6Address>, SOCKETS>;
    SOCK_REVERSE4 = "sock_reverse4": LruHashMap<SocketKey<Ipv4Address>, SocketPeer<Ipv4Address>, SOCKETS>;
    SOCK_REVERSE6 = "sock_reverse6": LruHashMap<SocketKey<Ipv6Address>, SocketPeer<Ipv6Address>, SOCKETS>;
    SERVICE_NAMES = "service_names": HashMap<u32, ServiceName, SERVICES, NO_PREALLOC>;
    SERVICE_COUNTERS = "service_counters": PerCpuArray<ServiceCounter, SERVICES>;
    DROP_COUNTERS = "drop_counters": PerCpuArray<u64, DROP_COUNTER_COUNT>;
    REJECT_BUDGET = "reject_budget": PerCpuArray<RejectBudget, 1>;
}
