//! A pinned map with its key and value types.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use aya::Pod;

use super::error::MapError;
use super::syscall::{self, Cursor};

/// Elements that one batch system call reads at first; a hash bucket that is larger doubles it.
const BATCH: u32 = 4_096;

/// Elements that one step of a walk reads.
const STRIDE: u32 = 256;

/// How often a write is tried again that found no memory.
const ATTEMPTS: u32 = 5;

/// A map. Its sizes were checked when it was opened, so that no call reads or writes beyond a value.
#[derive(Debug)]
pub(super) struct Map<K, V> {
    fd: OwnedFd,
    name: &'static str,
    max_entries: u32,
    /// Values per element: 1, or the number of possible CPUs.
    width: usize,
    types: PhantomData<(K, V)>,
}

impl<K: Pod, V: Pod> Map<K, V> {
    /// Opens a pinned map.
    pub(super) fn open(directory: &Path, name: &'static str, read_only: bool) -> Result<Self, MapError> {
        Self::open_wide(directory, name, read_only, 1)
    }

    /// Opens a pinned per-CPU map. Values are multiples of 8 octets, as the kernel lays them out.
    pub(super) fn open_per_cpu(
        directory: &Path,
        name: &'static str,
        read_only: bool,
        cpus: usize,
    ) -> Result<Self, MapError> {
        const { assert!(size_of::<V>().is_multiple_of(8)) };
        Self::open_wide(directory, name, read_only, cpus)
    }

    fn open_wide(directory: &Path, name: &'static str, read_only: bool, width: usize) -> Result<Self, MapError> {
        let pin: PathBuf = directory.join(name);
        let fd = syscall::open_pin(&pin, read_only).map_err(|source| MapError::Open { pin: pin.clone(), source })?;
        let info = syscall::map_info(fd.as_fd()).map_err(|source| MapError::Open { pin: pin.clone(), source })?;
        if (info.key_size as usize, info.value_size as usize) != (size_of::<K>(), size_of::<V>()) {
            return Err(MapError::Layout { pin });
        }
        Ok(Self { fd, name, max_entries: info.max_entries, width, types: PhantomData })
    }

    pub(super) const fn max_entries(&self) -> u32 {
        self.max_entries
    }

    pub(super) fn get(&self, key: &K) -> Result<Option<V>, MapError> {
        let mut values = buffer::<V>(self.width);
        let found = syscall::map_lookup(self.fd.as_fd(), bytes_of(key), &mut values);
        Ok(found.map_err(|source| self.error("look up in", source))?.then(|| read(&values, 0)))
    }

    pub(super) fn put(&self, key: &K, value: &V) -> Result<(), MapError> {
        let mut attempts = 0;
        loop {
            match syscall::map_update(self.fd.as_fd(), bytes_of(key), bytes_of(value)) {
                // Maps without preallocation refill a small cache of elements in the background (6.1); a burst can be
                // ahead of it.
                Err(error) if error.raw_os_error() == Some(libc::ENOMEM) && attempts < ATTEMPTS => {
                    attempts += 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
                result => return result.map_err(|source| self.error("write to", source)),
            }
        }
    }

    /// Writes an element unless there is one with this key.
    pub(super) fn insert(&self, key: &K, value: &V) -> Result<(), MapError> {
        let inserted = syscall::map_insert(self.fd.as_fd(), bytes_of(key), bytes_of(value));
        inserted.map_err(|source| self.error("write to", source))
    }

    /// Writes an element of a per-CPU map, a value for each CPU.
    pub(super) fn put_wide(&self, key: &K, values: &[V]) -> Result<(), MapError> {
        let octets: Vec<u8> = values.iter().flat_map(bytes_of).copied().collect();
        assert_eq!(values.len(), self.width, "a value for each CPU");
        let written = syscall::map_update(self.fd.as_fd(), bytes_of(key), &octets);
        written.map_err(|source| self.error("write to", source))
    }

    /// Writes elements in as few system calls as the kernel allows.
    pub(super) fn put_all(&self, elements: &[(K, V)]) -> Result<(), MapError> {
        let written = self.put_together(elements);
        elements[written..].iter().try_for_each(|(key, value)| self.put(key, value))
    }

    /// Writes elements in order by batch system calls, up to the first one that is better tried alone. Returns how many
    /// were written: none on kernels without batches.
    pub(super) fn put_together(&self, elements: &[(K, V)]) -> usize {
        let mut keys = Vec::with_capacity(elements.len() * size_of::<K>());
        let mut values = Vec::with_capacity(elements.len() * size_of::<V>());
        for (key, value) in elements {
            keys.extend_from_slice(bytes_of(key));
            values.extend_from_slice(bytes_of(value));
        }
        let (mut written, mut attempts) = (0, 0);
        while written < elements.len() {
            let count = u32::try_from(elements.len() - written).unwrap_or(u32::MAX);
            let (keys, values) = (&keys[written * size_of::<K>()..], &values[written * size_of::<V>()..]);
            let (now, result) = syscall::map_update_batch(self.fd.as_fd(), keys, values, count);
            written += now as usize;
            match result {
                Ok(()) => {}
                // As with single writes, the kernel's cache of elements needs a moment.
                Err(error) if error.raw_os_error() == Some(libc::ENOMEM) && (now > 0 || attempts < ATTEMPTS) => {
                    attempts = if now > 0 { 0 } else { attempts + 1 };
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(_) => break,
            }
        }
        written
    }

    /// Deletes an element; it need not be there.
    pub(super) fn delete(&self, key: &K) -> Result<bool, MapError> {
        syscall::map_delete(self.fd.as_fd(), bytes_of(key)).map_err(|source| self.error("delete from", source))
    }

    /// Every element; in a map that changes meanwhile, each that was there all the time at least once.
    pub(super) fn dump(&self) -> Result<Vec<(K, V)>, MapError> {
        self.dump_while(|_| true)
    }

    /// As [`Self::dump`], but no more elements after the first one whose key is not wanted: of an array, the first ones.
    pub(super) fn dump_while(&self, wanted: impl Fn(&K) -> bool) -> Result<Vec<(K, V)>, MapError> {
        self.dump_with(|key, values, elements| {
            let wanted = wanted(&key);
            elements.extend(wanted.then(|| (key, read(values, 0))));
            wanted
        })
    }

    /// What `digest` makes of every element, some or nothing. No more than that is held in memory.
    pub(super) fn dump_as<I: IntoIterator>(&self, digest: impl Fn(&K, &V) -> I) -> Result<Vec<I::Item>, MapError> {
        self.dump_with(|key, values, elements| {
            elements.extend(digest(&key, &read(values, 0)));
            true
        })
    }

    /// Every element, with one value per CPU for a per-CPU map.
    pub(super) fn dump_wide(&self) -> Result<Vec<(K, Vec<V>)>, MapError> {
        self.dump_with(|key, values, elements| {
            elements.push((key, (0..self.width).map(|cpu| read(values, cpu)).collect()));
            true
        })
    }

    /// What `take` keeps of the elements, until it says that it wants no more.
    fn dump_with<T>(&self, take: impl Fn(K, &[u8], &mut Vec<T>) -> bool) -> Result<Vec<T>, MapError> {
        let mut count = BATCH.min(self.max_entries.max(1));
        loop {
            match self.dump_batches(count, &take) {
                // A bucket has more elements than the buffer.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => count *= 2,
                Err(error) if lacks_batches(&error) => {
                    return self.dump_one_by_one(&take).map_err(|source| self.error("dump", source));
                }
                result => return result.map_err(|source| self.error("dump", source)),
            }
        }
    }

    fn dump_batches<T>(&self, count: u32, take: impl Fn(K, &[u8], &mut Vec<T>) -> bool) -> io::Result<Vec<T>> {
        let room = count as usize;
        let (mut keys, mut values) = (buffer::<K>(room), buffer::<V>(room * self.width));
        let mut cursor = Cursor::default();
        let mut elements = Vec::new();
        loop {
            let (read_now, end) =
                syscall::map_lookup_batch(self.fd.as_fd(), &mut cursor, &mut keys, &mut values, count)?;
            let values = values.chunks_exact(self.width * size_of::<V>());
            for (index, values) in values.take(read_now as usize).enumerate() {
                if !take(read(&keys, index), values, &mut elements) {
                    return Ok(elements);
                }
            }
            if end {
                return Ok(elements);
            }
        }
    }

    fn dump_one_by_one<T>(&self, take: impl Fn(K, &[u8], &mut Vec<T>) -> bool) -> io::Result<Vec<T>> {
        let mut elements = Vec::new();
        let (mut key, mut next, mut values) = (None::<Vec<u8>>, buffer::<K>(1), buffer::<V>(self.width));
        // A key that vanished starts the kernel over: there are never more keys than this.
        for _ in 0..=self.max_entries {
            if !syscall::map_next_key(self.fd.as_fd(), key.as_deref(), &mut next)?
                || syscall::map_lookup(self.fd.as_fd(), &next, &mut values)?
                    && !take(read(&next, 0), &values, &mut elements)
            {
                break;
            }
            key = Some(next.clone());
        }
        Ok(elements)
    }

    /// The next elements of a walk, some hundreds at a time; `None` at its end. Of those that are in a hash all the time it
    /// misses none.
    pub(super) fn walk(&self, walk: &mut Walk) -> Result<Option<Vec<(K, V)>>, MapError> {
        if walk.over {
            return Ok(None);
        }
        let mut count = STRIDE.min(self.max_entries.max(1));
        loop {
            let room = count as usize;
            let (mut keys, mut values) = (buffer::<K>(room), buffer::<V>(room));
            match syscall::map_lookup_batch(self.fd.as_fd(), &mut walk.cursor, &mut keys, &mut values, count) {
                Ok((number, end)) => {
                    walk.over = end;
                    return Ok(Some((0..number as usize).map(|at| (read(&keys, at), read(&values, at))).collect()));
                }
                // A bucket has more elements than the buffer.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => count *= 2,
                // Not of this kind of map, or not on this kernel: then all at once.
                Err(error) if lacks_batches(&error) => {
                    walk.over = true;
                    return self.dump().map(Some);
                }
                Err(error) => return Err(self.error("walk over", error)),
            }
        }
    }

    fn error(&self, action: &'static str, source: io::Error) -> MapError {
        match source.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) if action == "write to" => {
                MapError::Full { map: self.name, max_entries: self.max_entries, source }
            }
            Some(libc::ENOMEM) if action == "write to" => MapError::NoMemory { map: self.name, source },
            _ => MapError::Access { action, map: self.name, source },
        }
    }
}

impl<V: Pod> Map<u32, V> {
    /// Elements of an array, from one index on.
    pub(super) fn get_range(&self, first: u32, number: u32) -> Result<Vec<V>, MapError> {
        let mut cursor = first.checked_sub(1).map_or_else(Cursor::default, Cursor::behind);
        let (mut keys, mut values) = (buffer::<u32>(number as usize), buffer::<V>(number as usize));
        match syscall::map_lookup_batch(self.fd.as_fd(), &mut cursor, &mut keys, &mut values, number) {
            Ok((found, _)) => Ok((0..found as usize).map(|at| read(&values, at)).collect()),
            Err(error) if lacks_batches(&error) => {
                (first..first.saturating_add(number)).filter_map(|index| self.get(&index).transpose()).collect()
            }
            Err(error) => Err(self.error("look up in", error)),
        }
    }
}

/// How far a walk over a map has got.
#[derive(Default)]
pub(super) struct Walk {
    cursor: Cursor,
    over: bool,
}

/// The kernel has no batch operations, or not for this kind of map.
fn lacks_batches(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTSUP | ENOTSUPP))
}

/// The kernel's own "operation is not supported", which escapes from some map types.
const ENOTSUPP: i32 = 524;

fn buffer<T>(elements: usize) -> Vec<u8> {
    vec![0; elements * size_of::<T>()]
}

fn bytes_of<T: Pod>(value: &T) -> &[u8] {
    // SAFETY: a `Pod` map key or value has no padding, so each of its octets is initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

fn read<T: Pod>(bytes: &[u8], element: usize) -> T {
    let bytes = &bytes[element * size_of::<T>()..][..size_of::<T>()];
    // SAFETY: the slice has the size of a `T`, and any octets are a valid `Pod`.
    unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) }
}
