//! Internet checksum arithmetic (RFC 1071, RFC 1624) over words in memory order.
//!
//! One's-complement sums are independent of byte order as long as all words are read the same way, so everything here
//! takes words as they lie in memory (network data read natively).

/// Folds a 32-bit one's-complement sum to 16 bits.
#[inline(always)]
#[must_use]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    sum as u16
}

/// The sum to add to a packet's sum when 32-bit word `old` becomes `new`.
#[inline(always)]
#[must_use]
pub const fn difference(old: u32, new: u32) -> u64 {
    !old as u64 + new as u64
}

/// A checksum field after the data that it covers changed by `difference` (RFC 1624, equation 3).
#[inline(always)]
#[must_use]
pub const fn update(checksum: u16, difference: u64) -> u16 {
    !fold(!checksum as u64 + difference)
}

/// Like [`update`] for UDP: 0 means "no checksum" and stays 0, and a computed 0 is sent as 0xffff (RFC 768).
#[inline(always)]
#[must_use]
pub const fn update_udp(checksum: u16, difference: u64) -> u16 {
    if checksum == 0 {
        return 0;
    }
    match update(checksum, difference) {
        0 => 0xffff,
        updated => updated,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checksum(words: &[u16]) -> u16 {
        !fold(words.iter().map(|w| u64::from(*w)).sum())
    }

    #[test]
    fn an_updated_checksum_equals_one_computed_afresh() {
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        for _ in 0..100_000 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let old = (seed >> 32) as u32;
            let new = seed as u32;
            let other = (seed >> 16) as u16 | 1;
            let halves = |w: u32| [w as u16, (w >> 16) as u16];
            let before = [other, halves(old)[0], halves(old)[1]];
            let after = [other, halves(new)[0], halves(new)[1]];
            assert_eq!(update(checksum(&before), difference(old, new)), checksum(&after));
        }
    }

    #[test]
    fn a_udp_checksum_of_zero_stays_zero_and_a_computed_zero_is_sent_as_all_ones() {
        assert_eq!(update_udp(0, difference(1, 2)), 0);
        // 0xfffe covers a sum of 1; adding 0xfffe makes the sum 0xffff, whose complement is 0.
        assert_eq!(update_udp(0xfffe, 0xfffe), 0xffff);
    }
}
