//! Machines as they are found in clusters, and what their interfaces are taken for.

use super::*;

/// A machine under construction.
#[derive(Default)]
struct Machine {
    links: Vec<Link>,
    addresses: Vec<InterfaceAddress>,
    routes: Vec<DefaultRoute>,
    node_addresses: Vec<IpAddr>,
    rules: InterfaceRules,
}

impl Machine {
    fn new() -> Self {
        let mut machine = Self::default();
        machine.link("lo", None, &["127.0.0.1/8", "::1/128"]).loopback = true;
        machine
    }

    /// A device of a kind (`None`: hardware) with addresses, most with the next index.
    fn link(&mut self, name: &str, kind: Option<&str>, addresses: &[&str]) -> &mut Link {
        let index = u32::try_from(self.links.len()).unwrap() + 1;
        for text in addresses {
            let (address, length) = text.split_once('/').unwrap();
            self.addresses.push(InterfaceAddress {
                index,
                address: address.parse().unwrap(),
                prefix_length: length.parse().unwrap(),
                secondary: false,
            });
        }
        self.links.push(Link {
            index,
            name: name.to_owned(),
            kind: kind.map(str::to_owned),
            ethernet: !matches!(kind, Some("tun" | "wireguard" | "ipip")),
            up: true,
            on_bus: kind.is_none(),
            ..Link::default()
        });
        self.links.last_mut().unwrap()
    }

    fn pod(&mut self, name: &str, controller: Option<&str>) {
        let controller = controller.map(|name| self.index(name));
        let veth = self.link(name, Some("veth"), &[]);
        (veth.lower, veth.lower_elsewhere, veth.controller) = (Some(2), true, controller);
    }

    fn default_route(&mut self, name: &str, source: Option<&str>) -> &mut DefaultRoute {
        let index = self.index(name);
        let source = source.map(|address| address.parse().unwrap());
        self.routes.push(DefaultRoute { index, ipv6: false, main: true, source, metric: 0 });
        self.routes.last_mut().unwrap()
    }

    fn index(&self, name: &str) -> u32 {
        self.links.iter().find(|link| link.name == name).unwrap().index
    }

    fn interfaces(&self) -> Vec<Interface> {
        interfaces(&self.view())
    }

    fn view(&self) -> View<'_> {
        View {
            links: &self.links,
            addresses: &self.addresses,
            routes: &self.routes,
            node_addresses: &self.node_addresses,
            rules: &self.rules,
        }
    }

    fn roles(&self) -> String {
        let mut names: Vec<_> = self.interfaces().into_iter().map(|i| format!("{}={:?}", i.name, i.role)).collect();
        names.sort();
        names.join(" ")
    }

    fn interface(&self, name: &str) -> Interface {
        self.interfaces().into_iter().find(|interface| interface.name == name).unwrap()
    }
}

#[test]
fn flannel_vxlan_node() {
    let mut node = Machine::new();
    node.link("eth0", None, &["192.168.1.10/24"]);
    node.default_route("eth0", None);
    node.link("flannel.1", Some("vxlan"), &["10.244.0.0/32"]);
    node.link("cni0", Some("bridge"), &["10.244.0.1/24"]);
    node.pod("veth1234", Some("cni0"));
    node.pod("veth5678", Some("cni0"));
    assert_eq!(node.roles(), "eth0=Uplink flannel.1=Tunnel veth1234=Pod veth5678=Pod");
    let source = |name: &str| node.interface(name).source4.unwrap().to_string();
    assert_eq!(source("flannel.1"), "10.244.0.0", "replies must come back through the tunnel");
    assert_eq!(source("eth0"), "192.168.1.10");
    assert!(node.interface("eth0").physical && node.interface("eth0").ethernet);
    assert!(!node.interface("flannel.1").physical && !node.interface("veth1234").physical);
}

#[test]
fn calico_routed_veths_and_ipip() {
    let mut node = Machine::new();
    node.link("ens5", None, &["10.0.0.5/24"]);
    node.default_route("ens5", Some("10.0.0.5"));
    node.pod("cali0001", None);
    node.pod("cali0002", None);
    node.link("tunl0", Some("ipip"), &["10.1.44.0/32"]);
    assert_eq!(node.roles(), "cali0001=Pod cali0002=Pod ens5=Uplink tunl0=Tunnel");
    assert_eq!(node.interface("cali0001").source4.unwrap().to_string(), "10.0.0.5", "the node's, having none itself");
    assert!(!node.interface("tunl0").ethernet);
}

#[test]
fn an_unused_fallback_tunnel_is_left_alone() {
    let mut node = Machine::new();
    node.link("tunl0", Some("ipip"), &[]).up = false;
    node.link("sit0", Some("sit"), &[]).up = false;
    assert_eq!(node.roles(), "");
}

#[test]
fn ptp_gateway_addresses_do_not_make_a_pod_an_uplink() {
    let mut node = Machine::new();
    node.pod("vethptp0", None);
    let index = node.index("vethptp0");
    node.addresses.push(InterfaceAddress {
        index,
        address: "10.64.3.1".parse().unwrap(),
        prefix_length: 32,
        secondary: false,
    });
    assert_eq!(node.roles(), "vethptp0=Pod");
}

#[test]
fn kind_node_whose_uplink_is_a_veth() {
    let mut node = Machine::new();
    node.pod("eth0", None);
    let index = node.index("eth0");
    let address = "172.18.0.3".parse().unwrap();
    node.addresses.push(InterfaceAddress { index, address, prefix_length: 16, secondary: false });
    node.pod("veth0a1b", None);
    assert_eq!(node.roles(), "eth0=Uplink veth0a1b=Pod", "by its subnet alone");
    node.default_route("eth0", None);
    assert_eq!(node.roles(), "eth0=Uplink veth0a1b=Pod");
    assert!(!node.interface("eth0").physical);
}

#[test]
fn a_veth_with_a_single_address_is_an_uplink_once_it_is_the_nodes() {
    let mut node = Machine::new();
    node.pod("eth0", None);
    let index = node.index("eth0");
    let address: IpAddr = "172.18.0.3".parse().unwrap();
    node.addresses.push(InterfaceAddress { index, address, prefix_length: 32, secondary: false });
    assert_eq!(node.roles(), "eth0=Pod");
    node.node_addresses.push(address);
    assert_eq!(node.roles(), "eth0=Uplink");
}

#[test]
fn a_policy_route_through_a_pod_does_not_make_it_an_uplink() {
    let mut node = Machine::new();
    node.pod("vethgw", None);
    node.default_route("vethgw", None).main = false;
    assert_eq!(node.roles(), "vethgw=Pod");
}

#[test]
fn docker_and_virtual_machines_beside_it() {
    let mut node = Machine::new();
    node.link("eth0", None, &["192.168.1.10/24"]);
    node.link("docker0", Some("bridge"), &["172.17.0.1/16"]);
    node.pod("vethdock", Some("docker0"));
    node.link("virbr0", Some("bridge"), &["192.168.122.1/24"]);
    let bridge = node.index("virbr0");
    node.link("vnet0", Some("tun"), &[]).controller = Some(bridge);
    assert_eq!(node.roles(), "eth0=Uplink vethdock=Pod");
}

#[test]
fn two_uplinks() {
    let mut node = Machine::new();
    node.link("eth0", None, &["192.168.1.10/24"]);
    node.default_route("eth0", None);
    node.link("eth1", None, &["10.9.0.10/24"]);
    node.link("eth2", None, &[]);
    assert_eq!(node.roles(), "eth0=Uplink eth1=Uplink");
    assert_eq!(node.interface("eth1").source4.unwrap().to_string(), "10.9.0.10");
}

#[test]
fn uplinks_without_addresses_by_their_routes() {
    let mut node = Machine::new();
    node.link("eth0", None, &["fe80::1/64"]);
    node.link("eth1", None, &["fe80::2/64"]);
    node.link("dummy0", Some("dummy"), &["10.7.7.7/32"]);
    node.default_route("eth0", Some("10.7.7.7"));
    node.default_route("eth1", Some("10.7.7.7"));
    assert_eq!(node.roles(), "eth0=Uplink eth1=Uplink");
    assert_eq!(node.interface("eth1").source4.unwrap().to_string(), "10.7.7.7", "the route's preferred source");
}

#[test]
fn bridge_uplink() {
    let mut node = Machine::new();
    node.link("br0", Some("bridge"), &["192.168.1.10/24"]);
    let bridge = node.index("br0");
    node.link("eth0", None, &[]).controller = Some(bridge);
    assert_eq!(node.roles(), "br0=Uplink", "and its port carries the same packets");
    assert!(!node.interface("br0").physical);
}

#[test]
fn bridge_with_only_veths_is_an_uplink_by_route_or_node_address() {
    let mut node = Machine::new();
    node.link("br0", Some("bridge"), &["192.168.1.10/24"]);
    node.pod("port", Some("br0"));
    assert_eq!(node.roles(), "port=Pod");
    node.node_addresses = vec!["192.168.1.10".parse().unwrap()];
    assert_eq!(node.roles(), "br0=Uplink port=Pod");
    node.node_addresses.clear();
    node.default_route("br0", None);
    assert_eq!(node.roles(), "br0=Uplink port=Pod");
}

#[test]
fn bonds_and_vlans() {
    let mut node = Machine::new();
    node.link("bond0", Some("bond"), &[]);
    let bond = node.index("bond0");
    node.link("eth0", None, &[]).controller = Some(bond);
    node.link("eth1", None, &[]).controller = Some(bond);
    node.link("bond0.100", Some("vlan"), &["10.1.0.4/24"]).lower = Some(bond);
    assert_eq!(node.roles(), "bond0.100=Uplink");
}

#[test]
fn wireguard_and_tun() {
    let mut node = Machine::new();
    node.link("eth0", None, &["203.0.113.9/24"]);
    node.link("wg0", Some("wireguard"), &["10.8.0.2/24"]);
    node.link("tailscale0", Some("tun"), &["100.64.0.1/32"]);
    assert_eq!(node.roles(), "eth0=Uplink tailscale0=Uplink wg0=Tunnel");
    assert!(!node.interface("wg0").ethernet);
    node.node_addresses = vec!["10.8.0.2".parse().unwrap()];
    assert_eq!(node.interface("wg0").role, Role::Uplink, "nodes that know each other by wireguard addresses");
}

#[test]
fn parked_service_addresses_are_not_ours() {
    let mut node = Machine::new();
    node.link("eth0", None, &["192.168.1.10/24", "2001:db8::10/64", "fe80::10/64"]);
    node.link("kube-ipvs0", Some("dummy"), &["10.96.0.1/32"]);
    node.link("nodelocaldns", Some("dummy"), &["169.254.20.10/32", "10.96.0.10/32"]);
    node.link("anycast", Some("dummy"), &["198.51.100.1/32"]);
    assert_eq!(node.roles(), "eth0=Uplink");
    let addresses: Vec<String> = local_addresses(&node.view()).iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["192.168.1.10", "198.51.100.1", "2001:db8::10"]);
}

#[test]
fn a_veth_pair_within_one_namespace_is_nothing() {
    let mut node = Machine::new();
    node.link("v0", Some("veth"), &[]).lower = Some(3);
    node.link("v1", Some("veth"), &[]).lower = Some(2);
    assert_eq!(node.roles(), "");
}

#[test]
fn rules_override_detection_and_ignored_goes_first() {
    let mut node = Machine::new();
    node.link("eth0", None, &["192.168.1.10/24"]);
    node.link("eth1", None, &[]);
    node.pod("cali1", None);
    node.pod("cali2", None);
    node.link("tap7", Some("tun"), &[]);
    node.link("mesh0", Some("tun"), &["10.5.0.1/24"]);
    node.rules = InterfaceRules {
        pods: vec!["tap*".to_owned(), "cali*".to_owned()],
        uplinks: vec!["eth*".to_owned()],
        tunnels: vec!["mesh0".to_owned()],
        ignored: vec!["*2".to_owned(), "eth0".to_owned()],
    };
    assert_eq!(node.roles(), "cali1=Pod eth1=Uplink mesh0=Tunnel tap7=Pod");
}

#[test]
fn source_prefers_the_nodes_address_and_then_primary_ones() {
    let mut node = Machine::new();
    node.link("eth0", None, &["10.0.0.250/24", "10.0.0.4/24", "2001:db8::aaaa/64", "2001:db8::4/64"]);
    for held in &mut node.addresses {
        held.secondary = ["10.0.0.250", "2001:db8::aaaa"].contains(&held.address.to_string().as_str());
    }
    let eth0 = node.interface("eth0");
    assert_eq!(eth0.source4.unwrap().to_string(), "10.0.0.4");
    assert_eq!(eth0.source6.unwrap().to_string(), "2001:db8::4");
    node.node_addresses = vec!["10.0.0.250".parse().unwrap()];
    assert_eq!(node.interface("eth0").source4.unwrap().to_string(), "10.0.0.250");
}

#[test]
fn patterns() {
    for (pattern, name, expected) in [
        ("eth0", "eth0", true),
        ("eth0", "eth01", false),
        ("eth*", "eth", true),
        ("*", "anything", true),
        ("*.100", "bond0.100", true),
        ("v*h*1", "veth-1", true),
        ("v*h*1", "veth-2", false),
        ("a*a", "a", false),
        ("", "", true),
        ("", "x", false),
    ] {
        assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
    }
}
