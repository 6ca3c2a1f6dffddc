//! The same services as rulesets of kube-proxy's shape and as Kubernetes objects.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use serde_json::{Value, json};

use super::server::{BULK, TCP, UDP};

/// A ruleset's mark for packets that are to be masqueraded, as kube-proxy has it.
const MASQUERADE: &str = "0x4000";
/// The pods' network: clients in it are not masqueraded.
const PODS: &str = "10.244.0.0/16";

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

impl Port {
    /// What tells its chains from others'.
    fn chain(&self) -> String {
        format!("{:06}{}{}", self.number, self.protocol, self.port)
    }

    /// Its nodePort: the first service's have one.
    fn node_port(&self) -> Option<u16> {
        (self.number == 0).then_some(node_port(self.port))
    }
}

/// `iptables-restore` input: kube-proxy's iptables mode, one endpoint each.
pub(crate) fn iptables(count: u32, backend: Ipv4Addr) -> String {
    let mut chains = String::new();
    let mut rules = String::new();
    for port in ports(count) {
        let (chain, node_port, Port { address, protocol, port, number }) = (port.chain(), port.node_port(), port);
        let destination = format!("-d {address}/32 -p {protocol} -m {protocol} --dport {port}");
        let _ = writeln!(chains, ":KUBE-SVC-{chain} - [0:0]\n:KUBE-SEP-{chain} - [0:0]");
        let _ = writeln!(
            rules,
            "-A KUBE-SERVICES {destination} -m comment --comment \"bench/s{number} cluster IP\" -j KUBE-SVC-{chain}\n\
             -A KUBE-SVC-{chain} ! -s {PODS} {destination} -m comment --comment \"bench/s{number} cluster IP\" -j KUBE-MARK-MASQ\n\
             -A KUBE-SVC-{chain} -m comment --comment \"bench/s{number} -> {backend}:{port}\" -j KUBE-SEP-{chain}\n\
             -A KUBE-SEP-{chain} -s {backend}/32 -m comment --comment \"bench/s{number}\" -j KUBE-MARK-MASQ\n\
             -A KUBE-SEP-{chain} -p {protocol} -m comment --comment \"bench/s{number}\" -m {protocol} -j DNAT --to-destination {backend}:{port}"
        );
        if let Some(node_port) = node_port {
            let _ = writeln!(chains, ":KUBE-EXT-{chain} - [0:0]");
            let _ = writeln!(
                rules,
                "-A KUBE-NODEPORTS -p {protocol} -m comment --comment \"bench/s{number}\" -m {protocol} --dport {node_port} -j KUBE-EXT-{chain}\n\
                 -A KUBE-EXT-{chain} -m comment --comment \"bench/s{number} external\" -j KUBE-MARK-MASQ\n\
                 -A KUBE-EXT-{chain} -j KUBE-SVC-{chain}"
            );
        }
    }
    format!(
        "*filter\n:KUBE-FORWARD - [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-PROXY-FIREWALL - [0:0]\n\
         -A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL\n\
         -A FORWARD -j KUBE-FORWARD\n-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES\n\
         -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A KUBE-FORWARD -m mark --mark {MASQUERADE}/{MASQUERADE} -j ACCEPT\n\
         -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n\
         *nat\n:KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n{chains}\
         -A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n-A POSTROUTING -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark {MASQUERADE}\n\
         -A KUBE-POSTROUTING -m mark ! --mark {MASQUERADE}/{MASQUERADE} -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark {MASQUERADE}\n-A KUBE-POSTROUTING -j MASQUERADE --random-fully\n\
         {rules}-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n"
    )
}

/// `nft -f` input: kube-proxy's nftables mode, one endpoint each, on a node with this address.
pub(crate) fn nftables(count: u32, backend: Ipv4Addr, node: Ipv4Addr) -> String {
    let mut chains = String::new();
    let (mut services, mut node_ports, mut addresses) = (Vec::new(), Vec::new(), Vec::new());
    for port in ports(count) {
        let (chain, node_port, Port { address, protocol, port, .. }) = (port.chain(), port.node_port(), port);
        let _ = writeln!(
            chains,
            "chain endpoint-{chain} {{\n ip saddr {backend} jump mark-for-masquerade\n meta l4proto {protocol} dnat to {backend}:{port}\n}}\n\
             chain service-{chain} {{\n ip daddr {address} {protocol} dport {port} ip saddr != {PODS} jump mark-for-masquerade\n \
             numgen random mod 1 vmap {{ 0 : goto endpoint-{chain} }}\n}}"
        );
        if let Some(node_port) = node_port {
            let _ = writeln!(chains, "chain external-{chain} {{ jump mark-for-masquerade; goto service-{chain}; }}");
            node_ports.push(format!("{protocol} . {node_port} : goto external-{chain}"));
        }
        services.push(format!("{address} . {protocol} . {port} : goto service-{chain}"));
        if port == TCP {
            addresses.push(address.to_string());
        }
    }
    format!(
        "table ip kube-proxy {{\nset cluster-ips {{ type ipv4_addr; elements = {{ {} }} }}\nset nodeport-ips {{ type ipv4_addr; elements = {{ {node} }} }}\n\
         map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}\n\
         map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}\n\
         map firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}\n\
         chain mark-for-masquerade {{ meta mark set meta mark or {MASQUERADE}; }}\n\
         chain masquerading {{\n meta mark and {MASQUERADE} == 0 return\n meta mark set meta mark xor {MASQUERADE}\n masquerade fully-random\n}}\n\
         chain cluster-ips-check {{ ip daddr @cluster-ips reject; }}\n\
         chain firewall-check {{ ip daddr . meta l4proto . th dport vmap @firewall-ips; }}\n\
         chain service-endpoints-check {{ ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }}\n\
         chain nodeport-endpoints-check {{ ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }}\n{chains}\
         map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; elements = {{ {} }} }}\n\
         map service-nodeports {{ type inet_proto . inet_service : verdict; elements = {{ {} }} }}\n\
         chain services {{\n ip daddr . meta l4proto . th dport vmap @service-ips\n \
         ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports\n}}\n\
         chain filter-prerouting-pre-dnat {{ type filter hook prerouting priority dstnat - 10; ct state new jump firewall-check; }}\n\
         chain filter-input {{ type filter hook input priority filter - 10; ct state new jump nodeport-endpoints-check; ct state new jump service-endpoints-check; }}\n\
         chain filter-forward {{ type filter hook forward priority filter - 10; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }}\n\
         chain filter-output {{ type filter hook output priority -110; ct state new jump service-endpoints-check; ct state new jump firewall-check; }}\n\
         chain filter-output-post-dnat {{ type filter hook output priority -90; ct state new jump cluster-ips-check; }}\n\
         chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}\n\
         chain nat-output {{ type nat hook output priority -100; jump services; }}\n\
         chain nat-postrouting {{ type nat hook postrouting priority srcnat; jump masquerading; }}\n}}\n",
        addresses.join(", "),
        services.join(", "),
        node_ports.join(", ")
    )
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
