//! `destinations` and `sources`: what lets packets that are not Sheave's pass at the cost of one array element.
//!
//! Addresses of both families share the elements by hash, so an element that says no is right, and one that says yes means
//! that the hash maps have to be asked.
//!
//! `destinations`: not 0 once an address had a frontend, or is the source of packets that the programs redirect, to which
//! the replies come. Written before the frontend or the flow; never taken back, because flows outlive frontends.
//!
//! `sources`: when a flow to a backend with this address was last seen, in seconds of CLOCK_MONOTONIC, so that elements
//! expire as their flows do; 0 means never.

use crate::Address;

/// Elements of each.
pub const ELEMENTS: u32 = 1 << BITS;
const BITS: u32 = 16;

/// The element of an address.
#[inline(always)]
#[must_use]
pub fn element<A: Address>(address: &A) -> u32 {
    // In the machine's order, in which neighbours differ at the lower end, all of which counts in the product.
    let [first, second, third, last] = address.words().map(|word| u64::from(u32::from_be(word)));
    let mixed = first ^ second.rotate_left(32) ^ third.rotate_left(13) ^ last.rotate_left(45);
    // Fibonacci hashing: the upper bits of a product with 2^64 divided by the golden ratio.
    (mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - BITS)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Ipv4Address, Ipv6Address};

    #[test]
    fn neighbouring_addresses_hardly_ever_share_an_element() {
        let v4 = |number: u32| element(&Ipv4Address::from_be_word((0x0a60_0000 + number).to_be()));
        let v6 = |number: u32| element(&Ipv6Address::from_words([0xfd_u32, 0, 0, number.to_be()]));
        for of in [&v4 as &dyn Fn(u32) -> u32, &v6] {
            let mut taken = [false; ELEMENTS as usize];
            let distinct = (0..8_192).filter(|number| !core::mem::replace(&mut taken[of(*number) as usize], true));
            // Random ones would leave 7 700.
            let distinct = distinct.count();
            assert!(distinct > 7_000, "{distinct} elements");
        }
    }
}
