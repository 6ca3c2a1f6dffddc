//! The kernel's maps, by the names and methods of `aya_ebpf::btf_maps`.
//!
//! As in the kernel, an element that is replaced or removed stays readable until the program has run ([`Clear::clear`] is called
//! between inputs only).

use std::borrow::Borrow;
use std::cell::UnsafeCell;
use std::collections::HashMap as StdHashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::mem::MaybeUninit;

/// The kernel's EEXIST, ENOENT and E2BIG.
const EXISTS: i32 = -17;
const ABSENT: i32 = -2;
const FULL: i32 = -7;
/// BPF_NOEXIST and BPF_EXIST.
const NOEXIST: u64 = 1;
const EXIST: u64 = 2;

/// Elements by the bytes of their keys, which is what the kernel compares. The hash is the same each time, and so is their order.
struct Elements<V> {
    live: StdHashMap<Box<[u8]>, Box<UnsafeCell<V>>, BuildHasherDefault<DefaultHasher>>,
    gone: Vec<Box<UnsafeCell<V>>>,
}

impl<V> Elements<V> {
    const fn new() -> Self {
        Self { live: StdHashMap::with_hasher(BuildHasherDefault::new()), gone: Vec::new() }
    }

    fn get(&self, key: &[u8]) -> Option<*mut V> {
        self.live.get(key).map(|element| element.get())
    }

    fn insert(&mut self, key: &[u8], value: V, flags: u64, limit: usize) -> Result<(), i32> {
        let known = self.live.contains_key(key);
        match flags {
            NOEXIST if known => return Err(EXISTS),
            EXIST if !known => return Err(ABSENT),
            _ if !known && self.live.len() >= limit => return Err(FULL),
            _ => {}
        }
        self.gone.extend(self.live.insert(key.into(), Box::new(UnsafeCell::new(value))));
        Ok(())
    }

    fn remove(&mut self, key: &[u8]) -> Result<(), i32> {
        self.gone.push(self.live.remove(key).ok_or(ABSENT)?);
        Ok(())
    }
}

/// A map's elements behind a shared reference. Only the holder of [`crate::kernel::Kernel`] gets here, and a program runs on
/// one processor, so nothing else uses them meanwhile.
struct Shared<V>(UnsafeCell<Elements<V>>);

// SAFETY: as above.
unsafe impl<V> Sync for Shared<V> {}

impl<V> Shared<V> {
    const fn new() -> Self {
        Self(UnsafeCell::new(Elements::new()))
    }

    #[expect(clippy::mut_from_ref, reason = "what the kernel's maps are")]
    fn elements(&self) -> &mut Elements<V> {
        // SAFETY: as above; no reference outlives the method that takes it.
        unsafe { &mut *self.0.get() }
    }
}

/// The bytes of a key.
fn bytes<K>(key: &K) -> &[u8] {
    // SAFETY: keys have no padding (asserted in `sheave_common`), and are read only.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(key).cast(), size_of::<K>()) }
}

/// What is emptied between inputs.
pub trait Clear {
    /// Removes every element.
    fn clear(&self);
}

macro_rules! hash_map {
    ($($name:ident)+) => {
        $(
            pub struct $name<K, V, const ENTRIES: usize, const FLAGS: usize = 0>(
                Shared<V>,
                std::marker::PhantomData<fn(K)>,
            );

            impl<K: Copy, V: Copy, const ENTRIES: usize, const FLAGS: usize> $name<K, V, ENTRIES, FLAGS> {
                #[expect(clippy::new_without_default, reason = "aya's shape")]
                pub const fn new() -> Self {
                    Self(Shared::new(), std::marker::PhantomData)
                }

                /// # Safety
                ///
                /// As for aya's: the element may change.
                pub unsafe fn get(&self, key: impl Borrow<K>) -> Option<&V> {
                    // SAFETY: elements stay in place until the maps are cleared.
                    self.get_ptr(key).map(|element| unsafe { &*element })
                }

                pub fn get_ptr(&self, key: impl Borrow<K>) -> Option<*const V> {
                    self.get_ptr_mut(key).map(<*mut V>::cast_const)
                }

                pub fn get_ptr_mut(&self, key: impl Borrow<K>) -> Option<*mut V> {
                    self.0.elements().get(bytes(key.borrow()))
                }

                pub fn insert(&self, key: impl Borrow<K>, value: impl Borrow<V>, flags: u64) -> Result<(), i32> {
                    self.0.elements().insert(bytes(key.borrow()), *value.borrow(), flags, ENTRIES)
                }

                pub fn remove(&self, key: impl Borrow<K>) -> Result<(), i32> {
                    self.0.elements().remove(bytes(key.borrow()))
                }

                /// A copy of every element.
                pub fn dump(&self) -> Vec<(K, V)> {
                    let entry = |(key, value): (&Box<[u8]>, &Box<UnsafeCell<V>>)| {
                        // SAFETY: the key is a K's bytes, and the element is this map's.
                        unsafe { (key.as_ptr().cast::<K>().read_unaligned(), *value.get()) }
                    };
                    self.0.elements().live.iter().map(entry).collect()
                }
            }

            impl<K, V, const ENTRIES: usize, const FLAGS: usize> Clear for $name<K, V, ENTRIES, FLAGS> {
                fn clear(&self) {
                    *self.0.elements() = Elements::new();
                }
            }
        )+
    };
}

hash_map!(HashMap LruHashMap);

macro_rules! array {
    ($($name:ident)+) => {
        $(
            /// An array, whose elements are zero until they are written.
            pub struct $name<V, const ENTRIES: usize>(Shared<V>);

            impl<V: Copy, const ENTRIES: usize> $name<V, ENTRIES> {
                #[expect(clippy::new_without_default, reason = "aya's shape")]
                pub const fn new() -> Self {
                    Self(Shared::new())
                }

                pub fn get(&self, index: u32) -> Option<&V> {
                    // SAFETY: elements stay in place until the maps are cleared.
                    self.get_ptr_mut(index).map(|element| unsafe { &*element })
                }

                pub fn get_ptr(&self, index: u32) -> Option<*const V> {
                    self.get_ptr_mut(index).map(<*mut V>::cast_const)
                }

                /// A copy of every element that was ever asked for, with its index.
                pub fn dump(&self) -> Vec<(u32, V)> {
                    let index = |key: &[u8]| key.iter().fold(0, |index, byte| index << 8 | u32::from(*byte));
                    let elements = self.0.elements().live.iter();
                    // SAFETY: the elements are this map's, and no program runs.
                    elements.map(|(key, element)| (index(key), unsafe { *element.get() })).collect()
                }

                pub fn get_ptr_mut(&self, index: u32) -> Option<*mut V> {
                    if index as usize >= ENTRIES {
                        return None;
                    }
                    let elements = self.0.elements();
                    let key = index.to_be_bytes();
                    if let Some(element) = elements.get(&key) {
                        return Some(element);
                    }
                    // SAFETY: the maps' values are plain numbers, for which zeroes are a value.
                    let zero = unsafe { MaybeUninit::<V>::zeroed().assume_init() };
                    elements.insert(&key, zero, 0, ENTRIES).ok()?;
                    elements.get(&key)
                }
            }

            impl<V, const ENTRIES: usize> Clear for $name<V, ENTRIES> {
                fn clear(&self) {
                    *self.0.elements() = Elements::new();
                }
            }
        )+
    };
}

array!(Array PerCpuArray);

/// A trie: the longest prefix counts.
pub struct LpmTrie<K, V, const ENTRIES: usize>(Shared<V>, std::marker::PhantomData<fn(K)>);

pub mod lpm_trie {
    /// A prefix: its length in bits, and its data.
    #[derive(Clone, Copy)]
    #[repr(C, packed)]
    pub struct Key<K> {
        pub prefix_len: u32,
        pub data: K,
    }

    impl<K> Key<K> {
        pub const fn new(prefix_len: u32, data: K) -> Self {
            Self { prefix_len, data }
        }
    }
}

/// Which bits of the byte at an index are among the first `bits`.
fn mask(index: u32, bits: u32) -> u8 {
    !u8::MAX.checked_shr(bits.saturating_sub(index * 8).min(8)).unwrap_or(0)
}

/// The first bits of some bytes, and how many: what an element is kept under.
fn prefix(data: &[u8], bits: u32) -> Vec<u8> {
    let masked = (0..).zip(data).map(|(index, byte)| byte & mask(index, bits));
    masked.chain(bits.to_be_bytes()).collect()
}

/// How many bits a prefix has, if it is one of some bytes.
fn length_of(prefix: &[u8], data: &[u8]) -> Option<u32> {
    let (start, bits) = prefix.split_last_chunk()?;
    let bits = u32::from_be_bytes(*bits);
    let is_prefix =
        (0..).zip(start.iter().zip(data)).all(|(index, (one, other))| (one ^ other) & mask(index, bits) == 0);
    is_prefix.then_some(bits)
}

impl<K: Copy, V: Copy, const ENTRIES: usize> LpmTrie<K, V, ENTRIES> {
    #[expect(clippy::new_without_default, reason = "aya's shape")]
    pub const fn new() -> Self {
        Self(Shared::new(), std::marker::PhantomData)
    }

    pub fn get(&self, key: &lpm_trie::Key<K>) -> Option<&V> {
        let (data, limit) = (key.data, key.prefix_len);
        // There are few, so they are all looked at.
        let matching = self.0.elements().live.iter().filter_map(|(prefix, element)| {
            let bits = length_of(prefix, bytes(&data)).filter(|bits| *bits <= limit)?;
            Some((bits, element.get()))
        });
        let longest = matching.max_by_key(|(bits, _)| *bits).map(|(_, element)| element);
        // SAFETY: elements stay in place until the maps are cleared.
        longest.map(|element| unsafe { &*element })
    }

    pub fn insert(&self, key: &lpm_trie::Key<K>, value: V) -> Result<(), i32> {
        let data = key.data;
        self.0.elements().insert(&prefix(bytes(&data), key.prefix_len), value, 0, ENTRIES)
    }
}

impl<K, V, const ENTRIES: usize> Clear for LpmTrie<K, V, ENTRIES> {
    fn clear(&self) {
        *self.0.elements() = Elements::new();
    }
}

/// A ring buffer that keeps the last record.
pub struct RingBuf<T, const BYTES: usize>(Shared<T>);

/// Room for a record.
pub struct RingBufEntry<T>(*mut MaybeUninit<T>);

impl<T> RingBufEntry<T> {
    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.0.cast()
    }

    pub fn submit(self, _flags: u64) {}
}

impl<T: Copy, const BYTES: usize> RingBuf<T, BYTES> {
    #[expect(clippy::new_without_default, reason = "aya's shape")]
    pub const fn new() -> Self {
        Self(Shared::new())
    }

    pub fn reserve(&self, _flags: u64) -> Option<RingBufEntry<T>> {
        let elements = self.0.elements();
        // SAFETY: events are plain numbers.
        let zero = unsafe { MaybeUninit::<T>::zeroed().assume_init() };
        elements.insert(&[], zero, 0, 1).ok()?;
        Some(RingBufEntry(elements.get(&[])?.cast()))
    }
}

impl<T, const BYTES: usize> Clear for RingBuf<T, BYTES> {
    fn clear(&self) {
        *self.0.elements() = Elements::new();
    }
}
