//! Reading elements that the controller replaces while programs run.
//!
//! The kernel may recycle a replaced hash element at once, while a reader on another CPU still holds its pointer. So a
//! reader copies the value, looks the key up again, and accepts the copy only if the element found then is equal to it
//! word by word. The version at a value's start is unique over all writes, so equality means that it is the same write:
//! a copy that mixes two writes, or that is another key's, can't be equal to what the second lookup finds.

use core::mem::MaybeUninit;

use sheave_common::DropReason;
use sheave_common::backend::{Backend, flags};
use sheave_common::frontend::{Frontend, FrontendKey};

use crate::maps::{self, Family};

/// How often a read is tried before the packet is given up.
const ATTEMPTS: u32 = 4;

/// Copies an element's value; `Ok(None)` if the key is absent.
#[inline(always)]
fn read<V: Copy>(lookup: impl Fn() -> Option<*const V>) -> Result<Option<V>, DropReason> {
    let mut value = MaybeUninit::uninit();
    let found = read_into(lookup, value.as_mut_ptr())?;
    // SAFETY: it is filled if it was found.
    Ok(if found { Some(unsafe { value.assume_init() }) } else { None })
}

/// Copies an element's value to `place`; false if the key is absent.
#[inline(always)]
fn read_into<V: Copy>(lookup: impl Fn() -> Option<*const V>, place: *mut V) -> Result<bool, DropReason> {
    for _ in 0..ATTEMPTS {
        let Some(first) = lookup() else { return Ok(false) };
        // A map value stays readable memory while the program runs, whatever it is reused for.
        maps::copy_words(first, place);
        let Some(second) = lookup() else { continue };
        if same(place, second) {
            return Ok(true);
        }
    }
    Err(DropReason::Contended)
}

/// Compares two values word by word.
#[inline(always)]
fn same<V>(left: *const V, right: *const V) -> bool {
    let (left, right) = (left.cast::<u64>(), right.cast::<u64>());
    for word in 0..size_of::<V>() / 8 {
        // SAFETY: both values are 8-byte aligned and a multiple of 8 bytes long (asserted in `sheave_common`).
        if unsafe { left.add(word).read_volatile() != right.add(word).read_volatile() } {
            return false;
        }
    }
    true
}

/// A frontend, whole.
#[inline(always)]
pub fn frontend<A: Family>(key: &FrontendKey<A>) -> Result<Option<Frontend>, DropReason> {
    read(|| A::frontend(key))
}

/// Whether a frontend is there and belongs to this service port. What says otherwise is looked at again, since it may have
/// been an element that was just recycled.
#[inline(always)]
pub fn serves<A: Family>(key: &FrontendKey<A>, service_id: u32) -> bool {
    (0..2).any(|_| {
        A::frontend(key)
            // SAFETY: a map value stays readable memory while the program runs, and this is one aligned word.
            .is_some_and(|element| unsafe { (&raw const (*element).service_id).read_volatile() } == service_id)
    })
}

/// Whether a backend is there and serves the flows that it has: one that left stays for a moment, for packets in flight. What
/// says otherwise is looked at again, since it may have been an element that was just recycled.
#[inline(always)]
pub fn is_serving<A: Family>(id: u32) -> bool {
    (0..2).any(|_| {
        A::backend(id)
            // SAFETY: a map value stays readable memory while the program runs, and this is one aligned word.
            .is_some_and(|element| unsafe { (&raw const (*element).flags).read_volatile() } & flags::SERVING != 0)
    })
}

/// Reads a backend into `place`, whole; false if there is none.
#[inline(always)]
pub fn backend<A: Family>(id: u32, place: *mut Backend<A>) -> Result<bool, DropReason> {
    read_into(|| A::backend(id), place)
}
