//! The dataplane on this machine's kernel: pins, links, restarts, crashes, and what it refuses. Each test has its own pin
//! directory, network namespace and cgroup, and never touches the machine's interfaces or its root cgroup.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fs, io, thread};

use sheave::config::{MapSizes, RunConfig, SourceConfig};
use sheave::dataplane::{self, Dataplane, DataplaneError, PinnedMaps};
use sheave::interfaces::{Interface, Role};
use sheave::model::desired::{Endpoint, EndpointSets, Protocol, ServiceKey, ServicePort, ServicePortName};
use sheave_common::frontend::flags::CLUSTER_IP;

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A pin directory and a cgroup of this test's own, removed when it ends, however it ends.
struct Bench {
    config: RunConfig,
    cgroup: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let name = format!("sheave-test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let cgroup = cgroup_root().join(&name);
        fs::create_dir(&cgroup).expect("a cgroup");
        let mut config = RunConfig::new(SourceConfig::Manifests(PathBuf::from("/nonexistent")), "node".to_owned());
        config.pin_path = Path::new("/sys/fs/bpf").join(&name);
        config.cgroup = Some(cgroup.clone());
        config.sizes = MapSizes {
            services: 64,
            frontends: 64,
            backends: 64,
            table: 64,
            conntrack: 1024,
            half_open: 1024,
            affinity: 64,
            sockets: 64,
        };
        Self { config, cgroup }
    }

    fn open(&self) -> Dataplane {
        Dataplane::open(&self.config).unwrap_or_else(|error| panic!("{}", chain(&error)))
    }

    fn pin(&self, name: &str) -> PathBuf {
        self.config.pin_path.join(name)
    }

    fn view(&self) -> PinnedMaps {
        PinnedMaps::open(&self.config.pin_path).expect("the maps are pinned")
    }

    fn links(&self) -> BTreeSet<String> {
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

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn cgroup_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").expect("/proc/mounts");
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    PathBuf::from(fields.find(|fields| fields[2] == "cgroup2").expect("cgroup v2 is mounted")[1])
}

/// Runs a test in a network namespace of its own, which goes away with its thread.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
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

fn mount_bpf() {
    if !fs::read_to_string("/proc/mounts").expect("/proc/mounts").contains(" /sys/fs/bpf bpf ") {
        run("mount -t bpf bpf /sys/fs/bpf");
    }
}

fn run(command: &str) {
    let words: Vec<&str> = command.split(' ').collect();
    let output = Command::new(words[0]).args(&words[1..]).output().expect(command);
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

fn interface(name: &str, role: Role) -> Interface {
    let index = interface_index(name);
    let source4 = Some(Ipv4Addr::new(192, 0, 2, 1));
    Interface { index, name: name.to_owned(), role, ethernet: true, physical: false, source4, source6: None }
}

fn interface_index(name: &str) -> u32 {
    let name = std::ffi::CString::new(name).expect("no NUL");
    // SAFETY: the name is NUL-terminated.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

fn name(name: &str) -> ServicePortName {
    let service = ServiceKey { namespace: "default".to_owned(), name: name.to_owned() };
    ServicePortName { service, port: "http".to_owned(), protocol: Protocol::Tcp }
}

fn service(host: u8, backends: &[u8]) -> ServicePort {
    let address = |host: u8| Ipv4Addr::new(10, 1, 0, host).into();
    let endpoint = |host: &u8| Endpoint { address: address(*host), port: 80, local: *host == 1, terminating: false };
    let cluster: Vec<Endpoint> = backends.iter().map(endpoint).collect();
    let local = cluster.iter().filter(|endpoint| endpoint.local).copied().collect();
    ServicePort {
        frontends: BTreeMap::from([(SocketAddr::from(([10, 96, 0, host], 80)), CLUSTER_IP)]),
        endpoints4: EndpointSets { cluster, local },
        ..ServicePort::default()
    }
}

fn desired() -> BTreeMap<ServicePortName, ServicePort> {
    BTreeMap::from([(name("web"), service(1, &[1, 2, 3])), (name("db"), service(2, &[4]))])
}

#[test]
fn service_ports_become_map_elements_and_a_restart_writes_nothing() {
    in_namespace(|| {
        let bench = Bench::new();
        let mut dataplane = bench.open();
        let applied = dataplane.apply_all(desired());
        assert!(applied.failed.is_empty() && applied.other.is_none(), "{applied:?}");
        let view = bench.view();
        assert_eq!(view.frontends4().expect("a dump").len(), 4, "two frontends and the marks of their addresses");
        assert_eq!(view.backends4().expect("a dump").len(), 4);
        let names: BTreeSet<String> = view
            .service_names()
            .expect("a dump")
            .iter()
            .filter_map(|(_, name)| name.as_str().map(str::to_owned))
            .collect();
        assert_eq!(names, BTreeSet::from(["default/db:http".to_owned(), "default/web:http".to_owned()]));
        drop(dataplane);
        let mut dataplane = bench.open();
        let applied = dataplane.apply_all(desired());
        assert_eq!((applied.written, dataplane.map_writes()), (0, 0));
        assert!(dataplane.begin_grace().is_none());
    });
}

#[test]
fn programs_are_attached_by_role_and_cleanup_leaves_nothing() {
    in_namespace(|| {
        let bench = Bench::new();
        run("ip link add pod0 type veth peer name peer0");
        run("ip link add up0 type veth peer name peer1");
        let mut dataplane = bench.open();
        dataplane.attach(&interface("pod0", Role::Pod)).expect("attached");
        dataplane.attach(&interface("up0", Role::Uplink)).expect("attached");
        let (pod, uplink) = (interface_index("pod0"), interface_index("up0"));
        let mut expected: BTreeSet<String> =
            ["connect4", "sendmsg4", "recvmsg4", "getpeername4"].map(|hook| format!("cgroup_{hook}")).into();
        expected.extend([pod, uplink].iter().flat_map(|i| [format!("{i}_ingress"), format!("{i}_egress")]));
        assert_eq!(bench.links(), expected);
        assert!(matches!(dataplane::cleanup(&bench.config.pin_path), Err(DataplaneError::Busy { .. })));
        drop(dataplane);
        dataplane::cleanup(&bench.config.pin_path).expect("cleaned up");
        assert!(!bench.config.pin_path.exists());
        dataplane::cleanup(&bench.config.pin_path).expect("again is no error");
    });
}
