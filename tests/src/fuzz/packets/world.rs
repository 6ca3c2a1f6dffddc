//! A node with a few Services, as [`sheave::dataplane`] would have written them.

use std::net::{IpAddr, SocketAddr};

use arbitrary::{Result, Unstructured};
use sheave_common::backend::{Backend, flags as backend_flags};
use sheave_common::config::{Config, flags as config_flags};
use sheave_common::frontend::{BackendSet, Frontend, FrontendKey, flags as frontend_flags};
use sheave_common::interface::{Interface, flags as interface_flags};
use sheave_common::prefix::SourceRange;
use sheave_common::{Address, Ipv4Address, Ipv6Address, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP, features, filter};
use sheave_ebpf_host::btf_maps::lpm_trie::Key;
use sheave_ebpf_host::kernel::{Kernel, Route};
use sheave_ebpf_host::maps;

use crate::program::default_config;

/// Interfaces.
pub(super) const UPLINK: u32 = 2;
pub(super) const POD: u32 = 3;
pub(super) const LOCAL: u32 = 4;
pub(super) const TUNNEL: u32 = 5;

/// First and last source port for SNAT: few, so that they run out.
pub(super) const SNAT_PORTS: [u16; 2] = [61_000, 61_003];

/// Parties, of both families.
pub(super) const VIP: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
pub(super) const BALANCER: [&str; 2] = ["203.0.113.10", "2001:db8:113::10"];
pub(super) const NODE: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
pub(super) const REMOTE: [&str; 2] = ["10.244.1.5", "fd00:244:1::5"];
pub(super) const NEAR: [&str; 2] = ["10.244.0.5", "fd00:244::5"];
pub(super) const CLIENT_POD: [&str; 2] = ["10.244.0.9", "fd00:244::9"];
pub(super) const CLIENT: [&str; 2] = ["198.51.100.7", "2001:db8:100::7"];
pub(super) const HAIRPIN: [&str; 2] = ["169.254.42.1", "fd00:42::1"];

/// The ports of frontends: with endpoints on a ClusterIP, a nodePort and a load-balancer IP; without; and the backends' own.
pub(super) const SERVED: u16 = 80;
pub(super) const NODE_PORT: u16 = 30_080;
pub(super) const BALANCED: u16 = 443;
pub(super) const UNSERVED: u16 = 81;
pub(super) const TARGET: u16 = 8_080;

/// What may differ between nodes.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) ipv6: bool,
    features: u32,
    flags: u32,
    affinity: u32,
    algorithm: u32,
    mtu: u16,
    resolved: bool,
    rejects: u32,
    /// Whether XDP and tc are compared, which takes three times as long.
    pub(super) compare: bool,
}

impl Plan {
    pub(super) fn read(input: &mut Unstructured<'_>) -> Result<Self> {
        let choice = input.arbitrary::<[u8; 4]>()?;
        let bit = |byte: usize, bit: u8| choice[byte] >> bit & 1 != 0;
        let mut plan = Self {
            ipv6: bit(0, 0),
            features: features::FIB_MTU | features::XDP_FRAGS,
            flags: 0,
            affinity: if bit(0, 1) { 60 } else { 0 },
            algorithm: u32::from(choice[1] & 3),
            mtu: if bit(0, 2) { 1_500 } else { 300 },
            resolved: !bit(0, 3),
            rejects: if bit(0, 4) { 1 } else { 1_000 },
            compare: bit(2, 3) && bit(2, 4),
        };
        for (on, feature) in [
            (bit(2, 0), features::FIB_SOURCE),
            (bit(2, 1), features::BYPASS | features::BYPASSED),
            (bit(2, 2), features::BYPASSED),
        ] {
            plan.features |= if on { feature } else { 0 };
        }
        for (on, flag) in [
            (choice[3] & 7 == 7, config_flags::LEAVING),
            (choice[3] >> 3 & 3 == 3, config_flags::DRAIN_FOREIGN),
            (bit(3, 5), config_flags::SERVICE_CIDRS4 | config_flags::SERVICE_CIDRS6),
        ] {
            plan.flags |= if on { flag } else { 0 };
        }
        Ok(plan)
    }

    /// Whether mid-flow packets, or all that no flow knows, are another proxy's.
    pub(super) fn shares(&self) -> bool {
        self.flags & (config_flags::LEAVING | config_flags::DRAIN_FOREIGN) != 0
    }

    /// The parties' addresses of this plan's family.
    pub(super) fn of(&self, party: [&str; 2]) -> IpAddr {
        party[usize::from(self.ipv6)].parse().expect("an address")
    }
}

/// A node.
pub(super) struct World {
    pub(super) kernel: Kernel,
    pub(super) plan: Plan,
}

impl World {
    pub(super) fn new(plan: &Plan) -> Self {
        let world = Self { kernel: Kernel::boot(plan.features), plan: plan.clone() };
        world.configure();
        if plan.ipv6 {
            world.services::<Ipv6Address>();
        } else {
            world.services::<Ipv4Address>();
        }
        let source = plan.of(NODE).into();
        for (to, ifindex) in [(REMOTE, UPLINK), (CLIENT, UPLINK), (NEAR, LOCAL), (CLIENT_POD, POD)] {
            let route = Route { ifindex, mtu: plan.mtu, resolved: plan.resolved, source };
            world.kernel.route(plan.of(to), route);
        }
        world
    }

    fn configure(&self) {
        let [hairpin4, hairpin6] = HAIRPIN.map(|address| address.parse::<IpAddr>().expect("an address"));
        let [node4, node6] = NODE.map(|address| address.parse::<IpAddr>().expect("an address"));
        let default = default_config();
        let config = Config {
            flags: default.flags | self.plan.flags,
            snat_port_first: SNAT_PORTS[0],
            snat_port_last: SNAT_PORTS[1],
            rejects_per_second: self.plan.rejects,
            hairpin4: Of::of(hairpin4),
            hairpin6: Of::of(hairpin6),
            node4: Of::of(node4),
            node6: Of::of(node6),
            ..default
        };
        // SAFETY: no program runs.
        unsafe { maps::CONFIG.get_ptr_mut(0).expect("the one element").write(config) };
        for (ifindex, flags) in [
            (UPLINK, interface_flags::UPLINK | interface_flags::XDP),
            (POD, interface_flags::POD),
            (LOCAL, interface_flags::POD),
            (TUNNEL, interface_flags::UPLINK),
        ] {
            let interface = Interface { source4: Of::of(node4), source6: Of::of(node6), flags };
            maps::INTERFACES_MAP.insert(ifindex, interface, 0).expect("room");
        }
    }

    /// The same Services for every protocol: 1 to 3 with endpoints, 4 to 6 without.
    fn services<A: Of>(&self) {
        let address = |party: [&str; 2]| A::of(self.plan.of(party));
        let guards = Key::new(32 + A::BITS, SourceRange { service_id: 1, address: address(CLIENT) });
        A::put_source_range(&guards);
        A::put_service_cidr(self.plan.of(VIP));
        let mut id = 0;
        for (service, protocol) in (1..).zip([PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_SCTP]) {
            let first = id;
            for (party, local) in [(REMOTE, false), (NEAR, true), (CLIENT_POD, true)] {
                id += 1;
                let flags = if local { backend_flags::LOCAL | backend_flags::IN_LOCAL_SET } else { 0 };
                let flags = flags | backend_flags::IN_CLUSTER_SET | backend_flags::SERVING | backend_flags::COUNTED;
                A::put_backend(id, service, address(party), flags);
            }
            let run = first * 2;
            for index in 0..4 {
                // SAFETY: no program runs.
                unsafe {
                    let element = maps::BACKEND_TABLE.get_ptr_mut(run / 2 + index / 2).expect("an element");
                    (*element)[index as usize % 2] = if index < 3 { first + 1 + index } else { 0 };
                }
            }
            let sets = (BackendSet { first: run, length: 3 }, BackendSet::default());
            let frontend = |service_id, flags, (cluster, local)| Frontend {
                version: u64::from(service_id) << 8 | u64::from(flags),
                service_id,
                flags,
                cluster,
                local,
                affinity_seconds: self.plan.affinity,
                algorithm: self.plan.algorithm,
            };
            let guarded = if service == 1 { frontend_flags::SOURCE_RANGES } else { 0 };
            for (party, port, service_id, flags, sets) in [
                (VIP, SERVED, service, frontend_flags::CLUSTER_IP, sets),
                (NODE, NODE_PORT, service, frontend_flags::NODE_PORT, sets),
                (BALANCER, BALANCED, service, frontend_flags::LOAD_BALANCER | guarded, sets),
                (VIP, UNSERVED, service + 3, frontend_flags::CLUSTER_IP, Default::default()),
                (BALANCER, UNSERVED, service, frontend_flags::LOAD_BALANCER | frontend_flags::EXTERNAL_LOCAL, sets),
            ] {
                A::put_frontend(
                    FrontendKey::new(address(party), port.to_be(), protocol),
                    frontend(service_id, flags, sets),
                );
            }
            for (party, flags) in [(VIP, frontend_flags::WHOLE_ADDRESS), (BALANCER, frontend_flags::SERVICE_ADDRESS)] {
                let flags = flags | frontend_flags::HAS_ENDPOINT;
                A::put_frontend(FrontendKey::mark(address(party)), frontend(0, flags, Default::default()));
            }
        }
        for party in [VIP, NODE, BALANCER] {
            // SAFETY: no program runs.
            unsafe { maps::DESTINATIONS.get_ptr_mut(filter::element(&address(party))).expect("an element").write(1) };
        }
    }

    /// Addresses and ports that clients connect to.
    pub(super) fn is_frontend(&self, address: SocketAddr) -> bool {
        [(VIP, SERVED), (NODE, NODE_PORT), (BALANCER, BALANCED), (BALANCER, UNSERVED)]
            .into_iter()
            .any(|(party, port)| address == SocketAddr::new(self.plan.of(party), port))
    }

    /// Addresses and ports that serve them.
    pub(super) fn is_backend(&self, address: SocketAddr) -> bool {
        let backends = [REMOTE, NEAR, CLIENT_POD].map(|party| SocketAddr::new(self.plan.of(party), TARGET));
        backends.contains(&address)
    }
}

/// An address family's maps.
trait Of: Address {
    const BITS: u32 = size_of::<Self>() as u32 * 8;
    fn of(ip: IpAddr) -> Self;
    fn put_backend(id: u32, service_id: u32, address: Self, flags: u32);
    fn put_frontend(key: FrontendKey<Self>, frontend: Frontend);
    fn put_source_range(key: &Key<SourceRange<Self>>);
    fn put_service_cidr(of: IpAddr);
}

macro_rules! of {
    ($($address:ty: $variant:ident $backends:ident $frontends:ident $ranges:ident $cidrs:ident $cidr:literal;)+) => {
        $(
            impl Of for $address {
                fn of(ip: IpAddr) -> Self {
                    let IpAddr::$variant(ip) = ip else { panic!("{ip} is of the other family") };
                    ip.into()
                }

                fn put_backend(id: u32, service_id: u32, address: Self, flags: u32) {
                    let (port_be, version, weight) = (TARGET.to_be(), u64::from(id) << 32, 1);
                    let backend =
                        Backend { version, service_id, address, port_be, weight, flags, reserved: Self::FILL };
                    maps::$backends.insert(id, backend, 0).expect("room");
                }

                fn put_frontend(key: FrontendKey<Self>, frontend: Frontend) {
                    maps::$frontends.insert(key, frontend, 0).expect("room");
                }

                fn put_source_range(key: &Key<SourceRange<Self>>) {
                    maps::$ranges.insert(key, 1).expect("room");
                }

                fn put_service_cidr(of: IpAddr) {
                    maps::$cidrs.insert(&Key::new($cidr, Self::of(of)), 1).expect("room");
                }
            }
        )+
    };
}

of! {
    Ipv4Address: V4 BACKENDS4 FRONTENDS4 SOURCE_RANGES4 SERVICE_CIDRS4 16;
    Ipv6Address: V6 BACKENDS6 FRONTENDS6 SOURCE_RANGES6 SERVICE_CIDRS6 112;
}
