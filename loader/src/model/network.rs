//! An IP network: what loadBalancerSourceRanges and ServiceCIDRs are lists of.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The addresses that share their first bits. Bits beyond the length are zero, so equal networks are equal values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Network {
    address: IpAddr,
    length: u8,
}

impl Network {
    /// The first of all networks in order.
    pub const FIRST: Self = Self { address: IpAddr::V4(Ipv4Addr::UNSPECIFIED), length: 0 };

    /// The network of an address; `None` if the address has fewer bits than that.
    #[must_use]
    pub fn new(address: IpAddr, length: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V4(address) => {
                let unused = 32_u32.checked_sub(length.into())?;
                Ipv4Addr::from_bits(address.to_bits() & u32::MAX.checked_shl(unused).unwrap_or(0)).into()
            }
            IpAddr::V6(address) => {
                let unused = 128_u32.checked_sub(length.into())?;
                Ipv6Addr::from_bits(address.to_bits() & u128::MAX.checked_shl(unused).unwrap_or(0)).into()
            }
        };
        Some(Self { address, length })
    }

    /// Its first address.
    #[must_use]
    pub const fn address(&self) -> IpAddr {
        self.address
    }

    /// How many bits its addresses share.
    #[must_use]
    pub const fn length(&self) -> u8 {
        self.length
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_begins_with_its_first_address_and_is_no_longer_than_an_address() {
        let network = |address: &str, length| {
            Network::new(address.parse().expect("an address"), length).map(|network| network.to_string())
        };
        for (address, length, expected) in [
            ("192.0.2.77", 24, Some("192.0.2.0/24")),
            ("192.0.2.77", 32, Some("192.0.2.77/32")),
            ("192.0.2.77", 0, Some("0.0.0.0/0")),
            ("192.0.2.77", 33, None),
            ("fd00:1::77", 64, Some("fd00:1::/64")),
            ("fd00:1::77", 128, Some("fd00:1::77/128")),
            ("fd00:1::77", 0, Some("::/0")),
            ("fd00:1::77", 129, None),
        ] {
            assert_eq!(network(address, length).as_deref(), expected, "{address}/{length}");
        }
    }
}
