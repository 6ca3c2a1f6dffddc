//! IPv4 and IPv6 addresses as they lie in map keys and packets: octets in network order.

use core::fmt;

/// An address family: what generic code needs to know of an address.
pub trait Address: Copy + Eq + 'static {
    /// Zeroes that round a struct with one address and a u64 up to a multiple of 8 bytes, so that it has no padding.
    type Fill: Copy + Eq + fmt::Debug + core::hash::Hash + 'static;
    /// The one value of [`Self::Fill`].
    const FILL: Self::Fill;
    /// The all-zeroes address.
    const UNSPECIFIED: Self;
    /// The address as 32-bit words in memory order, unused ones zero; for checksums and hashes.
    fn words(&self) -> [u32; 4];
}

/// An IPv4 address, four octets in network order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C, align(4))]
pub struct Ipv4Address {
    /// The octets as they are sent.
    pub octets: [u8; 4],
}

/// An IPv6 address, sixteen octets in network order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C, align(4))]
pub struct Ipv6Address {
    /// The octets as they are sent.
    pub octets: [u8; 16],
}

crate::layout::layout!(Ipv4Address, size 4, { octets @ 0 + 4 });
crate::layout::layout!(Ipv6Address, size 16, { octets @ 0 + 16 });

impl Ipv4Address {
    /// The address whose octets lie in memory as this word does (the kernel's `__be32`).
    #[inline(always)]
    #[must_use]
    pub const fn from_be_word(word: u32) -> Self {
        Self { octets: word.to_ne_bytes() }
    }

    /// Whether a packet from this address can be answered: it is not "this network", loopback, multicast or broadcast
    /// (RFC 1122, 3.2.1.3).
    #[inline(always)]
    #[must_use]
    pub const fn is_one_host(self) -> bool {
        !matches!(self.octets[0], 0 | 127 | 224..=239) && self.be_word() != u32::MAX
    }

    /// The kernel's `__be32`: a word whose memory is the octets.
    #[inline(always)]
    #[must_use]
    pub const fn be_word(self) -> u32 {
        u32::from_ne_bytes(self.octets)
    }
}

impl Ipv6Address {
    /// The address whose octets lie in memory as these words do.
    #[inline(always)]
    #[must_use]
    pub const fn from_words(words: [u32; 4]) -> Self {
        let [a, b, c, d] =
            [words[0].to_ne_bytes(), words[1].to_ne_bytes(), words[2].to_ne_bytes(), words[3].to_ne_bytes()];
        Self {
            octets: [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]],
        }
    }

    /// Whether a packet from this address can be answered by a router: it is not unspecified, loopback, multicast
    /// (RFC 4291, 2.5) or link-local, which means nothing beyond its link.
    #[inline(always)]
    #[must_use]
    pub fn is_one_host(self) -> bool {
        let [first, second, third, last] = self.words();
        let multicast = self.octets[0] == 0xff;
        let link_local = self.octets[0] == 0xfe && self.octets[1] & 0xc0 == 0x80;
        let unspecified_or_loopback = first == 0 && second == 0 && third == 0 && (last == 0 || last == 1_u32.to_be());
        !(multicast || link_local || unspecified_or_loopback)
    }
}

impl Address for Ipv4Address {
    type Fill = [u32; 0];
    const FILL: Self::Fill = [];
    const UNSPECIFIED: Self = Self { octets: [0; 4] };

    #[inline(always)]
    fn words(&self) -> [u32; 4] {
        [self.be_word(), 0, 0, 0]
    }
}

impl Address for Ipv6Address {
    type Fill = [u32; 1];
    const FILL: Self::Fill = [0];
    const UNSPECIFIED: Self = Self { octets: [0; 16] };

    #[inline(always)]
    fn words(&self) -> [u32; 4] {
        let o = &self.octets;
        [
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ]
    }
}

macro_rules! conversions {
    ($address:ident, $standard:path) => {
        impl From<$standard> for $address {
            fn from(address: $standard) -> Self {
                Self { octets: address.octets() }
            }
        }

        impl From<$address> for $standard {
            fn from(address: $address) -> Self {
                Self::from(address.octets)
            }
        }

        impl fmt::Display for $address {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                <$standard>::from(*self).fmt(f)
            }
        }

        impl fmt::Debug for $address {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

conversions!(Ipv4Address, core::net::Ipv4Addr);
conversions!(Ipv6Address, core::net::Ipv6Addr);
