//! Which elements of `backend_table` are free: an allocator of runs, best fit, O(log n) per call.

use std::collections::{BTreeMap, BTreeSet};

/// The free space of the backend table.
#[derive(Clone, Debug)]
pub struct Table {
    capacity: u32,
    used: u32,
    /// First element → length of each free stretch; no two touch.
    by_first: BTreeMap<u32, u32>,
    /// (length, first element) of the same stretches.
    by_length: BTreeSet<(u32, u32)>,
}

impl Table {
    /// A table of which everything is free.
    #[must_use]
    pub fn new(capacity: u32) -> Self {
        let mut table = Self { capacity, used: capacity, by_first: BTreeMap::new(), by_length: BTreeSet::new() };
        table.insert(0, capacity);
        table
    }

    /// Number of elements, free or not.
    #[must_use]
    pub const fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Number of elements that are not free.
    #[must_use]
    pub const fn used(&self) -> u32 {
        self.used
    }

    /// Takes the smallest stretch that holds `length` elements; `None` if there is none. `length` is not 0.
    pub fn allocate(&mut self, length: u32) -> Option<u32> {
        let (found, first) = *self.by_length.range((length, 0)..).next()?;
        self.remove(first, found);
        self.insert(first + length, found - length);
        Some(first)
    }

    /// Takes a given run. False if any of it was taken already; then nothing changes.
    pub fn reserve(&mut self, first: u32, length: u32) -> bool {
        let Some((start, found)) = self.by_first.range(..=first).next_back().map(|(s, l)| (*s, *l)) else {
            return false;
        };
        let Some(end) = first.checked_add(length) else { return false };
        if end > start + found {
            return false;
        }
        self.remove(start, found);
        self.insert(start, first - start);
        self.insert(end, start + found - end);
        true
    }

    /// Gives a run back.
    pub fn free(&mut self, first: u32, length: u32) {
        let (mut first, mut length) = (first, length);
        if let Some((before, found)) = self.by_first.range(..first).next_back().map(|(f, l)| (*f, *l))
            && before + found == first
        {
            self.remove(before, found);
            (first, length) = (before, found + length);
        }
        if let Some(after) = self.by_first.get(&(first + length)).copied() {
            self.remove(first + length, after);
            length += after;
        }
        self.insert(first, length);
    }

    fn insert(&mut self, first: u32, length: u32) {
        if length > 0 {
            self.by_first.insert(first, length);
            self.by_length.insert((length, first));
            self.used -= length;
        }
    }

    fn remove(&mut self, first: u32, length: u32) {
        self.by_first.remove(&first);
        self.by_length.remove(&(length, first));
        self.used += length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_neighbours_become_one_stretch_again() {
        let mut table = Table::new(10);
        let runs: Vec<u32> = (0..5).map(|_| table.allocate(2).expect("room")).collect();
        assert_eq!(table.allocate(1), None);
        for first in [runs[1], runs[3], runs[2]] {
            table.free(first, 2);
        }
        assert_eq!(table.allocate(6), Some(2));
        assert_eq!(table.allocate(1), None);
    }

    #[test]
    fn the_smallest_stretch_that_fits_is_taken() {
        let mut table = Table::new(100);
        assert!(table.reserve(10, 5));
        assert!(table.reserve(18, 2));
        assert_eq!(table.allocate(3), Some(15));
        assert_eq!(table.allocate(10), Some(0));
    }

    #[test]
    fn a_run_that_overlaps_another_or_leaves_the_table_is_not_reserved() {
        let mut table = Table::new(10);
        assert!(table.reserve(2, 3));
        assert!(!table.reserve(4, 1));
        assert!(!table.reserve(0, 3));
        assert!(!table.reserve(8, 3));
        assert!(!table.reserve(8, u32::MAX));
        assert_eq!(table.allocate(5), Some(5));
    }

    #[test]
    fn random_use_never_hands_out_an_element_twice_and_loses_none() {
        let mut table = Table::new(200);
        let mut taken: Vec<(u32, u32)> = Vec::new();
        let mut random = super::super::tests::Random::new(7);
        for _ in 0..20_000 {
            if random.below(2) == 0 {
                let length = 1 + random.below(12) as u32;
                if let Some(first) = table.allocate(length) {
                    assert!(first + length <= 200);
                    assert!(taken.iter().all(|(f, l)| first + length <= *f || f + l <= first));
                    taken.push((first, length));
                }
            } else if !taken.is_empty() {
                let (first, length) = taken.swap_remove(random.below(taken.len()));
                table.free(first, length);
            }
        }
        for (first, length) in taken {
            table.free(first, length);
        }
        assert_eq!(table.used(), 0);
        assert_eq!(table.allocate(200), Some(0));
        assert_eq!(table.used(), 200);
    }
}
