//! The views show what is pinned without any daemon, and say what to do when nothing is there.

use std::io::Read as _;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, PerCpuValues};
use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::backend::{self, Backend, TableElement};
use sheave_common::config::{Config, Timeouts};
use sheave_common::counter::ServiceCounter;
use sheave_common::flow::{EDGE_UPLINK, Flow, FlowKey, Tuple, flags as flow_flags, state};
use sheave_common::frontend::{BackendSet, Frontend, FrontendKey, flags};
use sheave_common::service_name::ServiceName;
use sheave_common::{Ipv4Address, Ipv6Address, LAYOUT_VERSION, PROTOCOL_TCP, names};
use sheave_tests::leftovers::unique_name;
use sheave_tests::process::built;

/// Flows in the map, enough to fill a pipe that nobody reads.
const FLOWS: u16 = 2_000;

/// Pinned maps of a dataplane that was left behind, removed when the test ends.
struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        // What is missing was never made.
        let _missing = std::fs::remove_dir_all(&self.0);
    }
}

impl Pins {
    /// Pins all maps and fills them with one Service: two frontends, two backends, flows, two clients with affinity.
    fn new() -> Result<Self> {
        let pins = Self(Path::new("/sys/fs/bpf").join(unique_name()));
        std::fs::create_dir(&pins.0).context("needs root and a BPF file system")?;
        let mut loader = aya::EbpfLoader::new();
        let fixed = [names::CONFIG, names::DROP_COUNTERS, names::REJECT_BUDGET];
        for name in names::MAPS.iter().copied().filter(|name| !fixed.contains(name)) {
            loader.map_max_entries(name, 16_384);
        }
        let mut object = loader.load(sheave::EBPF_OBJECT)?;
        for name in names::MAPS {
            object.map_mut(name).with_context(|| format!("no map {name}"))?.pin(pins.0.join(name))?;
        }
        pins.fill()?;
        Ok(pins)
    }

    fn map(&self, name: &str) -> Result<MapData> {
        Ok(MapData::from_pin(self.0.join(name))?)
    }

    fn hash<K: aya::Pod, V: aya::Pod>(&self, name: &str, elements: &[(K, V)]) -> Result<()> {
        let map = match name.trim_end_matches(['4', '6']) {
            "conntrack" | "half_open" | "affinity" | "new_affinity" => Map::LruHashMap(self.map(name)?),
            _ => Map::HashMap(self.map(name)?),
        };
        let mut map: HashMap<_, K, V> = HashMap::try_from(map)?;
        elements.iter().try_for_each(|(key, value)| map.insert(key, value, 0))?;
        Ok(())
    }

    fn fill(&self) -> Result<()> {
        let mut config: Array<_, Config> = Array::try_from(Map::Array(self.map(names::CONFIG)?))?;
        config.set(0, settings(), 0)?;
        let name = ServiceName::new(PROTOCOL_TCP, "default/web:http").context("name")?;
        self.hash(names::SERVICE_NAMES, &[(7_u32, name)])?;
        let mut table: Array<_, TableElement> = Array::try_from(Map::Array(self.map(names::BACKEND_TABLE)?))?;
        // From index 5 on: 31, 30, 31, 99.
        (2..).zip([[0, 31], [30, 31], [99, 0]]).try_for_each(|(element, ids)| table.set(element, ids, 0))?;
        let backend = |octet, flags| Backend {
            version: 1,
            service_id: 7,
            address: address([10, 244, 0, octet]),
            port_be: 8_080_u16.to_be(),
            weight: 1,
            flags,
            reserved: [],
        };
        self.hash(names::BACKENDS4, &[(30_u32, backend(5, backend::flags::LOCAL)), (31, backend(6, 0))])?;
        let frontend = |flags| Frontend {
            version: 2,
            service_id: 7,
            flags,
            cluster: BackendSet { first: 5, length: 2 },
            local: BackendSet { first: 6, length: 1 },
            affinity_seconds: 10_800,
            algorithm: 0,
        };
        let cluster_ip = FrontendKey::new(address([10, 96, 0, 10]), 80_u16.to_be(), PROTOCOL_TCP);
        let node_port = FrontendKey::new(address([192, 0, 2, 1]), 30_500_u16.to_be(), PROTOCOL_TCP);
        let elements = [(cluster_ip, frontend(flags::CLUSTER_IP)), (node_port, frontend(flags::NODE_PORT))];
        self.hash(names::FRONTENDS4, &elements)?;
        let flows: Vec<_> = (0..FLOWS).map(|number| flow(10_000 + number)).collect();
        self.hash(names::CONNTRACK4, &flows)?;
        self.hash(names::HALF_OPEN4, &[flow(9_999)])?;
        let client = AffinityKey { service_id: 7, edge: 0, client: address([198, 51, 100, 7]) };
        self.hash(names::AFFINITY4, &[(client, Affinity { backend_id: 31, last_new_connection: 0 })])?;
        // A newcomer, and one that is known by now.
        let newcomer = AffinityKey { client: address([198, 51, 100, 8]), ..client };
        let bound = Affinity { backend_id: 30, last_new_connection: 0 };
        self.hash(names::NEW_AFFINITY4, &[(newcomer, bound), (client, bound)])?;
        let mut counters: PerCpuArray<_, ServiceCounter> =
            PerCpuArray::try_from(Map::PerCpuArray(self.map(names::SERVICE_COUNTERS)?))?;
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        let counter = ServiceCounter { connections: 1, packets: 10, bytes: 100 };
        counters.set(7, PerCpuValues::try_from(vec![counter; cpus])?, 0)?;
        Ok(())
    }

    fn view(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new(built("sheave")?).args(arguments).arg("--pin-path").arg(&self.0).output()?;
        ensure!(output.status.success(), "sheave {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    fn json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&self.view(&[arguments, &["-o", "json"]].concat())?)?)
    }
}

fn address(octets: [u8; 4]) -> Ipv4Address {
    Ipv4Addr::from(octets).into()
}

fn settings() -> Config {
    let (nowhere4, nowhere6) = (Ipv4Address { octets: [0; 4] }, Ipv6Address { octets: [0; 16] });
    Config {
        next_version: 3,
        host_netns_cookie: 0,
        layout_version: LAYOUT_VERSION,
        next_backend_id: 32,
        next_service_id: 8,
        flags: 0,
        timeouts: Timeouts::DEFAULT,
        snat_port_first: 61_000,
        snat_port_last: 65_535,
        rejects_per_second: 1_000,
        hairpin4: nowhere4,
        hairpin6: nowhere6,
        node4: nowhere4,
        node6: nowhere6,
    }
}

fn flow(port: u16) -> (FlowKey<Ipv4Address>, Flow<Ipv4Address>) {
    let tuple = |source, source_port: u16, destination, destination_port: u16| Tuple {
        source: address(source),
        destination: address(destination),
        source_port_be: source_port.to_be(),
        destination_port_be: destination_port.to_be(),
    };
    let client = [198, 51, 100, 7];
    let key = FlowKey::new(tuple(client, port, [192, 0, 2, 1], 30_500), PROTOCOL_TCP, EDGE_UPLINK);
    let rewrite = tuple([192, 0, 2, 1], 61_000, [10, 244, 0, 6], 8_080);
    let flow = Flow {
        rewrite,
        service_id: 7,
        backend_id: 31,
        last_seen: u32::MAX,
        state: state::ESTABLISHED,
        flags: flow_flags::REDIRECT,
        closing: 0,
        tried: 0,
    };
    (key, flow)
}

#[test]
fn what_is_pinned_is_shown_without_a_daemon() -> Result<()> {
    let pins = Pins::new()?;
    let services = pins.json(&["services"])?;
    let expected = serde_json::json!([
        {
            "service": "default/web:http", "protocol": "TCP", "type": "ClusterIP", "address": "10.96.0.10", "port": 80,
            "host_only": false, "internal_policy": "Cluster", "external_policy": "Cluster", "affinity_seconds": 10_800, "algorithm": "random",
            "cluster_backends": ["10.244.0.5:8080", "10.244.0.6:8080"], "local_backends": ["10.244.0.5:8080"],
        },
        {
            "service": "default/web:http", "protocol": "TCP", "type": "NodePort", "address": "192.0.2.1", "port": 30_500,
            "host_only": false, "internal_policy": "Cluster", "external_policy": "Cluster", "affinity_seconds": 10_800, "algorithm": "random",
            "cluster_backends": ["10.244.0.5:8080", "10.244.0.6:8080"], "local_backends": ["10.244.0.5:8080"],
        },
    ]);
    assert_eq!(services, expected);
    let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
    assert_eq!(pins.json(&["services", "--counters"])?[0]["counters"]["bytes"], 100 * cpus);

    let backends = pins.json(&["backends"])?;
    assert_eq!(backends.as_array().map(Vec::len), Some(2));
    assert_eq!((&backends[0]["address"], &backends[0]["local"]), (&"10.244.0.5".into(), &true.into()));

    let flows = pins.json(&["conntrack", "--service", "default/web", "--client", "198.51.100.7"])?;
    assert_eq!(flows.as_array().map(Vec::len), Some(usize::from(FLOWS) + 1), "half-open flows are flows, too");
    assert_eq!(flows[0]["source"], "198.51.100.7:9999");
    assert_eq!(flows[0]["rewritten_destination"], "10.244.0.6:8080");
    assert_eq!((&flows[0]["edge"], &flows[0]["state"]), (&"uplink".into(), &"established".into()));
    assert_eq!(pins.view(&["conntrack", "--client", "198.51.100.8"])?, "(none)\n");

    let affinity = pins.view(&["affinity"])?;
    for (client, backend) in [("198.51.100.7", "10.244.0.6:8080"), ("198.51.100.8", "10.244.0.5:8080")] {
        let rows: Vec<&str> = affinity.lines().filter(|row| row.contains(client)).collect();
        ensure!(rows.len() == 1 && rows[0].contains(backend), "{affinity}");
    }
    Ok(())
}

/// `sheave conntrack | head` must not end in a panic.
#[test]
fn a_reader_that_has_seen_enough_is_no_error() -> Result<()> {
    let pins = Pins::new()?;
    let mut command = Command::new(built("sheave")?);
    command.arg("conntrack").arg("--pin-path").arg(&pins.0).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let mut start = [0; 16];
    child.stdout.take().context("stdout")?.read_exact(&mut start)?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    Ok(())
}

#[test]
fn errors_say_what_to_do() -> Result<()> {
    let fails = |command: &mut Command, remedies: &[&str]| -> Result<()> {
        let output = command.output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(
            !output.status.success() && remedies.iter().all(|remedy| text.contains(remedy)),
            "{remedies:?}: {text}"
        );
        Ok(())
    };
    let sheave = || -> Result<Command> { Ok(Command::new(built("sheave")?)) };
    fails(sheave()?.args(["services", "--pin-path", "/sys/fs/bpf/nowhere"]), &["/sys/fs/bpf/nowhere", "--pin-path"])?;

    let pins = Pins::new()?;
    std::fs::set_permissions(&pins.0, std::fs::Permissions::from_mode(0o700))?;
    // A copy: the built program may lie where nobody else can go.
    let program = std::env::temp_dir().join(unique_name());
    std::fs::copy(built("sheave")?, &program)?;
    let nobody = fails(
        Command::new(&program).arg("services").arg("--pin-path").arg(&pins.0).uid(65_534).gid(65_534),
        &["not permitted", "CAP_BPF"],
    );
    std::fs::remove_file(&program)?;
    nobody?;

    // A map of another version: values of another size.
    std::fs::remove_file(pins.0.join(names::FRONTENDS4))?;
    let mut loader = aya::EbpfLoader::new();
    let object = loader.map_max_entries(names::BACKENDS4, 16).load(sheave::EBPF_OBJECT)?;
    object.map(names::BACKENDS4).context("backends4")?.pin(pins.0.join(names::FRONTENDS4))?;
    fails(sheave()?.arg("services").arg("--pin-path").arg(&pins.0), &["frontends4", "version"])
}
