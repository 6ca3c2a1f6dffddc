//! The dataplane on this machine's kernel: pins, links, restarts, crashes, and what it refuses. Each test has its own pin
//! directory, network namespace and cgroup, and never touches the machine's interfaces or its root cgroup.

mod audit;
mod bench;
mod full;
mod links;
mod networks;
mod pins;
mod programs;
mod repair;
mod resize;
