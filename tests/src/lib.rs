//! What Sheave's tests and the demo stand on: small clusters made of network namespaces, servers and clients in them, a
//! running `sheave` on a node, and the manifests that it reads.
//!
//! Nothing here touches the machine's own interfaces or its root cgroup, and everything made is removed when its value
//! is dropped, after a panic too. What a killed run leaves (pins, cgroups, folders) carries its process id, and the next
//! run removes it ([`leftovers`]); namespaces and child processes end with the process that made them.

pub mod agent;
pub mod api_server;
pub mod cgroup;
pub mod client;
pub mod config;
pub mod container;
pub mod family;
pub mod flood;
pub mod follower;
pub mod forward;
pub mod fuzz;
pub mod gate;
pub mod held;
pub mod http;
pub mod kube_api;
pub mod kube_proxy;
pub mod kubectl;
pub mod leftovers;
pub mod liar;
pub mod log;
pub mod manifests;
pub mod netns;
pub mod objects;
pub mod oracle;
pub mod other_build;
pub mod packet;
pub mod patience;
pub mod process;
pub mod program;
pub mod raw_bpf;
pub mod raw_packets;
pub mod real_server;
pub mod scenario;
pub mod server;
pub mod soak;
pub mod topology;
pub mod tutorial;
pub mod wire;
