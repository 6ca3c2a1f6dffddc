//! Addresses of either family, and a node with an uplink: what tests of both families share.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use aya::Pod;
use sheave_common::interface::{Interface, flags as interface_flags};
use sheave_common::{Ipv4Address, Ipv6Address, names};
use sheave_tests::family::Family;
use sheave_tests::netns::Namespace;
use sheave_tests::program::{Outcome, Programs, Service, SkbContext};

/// The node's address.
const NODE4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The node's IPv6 address.
const NODE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1);

/// Who there is, in one family.
pub(crate) struct Addresses {
    pub(crate) family: Family,
    /// A client outside.
    pub(crate) client: IpAddr,
    /// This node.
    pub(crate) node: IpAddr,
    /// A ClusterIP.
    pub(crate) vip: IpAddr,
    /// An address that is a Service's, but only the ports that it has (an external IP).
    pub(crate) external: IpAddr,
    /// A pod of this node that asks.
    pub(crate) pod: IpAddr,
    /// A pod of this node that answers.
    pub(crate) local: IpAddr,
    /// A pod of another node.
    pub(crate) remote: IpAddr,
}

impl Addresses {
    pub(crate) const BOTH: [Self; 2] = [
        Self {
            family: Family::V4,
            client: IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7)),
            node: IpAddr::V4(NODE4),
            vip: IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)),
            external: IpAddr::V4(Ipv4Addr::new(203, 0, 113, 5)),
            pod: IpAddr::V4(Ipv4Addr::new(10, 1, 0, 1)),
            local: IpAddr::V4(Ipv4Addr::new(10, 1, 0, 2)),
            remote: IpAddr::V4(Ipv4Addr::new(10, 1, 1, 2)),
        },
        Self {
            family: Family::V6,
            client: IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 7)),
            node: IpAddr::V6(NODE6),
            vip: IpAddr::V6(Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x10)),
            external: IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 5)),
            pod: IpAddr::V6(Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1)),
            local: IpAddr::V6(Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 2)),
            remote: IpAddr::V6(Ipv6Addr::new(0xfd00, 1, 1, 0, 0, 0, 0, 2)),
        },
    ];
}

/// `address:port` as packets are made of.
pub(crate) fn at(address: IpAddr, port: u16) -> String {
    SocketAddr::new(address, port).to_string()
}

/// One of many clients' address and port.
pub(crate) fn client(family: Family, number: u16, port: u16) -> String {
    let [high, low] = number.to_be_bytes();
    let address: IpAddr = match family {
        Family::V4 => [10, 7, high, low].into(),
        Family::V6 => [0xfd00, 7, 0, 0, 0, 0, 0, number].into(),
    };
    at(address, port)
}

/// How many elements a map has.
pub(crate) fn elements<K: Pod, V: Pod>(programs: &mut Programs, map: &str) -> usize {
    programs.hash::<K, V>(map).expect("a map of these types").keys().filter(Result::is_ok).count()
}

/// A service port with one frontend, in one family.
pub(crate) fn service(id: u32, protocol: u8, frontend: (&str, u32), endpoints: &[(&str, bool)]) -> Service {
    Service {
        id,
        frontends: vec![(crate::address(frontend.0), frontend.1)],
        protocol,
        endpoints: endpoints.iter().map(|(endpoint, local)| (crate::address(endpoint), *local)).collect(),
        affinity: 0,
    }
}

/// Runs a test in a node's namespace: an uplink whose router, the next hop to everything, is known in both families, and the
/// programs with these services.
pub(crate) fn on_a_node(services: &[Service], test: impl FnOnce(&mut Programs, u32) + Send) {
    let node = Namespace::new("node").expect("namespace");
    node.ip(&[
        "link add up0 address 02:00:00:00:00:02 type veth peer name peer0",
        "link set up0 up",
        "link set peer0 up",
        &format!("address add {NODE4}/24 dev up0"),
        &format!("address add {NODE6}/64 dev up0 nodad"),
        "neighbour add 192.0.2.254 lladdr 02:00:00:00:00:09 dev up0 nud permanent",
        "neighbour add 2001:db8:2::fe lladdr 02:00:00:00:00:09 dev up0 nud permanent",
        "route add default via 192.0.2.254",
        "route add default via 2001:db8:2::fe",
    ])
    .expect("uplink");
    node.sysctl("ipv4/ip_forward", "1").expect("forwarding");
    node.sysctl("ipv6/conf/all/forwarding", "1").expect("forwarding");
    node.run(|| {
        // SAFETY: the name is a C string.
        let uplink = unsafe { libc::if_nametoindex(c"up0".as_ptr()) };
        let mut programs = Programs::load().expect("programs load");
        for service in services {
            programs.service(service).expect("service");
        }
        let interface = Interface {
            source4: Ipv4Address::from(NODE4),
            source6: Ipv6Address::from(NODE6),
            flags: interface_flags::UPLINK | interface_flags::XDP,
        };
        programs.hash::<u32, Interface>(names::INTERFACES).unwrap().insert(uplink, interface, 0).unwrap();
        test(&mut programs, uplink);
    });
}

/// Runs a tc program on a packet at the uplink.
pub(crate) fn uplink(programs: &mut Programs, program: &str, packet: &[u8], ifindex: u32) -> Outcome {
    programs.tc(program, packet, SkbContext { ifindex, ..SkbContext::default() }).expect("test run")
}
