//! Memory of one program run, for what does not fit on BPF's 512 bytes of stack.
//!
//! Each CPU has its own, and a run has it alone: tc and XDP programs run with bottom halves off, so none interrupts
//! another. Connect-time programs run in processes, which packets interrupt: they must not use it.

use core::mem::MaybeUninit;

use sheave_common::flow::{Flow, FlowKey, Tuple};

use crate::balance::Choice;
use crate::maps::Family;
use crate::packet::Packet;
use crate::packet::network::Quote;

/// Words of the maps' values.
pub const WORDS: usize = 56;

/// What it is used for. Each field belongs to one function at a time.
#[repr(C)]
pub struct Scratch<A: Family> {
    /// The packet of this run, for families whose stack it would fill.
    pub packet: MaybeUninit<Packet<A>>,
    /// Its flow.
    pub flow: MaybeUninit<Flow<A>>,
    /// The backend of a new flow.
    pub choice: MaybeUninit<Choice<A>>,
    /// Key of a new flow.
    pub forward: FlowKey<A>,
    /// A new flow.
    pub new_flow: MaybeUninit<Flow<A>>,
    /// Key of a flow's sibling.
    pub sibling_key: FlowKey<A>,
    /// The sibling.
    pub sibling: Flow<A>,
    /// What an ICMP error quotes.
    pub quote: MaybeUninit<Quote<A>>,
    /// Its own addresses after the rewrite.
    pub outer: Tuple<A>,
}

/// This CPU's scratch; `None` only if the verifier's view of an array were true.
#[inline(always)]
pub fn scratch<A: Family>() -> Option<*mut Scratch<A>> {
    const { assert!(size_of::<Scratch<A>>() <= WORDS * 8 && align_of::<Scratch<A>>() <= 8) };
    A::scratch().map(<*mut [u64; WORDS]>::cast)
}
