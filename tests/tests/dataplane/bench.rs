//! What every test of the dataplane needs: a place of its own, interfaces, and service ports.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io, thread};

use aya::Pod;
use aya::maps::{HashMap, Map, MapData};
use sheave::config::RunConfig;
use sheave::dataplane::{self, Dataplane, PinnedMaps};
use sheave::interfaces::{Interface, Role};
use sheave::model::desired::{Endpoint, EndpointSets, Protocol, ServiceKey, ServicePort, ServicePortName};
use sheave_common::Ipv4Address;
use sheave_common::flow::{Flow, FlowKey, Tuple, state};
use sheave_common::frontend::flags::CLUSTER_IP;
use sheave_tests::config;
use sheave_tests::leftovers::unique_name;

/// A pin directory and a cgroup of this test's own, removed when it ends, however it ends.
pub(crate) struct Bench {
    pub(crate) config: RunConfig,
    pub(crate) cgroup: PathBuf,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let cgroup = cgroup_root().join(unique_name());
        fs::create_dir(&cgroup).expect("a cgroup");
        let config = config::small(&cgroup);
        Self { config, cgroup }
    }

    pub(crate) fn open(&self) -> Dataplane {
        Dataplane::open(&self.config).unwrap_or_else(|error| panic!("{}", chain(&error)))
    }

    pub(crate) fn pin(&self, name: &str) -> PathBuf {
        self.config.pin_path.join(name)
    }

    pub(crate) fn view(&self) -> PinnedMaps {
        PinnedMaps::open(&self.config.pin_path).expect("the maps are pinned")
    }

    pub(crate) fn links(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(self.pin("links")).expect("the folder of links");
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Err(error) = dataplane::cleanup(&self.config.pin_path) {
            eprintln!("cleanup: {}", chain(&error));
        }
        if let Err(error) = fs::remove_dir(&self.cgroup) {
            eprintln!("{}: {error}", self.cgroup.display());
        }
    }
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

pub(crate) fn cgroup_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").expect("/proc/mounts");
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    PathBuf::from(fields.find(|fields| fields[2] == "cgroup2").expect("cgroup v2 is mounted")[1])
}

/// Runs a test in a network namespace of its own, which goes away with its thread.
pub(crate) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    mount_bpf();
    let thread = thread::spawn(|| {
        // SAFETY: unshare(2) takes no addresses; only this thread moves.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", io::Error::last_os_error());
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

pub(crate) fn mount_bpf() {
    if !fs::read_to_string("/proc/mounts").expect("/proc/mounts").contains(" /sys/fs/bpf bpf ") {
        run("mount -t bpf bpf /sys/fs/bpf");
    }
}

pub(crate) fn run(command: &str) {
    output(command);
}

/// What a command prints.
pub(crate) fn output(command: &str) -> String {
    let words: Vec<&str> = command.split(' ').collect();
    let output = Command::new(words[0]).args(&words[1..]).output().expect(command);
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn interface(name: &str, role: Role) -> Interface {
    let index = interface_index(name);
    let source4 = Some(Ipv4Addr::new(192, 0, 2, 1));
    Interface { index, name: name.to_owned(), role, ethernet: true, physical: false, source4, source6: None }
}

pub(crate) fn interface_index(name: &str) -> u32 {
    let name = std::ffi::CString::new(name).expect("no NUL");
    // SAFETY: the name is NUL-terminated.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

pub(crate) fn name(name: &str) -> ServicePortName {
    let service = ServiceKey { namespace: "default".into(), name: name.into() };
    ServicePortName { service, port: "http".into(), protocol: Protocol::Tcp }
}

pub(crate) fn service(host: u8, backends: &[u8]) -> ServicePort {
    let address = |host: u8| Ipv4Addr::new(10, 1, 0, host).into();
    let endpoint =
        |host: &u8| Endpoint { address: address(*host), port: 80, local: *host == 1, terminating: false, weight: 1 };
    let cluster: Box<[Endpoint]> = backends.iter().map(endpoint).collect();
    let local = cluster.iter().filter(|endpoint| endpoint.local).copied().collect();
    ServicePort {
        frontends: BTreeMap::from([(SocketAddr::from(([10, 96, 0, host], 80)), CLUSTER_IP)]),
        endpoints4: EndpointSets { cluster, local, kept: [].into() },
        ..ServicePort::default()
    }
}

pub(crate) fn desired() -> BTreeMap<ServicePortName, ServicePort> {
    BTreeMap::from([(name("web"), service(1, &[1, 2, 3])), (name("db"), service(2, &[4]))])
}

/// A pinned hash map, opened for writing behind the dataplane's back.
pub(crate) fn hash<K: Pod, V: Pod>(pin: &Path) -> HashMap<MapData, K, V> {
    let map = MapData::from_pin(pin).expect("the map is pinned");
    let lru = map.info().expect("map info").map_type().expect("a known type") == aya::maps::MapType::LruHash;
    HashMap::try_from(if lru { Map::LruHashMap(map) } else { Map::HashMap(map) }).expect("a hash map of these types")
}

/// Inserts a flow of this edge and service, which was idle for so long that it has ended.
pub(crate) fn insert_flow(bench: &Bench, map: &str, edge: u32, service_id: u32) {
    insert_flow_in(bench, map, edge, service_id, (1, state::NEW, 0));
}

/// The same at this point of its life: second when it was last seen, state, closing.
pub(crate) fn insert_flow_in(bench: &Bench, map: &str, edge: u32, service_id: u32, life: (u32, u8, u8)) {
    let (last_seen, state, closing) = life;
    let address = Ipv4Address { octets: [10, 0, 0, 1] };
    let port = u16::try_from(edge * 16 + service_id).expect("a small number");
    let tuple = Tuple { source: address, destination: address, source_port_be: port, destination_port_be: 1 };
    let key = FlowKey::new(tuple, 6, edge);
    let flow = Flow { rewrite: tuple, service_id, backend_id: 1, last_seen, state, flags: 0, closing, tried: 0 };
    hash::<FlowKey<Ipv4Address>, Flow<Ipv4Address>>(&bench.pin(map)).insert(key, flow, 0).expect("inserted");
}

/// Edges of the flows in a map.
pub(crate) fn edges(flows: &[(FlowKey<Ipv4Address>, Flow<Ipv4Address>)]) -> BTreeSet<u32> {
    flows.iter().map(|(key, _)| key.edge).collect()
}

/// What a client of the maps would see, without ids and runs.
pub(crate) fn meaning(view: &PinnedMaps) -> BTreeMap<String, String> {
    let names: BTreeMap<u32, String> =
        view.service_names().expect("a dump").iter().map(|(id, name)| (*id, format!("{:?}", name.as_str()))).collect();
    let backends: BTreeMap<u32, String> = view
        .backends4()
        .expect("a dump")
        .iter()
        .map(|(id, b)| (*id, format!("{}:{} {}", b.address, u16::from_be(b.port_be), b.flags)))
        .collect();
    let table = view.backend_table().expect("a dump");
    let set = |set: sheave_common::frontend::BackendSet| -> Vec<String> {
        let run = &table[set.first as usize..][..set.length as usize];
        run.iter().map(|id| backends[id].clone()).collect()
    };
    let frontends = view.frontends4().expect("a dump").into_iter();
    frontends
        .map(|(key, f)| {
            let (cluster, local) = (set(f.cluster), set(f.local));
            let value = format!("{:?} {} {cluster:?} {local:?}", names.get(&f.service_id), f.flags);
            (format!("{key:?}"), value)
        })
        .collect()
}
