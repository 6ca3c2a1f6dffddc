//! The settings part of `config`'s one element: what the command line and the node say, as the programs read it.

use std::net::{Ipv4Addr, Ipv6Addr};

use sheave_common::config::{Config, flags};
use sheave_common::features;
use sheave_common::{Address, Ipv4Address, Ipv6Address, LAYOUT_VERSION};

use super::error::DataplaneError;
use super::syscall;
use crate::config::{Bypass, ConnectMode, DrainForeign, RunConfig};

/// This element with the settings that were asked for; ids, version, node addresses and what is known of ServiceCIDRs stay.
pub(super) fn element(old: Option<Config>, run: &RunConfig) -> Result<Config, DataplaneError> {
    let cookie = syscall::netns_cookie().map_err(DataplaneError::NetnsCookie)?;
    let connect = match run.connect {
        ConnectMode::Host => flags::CONNECT_HOST,
        ConnectMode::Tcp => flags::CONNECT_HOST | flags::CONNECT_TCP,
        ConnectMode::All => flags::CONNECT_HOST | flags::CONNECT_ALL,
        ConnectMode::Off => 0,
    };
    let flag = |set: bool, flag: u32| if set { flag } else { 0 };
    Ok(Config {
        next_version: old.map_or(1, |old| old.next_version.max(1)),
        host_netns_cookie: cookie.unwrap_or(0),
        layout_version: LAYOUT_VERSION,
        next_backend_id: old.map_or(0, |old| old.next_backend_id),
        next_service_id: old.map_or(0, |old| old.next_service_id),
        flags: connect
            | flag(cookie.is_none() && connect != 0, flags::CONNECT_INIT_NETNS)
            | flag(run.drain_foreign != DrainForeign::Off, flags::DRAIN_FOREIGN)
            | flag(run.drain.is_some(), flags::LEAVING)
            | flag(run.bypass_netfilter != Bypass::Off, flags::BYPASSED)
            | flag(run.syn_failover, flags::SYN_FAILOVER)
            | old.map_or(0, |old| old.flags & (flags::SERVICE_CIDRS4 | flags::SERVICE_CIDRS6 | flags::BYPASSED)),
        timeouts: run.timeouts,
        snat_port_first: run.snat_ports.0,
        snat_port_last: run.snat_ports.1,
        rejects_per_second: run.rejects_per_second,
        hairpin4: run.hairpin4.into(),
        hairpin6: run.hairpin6.into(),
        node4: old.map_or(Ipv4Address::UNSPECIFIED, |old| old.node4),
        node6: old.map_or(Ipv6Address::UNSPECIFIED, |old| old.node6),
    })
}

/// The programs' constants that are not the kernel's features.
pub(super) fn constants(old: Option<Config>, run: &RunConfig) -> u32 {
    let bypass = run.bypass_netfilter != Bypass::Off;
    let bypassed = bypass || old.is_some_and(|old| old.flags & flags::BYPASSED != 0);
    (if bypass { features::BYPASS } else { 0 }) | if bypassed { features::BYPASSED } else { 0 }
}

/// The element when connections of another proxy have drained.
pub(super) fn without_foreign(config: Config) -> Config {
    Config { flags: config.flags & !flags::DRAIN_FOREIGN, ..config }
}

/// The element with these node addresses.
pub(super) fn with_node(config: Config, node4: Option<Ipv4Addr>, node6: Option<Ipv6Addr>) -> Config {
    Config {
        node4: node4.unwrap_or(Ipv4Addr::UNSPECIFIED).into(),
        node6: node6.unwrap_or(Ipv6Addr::UNSPECIFIED).into(),
        ..config
    }
}
