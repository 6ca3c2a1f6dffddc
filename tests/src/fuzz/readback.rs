//! What the pinned maps may hold when the controller starts: what another version, a torn write, an editor or chance left
//! there. The plan brings the maps to what is desired all the same, and a start after that writes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use arbitrary::{Result, Unstructured};
use sheave::dataplane::read_name;
use sheave::model::desired::{Algorithm, Endpoint, EndpointSets, Protocol, ServiceKey, ServicePort, ServicePortName};
use sheave::model::network::Network;
use sheave::plan::{Backend, Frontend, FrontendAddress, PlanError};
use sheave_common::frontend::{BackendSet, flags};
use sheave_common::service_name::{ServiceName, TEXT_LENGTH};

use super::kernel_maps::{Maps, Room};

/// Service ids that there are: several times as many as are desired and named by chance.
const SERVICES: u32 = 128;

/// Runs one input.
///
/// # Panics
/// If the maps don't come to what is desired.
pub fn run(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let Ok((desired, before)) = read(&mut input) else { return };
    let room = Room::new(SERVICES, desired.values().chain(before.values()).any(is_maglev));
    let mut maps = Maps::fresh(room, &before);
    // What a controller wrote, and then something went wrong.
    let _ = spoil(&mut input, &mut maps);
    let exhausted = maps.next_backend_id.max(maps.backends.keys().max().copied().unwrap_or(0)) > u32::MAX - 1_000;
    let refused = maps.reach(&desired);
    if refused.is_empty() {
        assert_eq!(maps.meaning(), Maps::fresh(room, &desired).meaning());
        let names: BTreeSet<&ServicePortName> = maps.names.values().flatten().collect();
        assert_eq!(names, desired.keys().collect(), "exactly the desired service ports have names");
        maps.assert_settled(&desired);
        return;
    }
    for error in refused.values() {
        assert!(exhausted && *error == PlanError::BackendIdsExhausted, "{error}");
    }
}

type Desired = BTreeMap<ServicePortName, ServicePort>;

/// What is desired now, and what was when the maps were written.
fn read(input: &mut Unstructured<'_>) -> Result<(Desired, Desired)> {
    Ok((desired(input)?, desired(input)?))
}

fn desired(input: &mut Unstructured<'_>) -> Result<Desired> {
    let mut all = Desired::new();
    for _ in 0..input.arbitrary::<u8>()? % 5 {
        let [which, host, count, kind, policy]: [u8; 5] = input.arbitrary()?;
        let mut port = ServicePort {
            algorithm: Algorithm::ALL[usize::from(policy & 3)],
            affinity_seconds: u32::from(policy & 4),
            ..ServicePort::default()
        };
        // Maglev's runs are long: one at a time, and another that takes its place, have room.
        if is_maglev(&port) && (policy & 0x30 != 0 || all.values().any(is_maglev)) {
            port.algorithm = Algorithm::Random;
        }
        let ipv6 = kind & 1 != 0;
        let kinds =
            [flags::CLUSTER_IP, flags::EXTERNAL_IP, flags::NODE_PORT, flags::LOAD_BALANCER | flags::SOURCE_RANGES];
        let kind = kinds[usize::from(kind >> 1 & 3)];
        port.frontends.insert(SocketAddr::new(address(ipv6, 96, host & 3), 80 + u16::from(host >> 4 & 1)), kind);
        if kind & flags::SOURCE_RANGES != 0 {
            port.source_ranges.extend(network(ipv6, host));
        }
        let endpoints = (0..count & 7).map(|number| Endpoint {
            address: address(ipv6, 244, number ^ (count >> 4)),
            port: 8_080,
            local: number & 1 != 0,
            terminating: policy & 8 != 0,
            weight: 1 + u16::from(policy >> 6),
        });
        let cluster: BTreeSet<Endpoint> = endpoints.collect();
        let local = cluster.iter().filter(|endpoint| endpoint.local).copied().collect();
        let sets = EndpointSets { cluster: cluster.into_iter().collect(), local, kept: [].into() };
        *(if ipv6 { &mut port.endpoints6 } else { &mut port.endpoints4 }) = sets;
        let claimed = port.frontends.keys().all(|key| all.values().any(|other| other.frontends.contains_key(key)));
        if !claimed {
            all.insert(name(which), port);
        }
    }
    Ok(all)
}

fn is_maglev(port: &ServicePort) -> bool {
    port.algorithm == Algorithm::Maglev
}

fn name(which: u8) -> ServicePortName {
    let service =
        ServiceKey { namespace: "default".into(), name: ["web", "dns", "db", "mail"][usize::from(which & 3)].into() };
    let protocol = if which & 8 == 0 { Protocol::Tcp } else { Protocol::Udp };
    ServicePortName { service, port: if which & 4 == 0 { "" } else { "http" }.into(), protocol }
}

fn address(ipv6: bool, pool: u8, host: u8) -> IpAddr {
    if ipv6 {
        Ipv6Addr::new(0xfd00, pool.into(), 0, 0, 0, 0, 0, host.into()).into()
    } else {
        Ipv4Addr::new(10, pool, 0, host).into()
    }
}

fn network(ipv6: bool, host: u8) -> Option<Network> {
    Network::new(address(ipv6, 1, host), host & if ipv6 { 127 } else { 31 })
}

/// A number that is likely to be one of those in use, or at a limit.
fn number(input: &mut Unstructured<'_>, table: u32) -> Result<u32> {
    let [kind, low]: [u8; 2] = input.arbitrary()?;
    Ok(match kind & 7 {
        0 => input.arbitrary()?,
        1 => u32::MAX - u32::from(low & 3),
        2 => table - u32::from(low & 7),
        3 => u32::from(low),
        _ => u32::from(low & 7),
    })
}

fn set(input: &mut Unstructured<'_>, table: u32) -> Result<BackendSet> {
    Ok(BackendSet { first: number(input, table)?, length: number(input, table)? })
}

/// Changes elements, adds some, takes some away.
fn spoil(input: &mut Unstructured<'_>, maps: &mut Maps) -> Result<()> {
    let table = maps.table.len() as u32;
    let number = |input: &mut Unstructured<'_>| number(input, table);
    let set = |input: &mut Unstructured<'_>| set(input, table);
    while !input.is_empty() {
        maps.own.clear();
        let [what, host]: [u8; 2] = input.arbitrary()?;
        let ipv6 = host & 0x80 != 0;
        match what % 14 {
            0 => {
                let key = SocketAddr::new(address(ipv6, 96, host & 7), 80 + u16::from(host >> 4 & 1));
                let protocol = [6, 17, 132, 0, 255][usize::from(what >> 4) % 5];
                let frontend = Frontend {
                    service_id: number(input)?,
                    flags: input.arbitrary()?,
                    cluster: set(input)?,
                    local: set(input)?,
                    affinity_seconds: input.arbitrary()?,
                    algorithm: number(input)?,
                };
                maps.frontends.insert(FrontendAddress::new(key, protocol), frontend);
            }
            1 => {
                let key = FrontendAddress::mark(address(ipv6, 96, host & 7));
                maps.frontends
                    .insert(key, Frontend { service_id: number(input)?, ..Frontend::mark(input.arbitrary()?) });
            }
            2 => {
                let backend = Backend {
                    service_id: number(input)?,
                    address: address(ipv6, 244, host & 15),
                    port: if what & 16 == 0 { 8_080 } else { input.arbitrary()? },
                    weight: input.arbitrary()?,
                    flags: input.arbitrary()?,
                };
                maps.backends.insert(number(input)?, backend);
            }
            3 => {
                let mut name = ServiceName { protocol: host, length: 0, reserved: [0; 2], text: [0; TEXT_LENGTH] };
                name.length = input.arbitrary()?;
                let length = usize::from(input.arbitrary::<u8>()?).min(TEXT_LENGTH).min(input.len());
                name.text[..length].copy_from_slice(input.bytes(length)?);
                maps.names.insert(number(input)?, read_name(&name));
            }
            4 => drop(maps.names.insert(number(input)?, Some(name(host)))),
            5 => {
                let id = number(input)?;
                maps.source_ranges.extend(network(ipv6, host).map(|network| (id, network)));
            }
            6 => {
                let index = number(input)? as usize % maps.table.len();
                maps.table[index] = number(input)?;
            }
            7 => maps.next_backend_id = number(input)?,
            8 => maps.next_service_id = number(input)?,
            9 => drop(maps.frontends.pop_first()),
            10 => drop(maps.backends.pop_last()),
            11 => drop(maps.names.pop_first()),
            12 => {
                let both = [set(input)?, set(input)?];
                if let Some(frontend) = maps.frontends.values_mut().nth(usize::from(host & 3)) {
                    [frontend.cluster, frontend.local] = both;
                }
            }
            _ => {
                let service_id = number(input)?;
                if let Some(backend) = maps.backends.values_mut().nth(usize::from(host & 7)) {
                    backend.service_id = service_id;
                }
            }
        }
    }
    Ok(())
}
