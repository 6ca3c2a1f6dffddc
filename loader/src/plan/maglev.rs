//! Maglev-like tables (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, 3.4): every
//! backend gets a share of the table by its weight, and one that comes or goes moves hardly any element of the others.
//!
//! As in the paper, backends race through the table, each by a permutation of its own, and claim what is free. There each
//! claims one element a round, whatever it has to pass, so that one backend less changes what all others find. Here each
//! only *visits* one, and the race goes on until its share is almost exact: most elements belong to the backend that comes
//! first to them, whoever else runs, and only the last few even the shares out.
//!
//! A table depends on addresses, ports and weights alone, so all nodes of a cluster have the same one.

use std::net::{IpAddr, SocketAddr};

/// Sizes of tables: (backends that it is for, elements). A size that stays while backends come and go keeps clients where
/// they are: only the step from one row to another moves them all. Sizes are primes, for [`Permutation`].
const SIZES: [(usize, u32); 3] = [(10, 1_249), (200, 10_007), (usize::MAX, 100_003)];

/// A share may be off by this part of itself, and by that part of the table, whichever is less, and then by rounding: the
/// more exact shares are, the more clients move when another backend comes or goes.
const PART_OF_SHARE: u64 = 16;
const PART_OF_TABLE: u64 = 128;

/// An order of the elements of a table: `offset + step / (turn + start)` modulo its size, a prime. Unlike the paper's
/// arithmetic progressions, no two of them run in step.
struct Permutation {
    offset: u32,
    step: u32,
    start: u32,
}

/// A backend in the race.
struct Runner {
    address: SocketAddr,
    /// Index among the backends.
    index: usize,
    weight: u64,
    permutation: Permutation,
    /// Elements that it visited.
    turn: u32,
    /// Paces that it has not yet made use of.
    credit: u64,
    /// Elements that it has.
    claimed: u64,
    /// Elements that it gets at least and at most.
    bounds: (u64, u64),
}

/// The table of backends with their weights, as indexes into `backends`, whose order does not matter. Empty if there are
/// none or all weigh nothing.
pub(super) fn table(backends: &[(SocketAddr, u16)]) -> Vec<usize> {
    let total: u64 = backends.iter().map(|(_, weight)| u64::from(*weight)).sum();
    if total == 0 {
        return Vec::new();
    }
    if backends.len() == 1 {
        return vec![0];
    }
    let size = size(backends.len());
    let inverses = inverses(size);
    let mut runners: Vec<Runner> = backends
        .iter()
        .enumerate()
        .filter(|(_, (_, weight))| *weight > 0)
        .map(|(index, (address, weight))| Runner::new(index, *address, u64::from(*weight), total, size))
        .collect();
    runners.sort_unstable_by_key(|runner| runner.address);
    // Elements that nobody needs for its least share.
    let mut spare = u64::from(size) - runners.iter().map(|runner| runner.bounds.0).sum::<u64>();
    let mut table = vec![None; size as usize];
    let mut free = size;
    while free > 0 {
        let fastest = runners.iter().map(|runner| runner.pace(size)).max().unwrap_or(1);
        // Who may not claim now never may again, so who may has never passed a free element.
        runners.retain_mut(|runner| {
            let (least, most) = runner.bounds;
            if runner.claimed >= least && (spare == 0 || runner.claimed >= most) {
                return false;
            }
            if free == 0 || !runner.advances(fastest, size) {
                return true;
            }
            let element = &mut table[runner.permutation.at(runner.turn, &inverses)];
            runner.turn += 1;
            if element.is_none() {
                *element = Some(runner.index);
                spare -= u64::from(runner.claimed >= least);
                runner.claimed += 1;
                free -= 1;
            }
            true
        });
    }
    table.into_iter().flatten().collect()
}

impl Runner {
    fn new(index: usize, address: SocketAddr, weight: u64, total: u64, size: u32) -> Self {
        // In parts of `total`.
        let share = u64::from(size) * weight;
        let tolerance = (share / PART_OF_SHARE).min(u64::from(size) * total / PART_OF_TABLE);
        let bounds = ((share - tolerance) / total, (share + tolerance).div_ceil(total));
        let permutation = Permutation::new(address, size);
        Self { address, index, weight, permutation, turn: 0, credit: 0, claimed: 0, bounds }
    }

    /// How many elements it visits, compared with others: by its weight, and ever fewer the fewer are left to it. So the
    /// first to come to an element is one of weight w with probability w / total.
    const fn pace(&self, size: u32) -> u64 {
        self.weight * (size - self.turn) as u64
    }

    /// Whether it visits an element in this round.
    const fn advances(&mut self, fastest: u64, size: u32) -> bool {
        self.credit += self.pace(size);
        let advances = self.credit >= fastest;
        if advances {
            self.credit -= fastest;
        }
        advances
    }
}

impl Permutation {
    fn new(address: SocketAddr, size: u32) -> Self {
        let hash = hash(address);
        let part = |value: u64, below: u32| (value % u64::from(below)) as u32;
        Self {
            offset: part(hash >> 32, size),
            step: part(hash & 0xffff_ffff, size - 1) + 1,
            start: part(mix(hash), size),
        }
    }

    /// The element that comes after `turn` others.
    fn at(&self, turn: u32, inverses: &[u32]) -> usize {
        let size = inverses.len();
        let number = (turn + self.start) as usize;
        let inverse = inverses[if number < size { number } else { number - size }];
        ((u64::from(self.offset) + u64::from(self.step) * u64::from(inverse)) % size as u64) as usize
    }
}

/// The multiplicative inverses modulo a prime; 0 for 0.
fn inverses(prime: u32) -> Vec<u32> {
    let mut inverses = vec![0, 1];
    for number in 2..prime {
        // prime = quotient × number + remainder, so 1 / number = -quotient / remainder.
        let product = u64::from(prime / number) * u64::from(inverses[(prime % number) as usize]);
        inverses.push(prime - (product % u64::from(prime)) as u32);
    }
    inverses
}

/// FNV-1a over address and port, mixed once more: neighbouring addresses differ in one octet only.
fn hash(address: SocketAddr) -> u64 {
    let fold = |hash: u64, octet: &u8| (hash ^ u64::from(*octet)).wrapping_mul(0x0100_0000_01b3);
    let start = 0xcbf2_9ce4_8422_2325;
    let hash = match address.ip() {
        IpAddr::V4(v4) => v4.octets().iter().fold(start, fold),
        IpAddr::V6(v6) => v6.octets().iter().fold(start, fold),
    };
    mix(address.port().to_be_bytes().iter().fold(hash, fold))
}

/// MurmurHash3's finalizer.
const fn mix(mut hash: u64) -> u64 {
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

fn size(backends: usize) -> u32 {
    let row = SIZES.iter().find(|(most, _)| backends <= *most);
    row.map_or(SIZES[SIZES.len() - 1].1, |(_, elements)| *elements)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As many backends as asked for, in one of several networks.
    fn backends(count: usize, network: u8) -> Vec<(SocketAddr, u16)> {
        let address = |host: usize| [10, network, u8::try_from(host / 250).expect("few"), (host % 250) as u8 + 1];
        (0..count).map(|host| (SocketAddr::from((address(host), 8080)), 1)).collect()
    }

    fn shares(table: &[usize], backends: usize) -> Vec<f64> {
        let mut counts = vec![0_u32; backends];
        for index in table {
            counts[*index] += 1;
        }
        counts.into_iter().map(|count| f64::from(count) / table.len() as f64).collect()
    }

    /// The part of all clients that change their backend when one leaves, more than those that it had.
    fn disruption(backends: &[(SocketAddr, u16)], before: &[usize], leaver: usize) -> f64 {
        let mut rest = backends.to_vec();
        let (_, weight) = rest.remove(leaver);
        let total: u16 = backends.iter().map(|(_, weight)| weight).sum();
        moved(before, &table(&rest), leaver) - f64::from(weight) / f64::from(total)
    }

    fn moved(before: &[usize], after: &[usize], leaver: usize) -> f64 {
        // The last backend's table is the same with any number of elements.
        let after = |element: usize| if after.len() == 1 { after[0] } else { after[element] };
        let stays =
            |(element, own): (usize, &usize)| *own != leaver && *own - usize::from(*own > leaver) == after(element);
        1.0 - before.iter().enumerate().filter(|element| stays(*element)).count() as f64 / before.len() as f64
    }

    #[test]
    fn every_backend_gets_its_share() {
        for count in [1, 2, 3, 4, 7, 10, 11, 50, 100, 200] {
            let expected = 1.0 / count as f64;
            let table = table(&backends(count, 1));
            let tolerance = (expected / 16.0).min(1.0 / 128.0) + 1.0 / table.len() as f64;
            for share in shares(&table, count) {
                assert!((share - expected).abs() <= tolerance, "{share} of {count}");
            }
        }
    }

    #[test]
    fn weights_decide_the_shares() {
        for weights in [&[1, 2, 5, 0][..], &[100, 1], &[65_535, 1, 32_767], &[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 30]] {
            let mut weighted = backends(weights.len(), 1);
            for (backend, weight) in weighted.iter_mut().zip(weights) {
                backend.1 = *weight;
            }
            let total: u32 = weights.iter().map(|weight| u32::from(*weight)).sum();
            for (share, weight) in shares(&table(&weighted), weights.len()).into_iter().zip(weights) {
                let expected = f64::from(*weight) / f64::from(total);
                assert!((share - expected).abs() < 0.009, "{share}, not {expected}");
            }
        }
    }

    /// Connections of clients whose backend stays must stay, or every deployment would empty caches everywhere.
    #[test]
    fn a_backend_that_leaves_moves_hardly_more_than_its_own_clients() {
        for (network, count) in (0..8).flat_map(|network| (2..=10).map(move |count| (network, count))) {
            let all = backends(count, network);
            let before = table(&all);
            for leaver in 0..count {
                let more = disruption(&all, &before, leaver);
                assert!(more <= 0.02, "{more} of the clients moved, too, when {leaver} of {count} left, {network}");
            }
        }
    }

    #[test]
    fn so_does_one_of_many() {
        for counts in [11..=200, 499..=500] {
            let mut after = table(&backends(*counts.start(), 1));
            for count in counts.skip(1) {
                let before = table(&backends(count, 1));
                let more = moved(&before, &after, count - 1) - 1.0 / count as f64;
                assert!(more <= 0.02, "{more} of the clients moved, too, when 1 of {count} left");
                after = before;
            }
        }
    }

    #[test]
    fn so_does_one_of_any_weight() {
        for network in 0..8 {
            let mut all = backends(6, network);
            for (backend, weight) in all.iter_mut().zip([1, 2, 3, 10, 10, 20]) {
                backend.1 = weight;
            }
            let before = table(&all);
            for leaver in 0..all.len() {
                let more = disruption(&all, &before, leaver);
                assert!(more <= 0.03, "{more} of the clients moved, too, when {leaver} left, {network}");
            }
        }
    }

    /// Every node hears of endpoints in an order of its own.
    #[test]
    fn the_order_of_backends_does_not_matter() {
        let mut all = backends(30, 3);
        all.extend((1..=10_u16).map(|host| (SocketAddr::from(([0xfd00, 0, 0, 0, 0, 0, 0, host], 80)), host)));
        let owners = |all: &[(SocketAddr, u16)]| table(all).into_iter().map(|index| all[index].0).collect::<Vec<_>>();
        let here = owners(&all);
        all.reverse();
        all.rotate_left(7);
        assert_eq!(here, owners(&all));
    }

    #[test]
    fn every_permutation_visits_every_element() {
        for (backends_of_row, size) in SIZES {
            let inverses = inverses(size);
            for (address, _) in backends(backends_of_row.min(5), 9) {
                let permutation = Permutation::new(address, size);
                let mut visited = vec![false; size as usize];
                (0..size).for_each(|turn| visited[permutation.at(turn, &inverses)] = true);
                assert!(visited.iter().all(|visited| *visited), "{address} of {size}");
            }
        }
    }

    #[test]
    fn a_set_without_weight_has_no_table() {
        assert_eq!(table(&[]), Vec::<usize>::new());
        assert_eq!(table(&[("10.0.0.1:80".parse().expect("address"), 0)]), Vec::<usize>::new());
    }
}
