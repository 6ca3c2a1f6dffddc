//! Replacing sets at full speed under a reader: no packet may see half a set, a torn value, or another service's.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aya::maps::{Array, HashMap, MapData};
use sheave_common::backend::{Backend, TableElement, flags as backend_flags};
use sheave_common::frontend::{BackendSet, Frontend, FrontendKey, flags};
use sheave_common::{Address as _, DropReason, Ipv4Address, PROTOCOL_UDP, names};
use sheave_tests::packet::{Packet, View};
use sheave_tests::program::{DROP, NEXT, Programs};

use crate::pod;

const SERVICES: u32 = 2;
const SET: u32 = 4;
/// Runs of the table before one is written again: far longer than any program runs.
const RUNS: u64 = 512;

/// Replaces the sets of both services in turn, as fast as it can, and returns how often it did.
struct Writer {
    frontends: HashMap<MapData, FrontendKey<Ipv4Address>, Frontend>,
    backends: HashMap<MapData, u32, Backend<Ipv4Address>>,
    table: Array<MapData, TableElement>,
    version: u64,
}

impl Writer {
    fn new(programs: &mut Programs) -> Self {
        Self {
            frontends: HashMap::try_from(programs.share(names::FRONTENDS4).unwrap()).unwrap(),
            backends: HashMap::try_from(programs.share(names::BACKENDS4).unwrap()).unwrap(),
            table: Array::try_from(programs.share(names::BACKEND_TABLE).unwrap()).unwrap(),
            version: 1,
        }
    }

    /// Writes a set of which every value tells its service and generation, in the order that the controller uses.
    fn replace(&mut self, generation: u64) {
        let service = 1 + (generation % u64::from(SERVICES)) as u32;
        let tag = (generation / u64::from(SERVICES) % 250) as u8;
        let base = 1 + (generation % 4_096) as u32 * SET;
        let first = (generation % RUNS) as u32 * SET;
        for n in 0..SET {
            self.version += 1;
            let backend = Backend {
                version: self.version,
                service_id: service,
                address: Ipv4Address::from(Ipv4Addr::new(10, service as u8, tag, n as u8 + 1)),
                port_be: port(service, tag).to_be(),
                weight: 1,
                flags: backend_flags::IN_CLUSTER_SET | backend_flags::SERVING,
                reserved: Ipv4Address::FILL,
            };
            self.backends.insert(base + n, backend, 0).unwrap();
            // Whole elements, each as soon as its backends are there.
            if n % 2 == 1 {
                self.table.set((first + n) / 2, [base + n - 1, base + n], 0).unwrap();
            }
        }
        self.version += 1;
        let frontend = Frontend {
            version: self.version,
            service_id: service,
            flags: flags::CLUSTER_IP,
            cluster: BackendSet { first, length: SET },
            local: BackendSet::default(),
            affinity_seconds: 0,
            algorithm: 0,
        };
        self.frontends.insert(key(service), frontend, 0).unwrap();
        // The set before last of this service goes at once, so that the kernel reuses its elements under the readers.
        if let Some(old) = generation.checked_sub(u64::from(SERVICES)) {
            for n in 0..SET {
                self.backends.remove(&(1 + (old % 4_096) as u32 * SET + n)).unwrap();
            }
        }
    }
}

fn key(service: u32) -> FrontendKey<Ipv4Address> {
    FrontendKey::new(Ipv4Address::from(Ipv4Addr::new(10, 96, 0, service as u8)), 53_u16.to_be(), PROTOCOL_UDP)
}

fn port(service: u32, tag: u8) -> u16 {
    10_000 * service as u16 + u16::from(tag)
}

#[test]
fn sets_replaced_at_full_speed_are_never_seen_torn_or_foreign() {
    let mut programs = Programs::load().unwrap();
    for service in 1..=SERVICES {
        programs.let_in(&key(service).address).unwrap();
    }
    let mut writer = Writer::new(&mut programs);
    for generation in 0..u64::from(SERVICES) {
        writer.replace(generation);
    }
    let stop = AtomicBool::new(false);
    let writes = AtomicU64::new(0);
    let (mut read, mut retried) = (0_u64, 0_u64);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut generation = u64::from(SERVICES);
            while !stop.load(Ordering::Relaxed) {
                writer.replace(generation);
                generation += 1;
                writes.fetch_add(1, Ordering::Relaxed);
            }
        });
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(5) {
            let service = 1 + (read % u64::from(SERVICES)) as u32;
            let client = format!("172.16.{}.{}:{}", read >> 8 & 0xff, read & 0xff, 1_024 + (read >> 16) % 60_000);
            let packet = Packet::udp(&client, &format!("10.96.0.{service}:53")).build();
            let out = pod(&mut programs, "pod_ingress", &packet);
            read += 1;
            if out.action == DROP {
                retried += 1;
                continue;
            }
            assert_eq!(out.action, NEXT);
            let backend = View(&out.packet).destination();
            let IpAddr::V4(address) = backend.ip() else { panic!("a backend of another family: {backend}") };
            let [ten, of, tag, n] = address.octets();
            assert_eq!((ten, u32::from(of)), (10, service), "another service's backend: {backend}");
            assert_eq!(backend.port(), port(service, tag), "a torn backend: {backend}");
            assert!((1..=SET as u8).contains(&n), "{backend}");
            View(&out.packet).assert_checksums();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let gone = programs.dropped(DropReason::BackendMissing).unwrap();
    let contended = programs.dropped(DropReason::Contended).unwrap();
    println!(
        "{read} reads against {} replaced sets: {gone} found their backend gone, {contended} contended",
        writes.load(Ordering::Relaxed)
    );
    assert_eq!(retried, gone + contended, "every drop has one of these two reasons");
    assert!(read > 10_000 && writes.load(Ordering::Relaxed) > 1_000, "both sides were at work");
    // The writer gives readers no grace period, and still almost every read succeeds.
    assert!(retried * 100 <= read, "{retried} of {read}");
}
