//! Makes the plan's writes: turns them into map elements, gives each frontend and backend its version, and counts.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use sheave_common::config::{Config, flags};
use sheave_common::frontend::{self, FrontendKey};
use sheave_common::interface::Interface;
use sheave_common::service_name::ServiceName;
use sheave_common::{Address, Ipv4Address, Ipv6Address, backend};

use super::error::MapError;
use super::maps::Maps;
use super::{networks, views};
use crate::model::desired::{Protocol, ServiceKey, ServicePortName};
use crate::model::network::Network;
use crate::plan::{Backend, Dump, Frontend, FrontendAddress, Write};

/// Versions that are reserved at once.
const VERSIONS: u64 = 1 << 16;

/// The one writer of maps.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) maps: Maps,
    /// As the map has it.
    config: Config,
    /// Next version to use; below `config.next_version`, or equal when none is reserved.
    next_version: u64,
    writes: u64,
}

impl Writer {
    /// `config` is what the map has to hold from now on; it is written if it does not.
    pub(super) fn new(maps: Maps, old: Option<Config>, config: Config) -> Result<Self, MapError> {
        let mut writer = Self { maps, config, next_version: config.next_version, writes: 0 };
        if old != Some(config) {
            writer.put_config(config)?;
        }
        Ok(writer)
    }

    /// `config`'s element as the map has it.
    pub(super) const fn config(&self) -> &Config {
        &self.config
    }

    /// Writes `config`'s element if it differs.
    pub(super) fn set_config(&mut self, config: Config) -> Result<(), MapError> {
        if config == self.config { Ok(()) } else { self.put_config(config) }
    }

    fn put_config(&mut self, config: Config) -> Result<(), MapError> {
        self.maps.config.put(&0, &config)?;
        self.writes += 1;
        self.config = config;
        Ok(())
    }

    /// Map writes made so far.
    pub(super) const fn writes(&self) -> u64 {
        self.writes
    }

    /// Writes an interface's element if it differs.
    pub(super) fn put_interface(&mut self, index: u32, interface: Interface) -> Result<(), MapError> {
        if self.maps.interfaces.get(&index)? != Some(interface) {
            self.maps.interfaces.put(&index, &interface)?;
            self.writes += 1;
        }
        Ok(())
    }

    /// Deletes an interface's element; it need not be there.
    pub(super) fn delete_interface(&mut self, index: u32) -> Result<(), MapError> {
        if self.maps.interfaces.delete(&index)? {
            self.writes += 1;
        }
        Ok(())
    }

    /// Makes `service_cidrs4/6` hold exactly these networks. The programs look into a map only while `config` says that it
    /// is not empty: so filled before, and emptied after.
    pub(super) fn set_service_cidrs(&mut self, wanted: &BTreeSet<Network>) -> Result<(), MapError> {
        let known = networks::service_cidrs(&self.maps)?;
        for network in wanted.difference(&known) {
            networks::put_service_cidr(&self.maps, network)?;
            self.writes += 1;
        }
        let flag = |ipv4: bool, flag: u32| {
            if wanted.iter().any(|network| network.address().is_ipv4() == ipv4) { flag } else { 0 }
        };
        let both = flags::SERVICE_CIDRS4 | flags::SERVICE_CIDRS6;
        let now = flag(true, flags::SERVICE_CIDRS4) | flag(false, flags::SERVICE_CIDRS6);
        self.set_config(Config { flags: self.config.flags & !both | now, ..self.config })?;
        for network in known.difference(wanted) {
            networks::delete_service_cidr(&self.maps, network)?;
            self.writes += 1;
        }
        Ok(())
    }

    /// Makes one of the plan's writes.
    pub(super) fn write(&mut self, write: &Write) -> Result<(), MapError> {
        match write {
            Write::Reserve { next_backend_id, next_service_id } => {
                let (next_backend_id, next_service_id) = (*next_backend_id, *next_service_id);
                return self.set_config(Config { next_backend_id, next_service_id, ..self.config });
            }
            Write::PutName { service_id, name } => {
                let text = name.to_string();
                // The plan refuses names that do not fit.
                if let Some(name) = ServiceName::new(name.protocol.number(), &text) {
                    self.maps.service_names.put(service_id, &name)?;
                }
            }
            Write::PutBackend { id, backend } => {
                let version = self.version()?;
                match backend.address {
                    IpAddr::V4(address) => self.maps.v4.backends.put(id, &backend_value(backend, address, version))?,
                    IpAddr::V6(address) => self.maps.v6.backends.put(id, &backend_value(backend, address, version))?,
                }
            }
            Write::WriteRun { first, ids } => {
                let elements: Vec<(u32, u32)> = (*first..).zip(ids.iter().copied()).collect();
                self.maps.backend_table.put_all(&elements)?;
            }
            Write::PutSourceRange { service_id, network } => {
                networks::put_source_range(&self.maps, *service_id, network)?;
            }
            Write::DeleteSourceRange { service_id, network } => {
                networks::delete_source_range(&self.maps, *service_id, network)?;
            }
            Write::PutFrontend { address, frontend } => {
                let value = frontend_value(frontend, self.version()?);
                match address.address {
                    IpAddr::V4(ip) => self.maps.v4.frontends.put(&key(address, ip), &value)?,
                    IpAddr::V6(ip) => self.maps.v6.frontends.put(&key(address, ip), &value)?,
                }
            }
            Write::DeleteFrontend { address } => match address.address {
                IpAddr::V4(ip) => drop(self.maps.v4.frontends.delete(&key(address, ip))?),
                IpAddr::V6(ip) => drop(self.maps.v6.frontends.delete(&key(address, ip))?),
            },
            Write::DeleteBackend { id, address } => match address {
                IpAddr::V4(_) => drop(self.maps.v4.backends.delete(id)?),
                IpAddr::V6(_) => drop(self.maps.v6.backends.delete(id)?),
            },
            Write::DeleteName { service_id } => drop(self.maps.service_names.delete(service_id)?),
        }
        self.writes += 1;
        Ok(())
    }

    /// A version that no element ever had: reserved in the pinned config before it is used.
    fn version(&mut self) -> Result<u64, MapError> {
        if self.next_version >= self.config.next_version {
            let next_version = self.next_version + VERSIONS;
            self.put_config(Config { next_version, ..self.config })?;
        }
        let version = self.next_version;
        self.next_version += 1;
        Ok(version)
    }

    /// What the maps hold, for the plan.
    pub(super) fn dump(&self) -> Result<Dump, MapError> {
        let maps = &self.maps;
        let mut frontends: Vec<_> = maps.v4.frontends.dump()?.iter().map(plan_frontend).collect();
        frontends.extend(maps.v6.frontends.dump()?.iter().map(plan_frontend));
        let mut backends: Vec<_> = maps.v4.backends.dump()?.iter().map(plan_backend).collect();
        backends.extend(maps.v6.backends.dump()?.iter().map(plan_backend));
        let names = maps.service_names.dump()?;
        Ok(Dump {
            frontends,
            backends,
            names: names.iter().map(|(id, name)| (*id, parse(name))).collect(),
            source_ranges: networks::source_ranges(maps)?,
            table: views::table(maps)?,
            next_backend_id: self.config.next_backend_id,
            next_service_id: self.config.next_service_id,
            service_limit: maps.service_names.max_entries(),
        })
    }
}

fn key<A, S: Into<A>>(address: &FrontendAddress, ip: S) -> FrontendKey<A> {
    FrontendKey::new(ip.into(), address.port.to_be(), address.protocol)
}

fn frontend_value(frontend: &Frontend, version: u64) -> frontend::Frontend {
    frontend::Frontend {
        version,
        service_id: frontend.service_id,
        flags: frontend.flags,
        cluster: frontend.cluster,
        local: frontend.local,
        affinity_seconds: frontend.affinity_seconds,
        algorithm: frontend.algorithm,
    }
}

fn backend_value<A: Address, S: Into<A>>(backend: &Backend, address: S, version: u64) -> backend::Backend<A> {
    backend::Backend {
        version,
        service_id: backend.service_id,
        address: address.into(),
        port_be: backend.port.to_be(),
        weight: backend.weight,
        flags: backend.flags,
        reserved: A::FILL,
    }
}

/// An address of either family for the plan.
trait Ip: Copy {
    fn ip(self) -> IpAddr;
}

impl Ip for Ipv4Address {
    fn ip(self) -> IpAddr {
        IpAddr::V4(self.into())
    }
}

impl Ip for Ipv6Address {
    fn ip(self) -> IpAddr {
        IpAddr::V6(self.into())
    }
}

fn plan_frontend<A: Ip>((key, value): &(FrontendKey<A>, frontend::Frontend)) -> (FrontendAddress, Frontend) {
    let address = SocketAddr::new(key.address.ip(), u16::from_be(key.port_be));
    let frontend = Frontend {
        service_id: value.service_id,
        flags: value.flags,
        cluster: value.cluster,
        local: value.local,
        affinity_seconds: value.affinity_seconds,
        algorithm: value.algorithm,
    };
    (FrontendAddress::new(address, key.protocol), frontend)
}

fn plan_backend<A: Address + Ip>((id, value): &(u32, backend::Backend<A>)) -> (u32, Backend) {
    let backend = Backend {
        service_id: value.service_id,
        address: value.address.ip(),
        port: u16::from_be(value.port_be),
        weight: value.weight,
        flags: value.flags,
    };
    (*id, backend)
}

/// The service port that a name in the map stands for.
fn parse(name: &ServiceName) -> Option<ServicePortName> {
    let (namespace, rest) = name.as_str()?.split_once('/')?;
    let (service, port) = rest.split_once(':').unwrap_or((rest, ""));
    let service = ServiceKey { namespace: namespace.to_owned(), name: service.to_owned() };
    Some(ServicePortName { service, port: port.to_owned(), protocol: Protocol::from_number(name.protocol)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_the_map_is_read_back_as_the_service_port_it_was_written_for() {
        for port in ["", "http"] {
            let service = ServiceKey { namespace: "kube-system".to_owned(), name: "dns".to_owned() };
            let name = ServicePortName { service, port: port.to_owned(), protocol: Protocol::Udp };
            let stored = ServiceName::new(name.protocol.number(), &name.to_string()).expect("it fits");
            assert_eq!(parse(&stored), Some(name));
        }
    }
}
