//! Names of the maps: in the object file, and of their pins below the pin directory (`--pin-path`).

/// Every pinned map.
pub const MAPS: &[&str] = &[
    CONFIG,
    FRONTENDS4,
    FRONTENDS6,
    BACKENDS4,
    BACKENDS6,
    BACKEND_TABLE,
    BACKEND_LOADS,
    CONNTRACK4,
    CONNTRACK6,
    HALF_OPEN4,
    HALF_OPEN6,
    AFFINITY4,
    AFFINITY6,
    NEW_AFFINITY4,
    NEW_AFFINITY6,
    INTERFACES,
    SOCK_FORWARD4,
    SOCK_FORWARD6,
    SOCK_REVERSE4,
    SOCK_REVERSE6,
    SOURCE_RANGES4,
    SOURCE_RANGES6,
    SERVICE_CIDRS4,
    SERVICE_CIDRS6,
    FRAGMENTS4,
    FRAGMENTS6,
    SERVICE_NAMES,
    SERVICE_COUNTERS,
    DROP_COUNTERS,
    REJECT_BUDGET,
    DESTINATIONS,
    SOURCES,
    EVENTS,
    LISTENER,
];

/// Maps that are not pinned: memory of the programs alone.
pub const PRIVATE: &[&str] = &["routes4", "routes6", "scratch4", "scratch6"];

macro_rules! names {
    ($($constant:ident = $name:literal : $meaning:literal;)+) => {
        $( #[doc = $meaning] pub const $constant: &str = $name; )+
    };
}

names! {
    CONFIG = "config": "0 → [`crate::config::Config`].";
    FRONTENDS4 = "frontends4": "[`crate::frontend::FrontendKey`] → [`crate::frontend::Frontend`], IPv4.";
    FRONTENDS6 = "frontends6": "The same for IPv6.";
    BACKENDS4 = "backends4": "Backend id → [`crate::backend::Backend`], IPv4.";
    BACKENDS6 = "backends6": "The same for IPv6.";
    BACKEND_TABLE = "backend_table": "Index → [`crate::backend::TableElement`].";
    BACKEND_LOADS = "backend_loads": "Backend id → [`crate::load::Load`].";
    CONNTRACK4 = "conntrack4": "[`crate::flow::FlowKey`] → [`crate::flow::Flow`], IPv4.";
    CONNTRACK6 = "conntrack6": "The same for IPv6.";
    HALF_OPEN4 = "half_open4": "Flows that are not established yet ([`crate::flow::state`]), IPv4.";
    HALF_OPEN6 = "half_open6": "The same for IPv6.";
    AFFINITY4 = "affinity4": "[`crate::affinity::AffinityKey`] → [`crate::affinity::Affinity`], IPv4.";
    AFFINITY6 = "affinity6": "The same for IPv6.";
    NEW_AFFINITY4 = "new_affinity4": "The same of clients none of whose connections is established yet, IPv4.";
    NEW_AFFINITY6 = "new_affinity6": "The same for IPv6.";
    INTERFACES = "interfaces": "Interface index → [`crate::interface::Interface`].";
    SOCK_FORWARD4 = "sock_forward4": "Socket and frontend → backend, IPv4.";
    SOCK_FORWARD6 = "sock_forward6": "The same for IPv6.";
    SOCK_REVERSE4 = "sock_reverse4": "Socket and backend → frontend, IPv4.";
    SOCK_REVERSE6 = "sock_reverse6": "The same for IPv6.";
    SOURCE_RANGES4 = "source_ranges4": "[`crate::prefix::SourceRange`] in a [`crate::prefix::Prefix`] → 1, IPv4.";
    SOURCE_RANGES6 = "source_ranges6": "The same for IPv6.";
    SERVICE_CIDRS4 = "service_cidrs4": "[`crate::prefix::Prefix`] → 1, IPv4.";
    SERVICE_CIDRS6 = "service_cidrs6": "The same for IPv6.";
    FRAGMENTS4 = "fragments4": "[`crate::fragment::FragmentKey`] → [`crate::fragment::FragmentPorts`], IPv4.";
    FRAGMENTS6 = "fragments6": "The same for IPv6.";
    SERVICE_NAMES = "service_names": "Service id → [`crate::service_name::ServiceName`].";
    SERVICE_COUNTERS = "service_counters": "Service id → [`crate::counter::ServiceCounter`] per CPU.";
    DROP_COUNTERS = "drop_counters": "Drop reason, or [`crate::drop_reason::SYN_FAILOVERS`] → packets per CPU (u64).";
    REJECT_BUDGET = "reject_budget": "0 → [`crate::counter::RejectBudget`] per CPU.";
    DESTINATIONS = "destinations": "[`crate::filter::element`] → 1.";
    SOURCES = "sources": "[`crate::filter::element`] → second.";
    EVENTS = "events": "Ring buffer of [`crate::event::Event`]s.";
    LISTENER = "listener": "[`crate::event::UNTIL`] and [`crate::event::LOST`] → u64.";
}
