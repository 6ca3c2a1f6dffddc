//! The same services for rulesets of kube-proxy's shape and as Kubernetes objects.

use std::net::Ipv4Addr;

use serde_json::{Value, json};
use sheave_tests::kube_proxy;

use super::server::{BULK, TCP, UDP};

/// One port of one service.
#[derive(Clone, Copy, Debug)]
struct Port {
    number: u32,
    address: Ipv4Addr,
    protocol: &'static str,
    port: u16,
}

/// ClusterIP of a service by its number, below 50 000.
pub(crate) fn address(number: u32) -> Ipv4Addr {
    let [_, _, _, third] = (number / 250).to_be_bytes();
    let [_, _, _, fourth] = (number % 250 + 1).to_be_bytes();
    Ipv4Addr::new(10, 96, third, fourth)
}

/// The first service's nodePort for a port.
pub(crate) fn node_port(port: u16) -> u16 {
    30_000 + port % 1_000
}

/// Every service answers TCP; the first one takes datagrams and bulk data, too.
fn ports(count: u32) -> impl Iterator<Item = Port> {
    let first = [("udp", UDP), ("tcp", BULK)];
    let more = first.map(|(protocol, port)| Port { number: 0, address: address(0), protocol, port });
    (0..count).map(|number| Port { number, address: address(number), protocol: "tcp", port: TCP }).chain(more)
}

/// The same ports for kube-proxy's rulesets, one endpoint each.
pub(crate) fn ruleset(count: u32, backend: Ipv4Addr) -> Vec<kube_proxy::Port> {
    let ports = ports(count).map(|Port { number, address, protocol, port }| kube_proxy::Port {
        name: format!("{number:06}{protocol}{port}"),
        at: (address, port).into(),
        protocol,
        // The first service's ports have one.
        node_port: (number == 0).then_some(node_port(port)),
        endpoints: vec![(backend, port).into()],
    });
    ports.collect()
}

/// Services and EndpointSlices, one endpoint each.
pub(crate) fn objects(count: u32, backend: Ipv4Addr, node: &str) -> Vec<Value> {
    let mut objects = Vec::new();
    for number in 0..count {
        let name = format!("s{number}");
        let mut own = vec![("tcp", "TCP", TCP)];
        if number == 0 {
            own.extend([("udp", "UDP", UDP), ("bulk", "TCP", BULK)]);
        }
        let port = |(name, protocol, port): &(&str, &str, u16)| {
            let mut fields = json!({"name": name, "protocol": protocol, "port": port});
            if number == 0 {
                fields["nodePort"] = node_port(*port).into();
            }
            fields
        };
        let ports: Vec<Value> = own.iter().map(port).collect();
        let kind = if number == 0 { "NodePort" } else { "ClusterIP" };
        objects.push(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "bench"},
            "spec": {"type": kind, "clusterIP": address(number), "clusterIPs": [address(number)], "ports": ports}}));
        objects.push(json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("{name}-1"), "namespace": "bench", "labels": {"kubernetes.io/service-name": name}},
            "ports": ports, "endpoints": [{"addresses": [backend], "nodeName": node}]}));
    }
    objects
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::address;

    /// Two services would be one, and the rulesets would be shorter than they say.
    #[test]
    fn fifty_thousand_services_have_addresses_of_their_own() {
        let addresses: BTreeSet<_> = (0..50_000).map(address).collect();
        assert_eq!(addresses.len(), 50_000);
        assert!(addresses.iter().all(|address| address.octets()[..2] == [10, 96]));
    }
}
