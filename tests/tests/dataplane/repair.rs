//! Repair: whatever state a crash or someone else left the maps in, the next start makes it right.

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::time::Duration;

use sheave::dataplane::monotonic_seconds;
use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::backend::Backend;
use sheave_common::flow::{closing, state};
use sheave_common::frontend::{Frontend, FrontendKey, flags};
use sheave_common::{Ipv4Address, service_name::ServiceName};
use sheave_tests::process::{Process, built, eventually};

use crate::bench::{Bench, desired, hash, in_namespace, insert_flow, insert_flow_in, meaning, name, run, service};

#[test]
fn elements_that_vanished_or_are_strangers_are_put_right_by_a_restart() {
    in_namespace(|| {
        let bench = Bench::new();
        assert!(bench.open().apply_all(desired()).failed.is_empty());
        let view = bench.view();
        let before = meaning(&view);
        let mut frontends = hash::<FrontendKey<Ipv4Address>, Frontend>(&bench.pin("frontends4"));
        let mut backends = hash::<u32, Backend<Ipv4Address>>(&bench.pin("backends4"));
        let mut names = hash::<u32, ServiceName>(&bench.pin("service_names"));
        let (key, frontend) = view.frontends4().expect("a dump")[0];
        frontends.remove(&key).expect("removed");
        let stranger = FrontendKey::new(Ipv4Address { octets: [203, 0, 113, 1] }, 80_u16.to_be(), 6);
        frontends.insert(stranger, Frontend { service_id: 40, ..frontend }, 0).expect("inserted");
        let (id, backend) = view.backends4().expect("a dump")[0];
        backends.remove(&id).expect("removed");
        backends.insert(900, Backend { service_id: 40, ..backend }, 0).expect("inserted");
        names.insert(50, ServiceName::new(6, "not a service port").expect("it fits"), 0).expect("inserted");
        let mut dataplane = bench.open();
        let applied = dataplane.apply_all(desired());
        assert!(applied.failed.is_empty() && applied.other.is_none(), "{applied:?}");
        let grace = dataplane.begin_grace().expect("strangers wait");
        dataplane.reclaim(grace).expect("reclaimed");
        assert_eq!(meaning(&view), before);
        assert_eq!(view.backends4().expect("a dump").len(), 4);
        assert_eq!(view.service_names().expect("a dump").len(), 2);
    });
}

#[test]
fn a_service_id_is_used_again_only_after_its_flows_and_affinity_entries_are_swept() {
    in_namespace(|| {
        let mut bench = Bench::new();
        bench.config.sizes.services = Some(3);
        let mut dataplane = bench.open();
        assert!(dataplane.apply_all(desired()).failed.is_empty());
        let view = bench.view();
        let gone = view.service_names().expect("a dump").into_iter();
        let gone = gone.filter(|(_, name)| name.as_str() == Some("default/db:http")).map(|(id, _)| id);
        let gone = gone.max().expect("db has an id");
        let kept = 3 - gone;
        for service_id in [gone, kept] {
            insert_flow(&bench, "conntrack4", 0, service_id);
        }
        let client = AffinityKey { service_id: gone, edge: 0, client: Ipv4Address { octets: [10, 0, 0, 1] } };
        for map in ["affinity4", "new_affinity4"] {
            let mut map = hash::<AffinityKey<Ipv4Address>, Affinity>(&bench.pin(map));
            map.insert(client, Affinity { backend_id: 1, last_new_connection: 1 }, 0).expect("inserted");
        }
        let changed = BTreeMap::from([(name("db"), None), (name("late"), Some(service(3, &[1])))]);
        let applied = dataplane.apply(changed);
        assert!(applied.failed.contains_key(&name("late")), "no id is free yet");
        let grace = dataplane.begin_grace().expect("db waits");
        dataplane.reclaim(grace).expect("reclaimed");
        assert!(dataplane.apply(BTreeMap::new()).failed.is_empty());
        let names = view.service_names().expect("a dump");
        assert!(names.iter().any(|(id, name)| *id == gone && name.as_str() == Some("default/late:http")));
        let flows = view.conntrack4().expect("a dump");
        assert_eq!(flows.iter().map(|(_, flow)| flow.service_id).collect::<Vec<_>>(), [kept]);
        assert!(view.affinity4().expect("a dump").is_empty() && view.new_affinity4().expect("a dump").is_empty());
    });
}

/// A download from a Service that has been deleted meanwhile would break off when enough others have been deleted, too.
#[test]
fn a_connection_to_a_service_that_is_gone_goes_on_and_its_id_waits_for_its_end() {
    in_namespace(|| {
        const MANY: u16 = 300;
        let mut bench = Bench::new();
        let sizes = &mut bench.config.sizes;
        (sizes.services, sizes.frontends) = (Some(1_000), Some(1_000));
        (sizes.backends, sizes.table) = (Some(1_000), Some(2_000));
        let mut dataplane = bench.open();
        let numbered = |number: u16| {
            let [high, low] = number.to_be_bytes();
            let mut one = service(0, &[1]);
            one.frontends = BTreeMap::from([(SocketAddr::from(([10, 96, high, low], 80)), flags::CLUSTER_IP)]);
            (name(&format!("service-{number}")), one)
        };
        assert!(dataplane.apply_all((0..MANY).map(numbered).collect()).failed.is_empty());
        let now = monotonic_seconds();
        let (open, over) = (1, 2);
        insert_flow_in(&bench, "conntrack4", 0, open, (now, state::ESTABLISHED, 0));
        insert_flow_in(&bench, "conntrack4", 0, over, (now, state::ESTABLISHED, closing::RESET));
        assert!(dataplane.apply((0..MANY).map(|number| (numbered(number).0, None)).collect()).failed.is_empty());
        let grace = dataplane.begin_grace().expect("they wait");
        dataplane.reclaim(grace).expect("reclaimed");
        let carried = || {
            let flows = bench.view().conntrack4().expect("a dump");
            flows.iter().map(|(_, flow)| flow.service_id).collect::<Vec<_>>()
        };
        assert_eq!(carried(), [open], "flows that are left");
        // Every id that is free comes before new ones.
        assert!(
            dataplane
                .apply(
                    (0..MANY - 1)
                        .map(|number| {
                            let (name, one) = numbered(number);
                            (name, Some(one))
                        })
                        .collect()
                )
                .failed
                .is_empty()
        );
        let used = bench.view().service_names().expect("a dump").into_iter().map(|(id, _)| id).collect::<Vec<_>>();
        assert!(used.contains(&over) && !used.contains(&open), "ids that are used again: {used:?}");
        assert_eq!(carried(), [open], "flows that are left");
    });
}

#[test]
fn a_daemon_killed_at_any_moment_is_repaired_by_the_next_one() {
    in_namespace(|| {
        let bench = Bench::new();
        let manifests = std::env::temp_dir().join(format!("sheave-kill-{}", std::process::id()));
        fs::create_dir_all(&manifests).expect("a folder");
        let write = |round: u8| {
            for number in 0..20_u8 {
                // A service appears, changes its endpoints with each round, and goes.
                let path = manifests.join(format!("{number}.yaml"));
                if (number + round).is_multiple_of(7) {
                    let _ = fs::remove_file(&path);
                } else {
                    fs::write(&path, manifest(number, round)).expect("written");
                }
            }
        };
        for round in 0..9_u8 {
            write(round);
            let mut daemon = start(&bench, &manifests);
            daemon.wait_for("the source has reported", Duration::from_secs(60)).expect("it starts");
            // From the middle of the first pass to well into the changes.
            if !round.is_multiple_of(3) {
                write(round + 1);
            }
            std::thread::sleep(Duration::from_millis(u64::from(round)));
            daemon.kill();
        }
        let fresh = Bench::new();
        let settle = |bench: &Bench| {
            let mut daemon = start(bench, &manifests);
            daemon.wait_for("the source has reported", Duration::from_secs(60)).expect("it starts");
            let (mut last, mut equal) = (None, 0);
            while equal < 3 {
                std::thread::sleep(Duration::from_millis(100));
                let view = bench.view();
                let now = Some((meaning(&view), view.backends4().expect("a dump").len()));
                equal = if now == last { equal + 1 } else { 0 };
                last = now;
            }
            daemon.kill();
            last
        };
        let expected = settle(&fresh);
        let repaired = settle(&bench);
        fs::remove_dir_all(&manifests).expect("removed");
        assert_eq!(repaired, expected);
    });
}

#[test]
fn nothing_is_removed_while_the_source_can_not_be_read() {
    in_namespace(|| {
        let bench = Bench::new();
        assert!(bench.open().apply_all(desired()).failed.is_empty());
        let before = meaning(&bench.view());
        run("ip link set lo up");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a listener can be made non-blocking");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let mut daemon = start_with(&bench, &["--api-server", &url]);
        // Four kinds of objects, and each tries again. Nobody gets an answer.
        let mut attempts = 0;
        eventually(Duration::from_secs(60), || {
            daemon.check_alive()?;
            attempts += std::iter::from_fn(|| listener.accept().ok()).count();
            anyhow::ensure!(attempts > 8, "after {attempts} attempts it does not try again:\n{}", daemon.log());
            Ok(())
        })
        .expect("it goes on");
        assert_eq!(meaning(&bench.view()), before);
    });
}

fn start(bench: &Bench, manifests: &std::path::Path) -> Process {
    start_with(bench, &["--manifests", manifests.to_str().expect("a path of UTF-8")])
}

fn start_with(bench: &Bench, source: &[&str]) -> Process {
    let mut command = Command::new(built("sheave").expect("sheave is built"));
    command.arg("run").args(source).args(["--node-name", "node"]);
    command.arg("--pin-path").arg(&bench.config.pin_path).arg("--cgroup").arg(&bench.cgroup);
    for (flag, entries) in [
        ("--max-services", "64"),
        ("--max-frontends", "64"),
        ("--max-backends", "64"),
        ("--max-table", "64"),
        ("--max-conntrack", "1024"),
        ("--max-half-open", "1024"),
        ("--max-affinity", "64"),
        ("--max-sockets", "64"),
        ("--max-source-ranges", "64"),
    ] {
        command.args([flag, entries]);
    }
    Process::start("sheave", &mut command).expect("started")
}

fn manifest(number: u8, round: u8) -> String {
    let (first, second) = (round % 3, 3 + round % 2);
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: s{number}, namespace: default}}
spec:
  clusterIP: 10.96.1.{number}
  clusterIPs: [10.96.1.{number}]
  ports: [{{name: http, port: 80, protocol: TCP}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: s{number}-1
  namespace: default
  labels: {{kubernetes.io/service-name: s{number}}}
addressType: IPv4
ports: [{{name: http, port: 8080, protocol: TCP}}]
endpoints:
- addresses: [10.1.{number}.{first}]
- addresses: [10.1.{number}.{second}]
"
    )
}
