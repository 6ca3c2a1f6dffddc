//! Sheave's controller: from Services and EndpointSlices to pinned BPF maps. ARCHITECTURE.md has the map of the house.
//!
//! Arrows run down only: `cli` → `controller` → `serve` → `dataplane` → `plan` → `model`, and `source` → `model`.

/// The BPF object file that this build embeds.
pub static EBPF_OBJECT: &[u8] = aya::include_bytes_aligned!(env!("SHEAVE_EBPF_OBJECT"));

pub mod check;
pub mod cli;
pub mod config;
pub mod controller;
pub mod dataplane;
pub mod interfaces;
pub mod model;
pub mod netfilter;
pub mod plan;
pub mod serve;
pub mod source;
