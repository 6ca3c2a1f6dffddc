//! The layout of every map's key and value, as `sheave_common` declares them.

use std::collections::BTreeMap;
use std::mem::offset_of;

use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::backend::{Backend, TableElement};
use sheave_common::config::{Config, Timeouts};
use sheave_common::counter::{RejectBudget, ServiceCounter};
use sheave_common::event::Event;
use sheave_common::flow::{Flow, FlowKey, Tuple};
use sheave_common::fragment::{FragmentKey, FragmentPorts};
use sheave_common::frontend::{BackendSet, Frontend, FrontendKey};
use sheave_common::interface::Interface;
use sheave_common::load::Load;
use sheave_common::prefix::{Prefix, SourceRange};
use sheave_common::service_name::ServiceName;
use sheave_common::socket::{SocketKey, SocketPeer};
use sheave_common::{Ipv4Address, Ipv6Address, names};

use crate::btf::Shape;

type V4 = Ipv4Address;
type V6 = Ipv6Address;

/// Key and value of each map, by name.
pub(crate) fn maps() -> BTreeMap<String, (Shape, Shape)> {
    fn row<K: Layout, V: Layout>(name: &str) -> (String, (Shape, Shape)) {
        (name.to_owned(), (K::shape(), V::shape()))
    }
    BTreeMap::from([
        row::<u32, Config>(names::CONFIG),
        row::<FrontendKey<V4>, Frontend>(names::FRONTENDS4),
        row::<FrontendKey<V6>, Frontend>(names::FRONTENDS6),
        row::<u32, Backend<V4>>(names::BACKENDS4),
        row::<u32, Backend<V6>>(names::BACKENDS6),
        row::<u32, TableElement>(names::BACKEND_TABLE),
        row::<u32, Load>(names::BACKEND_LOADS),
        row::<FlowKey<V4>, Flow<V4>>(names::CONNTRACK4),
        row::<FlowKey<V6>, Flow<V6>>(names::CONNTRACK6),
        row::<FlowKey<V4>, Flow<V4>>(names::HALF_OPEN4),
        row::<FlowKey<V6>, Flow<V6>>(names::HALF_OPEN6),
        row::<AffinityKey<V4>, Affinity>(names::AFFINITY4),
        row::<AffinityKey<V6>, Affinity>(names::AFFINITY6),
        row::<AffinityKey<V4>, Affinity>(names::NEW_AFFINITY4),
        row::<AffinityKey<V6>, Affinity>(names::NEW_AFFINITY6),
        row::<u32, Interface>(names::INTERFACES),
        row::<SocketKey<V4>, SocketPeer<V4>>(names::SOCK_FORWARD4),
        row::<SocketKey<V6>, SocketPeer<V6>>(names::SOCK_FORWARD6),
        row::<SocketKey<V4>, SocketPeer<V4>>(names::SOCK_REVERSE4),
        row::<SocketKey<V6>, SocketPeer<V6>>(names::SOCK_REVERSE6),
        row::<Prefix<SourceRange<V4>>, u32>(names::SOURCE_RANGES4),
        row::<Prefix<SourceRange<V6>>, u32>(names::SOURCE_RANGES6),
        row::<Prefix<V4>, u32>(names::SERVICE_CIDRS4),
        row::<Prefix<V6>, u32>(names::SERVICE_CIDRS6),
        row::<FragmentKey<V4>, FragmentPorts>(names::FRAGMENTS4),
        row::<FragmentKey<V6>, FragmentPorts>(names::FRAGMENTS6),
        row::<u32, ServiceName>(names::SERVICE_NAMES),
        row::<u32, ServiceCounter>(names::SERVICE_COUNTERS),
        row::<u32, u64>(names::DROP_COUNTERS),
        row::<u32, [u64; 11]>("routes4"),
        row::<u32, [u64; 11]>("routes6"),
        row::<u32, [u64; 56]>("scratch4"),
        row::<u32, [u64; 56]>("scratch6"),
        row::<u32, RejectBudget>(names::REJECT_BUDGET),
        row::<u32, u32>(names::DESTINATIONS),
        row::<u32, u32>(names::SOURCES),
        row::<(), Event>(names::EVENTS),
        row::<u32, u64>(names::LISTENER),
    ])
}

/// A type whose layout is known here.
trait Layout {
    fn shape() -> Shape;
}

macro_rules! integers {
    ($($integer:ty),+) => {
        $( impl Layout for $integer { fn shape() -> Shape { Shape::Integer(size_of::<$integer>()) } } )+
    };
}

integers!((), u8, u16, u32, u64, i64);

impl<T: Layout, const N: usize> Layout for [T; N] {
    fn shape() -> Shape {
        Shape::Array(Box::new(T::shape()), N)
    }
}

/// The shape of the field that a function projects to.
fn field<S, F: Layout>(_project: fn(&S) -> &F) -> Shape {
    F::shape()
}

macro_rules! layouts {
    ($($type:ty { $($field:ident),+ };)+) => {
        $(
            impl Layout for $type {
                fn shape() -> Shape {
                    Shape::Struct(size_of::<$type>(), vec![
                        $( (stringify!($field).to_owned(), offset_of!($type, $field), field(|value: &$type| &value.$field)), )+
                    ])
                }
            }
        )+
    };
}

layouts! {
    V4 { octets };
    V6 { octets };
    AffinityKey<V4> { service_id, edge, client };
    AffinityKey<V6> { service_id, edge, client };
    Affinity { backend_id, last_new_connection };
    Backend<V4> { version, service_id, address, port_be, weight, flags, reserved };
    Backend<V6> { version, service_id, address, port_be, weight, flags, reserved };
    Config {
        next_version, host_netns_cookie, layout_version, next_backend_id, next_service_id, flags, timeouts,
        snat_port_first, snat_port_last, rejects_per_second, hairpin4, hairpin6, node4, node6
    };
    Timeouts { syn, established, closing, reset, udp_new, udp_established };
    ServiceCounter { connections, packets, bytes };
    RejectBudget { second, sent };
    Load { connections };
    Tuple<V4> { source, destination, source_port_be, destination_port_be };
    Tuple<V6> { source, destination, source_port_be, destination_port_be };
    FlowKey<V4> { tuple, edge, protocol, reserved };
    FlowKey<V6> { tuple, edge, protocol, reserved };
    Flow<V4> { rewrite, service_id, backend_id, last_seen, state, flags, closing, tried };
    Flow<V6> { rewrite, service_id, backend_id, last_seen, state, flags, closing, tried };
    BackendSet { first, length };
    Event {
        source, destination, rewritten_source, rewritten_destination, source_port_be, destination_port_be,
        rewritten_source_port_be, rewritten_destination_port_be, service_id, backend_id, edge, kind, family, protocol,
        reason, flags, reserved
    };
    FrontendKey<V4> { address, port_be, protocol, reserved };
    FrontendKey<V6> { address, port_be, protocol, reserved };
    Frontend { version, service_id, flags, cluster, local, affinity_seconds, algorithm };
    Prefix<SourceRange<V4>> { prefix_len, data };
    Prefix<SourceRange<V6>> { prefix_len, data };
    Prefix<V4> { prefix_len, data };
    Prefix<V6> { prefix_len, data };
    SourceRange<V4> { service_id, address };
    SourceRange<V6> { service_id, address };
    FragmentKey<V4> { source, destination, identification, edge, protocol, egress, reserved };
    FragmentKey<V6> { source, destination, identification, edge, protocol, egress, reserved };
    FragmentPorts { source_port_be, destination_port_be, seen };
    Interface { source4, source6, flags };
    ServiceName { protocol, length, reserved, text };
    SocketKey<V4> { cookie, address, port_be, protocol, reserved, fill };
    SocketKey<V6> { cookie, address, port_be, protocol, reserved, fill };
    SocketPeer<V4> { address, port_be, reserved, service_id, backend_id };
    SocketPeer<V6> { address, port_be, reserved, service_id, backend_id };
}
