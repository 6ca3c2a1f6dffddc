//! The running kernel takes every program: its verifier at a known cost, and every hook.
//!
//! `cargo xtask vm test` runs this on every kernel that Sheave supports.

mod attach;
mod cost;
mod table;
