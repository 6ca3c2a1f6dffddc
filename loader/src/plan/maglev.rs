//! Maglev tables (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, 3.4): every
//! backend gets a share of the table by its weight, and one that comes or goes moves few elements of the others.
//!
//! A table depends on addresses, ports and weights alone, so all nodes of a cluster have the same one.

use std::net::{IpAddr, SocketAddr};

/// Sizes of tables: (backends that it is for, elements). A hundred elements for each backend keep shares even, and a size
/// that stays while backends come and go keeps clients where they are: only the step from one row to another moves them
/// all. Sizes are primes, so that every skip visits every element.
const SIZES: [(usize, usize); 4] = [(1, 1), (10, 1_249), (100, 10_007), (usize::MAX, 100_003)];

/// Positions in a table by preference: `offset`, `offset + skip`, … modulo its size.
struct Permutation {
    next: usize,
    skip: usize,
}

/// The table of backends with their weights, as indexes into `backends`. Empty if there are none or all weigh nothing.
pub(super) fn table(backends: &[(SocketAddr, u16)]) -> Vec<usize> {
    let heaviest = backends.iter().map(|(_, weight)| u64::from(*weight)).max().unwrap_or(0);
    if heaviest == 0 {
        return Vec::new();
    }
    let size = size(backends.len());
    let mut permutations: Vec<Permutation> = backends.iter().map(|(address, _)| permutation(*address, size)).collect();
    let mut table = vec![None; size];
    let mut credit = vec![0_u64; backends.len()];
    let mut filled = 0;
    while filled < size {
        for (index, (_, weight)) in backends.iter().enumerate() {
            // A backend takes its turn as often as its weight says, compared with the heaviest.
            credit[index] += u64::from(*weight);
            if credit[index] < heaviest || filled == size {
                continue;
            }
            credit[index] -= heaviest;
            let permutation = &mut permutations[index];
            while table[permutation.next].is_some() {
                permutation.next = (permutation.next + permutation.skip) % size;
            }
            table[permutation.next] = Some(index);
            filled += 1;
        }
    }
    table.into_iter().flatten().collect()
}

fn permutation(address: SocketAddr, size: usize) -> Permutation {
    if size == 1 {
        return Permutation { next: 0, skip: 0 };
    }
    let hash = hash(address);
    let part = |value: u64, below: usize| usize::try_from(value % below as u64).unwrap_or(0);
    Permutation { next: part(hash >> 32, size), skip: part(hash & 0xffff_ffff, size - 1) + 1 }
}

/// FNV-1a over address and port, mixed once more: neighbouring addresses differ in one octet only.
fn hash(address: SocketAddr) -> u64 {
    let fold = |hash: u64, octet: &u8| (hash ^ u64::from(*octet)).wrapping_mul(0x0100_0000_01b3);
    let start = 0xcbf2_9ce4_8422_2325;
    let hash = match address.ip() {
        IpAddr::V4(v4) => v4.octets().iter().fold(start, fold),
        IpAddr::V6(v6) => v6.octets().iter().fold(start, fold),
    };
    let mut hash = address.port().to_be_bytes().iter().fold(hash, fold);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

fn size(backends: usize) -> usize {
    let row = SIZES.iter().find(|(most, _)| backends <= *most);
    row.map_or(SIZES[SIZES.len() - 1].1, |(_, elements)| *elements)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(count: u8) -> Vec<(SocketAddr, u16)> {
        (1..=count).map(|host| (SocketAddr::from(([10, 244, 0, host], 8080)), 1)).collect()
    }

    fn shares(table: &[usize], backends: usize) -> Vec<f64> {
        let count = |backend| table.iter().filter(|index| **index == backend).count() as f64;
        (0..backends).map(|backend| count(backend) / table.len() as f64).collect()
    }

    #[test]
    fn every_backend_gets_its_share() {
        for count in [1, 2, 3, 10, 50, 200] {
            let expected = 1.0 / f64::from(count);
            for share in shares(&table(&backends(count)), usize::from(count)) {
                assert!((share - expected).abs() <= expected * 0.02 + 0.005, "{share} of {count}");
            }
        }
    }

    #[test]
    fn weights_decide_the_shares() {
        let mut weighted = backends(4);
        for (index, weight) in [1, 2, 5, 0].into_iter().enumerate() {
            weighted[index].1 = weight;
        }
        for (share, expected) in shares(&table(&weighted), 4).into_iter().zip([0.125, 0.25, 0.625, 0.0]) {
            assert!((share - expected).abs() < 0.01, "{share}, not {expected}");
        }
    }

    /// Connections of clients whose backend stays must stay, or every deployment would empty caches everywhere.
    #[test]
    fn a_backend_that_leaves_moves_hardly_more_than_its_own_share() {
        for count in [3_u8, 4, 5, 7, 10, 12, 30, 60, 100, 200] {
            let all = backends(count);
            let before = table(&all);
            for leaver in [0, usize::from(count) / 2, usize::from(count) - 1] {
                let mut rest = all.clone();
                rest.remove(leaver);
                let after = table(&rest);
                assert_eq!(before.len(), after.len(), "{count} backends and one less");
                let moved = before.iter().zip(&after).filter(|(before, after)| all[**before] != rest[**after]);
                let moved = moved.count() as f64 / before.len() as f64;
                let ideal = 1.0 / f64::from(count);
                // Of the others' clients, one in forty moves too: so the paper's algorithm does it, whatever the size.
                assert!(moved <= ideal + 0.025, "{moved} of the clients moved when 1 of {count} left");
            }
        }
    }

    #[test]
    fn tables_have_prime_sizes() {
        for (_, size) in &SIZES[1..] {
            assert!(
                (2..).take_while(|divisor| divisor * divisor <= *size).all(|divisor| size % divisor != 0),
                "{size}"
            );
        }
    }

    #[test]
    fn a_set_without_weight_has_no_table() {
        assert_eq!(table(&[]), Vec::<usize>::new());
        assert_eq!(table(&[("10.0.0.1:80".parse().expect("address"), 0)]), Vec::<usize>::new());
    }
}
