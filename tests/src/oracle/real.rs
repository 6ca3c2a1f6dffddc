//! Sheave on a node of its own: objects take the way that they take in `sheave run`, from JSON through conversion, model
//! and plan into pinned maps, and packets go through the programs on those maps.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sheave::config::{
    ConnectMode, DrainForeign, ExternalIps, MapSizes, NodePortAddresses, RunConfig, SourceConfig, XdpMode,
};
use sheave::dataplane::{self, Applied, Dataplane, Usage};
use sheave::interfaces::{Interface, Role};
use sheave::model::desired::{ServiceKey, ServicePort, ServicePortName};
use sheave::model::objects::SliceKey;
use sheave::model::{Change as ModelChange, Model, ModelOptions};
use sheave_common::flow::Flow;
use sheave_common::{Ipv4Address, Ipv6Address, names};

use super::answer::{Edge, Packet, Refusal, Source};
use super::cluster::{NodePorts, Options, THIS_NODE};
use super::frames::{SNAT_PORTS, frame_of, interpret};
use super::mutate::Change;
use crate::leftovers::unique_name;
use crate::netns::Namespace;
use crate::packet::{ACK, SYN, View};
use crate::program::{NEXT, Outcome, Programs, REDIRECT, SkbContext, XDP_PASS, XDP_TX};

/// What the programs did with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// Passed, with not a bit changed.
    Untouched,
    /// Dropped.
    Dropped,
    /// Answered in the name of what it asked.
    Refused(Refusal),
    /// Sent on.
    Translated(Passage),
    /// Something that no packet should meet.
    Odd(String),
}

/// How a packet went on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Passage {
    /// The endpoint.
    pub(super) to: SocketAddr,
    /// Whom it believes to be asked by.
    pub(super) from: SocketAddr,
    /// Which kind of address that is.
    pub(super) source: Source,
}

/// A node with Sheave. Everything it made goes with it.
pub(super) struct Sheave {
    config: RunConfig,
    dataplane: Option<Dataplane>,
    programs: Programs,
    model: Model,
    known: BTreeMap<ServiceKey, BTreeSet<ServicePortName>>,
    uplink: u32,
    pod: u32,
}

/// Makes the interfaces of a node in a namespace: an uplink whose router knows the way to everything, and a pod's.
pub(super) fn make_node(namespace: &Namespace) {
    namespace
        .ip(&[
            "link add up0 address 02:00:00:00:00:02 type veth peer name wire0",
            "link add pod0 address 02:00:00:00:00:02 type veth peer name eth0",
            "link set up0 up",
            "link set wire0 up",
            "link set pod0 up",
            "link set eth0 up",
            "address add 192.0.2.1/24 dev up0",
            "address add fd00:c0:0:2::1/64 dev up0 nodad",
            "neighbour add 192.0.2.254 lladdr 02:00:00:00:00:09 dev up0 nud permanent",
            "neighbour add fd00:c0:0:2::fe lladdr 02:00:00:00:00:09 dev up0 nud permanent",
            "neighbour add 192.0.2.2 lladdr 02:00:00:00:00:09 dev up0 nud permanent",
            "neighbour add 192.0.2.3 lladdr 02:00:00:00:00:09 dev up0 nud permanent",
            "neighbour add fd00:c0:0:2::2 lladdr 02:00:00:00:00:09 dev up0 nud permanent",
            "neighbour add fd00:c0:0:2::3 lladdr 02:00:00:00:00:09 dev up0 nud permanent",
            "route add default via 192.0.2.254",
            "route add default via fd00:c0:0:2::fe",
        ])
        .expect("interfaces of a node");
    namespace.sysctl("ipv4/ip_forward", "1").expect("forwarding");
    namespace.sysctl("ipv6/conf/all/forwarding", "1").expect("forwarding");
}

impl Sheave {
    /// Starts on [`make_node`]'s interfaces, in the calling thread's namespace, with nothing to do.
    pub(super) fn start(options: &Options) -> Self {
        Self::start_with(options, 512)
    }

    /// The same with room for so many service ports.
    pub(super) fn start_with(options: &Options, services: u32) -> Self {
        let mut config = config(options);
        config.sizes.services = Some(services);
        let dataplane = Dataplane::open(&config).expect("the dataplane opens");
        let programs = Programs::load_pinned(&config.pin_path).expect("the programs load on the same maps");
        let mut model = Model::new(ModelOptions {
            node_name: config.node_name.clone(),
            external_ips: config.external_ips.clone(),
            nodeport_addresses: config.nodeport_addresses.clone(),
            algorithm: config.algorithm,
        });
        model.set_node_addresses(options.addresses.clone());
        let (uplink, pod) = (index("up0"), index("pod0"));
        let known = BTreeMap::new();
        let mut sheave = Self { config, dataplane: Some(dataplane), programs, model, known, uplink, pod };
        sheave.attach();
        sheave
    }

    fn dataplane(&mut self) -> &mut Dataplane {
        self.dataplane.as_mut().expect("it is open between calls")
    }

    fn attach(&mut self) {
        for (name, index, role) in [("up0", self.uplink, Role::Uplink), ("pod0", self.pod, Role::Pod)] {
            let interface = Interface {
                index,
                name: name.to_owned(),
                role,
                ethernet: true,
                physical: false,
                source4: Some(Ipv4Addr::new(192, 0, 2, 1)),
                source6: Some(UPLINK6),
            };
            self.dataplane().attach(&interface).expect("programs attach");
        }
    }

    /// Takes changes in, as one pass of the controller does.
    pub(super) fn apply(&mut self, changes: &[Change]) {
        let changed = self.take(changes);
        let applied = self.dataplane().apply(changed);
        expect_applied(&applied);
        self.tell_service_cidrs();
        self.dataplane().sweep().expect("flows are swept");
    }

    /// Has the model take changes in; returns the service ports that changed.
    fn take(&mut self, changes: &[Change]) -> BTreeMap<ServicePortName, Option<ServicePort>> {
        let mut dirty = BTreeSet::new();
        for change in changes.iter().filter_map(read) {
            dirty.extend(self.model.apply(change));
        }
        let mut changed = BTreeMap::new();
        for key in dirty {
            let desired = self.model.desired(&key);
            let before = self.known.insert(key, desired.keys().cloned().collect()).unwrap_or_default();
            changed.extend(before.into_iter().map(|name| (name, None)));
            changed.extend(desired.into_iter().map(|(name, port)| (name, Some(port))));
        }
        changed
    }

    fn tell_service_cidrs(&mut self) {
        if let Some(networks) = self.model.service_cidrs() {
            self.dataplane().set_service_cidrs(&networks).expect("ServiceCIDRs are told");
        }
    }

    /// Lets a grace period pass, and frees what was given up before it.
    pub(super) fn reclaim(&mut self) {
        if let Some(grace) = self.dataplane().begin_grace() {
            dataplane::grace_period();
            let applied = self.dataplane().reclaim(grace).expect("reclaimed");
            expect_applied(&applied);
        }
    }

    /// Restarts the daemon. Nothing has changed meanwhile, so there is nothing to write.
    pub(super) fn restart(&mut self) {
        self.reclaim();
        self.reopen();
        let applied = self.apply_all();
        assert_eq!(applied.written, 0, "a restart without changes writes nothing");
    }

    /// Ends the daemon and starts another one, which knows nothing yet but what is pinned.
    pub(super) fn reopen(&mut self) {
        self.dataplane = None;
        self.dataplane = Some(Dataplane::open(&self.config).expect("the dataplane opens again"));
        self.attach();
        self.dataplane().sweep().expect("flows are swept");
    }

    /// The first pass of a daemon that was started again, to which the source reports a cluster that has changed meanwhile.
    pub(super) fn catch_up(&mut self, changes: &[Change]) {
        self.take(changes);
        self.apply_all();
        self.tell_service_cidrs();
        self.dataplane().sweep().expect("flows are swept");
        self.reclaim();
    }

    fn apply_all(&mut self) -> Applied {
        let desired: BTreeMap<ServicePortName, ServicePort> =
            self.model.services().flat_map(|key| self.model.desired(key)).collect();
        let applied = self.dataplane().apply_all(desired);
        expect_applied(&applied);
        applied
    }

    /// Where its maps are pinned.
    pub(super) fn pins(&self) -> &Path {
        &self.config.pin_path
    }

    /// How full its maps are.
    pub(super) fn usage(&mut self) -> Vec<Usage> {
        self.dataplane().usage()
    }

    /// Forgets every flow, as if all time-outs had passed.
    pub(super) fn forget_flows(&mut self) {
        for map in [names::CONNTRACK4, names::HALF_OPEN4] {
            let flows = self.programs.flows(map).expect("flows");
            let mut map = self.programs.hash::<_, Flow<Ipv4Address>>(map).expect("a map of flows");
            flows.into_keys().for_each(|key| map.remove(&key).expect("removed"));
        }
        for map in [names::CONNTRACK6, names::HALF_OPEN6] {
            let flows = self.programs.flows6(map).expect("flows");
            let mut map = self.programs.hash::<_, Flow<Ipv6Address>>(map).expect("a map of flows");
            flows.into_keys().for_each(|key| map.remove(&key).expect("removed"));
        }
    }

    /// Lets the endpoint answer the first packet of a connection, and returns from whom to whom that seems to go when it
    /// leaves Sheave's hands. `None` if it does not go where the client is.
    pub(super) fn answer(&mut self, packet: &Packet, passage: &Passage) -> Option<(SocketAddr, SocketAddr)> {
        let frame = frame_of(packet.protocol, passage.to, passage.from, SYN | ACK);
        // Where the answer meets this node, and what has to become of it there: the stack has it already, or never gets it.
        let (program, ifindex, action) = match (packet.edge, passage.source) {
            (Edge::Pod, Source::Hairpin) => ("pod_ingress", self.pod, REDIRECT),
            (Edge::Pod, _) => ("pod_egress", self.pod, NEXT),
            (Edge::Uplink, Source::Kept) => ("uplink_egress", self.uplink, NEXT),
            (Edge::Uplink, _) => ("uplink_ingress", self.uplink, REDIRECT),
        };
        let context = SkbContext { ifindex, ..SkbContext::default() };
        let outcome = self.programs.tc(program, &frame, context).expect("tc runs");
        let view = View(&outcome.packet);
        view.assert_checksums();
        (outcome.action == action).then(|| (view.source(), view.destination()))
    }

    /// Sends more on a connection that is open.
    pub(super) fn continue_open(&mut self, packet: &Packet) -> Seen {
        let frame = frame_of(packet.protocol, packet.source, packet.destination, ACK);
        self.by_tc(packet, &frame)
    }

    /// Sends a packet. At the uplink, XDP sees it first if `xdp` says so.
    pub(super) fn send(&mut self, packet: &Packet, xdp: bool) -> Seen {
        let frame = frame_of(packet.protocol, packet.source, packet.destination, SYN);
        let by_xdp = (xdp && packet.edge == Edge::Uplink)
            .then(|| self.programs.xdp(&frame, self.uplink).expect("XDP runs"))
            .filter(|outcome| (outcome.action, &outcome.packet) != (XDP_PASS, &frame));
        let by_tc = self.by_tc(packet, &frame);
        let Some(by_xdp) = by_xdp else { return by_tc };
        if by_xdp.action != XDP_TX {
            return Seen::Odd(format!("XDP: {by_xdp:?}"));
        }
        // XDP finished it. tc finds the same flow.
        let redirected = Outcome { action: REDIRECT, ..by_xdp };
        let seen = interpret(packet, &frame, &redirected);
        if seen == by_tc { seen } else { Seen::Odd(format!("XDP: {seen:?}, then tc: {by_tc:?}")) }
    }

    fn by_tc(&mut self, packet: &Packet, frame: &[u8]) -> Seen {
        let (program, ifindex) = match packet.edge {
            Edge::Pod => ("pod_ingress", self.pod),
            Edge::Uplink => ("uplink_ingress", self.uplink),
        };
        let context = SkbContext { ifindex, ..SkbContext::default() };
        interpret(packet, frame, &self.programs.tc(program, frame, context).expect("tc runs"))
    }
}

impl Drop for Sheave {
    fn drop(&mut self) {
        self.dataplane = None;
        if let Err(error) = dataplane::cleanup(&self.config.pin_path) {
            eprintln!("cleanup: {error}");
        }
    }
}

/// 192.0.2.1's sister, as the generator numbers addresses.
const UPLINK6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xc0, 0, 2, 0, 0, 0, 1);

fn config(options: &Options) -> RunConfig {
    let mut config = RunConfig::new(SourceConfig::Manifests("/nonexistent".into()), THIS_NODE.to_owned());
    config.pin_path = Path::new("/sys/fs/bpf").join(unique_name());
    config.connect = ConnectMode::Off;
    config.xdp = XdpMode::Native;
    // As the controller would find out.
    config.drain_foreign = DrainForeign::Off;
    config.external_ips = if options.external_ips { ExternalIps::All } else { ExternalIps::None };
    config.nodeport_addresses = match options.node_ports {
        NodePorts::Primary => NodePortAddresses::Primary,
        NodePorts::All => NodePortAddresses::All,
        NodePorts::Network(network, length) => NodePortAddresses::Networks(vec![(network, length)]),
    };
    // However long a slow machine takes, no flow times out and no refusal is held back.
    config.timeouts.syn = 86_400;
    config.timeouts.udp_new = 86_400;
    config.rejects_per_second = u32::MAX;
    config.snat_ports = SNAT_PORTS;
    config.sizes = MapSizes {
        frontends: Some(4_096),
        backends: Some(8_192),
        table: Some(16_384),
        conntrack: Some(65_536),
        // Nobody answers here, so this is where all flows stay.
        half_open: Some(262_144),
        affinity: Some(131_072),
        sockets: Some(64),
        ..MapSizes::default()
    };
    config
}

fn index(name: &str) -> u32 {
    let name = std::ffi::CString::new(name).expect("no NUL");
    // SAFETY: the name is a C string.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

fn expect_applied(applied: &Applied) {
    assert!(applied.failed.is_empty() && applied.other.is_none(), "{applied:?}");
}

/// An object as it comes from an API server.
fn through_json<T: Serialize + DeserializeOwned>(object: &T) -> T {
    let text = serde_json::to_string(object).expect("an object is JSON");
    serde_json::from_str(&text).expect("and JSON an object")
}

/// What a source reports of a change; nothing when another node goes.
fn read(change: &Change) -> Option<ModelChange> {
    fn split(key: &str) -> (String, String) {
        let (namespace, name) = key.split_once('/').expect("namespace/name");
        (namespace.to_owned(), name.to_owned())
    }
    Some(match change {
        Change::Service(_, Some(object)) => ModelChange::Service((&through_json::<core::Service>(object)).into()),
        Change::Service(key, None) => {
            let (namespace, name) = split(key);
            ModelChange::ServiceGone(ServiceKey { namespace: namespace.into(), name: name.into() })
        }
        Change::Slice(_, Some(object)) => {
            ModelChange::Slice((&through_json::<discovery::EndpointSlice>(object)).into())
        }
        Change::Slice(key, None) => {
            let (namespace, name) = split(key);
            ModelChange::SliceGone(SliceKey { namespace: namespace.into(), name: name.into() })
        }
        Change::Node(_, Some(object)) => ModelChange::Node((&through_json::<core::Node>(object)).into()),
        Change::Node(name, None) if name == THIS_NODE => ModelChange::NodeGone,
        Change::Node(_, None) => return None,
        Change::ServiceCidr(_, Some(object)) => {
            ModelChange::ServiceCidr((&through_json::<networking::ServiceCIDR>(object)).into())
        }
        Change::ServiceCidr(name, None) => ModelChange::ServiceCidrGone(name.clone()),
    })
}
