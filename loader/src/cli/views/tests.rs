//! What people and scripts see of given maps.

use std::collections::{BTreeMap, BTreeSet};

use sheave_common::backend::flags::IN_CLUSTER_SET;
use sheave_common::config::Timeouts;
use sheave_common::flow::{closing, flags as flow_flags, state};
use sheave_common::frontend::flags;
use sheave_common::{PROTOCOL_TCP, PROTOCOL_UDP, backend};

use super::super::output::json;
use super::snapshot::{Affinity, Backend, Flow, Frontend, Snapshot, Traffic};
use super::{Row as _, affinity, backends, conntrack, services, table};
use crate::model::network::Network;

fn maps() -> Snapshot {
    let backend = |service_id, address: &str, flags| Backend {
        service_id,
        address: address.parse().unwrap(),
        flags,
        weight: 1,
        connections: None,
    };
    let frontend = |address: &str, protocol, service_id, flags, affinity_seconds, cluster: &[u32], local: &[u32]| {
        let (address, cluster, local) = (address.parse().unwrap(), cluster.to_vec(), local.to_vec());
        Frontend { address, protocol, service_id, flags, affinity_seconds, algorithm: 0, cluster, local }
    };
    Snapshot {
        names: BTreeMap::from([
            (7, ("default/web:http".to_owned(), PROTOCOL_TCP)),
            (9, ("kube-system/dns:dns".to_owned(), PROTOCOL_UDP)),
        ]),
        frontends: vec![
            frontend("10.96.0.10:53", PROTOCOL_UDP, 9, flags::CLUSTER_IP, 0, &[41, 40], &[]),
            frontend("10.96.0.10:0", 0, 0, flags::WHOLE_ADDRESS, 0, &[], &[]),
            frontend("127.0.0.1:30500", PROTOCOL_TCP, 7, flags::NODE_PORT | flags::HOST_ONLY, 600, &[3, 12], &[3]),
            frontend("192.0.2.1:30500", PROTOCOL_TCP, 7, flags::NODE_PORT | flags::EXTERNAL_LOCAL, 600, &[3, 12], &[3]),
            frontend(
                "10.96.0.7:80",
                PROTOCOL_TCP,
                7,
                flags::CLUSTER_IP | flags::EXTERNAL_LOCAL,
                600,
                &[12, 3, 12],
                &[3],
            ),
            frontend("[fd00::7]:80", PROTOCOL_TCP, 7, flags::CLUSTER_IP, 600, &[50], &[]),
        ],
        backends: BTreeMap::from([
            (3, backend(7, "10.244.0.5:8080", backend::flags::LOCAL | IN_CLUSTER_SET)),
            (11, backend(7, "10.244.0.4:8080", 0)),
            (12, backend(7, "10.244.0.12:8080", IN_CLUSTER_SET)),
            (40, backend(9, "10.244.0.2:53", backend::flags::LOCAL | backend::flags::TERMINATING | IN_CLUSTER_SET)),
            (41, backend(9, "10.244.1.2:53", IN_CLUSTER_SET)),
            (50, backend(7, "[fd00:1::5]:8080", IN_CLUSTER_SET)),
        ]),
        source_ranges: BTreeMap::new(),
        counters: None,
        flows: flows(),
        affinities: vec![
            Affinity {
                service_id: 7,
                client: "10.244.0.9".parse().unwrap(),
                edge: 17,
                backend_id: 12,
                last_new_connection: 400,
            },
            Affinity {
                service_id: 7,
                client: "10.244.0.10".parse().unwrap(),
                edge: 18,
                backend_id: 3,
                last_new_connection: 950,
            },
            Affinity {
                service_id: 7,
                client: "10.244.0.11".parse().unwrap(),
                edge: 0,
                backend_id: 2,
                last_new_connection: 999,
            },
        ],
        interfaces: BTreeMap::from([(17, "veth17".to_owned())]),
        timeouts: Timeouts::DEFAULT,
        now: 1_000,
    }
}

fn flows() -> Vec<Flow> {
    let flow = |tuple: [&str; 4], protocol, edge, service_id, backend_id, last_seen, state, closing, flags| {
        let [source, destination, rewritten_source, rewritten_destination] = tuple.map(|end| end.parse().unwrap());
        Flow {
            protocol,
            edge,
            source,
            destination,
            rewritten_source,
            rewritten_destination,
            service_id,
            backend_id,
            last_seen,
            state,
            flags,
            closing,
        }
    };
    let pod = ["10.244.0.9:40000", "10.96.0.7:80", "10.244.0.9:40000", "10.244.0.12:8080"];
    let pod_reply = ["10.244.0.12:8080", "10.244.0.9:40000", "10.96.0.7:80", "10.244.0.9:40000"];
    let outside = ["198.51.100.4:51000", "192.0.2.1:30500", "192.0.2.1:61000", "10.244.0.12:8080"];
    let dns = ["10.244.0.9:5353", "10.96.0.10:53", "10.244.0.9:5353", "10.244.1.2:53"];
    let (redirect, reply) = (flow_flags::REDIRECT, flow_flags::REPLY);
    vec![
        flow(pod_reply, PROTOCOL_TCP, 17, 7, 12, 990, state::ESTABLISHED, closing::CLIENT_FIN, reply),
        flow(pod, PROTOCOL_TCP, 17, 7, 12, 990, state::ESTABLISHED, closing::CLIENT_FIN, 0),
        flow(outside, PROTOCOL_TCP, 0, 7, 12, 920, state::NEW, 0, redirect),
        flow(dns, PROTOCOL_UDP, 18, 9, 39, 970, state::NEW, 0, 0),
    ]
}

#[test]
fn services_as_a_table() {
    let expected = "\
SERVICE              PROTOCOL  TYPE                  ADDRESS          POLICY   AFFINITY  BACKENDS  LOCAL BACKENDS  CLIENTS
default/web:http     TCP       ClusterIP             10.96.0.7:80     Cluster  600s      2         1               all
default/web:http     TCP       ClusterIP             [fd00::7]:80     Cluster  600s      1         0               all
default/web:http     TCP       NodePort (host only)  127.0.0.1:30500  Cluster  600s      2         1               all
default/web:http     TCP       NodePort              192.0.2.1:30500  Local    600s      2         1               all
kube-system/dns:dns  UDP       ClusterIP             10.96.0.10:53    Cluster  -         2         0               all
";
    assert_eq!(table::render(&services::rows(&maps()), false), expected);
}

#[test]
fn a_wide_table_has_more_columns() {
    let last = |text: String| text.split_whitespace().last().map(str::to_owned);
    let mut snapshot = maps();
    snapshot.backends.retain(|id, _| *id == 3);
    snapshot.flows.truncate(1);
    snapshot.affinities.truncate(1);
    assert_eq!(last(table::render(&services::rows(&snapshot), true)).as_deref(), Some("-"), "no endpoint is left");
    assert_eq!(last(table::render(&backends::rows(&snapshot), true)).as_deref(), Some("cluster"));
    let flows = conntrack::rows(&snapshot, &conntrack::Filter::default());
    assert_eq!(last(table::render(&flows, true)).as_deref(), Some("12"));
    assert_eq!(last(table::render(&affinity::rows(&snapshot), true)).as_deref(), Some("12"));
}

#[test]
fn services_as_json_hold_nothing_that_depends_on_history() {
    let mut snapshot = maps();
    snapshot.frontends.truncate(1);
    let expected = r#"[
  {
    "service": "kube-system/dns:dns",
    "protocol": "UDP",
    "type": "ClusterIP",
    "address": "10.96.0.10",
    "port": 53,
    "host_only": false,
    "internal_policy": "Cluster",
    "external_policy": "Cluster",
    "affinity_seconds": 0,
    "algorithm": "random",
    "cluster_backends": [
      "10.244.0.2:53",
      "10.244.1.2:53"
    ],
    "local_backends": []
  }
]
"#;
    assert_eq!(json(&services::rows(&snapshot)).unwrap(), expected);

    // The same Services after another history: other ids, another order.
    let id = |id: &mut u32| *id = 1_000 - *id;
    let mut other = maps();
    other.frontends.reverse();
    for frontend in &mut other.frontends {
        id(&mut frontend.service_id);
        frontend.cluster.iter_mut().chain(&mut frontend.local).for_each(id);
        frontend.cluster.reverse();
    }
    other.names = other.names.into_iter().map(|(id, name)| (1_000 - id, name)).collect();
    other.backends = other
        .backends
        .into_iter()
        .map(|(id, backend)| (1_000 - id, Backend { service_id: 1_000 - backend.service_id, ..backend }))
        .collect();
    assert_eq!(json(&services::rows(&maps())).unwrap(), json(&services::rows(&other)).unwrap());
}

#[test]
fn services_show_who_may_use_a_guarded_frontend() {
    let mut snapshot = maps();
    let network = |address: &str, length| Network::new(address.parse().unwrap(), length).unwrap();
    let ranges = BTreeSet::from([network("198.51.100.0", 24), network("10.0.0.0", 8), network("fd00::", 64)]);
    snapshot.source_ranges = BTreeMap::from([(7, ranges)]);
    for frontend in &mut snapshot.frontends {
        frontend.flags |= flags::SOURCE_RANGES;
    }
    let rows = services::rows(&snapshot);
    let clients: Vec<String> = rows.iter().map(|row| row.cells().pop().unwrap()).collect();
    let v4 = "10.0.0.0/8,198.51.100.0/24";
    assert_eq!(clients, [v4, "fd00::/64", v4, v4, "none"]);
    let shown: serde_json::Value = serde_json::from_str(&json(&rows).unwrap()).unwrap();
    assert_eq!(shown[0]["source_ranges"], serde_json::json!(["10.0.0.0/8", "198.51.100.0/24"]));
    assert_eq!(shown[4]["source_ranges"], serde_json::json!([]));
}

#[test]
fn counters_are_shown_when_asked_for() {
    let mut snapshot = maps();
    snapshot.frontends.retain(|frontend| frontend.address.ip().is_ipv6() || frontend.service_id == 9);
    snapshot.counters = Some(BTreeMap::from([(7, Traffic { connections: 3, packets: 40, bytes: 5_000 })]));
    let expected = "\
SERVICE              PROTOCOL  TYPE       ADDRESS        POLICY   AFFINITY  BACKENDS  LOCAL BACKENDS  CLIENTS  CONNECTIONS  PACKETS  BYTES
default/web:http     TCP       ClusterIP  [fd00::7]:80   Cluster  600s      1         0               all      3            40       5000
kube-system/dns:dns  UDP       ClusterIP  10.96.0.10:53  Cluster  -         2         0               all      0            0        0
";
    let rows = services::rows(&snapshot);
    assert_eq!(table::render(&rows, false), expected);
    assert!(json(&rows).unwrap().contains("\"connections\": 3"));
}

#[test]
fn backends_as_a_table_and_as_json() {
    let expected = "\
ID  SERVICE              PROTOCOL  ADDRESS           STATE        LOCAL  WEIGHT  CONNECTIONS
11  default/web:http     TCP       10.244.0.4:8080   removed      no     1       -
3   default/web:http     TCP       10.244.0.5:8080   ready        yes    1       4
12  default/web:http     TCP       10.244.0.12:8080  ready        no     1       -
50  default/web:http     TCP       [fd00:1::5]:8080  ready        no     1       -
40  kube-system/dns:dns  UDP       10.244.0.2:53     terminating  yes    1       -
41  kube-system/dns:dns  UDP       10.244.1.2:53     ready        no     1       -
";
    let mut snapshot = maps();
    snapshot.backends.get_mut(&3).unwrap().connections = Some(4);
    assert_eq!(table::render(&backends::rows(&snapshot), false), expected);
    snapshot.backends.retain(|id, _| *id == 3);
    let expected = r#"[
  {
    "id": 3,
    "service": "default/web:http",
    "protocol": "TCP",
    "address": "10.244.0.5",
    "port": 8080,
    "state": "ready",
    "local": true,
    "weight": 1,
    "connections": 4
  }
]
"#;
    assert_eq!(json(&backends::rows(&snapshot)).unwrap(), expected);
}

#[test]
fn conntrack_as_a_table() {
    let rows = conntrack::rows(&maps(), &conntrack::Filter::default());
    let expected = "\
PROTOCOL  FROM     TUPLE                                     REWRITTEN                            SERVICE              BACKEND           STATE          AGE  EDGE                 HOW
TCP       client   10.244.0.9:40000 > 10.96.0.7:80       =>  10.244.0.9:40000 > 10.244.0.12:8080  default/web:http     10.244.0.12:8080  closing        10s  veth17               stack
TCP       backend  10.244.0.12:8080 > 10.244.0.9:40000   =>  10.96.0.7:80 > 10.244.0.9:40000      default/web:http     10.244.0.12:8080  closing        10s  veth17               stack
TCP       client   198.51.100.4:51000 > 192.0.2.1:30500  =>  192.0.2.1:61000 > 10.244.0.12:8080   default/web:http     10.244.0.12:8080  new (expired)  80s  uplink               redirect
UDP       client   10.244.0.9:5353 > 10.96.0.10:53       =>  10.244.0.9:5353 > 10.244.1.2:53      kube-system/dns:dns  39 (gone)         new            30s  interface 18 (gone)  stack
";
    assert_eq!(table::render(&rows, false), expected);
}

#[test]
fn conntrack_filters() {
    let shown = |service: Option<&str>, client: Option<&str>| {
        let client = client.map(|address| address.parse().unwrap());
        conntrack::rows(&maps(), &conntrack::Filter { service, client }).len()
    };
    assert_eq!(shown(Some("default/web"), None), 3);
    assert_eq!(shown(Some("default/web:http"), None), 3);
    assert_eq!(shown(Some("default/we"), None), 0);
    assert_eq!(shown(None, Some("10.244.0.9")), 3, "both halves of the client's flow, and its DNS query");
    assert_eq!(shown(Some("default/web"), Some("10.244.0.9")), 2);
}

#[test]
fn states_have_names_and_expire_by_them() {
    let shown = |protocol, state, closing, age: u32| {
        let mut snapshot = maps();
        snapshot.flows.truncate(1);
        let flow = &mut snapshot.flows[0];
        (flow.protocol, flow.state, flow.closing, flow.last_seen) = (protocol, state, closing, 1_000 - age);
        json(&conntrack::rows(&snapshot, &conntrack::Filter::default())).unwrap()
    };
    let fins = closing::CLIENT_FIN | closing::BACKEND_FIN;
    for (protocol, state, closing, age, name, expired) in [
        (PROTOCOL_TCP, state::NEW, 0, 59, "new", false),
        (PROTOCOL_TCP, state::ANSWERED, 0, 61, "answered", true),
        (PROTOCOL_TCP, state::ESTABLISHED, 0, 900, "established", false),
        (PROTOCOL_TCP, state::ESTABLISHED, closing::BACKEND_FIN, 119, "closing", false),
        (PROTOCOL_TCP, state::ESTABLISHED, fins, 121, "closed", true),
        (PROTOCOL_TCP, state::ESTABLISHED, fins | closing::RESET, 11, "reset", true),
        (PROTOCOL_UDP, state::NEW, 0, 31, "new", true),
        (PROTOCOL_UDP, state::ESTABLISHED, 0, 119, "established", false),
    ] {
        let text = shown(protocol, state, closing, age);
        assert!(text.contains(&format!("\"state\": \"{name}\"")), "{text}");
        assert!(text.contains(&format!("\"expired\": {expired}")), "{name} {age}: {text}");
    }
}

#[test]
fn affinity_as_a_table_and_as_json() {
    let expected = "\
SERVICE           PROTOCOL  CLIENT       EDGE                 BACKEND           SECONDS LEFT
default/web:http  TCP       10.244.0.9   veth17               10.244.0.12:8080  expired
default/web:http  TCP       10.244.0.10  interface 18 (gone)  10.244.0.5:8080   550
default/web:http  TCP       10.244.0.11  uplink               2 (gone)          expired
";
    let rows = affinity::rows(&maps());
    assert_eq!(table::render(&rows, false), expected);
    let expected = r#"[
  {
    "service": "default/web:http",
    "protocol": "TCP",
    "client": "10.244.0.10",
    "edge": "interface 18 (gone)",
    "backend": "10.244.0.5:8080",
    "backend_id": 3,
    "seconds_left": 550
  }
]
"#;
    assert_eq!(json(&rows[1..2]).unwrap(), expected);
}

#[test]
fn nothing_to_show_says_so() {
    let mut snapshot = maps();
    snapshot.affinities.clear();
    let rows = affinity::rows(&snapshot);
    assert_eq!(table::render(&rows, false), "(none)\n");
    assert_eq!(json(&rows).unwrap(), "[]\n");
}
