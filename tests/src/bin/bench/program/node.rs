//! A node for the programs to run on: an uplink with a route to everything, and services in the maps.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result};
use sheave_common::frontend::flags;
use sheave_common::interface::{Interface, flags as interface_flags};
use sheave_common::{Ipv4Address, Ipv6Address, PROTOCOL_TCP, PROTOCOL_UDP, names};
use sheave_tests::family::Family;
use sheave_tests::netns::Namespace;
use sheave_tests::program::{Programs, Service};

use super::subject::{CHAIN, Chain, FIRST_CHAIN_ID};
use super::walk::destinations;

/// The service port of TCP circles; that of UDP circles follows.
pub(crate) const TCP_SERVICE: u32 = 1;
/// Its counterpart.
pub(crate) const UDP_SERVICE: u32 = 2;

/// A node's namespace.
pub(crate) fn namespace() -> Result<Namespace> {
    let node = Namespace::new("node")?;
    node.sysctl("ipv6/conf/default/accept_dad", "0")?;
    node.ip(&[
        "link add up0 address 02:00:00:00:00:02 type veth peer name peer0",
        "link set up0 up",
        "link set peer0 up",
        "address add 192.0.2.1/24 dev up0",
        "address add 2001:db8::1/64 dev up0",
        "neighbour add 192.0.2.254 lladdr 02:00:00:00:00:09 dev up0 nud permanent",
        "neighbour add 2001:db8::fe lladdr 02:00:00:00:00:09 dev up0 nud permanent",
        "route add default via 192.0.2.254",
        "route add default via 2001:db8::fe",
    ])?;
    node.sysctl("ipv4/ip_forward", "1")?;
    node.sysctl("ipv6/conf/all/forwarding", "1")?;
    Ok(node)
}

/// The uplink's index, in the calling thread's namespace.
pub(crate) fn uplink() -> Result<u32> {
    // SAFETY: the name is a C string.
    let index = unsafe { libc::if_nametoindex(c"up0".as_ptr()) };
    (index != 0).then_some(index).context("up0 is not there")
}

/// The programs with every service, and the ids of the TCP and UDP circles' backends of each family.
pub(crate) fn programs(uplink: u32, flows: u32) -> Result<(Programs, [[u32; 2]; 2])> {
    let mut programs = Programs::load_sized(
        &[
            (names::CONNTRACK4, flows),
            (names::CONNTRACK6, flows),
            (names::HALF_OPEN4, 131_072),
            (names::HALF_OPEN6, 131_072),
            (names::BACKEND_TABLE, 16_384),
            (names::SERVICE_COUNTERS, 16_384),
        ],
        |_| {},
    )?;
    let interface = Interface {
        source4: Ipv4Address::from(Ipv4Addr::new(192, 0, 2, 1)),
        source6: Ipv6Address::from(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
        flags: interface_flags::UPLINK | interface_flags::XDP,
    };
    programs.hash::<u32, Interface>(names::INTERFACES)?.insert(uplink, interface, 0)?;
    let mut backends = [[0; 2]; 2];
    let mut next_id = FIRST_CHAIN_ID;
    for (family, backends) in Family::BOTH.into_iter().zip(&mut backends) {
        for (protocol, backend) in [PROTOCOL_TCP, PROTOCOL_UDP].into_iter().zip(backends) {
            let endpoint: IpAddr = family.pick(Ipv4Addr::new(10, 1, 0, 2), Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 2));
            let ids = programs.service(&Service {
                id: if protocol == PROTOCOL_TCP { TCP_SERVICE } else { UDP_SERVICE },
                frontends: destinations(family).map(|address| (address, flags::CLUSTER_IP)).to_vec(),
                protocol,
                endpoints: vec![(SocketAddr::new(endpoint, 8080), true)],
                affinity: 0,
            })?;
            *backend = ids.first().copied().context("a service of one endpoint")?;
            for remote in [false, true] {
                chain(&mut programs, Chain { family, protocol, remote }, &mut next_id)?;
            }
        }
    }
    Ok((programs, backends))
}

fn chain(programs: &mut Programs, chain: Chain, next_id: &mut u32) -> Result<()> {
    for place in 0..CHAIN {
        let kind = if chain.remote { flags::NODE_PORT } else { flags::CLUSTER_IP };
        programs.service(&Service {
            id: *next_id,
            frontends: vec![(chain.address(place), kind)],
            protocol: chain.protocol,
            endpoints: vec![(chain.address(place + 1), !chain.remote)],
            affinity: 0,
        })?;
        *next_id += 1;
    }
    Ok(())
}
