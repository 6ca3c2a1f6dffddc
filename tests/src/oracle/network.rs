//! Networks, as objects write them.

use std::net::IpAddr;

/// Whether a network contains an address: the first bits are the same.
pub(super) fn contains(network: IpAddr, length: u8, address: IpAddr) -> bool {
    let length = usize::from(length);
    network.is_ipv6() == address.is_ipv6() && bits(network)[..length] == bits(address)[..length]
}

/// The same for a text like 192.0.2.0/24, perhaps with white space around it. What is no network contains nothing.
pub(super) fn text_contains(text: &str, address: IpAddr) -> bool {
    let Some((network, length)) = text.trim().split_once('/') else { return false };
    match (network.parse::<IpAddr>(), length.parse::<u8>()) {
        (Ok(network), Ok(length)) => contains(network, length, address),
        _ => false,
    }
}

fn bits(address: IpAddr) -> Vec<bool> {
    let octets = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    octets.iter().flat_map(|octet| (0..8).map(move |bit| octet & (0x80 >> bit) != 0)).collect()
}
