//! `source_ranges4/6` and `service_cidrs4/6`: networks as keys of LPM tries.
//!
//! An element is there or not, and its value says nothing, so writing one is never seen half done.

use std::collections::BTreeSet;
use std::net::IpAddr;

use sheave_common::prefix::{Prefix, SourceRange};
use sheave_common::{Ipv4Address, Ipv6Address};

use super::error::MapError;
use super::maps::Maps;
use crate::model::network::Network;

/// The value of every element.
const PRESENT: u32 = 1;
/// Bits of the service id before a client's address.
const SERVICE_ID_LENGTH: u32 = 32;

pub(super) fn put_source_range(maps: &Maps, service_id: u32, network: &Network) -> Result<(), MapError> {
    match network.address() {
        IpAddr::V4(ip) => maps.v4.source_ranges.put(&range::<Ipv4Address>(service_id, network, ip), &PRESENT),
        IpAddr::V6(ip) => maps.v6.source_ranges.put(&range::<Ipv6Address>(service_id, network, ip), &PRESENT),
    }
}

/// It need not be there.
pub(super) fn delete_source_range(maps: &Maps, service_id: u32, network: &Network) -> Result<bool, MapError> {
    match network.address() {
        IpAddr::V4(ip) => maps.v4.source_ranges.delete(&range::<Ipv4Address>(service_id, network, ip)),
        IpAddr::V6(ip) => maps.v6.source_ranges.delete(&range::<Ipv6Address>(service_id, network, ip)),
    }
}

pub(super) fn put_service_cidr(maps: &Maps, network: &Network) -> Result<(), MapError> {
    match network.address() {
        IpAddr::V4(ip) => maps.v4.service_cidrs.put(&prefix::<Ipv4Address>(network, ip), &PRESENT),
        IpAddr::V6(ip) => maps.v6.service_cidrs.put(&prefix::<Ipv6Address>(network, ip), &PRESENT),
    }
}

/// It need not be there.
pub(super) fn delete_service_cidr(maps: &Maps, network: &Network) -> Result<bool, MapError> {
    match network.address() {
        IpAddr::V4(ip) => maps.v4.service_cidrs.delete(&prefix::<Ipv4Address>(network, ip)),
        IpAddr::V6(ip) => maps.v6.service_cidrs.delete(&prefix::<Ipv6Address>(network, ip)),
    }
}

/// Whether clients of these addresses are let in, by this element or by that of a wider network.
pub(super) fn has_source_range(maps: &Maps, service_id: u32, network: &Network) -> Result<bool, MapError> {
    let found = match network.address() {
        IpAddr::V4(ip) => maps.v4.source_ranges.get(&range::<Ipv4Address>(service_id, network, ip))?,
        IpAddr::V6(ip) => maps.v6.source_ranges.get(&range::<Ipv6Address>(service_id, network, ip))?,
    };
    Ok(found.is_some())
}

/// Service id and clients that an element stands for; `None` if that is no network.
pub(super) fn range_of<A: Copy + Into<I>, I: Into<IpAddr>>(key: &Prefix<SourceRange<A>>) -> Option<(u32, Network)> {
    let SourceRange { service_id, address } = key.data;
    let length = key.prefix_len.checked_sub(SERVICE_ID_LENGTH)?;
    Some((service_id, network::<A, I>(address, length)?))
}

/// Service ids with the clients that their guarded frontends let in.
pub(super) fn source_ranges(maps: &Maps) -> Result<Vec<(u32, Network)>, MapError> {
    fn read<A: Copy + Into<I>, I: Into<IpAddr>>((key, _): (Prefix<SourceRange<A>>, u32)) -> Option<(u32, Network)> {
        range_of::<A, I>(&key)
    }
    let mut ranges: Vec<_> =
        maps.v4.source_ranges.dump()?.into_iter().filter_map(read::<_, std::net::Ipv4Addr>).collect();
    ranges.extend(maps.v6.source_ranges.dump()?.into_iter().filter_map(read::<_, std::net::Ipv6Addr>));
    Ok(ranges)
}

/// Where ClusterIPs come from.
pub(super) fn service_cidrs(maps: &Maps) -> Result<BTreeSet<Network>, MapError> {
    fn read<A: Into<I>, I: Into<IpAddr>>((key, _): (Prefix<A>, u32)) -> Option<Network> {
        network::<A, I>(key.data, key.prefix_len)
    }
    let mut cidrs: BTreeSet<_> =
        maps.v4.service_cidrs.dump()?.into_iter().filter_map(read::<_, std::net::Ipv4Addr>).collect();
    cidrs.extend(maps.v6.service_cidrs.dump()?.into_iter().filter_map(read::<_, std::net::Ipv6Addr>));
    Ok(cidrs)
}

fn network<A: Into<I>, I: Into<IpAddr>>(address: A, length: u32) -> Option<Network> {
    let address: I = address.into();
    Network::new(address.into(), u8::try_from(length).ok()?)
}

fn range<A>(service_id: u32, network: &Network, address: impl Into<A>) -> Prefix<SourceRange<A>> {
    let prefix_len = SERVICE_ID_LENGTH + u32::from(network.length());
    Prefix { prefix_len, data: SourceRange { service_id, address: address.into() } }
}

fn prefix<A>(network: &Network, address: impl Into<A>) -> Prefix<A> {
    Prefix { prefix_len: network.length().into(), data: address.into() }
}
