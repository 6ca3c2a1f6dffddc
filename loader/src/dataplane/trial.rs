//! What the real tc program does to a packet that nobody has sent (BPF_PROG_TEST_RUN). The maps that programs only read are the
//! pinned ones; those that they write are copies that go with the trial, and hold what there is about this one packet. So a trial
//! changes nothing.

use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use aya::maps::{Array, HashMap, PerCpuArray};
use aya::programs::{SchedClassifier, TestRun as _};
use aya::{Ebpf, EbpfLoader, Pod, TestRunOptions};
use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::config::flags as config_flags;
use sheave_common::counter::ServiceCounter;
use sheave_common::flow::{EDGE_BYPASS, EDGE_UPLINK, Flow, FlowKey, Tuple};
use sheave_common::frontend::{Frontend, FrontendKey};
use sheave_common::interface::flags as interface_flags;
use sheave_common::{Address, DropReason, Ipv4Address, Ipv6Address, features, filter, names};

use super::error::MapError;
use super::maps::{FamilyMaps, Maps};
use super::programs::{self, Features};
use super::syscall::monotonic_seconds;

/// Maps that the programs only read.
const SHARED: [&str; 11] = [
    names::CONFIG,
    names::FRONTENDS4,
    names::FRONTENDS6,
    names::BACKENDS4,
    names::BACKENDS6,
    names::BACKEND_TABLE,
    names::INTERFACES,
    names::SOURCE_RANGES4,
    names::SOURCE_RANGES6,
    names::SERVICE_CIDRS4,
    names::SERVICE_CIDRS6,
];
/// Maps that they write, whose size is free.
const COPIED: [&str; 17] = [
    names::CONNTRACK4,
    names::CONNTRACK6,
    names::HALF_OPEN4,
    names::HALF_OPEN6,
    names::AFFINITY4,
    names::AFFINITY6,
    names::NEW_AFFINITY4,
    names::NEW_AFFINITY6,
    names::SOCK_FORWARD4,
    names::SOCK_FORWARD6,
    names::SOCK_REVERSE4,
    names::SOCK_REVERSE6,
    names::FRAGMENTS4,
    names::FRAGMENTS6,
    names::SERVICE_NAMES,
    names::EVENTS,
    names::BACKEND_LOADS,
];
/// Elements of a copy, and octets of the ring buffer. An LRU map needs some for each CPU.
const SIZE: u32 = 4_096;
/// `struct __sk_buff` up to `hwtstamp` (kernel 6.18), and where it has the interface.
const SK_BUFF: usize = 192;
const SK_BUFF_IFINDEX: usize = 40;
/// An answer may be longer than the packet that it answers.
const LONGER: usize = 256;

/// Why there is no outcome.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    /// The pinned maps can't be read.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Sheave is not attached there.
    #[error("Sheave is not attached to the interface with index {0}")]
    NotAttached(u32),
    /// The two ends.
    #[error("{0} and {1} are not of one family")]
    Families(SocketAddr, SocketAddr),
    /// The kernel refuses.
    #[error("cannot {action}")]
    Kernel {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: Box<dyn Error + Send + Sync>,
    },
}

fn kernel<E: Error + Send + Sync + 'static>(action: &'static str) -> impl FnOnce(E) -> TrialError {
    move |source| TrialError::Kernel { action, source: Box::new(source) }
}

/// A packet that might come in.
#[derive(Clone, Debug)]
pub struct Trial {
    /// Its source.
    pub from: SocketAddr,
    /// Its destination.
    pub to: SocketAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// ifindex of where it comes in.
    pub index: u32,
    /// The frame, with its Ethernet header.
    pub frame: Vec<u8>,
}

/// What becomes of it, and what that came from.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The program's answer, a TC_ACT number.
    pub action: i32,
    /// The frame afterwards.
    pub frame: Vec<u8>,
    /// Why it did not get through, if it did not.
    pub reasons: Vec<DropReason>,
    /// It came in from a pod; otherwise from an uplink or tunnel.
    pub inside: bool,
    /// The frontend that it goes to.
    pub frontend: Option<Frontend>,
    /// The backend that the client used last, and the second of CLOCK_MONOTONIC in which its time runs out.
    pub remembered: Option<(u32, u32)>,
    /// Its flow.
    pub flow: Option<TrialFlow>,
}

/// A packet's flow.
#[derive(Clone, Copy, Debug)]
pub struct TrialFlow {
    /// It is made by this packet.
    pub new: bool,
    /// Its service port.
    pub service_id: u32,
    /// Its backend.
    pub backend_id: u32,
    /// Bits of [`sheave_common::flow::flags`].
    pub flags: u8,
    /// The backend's address.
    pub destination: SocketAddr,
}

impl Trial {
    /// Tries it. Of the calling thread's network namespace, as the interface is.
    ///
    /// # Errors
    ///
    /// If the maps can't be read, or the kernel refuses to load or run the program.
    pub fn run(&self, directory: &Path) -> Result<Outcome, TrialError> {
        let maps = Maps::open(directory, true)?;
        match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let names = [names::CONNTRACK4, names::HALF_OPEN4, names::AFFINITY4, names::NEW_AFFINITY4];
                self.run_in(directory, &maps, &maps.v4, names, (from.into(), to.into()), v4)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let names = [names::CONNTRACK6, names::HALF_OPEN6, names::AFFINITY6, names::NEW_AFFINITY6];
                self.run_in(directory, &maps, &maps.v6, names, (from.into(), to.into()), v6)
            }
            _ => Err(TrialError::Families(self.from, self.to)),
        }
    }

    fn run_in<A: Address>(
        &self,
        directory: &Path,
        maps: &Maps,
        family: &FamilyMaps<A>,
        [conntrack, half_open, affinity, new_affinity]: [&'static str; 4],
        (source, destination): (A, A),
        ip: fn(A) -> IpAddr,
    ) -> Result<Outcome, TrialError>
    where
        FrontendKey<A>: Pod,
        FlowKey<A>: Pod,
        Flow<A>: Pod,
        AffinityKey<A>: Pod,
    {
        let interface = maps.interfaces.get(&self.index)?.ok_or(TrialError::NotAttached(self.index))?;
        let inside = interface.flags & interface_flags::POD != 0;
        let (source_port_be, destination_port_be) = (self.from.port().to_be(), self.to.port().to_be());
        let frontend = family.frontends.get(&FrontendKey::new(destination, destination_port_be, self.protocol))?;
        let service_id = frontend.map_or(0, |frontend| frontend.service_id);
        let bits = maps.config.get(&0)?.map_or(0, |config| config.flags);
        // Only the daemon knows whether it is on now.
        let bypassed = bits & config_flags::BYPASSED != 0;
        let constants = if bypassed { features::BYPASS | features::BYPASSED } else { 0 };
        let mut copy = Copy::load(directory, Features::detect().bits() | constants, service_id)?;

        // What there is about this packet.
        let tuple = Tuple { source, destination, source_port_be, destination_port_be };
        let edge = if inside { self.index } else { EDGE_UPLINK };
        let keys = [edge, EDGE_BYPASS].map(|edge| FlowKey::new(tuple, self.protocol, edge));
        for (name, map) in [(conntrack, &family.conntrack), (half_open, &family.half_open)] {
            for key in keys {
                let Some(flow) = map.get(&key)? else { continue };
                copy.insert(name, &key, &flow)?;
                let sibling = flow.sibling_key(&key);
                if let Some(flow) = map.get(&sibling)? {
                    copy.insert(name, &sibling, &flow)?;
                }
            }
        }
        let client = AffinityKey { service_id, edge, client: source };
        let mut known: Option<Affinity> = None;
        // Newcomers first: one that is established meanwhile is in the other map then, which is what counts.
        for (name, map) in [(new_affinity, &family.new_affinity), (affinity, &family.affinity)] {
            let Some(found) = map.get(&client)? else { continue };
            copy.insert(name, &client, &found)?;
            known = Some(found);
        }
        for (id, load) in maps.backend_loads.dump()? {
            // One that finds no room counts as idle.
            let _ = copy.insert(names::BACKEND_LOADS, &id, &load);
        }
        let element = filter::element(&destination);
        copy.set(names::DESTINATIONS, element, maps.destinations.get(&element)?.unwrap_or_default())?;

        let (action, frame) =
            copy.run(if inside { "pod_ingress" } else { "uplink_ingress" }, &self.frame, self.index)?;
        let new = copy.counted(names::SERVICE_COUNTERS, service_id, |counter: ServiceCounter| counter.connections)? > 0;
        let mut reasons = Vec::new();
        for reason in DropReason::ALL {
            if copy.counted(names::DROP_COUNTERS, *reason as u32, |packets: u64| packets)? > 0 {
                reasons.push(*reason);
            }
        }
        let mut flow = None;
        for (name, key) in [conntrack, half_open].into_iter().flat_map(|name| keys.map(|key| (name, key))) {
            let found: Option<Flow<A>> = if flow.is_none() { copy.get(name, &key)? } else { None };
            if let Some(found) = found {
                flow = Some(TrialFlow {
                    new,
                    service_id: found.service_id,
                    backend_id: found.backend_id,
                    flags: found.flags,
                    destination: SocketAddr::new(
                        ip(found.rewrite.destination),
                        u16::from_be(found.rewrite.destination_port_be),
                    ),
                });
            }
        }
        let until =
            |known: Affinity, frontend: Frontend| known.last_new_connection.saturating_add(frontend.affinity_seconds);
        let remembered = known.zip(frontend).filter(|(_, frontend)| frontend.affinity_seconds != 0);
        let remembered = remembered.map(|(known, frontend)| (known.backend_id, until(known, frontend)));
        let remembered = remembered.filter(|(_, until)| *until > monotonic_seconds());
        Ok(Outcome { action, frame, reasons, inside, frontend, remembered, flow })
    }
}

fn v4(address: Ipv4Address) -> IpAddr {
    IpAddr::V4(address.into())
}

fn v6(address: Ipv6Address) -> IpAddr {
    IpAddr::V6(address.into())
}

/// The programs once more, with maps of their own where they write.
struct Copy(Ebpf);

impl Copy {
    fn load(directory: &Path, constants: u32, service_id: u32) -> Result<Self, TrialError> {
        programs::raise_locked_memory();
        let mut loader = EbpfLoader::new();
        for name in SHARED {
            loader.map_pin_path(name, directory.join(name));
        }
        for name in COPIED {
            loader.map_max_entries(name, SIZE);
        }
        loader.map_max_entries(names::SERVICE_COUNTERS, service_id + 1);
        loader.override_global("FEATURES", &constants, true);
        let object = programs::object(constants);
        loader.load(&object).map(Self).map_err(kernel("load the programs' object"))
    }

    fn insert<K: Pod, V: Pod>(&mut self, name: &str, key: &K, value: &V) -> Result<(), TrialError> {
        const ACTION: &str = "copy an element";
        let Some(map) = self.0.map_mut(name) else { return Ok(()) };
        let mut map = HashMap::<_, K, V>::try_from(map).map_err(kernel(ACTION))?;
        map.insert(key, value, 0).map_err(kernel(ACTION))
    }

    fn set(&mut self, name: &str, index: u32, value: u32) -> Result<(), TrialError> {
        const ACTION: &str = "copy an element";
        let Some(map) = self.0.map_mut(name) else { return Ok(()) };
        let mut map = Array::<_, u32>::try_from(map).map_err(kernel(ACTION))?;
        map.set(index, value, 0).map_err(kernel(ACTION))
    }

    fn get<K: Pod, V: Pod>(&self, name: &str, key: &K) -> Result<Option<V>, TrialError> {
        const ACTION: &str = "read a copy";
        let Some(map) = self.0.map(name) else { return Ok(None) };
        let map = HashMap::<_, K, V>::try_from(map).map_err(kernel(ACTION))?;
        match map.get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(aya::maps::MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(kernel(ACTION)(error)),
        }
    }

    /// An element of a per-CPU array, over all CPUs.
    fn counted<V: Pod>(&self, name: &str, index: u32, number: impl Fn(V) -> u64) -> Result<u64, TrialError> {
        const ACTION: &str = "read a counter";
        let Some(map) = self.0.map(name) else { return Ok(0) };
        let counters = PerCpuArray::<_, V>::try_from(map).map_err(kernel(ACTION))?;
        let values = counters.get(&index, 0).map_err(kernel(ACTION))?;
        Ok(values.iter().map(|value| number(*value)).sum())
    }

    fn run(&mut self, name: &'static str, frame: &[u8], index: u32) -> Result<(i32, Vec<u8>), TrialError> {
        const ACTION: &str = "run the program (BPF_PROG_TEST_RUN)";
        let missing = || kernel(ACTION)(std::io::Error::other(format!("the object has no program {name}")));
        let program = self.0.program_mut(name).ok_or_else(missing)?;
        let program: &mut SchedClassifier = program.try_into().map_err(kernel(ACTION))?;
        program.load().map_err(kernel("load the program"))?;
        let mut context = [0_u8; SK_BUFF];
        context[SK_BUFF_IFINDEX..SK_BUFF_IFINDEX + 4].copy_from_slice(&index.to_ne_bytes());
        let mut out = vec![0_u8; frame.len() + LONGER];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let result = program.test_run(options).map_err(kernel(ACTION))?;
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value.cast_signed(), out))
    }
}
