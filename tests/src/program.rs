//! Running the real programs on hand-made packets (BPF_PROG_TEST_RUN), with their maps filled by hand.
//!
//! Nothing is pinned and nothing attached: the object is loaded privately and goes with its [`Programs`].

mod runs;
mod services;

use std::collections::HashMap as StdHashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, PerCpuArray};
use aya::{Ebpf, EbpfLoader, Pod};
use sheave::dataplane::{self, Features};
use sheave::model::desired::Algorithm;
use sheave_common::config::{Config, Timeouts, flags as config_flags};
use sheave_common::counter::ServiceCounter;
use sheave_common::flow::{Flow, FlowKey};
use sheave_common::prefix::SourceRange;
use sheave_common::{Address, DropReason, Ipv4Address, Ipv6Address, names};

pub use runs::{Outcome, SkbContext};
pub use services::Service;

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
            (names::NEW_AFFINITY4, 4_096),
            (names::NEW_AFFINITY6, 4_096),
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
