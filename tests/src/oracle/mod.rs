//! A second reading of what a Service means: plain, slow code over Kubernetes' own objects that says what must become of a
//! packet. The model-based test compares it with the real programs.
//!
//! Written from the rules alone. It shares no code with Sheave's model, plan or programs, and must not begin to: a mistake
//! that both make is one that no random packet finds. [`generate`] and [`mutate`] make clusters, [`packets`] what is sent in
//! them, [`real`] is Sheave, and [`history`] lets the two meet.

mod answer;
mod cluster;
mod endpoints;
mod frames;
mod frontends;
mod generate;
pub mod history;
pub mod killed;
mod memory;
mod mutate;
mod network;
mod packets;
mod real;
mod settle;

pub use answer::{Answer, Edge, Oracle, Packet, Protocol, Refusal, Source};
pub use cluster::{Cluster, NodePorts, Options, THIS_NODE};
