//! Running the real programs on hand-made packets (BPF_PROG_TEST_RUN), with their maps filled by hand.
//!
//! Nothing is pinned and nothing attached: the object is loaded privately and goes with its [`Programs`].

use std::collections::HashMap as StdHashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, PerCpuArray};
use aya::programs::{SchedClassifier, TestRun as _, Xdp};
use aya::{Ebpf, EbpfLoader, Pod, TestRunOptions};
use sheave::dataplane::{self, Features};
use sheave::model::desired::Algorithm;
use sheave::plan::spread;
use sheave_common::backend::{Backend, IDS_PER_ELEMENT, TableElement, flags as backend_flags};
use sheave_common::config::{Config, Timeouts, flags as config_flags};
use sheave_common::counter::ServiceCounter;
use sheave_common::flow::{Flow, FlowKey};
use sheave_common::frontend::{BackendSet, Frontend, FrontendKey, flags as frontend_flags};
use sheave_common::prefix::SourceRange;
use sheave_common::{Address, DropReason, Ipv4Address, Ipv6Address, filter, names};

use crate::family::Family;
use crate::raw_bpf::{self, xdp_context};

/// tc's "next program".
pub const NEXT: i32 = -1;
/// tc's "drop".
pub const DROP: i32 = 2;
/// tc's "redirected".
pub const REDIRECT: i32 = 7;
/// XDP: to the stack.
pub const XDP_PASS: i32 = 2;
/// XDP: out of the interface that the frame came in by.
pub const XDP_TX: i32 = 3;

/// The loaded object. Each program is loaded when it is run first: verifying all of them takes a second, and half a minute on
/// an emulated processor.
pub struct Programs {
    bpf: Ebpf,
    version: u64,
    next_backend: u32,
    table_used: u32,
    algorithm: Algorithm,
}

/// What a program did to a packet.
#[derive(Debug)]
pub struct Outcome {
    /// The action.
    pub action: i32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// How long a run took: the mean of all repeats, in whole nanoseconds.
    pub duration: Duration,
}

/// The fields of `__sk_buff` that a test may set; the rest is zero.
#[derive(Clone, Copy, Default)]
pub struct SkbContext {
    /// Interface that the packet is on; 0 is loopback.
    pub ifindex: u32,
    /// Payload per segment of a GSO packet.
    pub gso_size: u32,
    /// Number of segments.
    pub gso_segs: u32,
}

/// `struct __sk_buff` up to `hwtstamp` (kernel 6.18): 192 bytes.
const SK_BUFF: usize = 192;
const SK_BUFF_IFINDEX: usize = 40;
const SK_BUFF_GSO_SEGS: usize = 164;
const SK_BUFF_GSO_SIZE: usize = 176;

/// A service port for [`Programs::service`].
pub struct Service {
    /// Its id.
    pub id: u32,
    /// Frontends of either family, with bits of [`sheave_common::frontend::flags`].
    pub frontends: Vec<(SocketAddr, u32)>,
    /// Protocol number.
    pub protocol: u8,
    /// Endpoints: address, and whether it is on this node. A frontend gets those of its family.
    pub endpoints: Vec<(SocketAddr, bool)>,
    /// Affinity time-out in seconds.
    pub affinity: u32,
}

impl Programs {
    /// Loads the object with small maps and a default configuration.
    pub fn load() -> Result<Self> {
        Self::load_with(|_| {})
    }

    /// Loads the object; `adjust` changes the configuration.
    pub fn load_with(adjust: impl FnOnce(&mut Config)) -> Result<Self> {
        Self::load_sized(&[], adjust)
    }

    /// The same with other sizes for some maps.
    pub fn load_sized(sizes: &[(&'static str, u32)], adjust: impl FnOnce(&mut Config)) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        for (map, size) in [
            (names::CONNTRACK4, 65_536),
            (names::CONNTRACK6, 65_536),
            (names::HALF_OPEN4, 65_536),
            (names::HALF_OPEN6, 65_536),
            (names::BACKEND_TABLE, 4_096),
            (names::SERVICE_COUNTERS, 1_024),
            (names::AFFINITY4, 4_096),
            (names::AFFINITY6, 4_096),
        ] {
            loader.map_max_entries(map, size);
        }
        for (map, size) in sizes {
            loader.map_max_entries(map, *size);
        }
        let mut programs = Self::load_by(loader)?;
        let mut config = default_config();
        adjust(&mut config);
        programs.array::<Config>(names::CONFIG)?.set(0, config, 0)?;
        Ok(programs)
    }

    /// Loads the object once more, on the maps that a dataplane has pinned in a directory, and leaves them as they are.
    pub fn load_pinned(directory: &Path) -> Result<Self> {
        let mut pins = Vec::new();
        for pin in std::fs::read_dir(directory)? {
            let pin = pin?;
            if pin.file_type()?.is_file() {
                pins.push((pin.file_name().to_string_lossy().into_owned(), pin.path()));
            }
        }
        let mut loader = EbpfLoader::new();
        for (map, pin) in &pins {
            loader.map_pin_path(map, pin);
        }
        Self::load_by(loader)
    }

    fn load_by(loader: EbpfLoader<'_>) -> Result<Self> {
        let features = Features::detect().bits();
        // A loader that may borrow what is this function's own.
        let mut loader = loader;
        loader.override_global("FEATURES", &features, true);
        let bpf = loader.load(&dataplane::object(features)).context("loading the BPF object")?;
        Ok(Self { bpf, version: 1, next_backend: 1, table_used: 0, algorithm: Algorithm::Random })
    }

    /// Loads every program, also those that nothing runs.
    pub fn load_all(&mut self) -> Result<()> {
        for (name, program) in self.bpf.programs_mut() {
            match program {
                aya::programs::Program::SchedClassifier(program) => program.load(),
                aya::programs::Program::Xdp(program) => program.load(),
                aya::programs::Program::CgroupSockAddr(program) => program.load(),
                _ => return Err(anyhow!("unexpected program type of {name}")),
            }
            .with_context(|| format!("loading {name}"))?;
        }
        Ok(())
    }

    /// An array by name.
    pub fn array<V: Pod>(&mut self, name: &str) -> Result<Array<&mut aya::maps::MapData, V>> {
        Ok(Array::try_from(self.bpf.map_mut(name).with_context(|| format!("no map {name}"))?)?)
    }

    /// A hash map by name.
    pub fn hash<K: Pod, V: Pod>(&mut self, name: &str) -> Result<HashMap<&mut aya::maps::MapData, K, V>> {
        Ok(HashMap::try_from(self.bpf.map_mut(name).with_context(|| format!("no map {name}"))?)?)
    }

    fn mark_network<K: Pod>(&mut self, map: &str, length: u32, data: K) -> Result<()> {
        let map = self.bpf.map_mut(map).with_context(|| format!("no map {map}"))?;
        Ok(LpmTrie::<_, K, u32>::try_from(map)?.insert(&Key::new(length, data), 1, 0)?)
    }

    /// Lets clients use a service port's frontends that carry `SOURCE_RANGES`.
    pub fn source_range(&mut self, service_id: u32, address: IpAddr, length: u32) -> Result<()> {
        let length = 32 + length;
        match address {
            IpAddr::V4(ip) => {
                let range = SourceRange { service_id, address: Ipv4Address::from(ip) };
                self.mark_network(names::SOURCE_RANGES4, length, range)
            }
            IpAddr::V6(ip) => {
                let range = SourceRange { service_id, address: Ipv6Address::from(ip) };
                self.mark_network(names::SOURCE_RANGES6, length, range)
            }
        }
    }

    /// Takes everybody off every list of clients.
    pub fn clear_source_ranges(&mut self) -> Result<()> {
        fn clear<K: Pod>(map: &mut aya::maps::Map) -> Result<()> {
            let mut trie = LpmTrie::<_, K, u32>::try_from(map)?;
            let keys: Vec<Key<K>> = trie.keys().collect::<Result<_, _>>()?;
            keys.iter().try_for_each(|key| Ok(trie.remove(key)?))
        }
        clear::<SourceRange<Ipv4Address>>(self.bpf.map_mut(names::SOURCE_RANGES4).context("no source_ranges4")?)?;
        clear::<SourceRange<Ipv6Address>>(self.bpf.map_mut(names::SOURCE_RANGES6).context("no source_ranges6")?)
    }

    /// Says that ClusterIPs come from a network.
    pub fn service_cidr(&mut self, address: IpAddr, length: u32) -> Result<()> {
        let flag = match address {
            IpAddr::V4(ip) => {
                self.mark_network(names::SERVICE_CIDRS4, length, Ipv4Address::from(ip))?;
                config_flags::SERVICE_CIDRS4
            }
            IpAddr::V6(ip) => {
                self.mark_network(names::SERVICE_CIDRS6, length, Ipv6Address::from(ip))?;
                config_flags::SERVICE_CIDRS6
            }
        };
        self.configure(|config| config.flags |= flag)
    }

    /// Changes the configuration.
    pub fn configure(&mut self, adjust: impl FnOnce(&mut Config)) -> Result<()> {
        let mut map = self.array::<Config>(names::CONFIG)?;
        let mut config = map.get(&0, 0)?;
        adjust(&mut config);
        Ok(map.set(0, config, 0)?)
    }

    /// A second handle of a map, for another thread.
    pub fn share(&mut self, name: &str) -> Result<aya::maps::Map> {
        use aya::maps::{Map, MapData};
        let map = self.bpf.map_mut(name).with_context(|| format!("no map {name}"))?;
        let again = |data: &MapData| -> Result<MapData> { Ok(MapData::from_id(data.info()?.id())?) };
        match map {
            Map::HashMap(data) => Ok(Map::HashMap(again(data)?)),
            Map::Array(data) => Ok(Map::Array(again(data)?)),
            Map::RingBuf(data) => Ok(Map::RingBuf(again(data)?)),
            _ => Err(anyhow!("{name} is neither a hash, nor an array, nor a ring buffer")),
        }
    }

    /// A hash map's descriptor, for programs that are not in the object.
    pub fn descriptor(&mut self, name: &str) -> Result<OwnedFd> {
        use aya::maps::Map;
        let (Map::HashMap(data) | Map::LruHashMap(data)) =
            self.bpf.map_mut(name).with_context(|| format!("no map {name}"))?
        else {
            return Err(anyhow!("{name} is no hash map"));
        };
        Ok(data.fd().as_fd().try_clone_to_owned()?)
    }

    /// How services that are written from now on choose their backends; at random if it isn't called.
    pub fn set_algorithm(&mut self, algorithm: Algorithm) {
        self.algorithm = algorithm;
    }

    /// Writes a service port's backends, table runs and frontends, and returns its backend ids in order.
    pub fn service(&mut self, service: &Service) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for (address, local) in &service.endpoints {
            let id = self.next_backend;
            self.next_backend += 1;
            match address.ip() {
                IpAddr::V4(ip) => {
                    self.backend(names::BACKENDS4, id, service, Ipv4Address::from(ip), address, *local)?;
                }
                IpAddr::V6(ip) => {
                    self.backend(names::BACKENDS6, id, service, Ipv6Address::from(ip), address, *local)?;
                }
            }
            ids.push(id);
        }
        for family in Family::BOTH {
            let of_family = |address: &SocketAddr| Family::of(address.ip()) == family;
            if !service.frontends.iter().any(|(address, _)| of_family(address)) {
                continue;
            }
            let mine = || ids.iter().zip(&service.endpoints).filter(|(_, (address, _))| of_family(address));
            let cluster: Vec<_> = mine().map(|(id, (address, _))| (*address, 1, *id)).collect();
            let local: Vec<_> =
                mine().filter(|(_, (_, local))| *local).map(|(id, (address, _))| (*address, 1, *id)).collect();
            let (cluster, local) = (spread(self.algorithm, &cluster), spread(self.algorithm, &local));
            let (cluster, local) = (self.run(&cluster)?, self.run(&local)?);
            for (address, flags) in service.frontends.iter().filter(|(address, _)| of_family(address)) {
                let frontend = Frontend {
                    version: self.next_version(),
                    service_id: service.id,
                    flags: *flags,
                    cluster,
                    local,
                    affinity_seconds: service.affinity,
                    algorithm: self.algorithm as u32,
                };
                let (port_be, protocol) = (address.port().to_be(), service.protocol);
                match address.ip() {
                    IpAddr::V4(ip) => {
                        self.frontend(names::FRONTENDS4, Ipv4Address::from(ip), port_be, protocol, frontend)?;
                    }
                    IpAddr::V6(ip) => {
                        self.frontend(names::FRONTENDS6, Ipv6Address::from(ip), port_be, protocol, frontend)?;
                    }
                }
            }
        }
        Ok(ids)
    }

    fn backend<A: Address>(
        &mut self,
        map: &str,
        id: u32,
        service: &Service,
        address: A,
        endpoint: &SocketAddr,
        local: bool,
    ) -> Result<()>
    where
        Backend<A>: Pod,
    {
        let mut flags = backend_flags::IN_CLUSTER_SET | backend_flags::SERVING;
        if local {
            flags |= backend_flags::LOCAL | backend_flags::IN_LOCAL_SET;
        }
        if self.algorithm == Algorithm::LeastConnections {
            flags |= backend_flags::COUNTED;
        }
        let backend = Backend {
            version: self.next_version(),
            service_id: service.id,
            address,
            port_be: endpoint.port().to_be(),
            weight: 1,
            flags,
            reserved: A::FILL,
        };
        Ok(self.hash::<u32, Backend<A>>(map)?.insert(id, backend, 0)?)
    }

    /// Writes a frontend and, where its kind asks for one, the mark on its address.
    fn frontend<A: Address>(
        &mut self,
        map: &str,
        address: A,
        port_be: u16,
        protocol: u8,
        frontend: Frontend,
    ) -> Result<()>
    where
        FrontendKey<A>: Pod,
    {
        let mark = if frontend.flags & frontend_flags::CLUSTER_IP != 0 {
            frontend_flags::WHOLE_ADDRESS
        } else if frontend.flags & (frontend_flags::LOAD_BALANCER | frontend_flags::EXTERNAL_IP) != 0 {
            frontend_flags::SERVICE_ADDRESS
        } else {
            0
        };
        self.let_in(&address)?;
        self.hash::<FrontendKey<A>, Frontend>(map)?.insert(
            FrontendKey::new(address, port_be, protocol),
            frontend,
            0,
        )?;
        if mark != 0 {
            let marked = Frontend {
                version: self.next_version(),
                service_id: 0,
                flags: mark,
                cluster: BackendSet::default(),
                local: BackendSet::default(),
                affinity_seconds: 0,
                algorithm: 0,
            };
            self.hash::<FrontendKey<A>, Frontend>(map)?.insert(FrontendKey::mark(address), marked, 0)?;
        }
        Ok(())
    }

    /// Writes the mark on a service address, as the controller does.
    pub fn mark(&mut self, address: IpAddr, flags: u32) -> Result<()> {
        let mark = Frontend {
            version: self.next_version(),
            service_id: 0,
            flags,
            cluster: BackendSet::default(),
            local: BackendSet::default(),
            affinity_seconds: 0,
            algorithm: 0,
        };
        match address {
            IpAddr::V4(address) => {
                let key = FrontendKey::mark(Ipv4Address::from(address));
                self.let_in(&key.address)?;
                self.hash::<_, Frontend>(names::FRONTENDS4)?.insert(key, mark, 0)?;
            }
            IpAddr::V6(address) => {
                let key = FrontendKey::mark(Ipv6Address::from(address));
                self.let_in(&key.address)?;
                self.hash::<_, Frontend>(names::FRONTENDS6)?.insert(key, mark, 0)?;
            }
        }
        Ok(())
    }

    /// Has the programs look for packets to an address, as the controller does for a frontend's and the programs for the
    /// source of packets that they redirect.
    pub fn let_in<A: Address>(&mut self, to: &A) -> Result<()> {
        Ok(self.array::<u32>(names::DESTINATIONS)?.set(filter::element(to), 1, 0)?)
    }

    /// Has the programs look for packets from an address, as they do themselves for the backend of a flow that was last seen
    /// in that second.
    pub fn let_out<A: Address>(&mut self, from: &A, second: u32) -> Result<()> {
        Ok(self.array::<u32>(names::SOURCES)?.set(filter::element(from), second, 0)?)
    }

    fn next_version(&mut self) -> u64 {
        self.version += 1;
        self.version
    }

    fn run(&mut self, ids: &[u32]) -> Result<BackendSet> {
        let first = self.table_used;
        let mut table = self.array::<TableElement>(names::BACKEND_TABLE)?;
        for (element, ids) in (first / IDS_PER_ELEMENT..).zip(ids.chunks(IDS_PER_ELEMENT as usize)) {
            table.set(element, [ids[0], ids.get(1).copied().unwrap_or(0)], 0)?;
        }
        let length = u32::try_from(ids.len())?;
        self.table_used += length.next_multiple_of(IDS_PER_ELEMENT);
        Ok(BackendSet { first, length })
    }

    /// A tc program by itself, which another thread can run meanwhile; its packets come in by the loopback device.
    pub fn detach(&mut self, name: &str) -> Result<raw_bpf::Program> {
        Ok(self.classifier(name)?.fd()?.as_fd().try_clone_to_owned()?.into())
    }

    /// Runs a tc program once.
    pub fn tc(&mut self, program: &str, packet: &[u8], context: SkbContext) -> Result<Outcome> {
        self.tc_repeated(program, packet, context, 1)
    }

    /// Runs a tc program again and again on what it has made of the packet; the outcome is the last run's.
    pub fn tc_repeated(&mut self, program: &str, packet: &[u8], context: SkbContext, repeat: u32) -> Result<Outcome> {
        let program = self.classifier(program)?;
        let mut skb = [0_u8; SK_BUFF];
        for (offset, value) in [
            (SK_BUFF_IFINDEX, context.ifindex),
            (SK_BUFF_GSO_SIZE, context.gso_size),
            (SK_BUFF_GSO_SEGS, context.gso_segs),
        ] {
            skb[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
        }
        // An answer may be longer than the packet that it answers.
        let mut out = vec![0_u8; packet.len() + 256];
        let result = program.test_run(TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&skb),
            repeat,
            ..TestRunOptions::new()
        })?;
        out.truncate(usize::try_from(result.data_size_out)?);
        Ok(Outcome { action: result.return_value.cast_signed(), packet: out, duration: result.duration })
    }

    /// A tc program, loaded when it is asked for first: the kernel's verifier takes its time over each.
    fn classifier(&mut self, name: &str) -> Result<&mut SchedClassifier> {
        let program: &mut SchedClassifier =
            self.bpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?;
        if program.fd().is_err() {
            program.load().with_context(|| format!("loading {name}"))?;
        }
        Ok(program)
    }

    /// Runs the XDP program once, as if the frame had come in by an interface of the calling thread's namespace.
    pub fn xdp(&mut self, packet: &[u8], ifindex: u32) -> Result<Outcome> {
        self.xdp_repeated(packet, ifindex, 1)
    }

    /// Runs the XDP program again and again on what it has made of the frame; the outcome is the last run's.
    pub fn xdp_repeated(&mut self, packet: &[u8], ifindex: u32, repeat: u32) -> Result<Outcome> {
        let context = xdp_context(packet, ifindex)?;
        let program = self.uplink_xdp()?;
        let mut out = vec![0_u8; packet.len() + 4_096];
        let result = program.test_run(TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            repeat,
            ..TestRunOptions::new()
        })?;
        out.truncate(usize::try_from(result.data_size_out)?);
        Ok(Outcome { action: result.return_value.cast_signed(), packet: out, duration: result.duration })
    }

    /// Runs the XDP program on frames that then really leave (see [`raw_bpf::live_frames`]).
    pub fn xdp_live(&mut self, packet: &[u8], ifindex: u32, frames: u32) -> Result<Duration> {
        let program = self.uplink_xdp()?.fd()?.as_fd();
        Ok(raw_bpf::live_frames(program, packet, ifindex, frames)?)
    }

    fn uplink_xdp(&mut self) -> Result<&mut Xdp> {
        let program: &mut Xdp = self.bpf.program_mut("uplink_xdp").context("no program uplink_xdp")?.try_into()?;
        if program.fd().is_err() {
            program.load().context("loading uplink_xdp")?;
        }
        Ok(program)
    }

    /// Takes what the programs have logged through aya-log, as raw records; development builds only.
    #[cfg(feature = "packet-trace")]
    pub fn take_log(&mut self) -> Result<Vec<Vec<u8>>> {
        let map = self.bpf.map_mut("AYA_LOGS").context("no map AYA_LOGS: the object does not log")?;
        let mut ring = aya::maps::RingBuf::try_from(map)?;
        let mut records = Vec::new();
        while let Some(record) = ring.next() {
            records.push(record.to_vec());
        }
        Ok(records)
    }

    /// All entries of an IPv4 flow map.
    pub fn flows(&mut self, map: &str) -> Result<StdHashMap<FlowKey<Ipv4Address>, Flow<Ipv4Address>>> {
        self.flows_of(map)
    }

    /// All entries of an IPv6 flow map.
    pub fn flows6(&mut self, map: &str) -> Result<StdHashMap<FlowKey<Ipv6Address>, Flow<Ipv6Address>>> {
        self.flows_of(map)
    }

    fn flows_of<A: Address + Hash>(&mut self, map: &str) -> Result<StdHashMap<FlowKey<A>, Flow<A>>>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        let map = self.hash::<FlowKey<A>, Flow<A>>(map)?;
        map.iter().map(|entry| entry.map_err(Into::into)).collect()
    }

    /// Packets counted for a reason, over all CPUs.
    pub fn dropped(&mut self, reason: DropReason) -> Result<u64> {
        self.counted(reason as u32)
    }

    /// An element of `drop_counters`, over all CPUs.
    pub fn counted(&mut self, index: u32) -> Result<u64> {
        let map = self.bpf.map_mut(names::DROP_COUNTERS).context("no drop_counters")?;
        let counters: PerCpuArray<_, u64> = PerCpuArray::try_from(map)?;
        Ok(counters.get(&index, 0)?.iter().sum())
    }

    /// A service port's counters, over all CPUs.
    pub fn counter(&mut self, service_id: u32) -> Result<ServiceCounter> {
        let map = self.bpf.map_mut(names::SERVICE_COUNTERS).context("no service_counters")?;
        let counters: PerCpuArray<_, ServiceCounter> = PerCpuArray::try_from(map)?;
        let mut total = ServiceCounter::default();
        for counter in counters.get(&service_id, 0)?.iter() {
            total.connections += counter.connections;
            total.packets += counter.packets;
            total.bytes += counter.bytes;
        }
        Ok(total)
    }
}

/// The configuration that `sheave run` would write by default.
#[must_use]
pub fn default_config() -> Config {
    Config {
        next_version: 1 << 32,
        host_netns_cookie: 0,
        layout_version: sheave_common::LAYOUT_VERSION,
        next_backend_id: 1,
        next_service_id: 1,
        flags: config_flags::CONNECT_HOST | config_flags::SYN_FAILOVER,
        timeouts: Timeouts::DEFAULT,
        snat_port_first: 10_000,
        snat_port_last: 29_999,
        rejects_per_second: 1_000,
        hairpin4: Ipv4Address::from(Ipv4Addr::new(169, 254, 42, 1)),
        hairpin6: Ipv6Address::from(Ipv6Addr::new(0xfd53, 0x6865, 0x6176, 0x6500, 0, 0, 0, 1)),
        node4: Ipv4Address::UNSPECIFIED,
        node6: Ipv6Address::UNSPECIFIED,
    }
}
