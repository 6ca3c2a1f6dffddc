//! The kernel programs, compiled for the host from the very files in `ebpf/src`, so that they can be fuzzed under a
//! sanitizer: packets are exactly as long as they are, and every helper checks what the kernel's checks.
//!
//! This crate stands in for `aya_ebpf`: [`btf_maps`], [`helpers`] and [`programs`] are what the kernel is to the programs,
//! [`kernel`] is what a test tells that kernel and hears from it. Connect-time programs have no packet and are left out, as are
//! the entry points of `main`, whose few lines [`kernel::Kernel::run`] repeats.
//!
//! The maps are the programs' statics, so there is one kernel in a process: [`kernel::Kernel::boot`] waits for its turn.

#![expect(missing_docs, reason = "the programs' own items, which are private there")]
#![expect(unreachable_pub, reason = "a program has no API; `pub` marks what its modules share")]
#![expect(clippy::missing_safety_doc, reason = "the kernel's helpers ask what the kernel's do")]
#![expect(
    clippy::explicit_counter_loop,
    clippy::manual_is_multiple_of,
    clippy::semicolon_if_nothing_returned,
    reason = "the programs are no crate of the host"
)]

// So that `aya_ebpf::…` in the programs means this crate.
extern crate self as aya_ebpf;

pub mod btf_maps;
pub mod helpers;
pub mod kernel;
pub mod memory;
pub mod parsing;
pub mod programs;

pub use programs::EbpfContext;

/// The kernel's types and constants.
pub mod bindings {
    pub use aya_ebpf_bindings::bindings::*;
}

/// The macro that marks a map.
pub mod macros {
    pub use aya_ebpf_macros::btf_map;
}

/// The programs' own clock. What the kernel can do is a constant of the loaded object there, and a setting here.
#[path = "../../../ebpf/src/features.rs"]
mod object_features;

mod features {
    pub use sheave_common::features::*;

    pub use crate::object_features::{elapsed, now, stamp};

    pub fn has(feature: u32) -> bool {
        crate::kernel::with(|state| state.features & feature != 0)
    }
}

include!(concat!(env!("OUT_DIR"), "/programs.rs"));
