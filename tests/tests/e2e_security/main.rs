//! What a pod that means harm can't do: reach whom a policy forbids, act as another, or talk to what is not for it.
//! Sheave runs on node 1.

mod network_policy;
mod ports;
mod rights;
mod spoofing;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use sheave_tests::family::Family;
use sheave_tests::manifests::Service;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const WEB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
const NODE_PORT: u16 = 30_500;

/// A Service of both families, with a nodePort.
fn web() -> Service {
    Service::new("web", WEB)
        .and(WEB6)
        .tcp("http", 80, server::WHO)
        .node_port(NODE_PORT)
        .tcp("echo", 7, server::ECHO)
        .udp("udp", 53, server::UDP)
}

fn web_at(scenario: &Scenario, family: Family, port: u16) -> SocketAddr {
    scenario.at(family.pick(WEB, WEB6), port)
}
