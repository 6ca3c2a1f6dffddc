//! SCTP's checksum, CRC32c (RFC 9260, appendix A), as far as a change of a few octets needs it.
//!
//! A CRC is linear: when a packet changes by an XOR of `d`, its CRC changes by the CRC of `d` alone. So a rewrite of the
//! ports needs not the rest of the packet, but only its length.

/// The polynomial, reflected: bit 31 is the coefficient of x⁰.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// Bits of a packet's length.
const LENGTH_BITS: usize = 17;

/// The product of two polynomials modulo [`POLYNOMIAL`].
const fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 0;
    while bit < 32 {
        product ^= b & 0_u32.wrapping_sub((a >> (31 - bit)) & 1);
        b = (b >> 1) ^ (POLYNOMIAL & 0_u32.wrapping_sub(b & 1));
        bit += 1;
    }
    product
}

/// x to the power of 8 · 2ᵏ: what 2ᵏ octets do to a CRC.
const OCTETS: [u32; LENGTH_BITS] = {
    let mut powers = [0; LENGTH_BITS];
    // x⁸
    let mut power = 1 << (31 - 8);
    let mut k = 0;
    while k < LENGTH_BITS {
        powers[k] = power;
        power = multiply(power, power);
        k += 1;
    }
    powers
};

/// Products of [`OCTETS`] with every value of each of a CRC's eight half-octets, lowest first: a product with 2ᵏ octets'
/// power is eight of these.
static PRODUCTS: [[[u32; 16]; 8]; LENGTH_BITS] = {
    let mut products = [[[0; 16]; 8]; LENGTH_BITS];
    let mut k = 0;
    while k < LENGTH_BITS {
        let mut position = 0;
        while position < 8 {
            let mut half = 0;
            while half < 16 {
                products[k][position][half] = multiply((half as u32) << (4 * position), OCTETS[k]);
                half += 1;
            }
            position += 1;
        }
        k += 1;
    }
    products
};

/// What to XOR to the CRC32c of `length` octets (less than 2¹⁷) when their first four change from `old` to `new`, both as
/// they lie in memory read as a little-endian word. The CRC is a number; SCTP sends its least significant octet first.
#[must_use]
#[inline(always)]
pub fn difference(old: u32, new: u32, length: u32) -> u32 {
    let mut crc = old ^ new;
    for (k, products) in PRODUCTS.iter().enumerate() {
        let mut product = 0;
        for (position, halves) in products.iter().enumerate() {
            product ^= halves[(crc >> (4 * position)) as usize & 15];
        }
        // Without a branch, so that the kernel's verifier sees one path.
        let chosen = 0_u32.wrapping_sub((length >> k) & 1);
        crc = (product & chosen) | (crc & !chosen);
    }
    crc
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crc32c(octets: impl IntoIterator<Item = u8>) -> u32 {
        let mut crc = u32::MAX;
        for octet in octets {
            crc ^= u32::from(octet);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (POLYNOMIAL & 0_u32.wrapping_sub(crc & 1));
            }
        }
        !crc
    }

    #[test]
    fn the_reference_here_is_crc32c() {
        // RFC 3720, B.4
        assert_eq!(crc32c([0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(0..32), 0x46dd_794e);
    }

    #[test]
    fn a_changed_checksum_equals_one_computed_afresh() {
        for length in [4_u32, 12, 16, 17, 255, 1_480, 9_000, 65_535] {
            let packet = |start: u32| start.to_le_bytes().into_iter().chain((4..length).map(|index| (index * 7) as u8));
            let (old, new) = (0x0050_3039, 0x1f90_8235);
            let changed = crc32c(packet(old)) ^ difference(old, new, length);
            assert_eq!(changed, crc32c(packet(new)), "{length} octets");
        }
    }
}
