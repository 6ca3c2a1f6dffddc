//! Makes the plan's writes, many of a kind together where that is possible, gives each frontend and backend its version, and
//! counts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use sheave_common::config::{Config, flags};
use sheave_common::interface::Interface;
use sheave_common::{Ipv4Address, Ipv6Address, filter};

use super::error::MapError;
use super::maps::Maps;
use super::{elements, networks, views};
use crate::model::network::Network;
use crate::plan::{Dump, Operation, Sink, Write};

/// Versions that are reserved at once.
const VERSIONS: u64 = 1 << 16;

/// The one writer of maps.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) maps: Maps,
    /// As the map has it.
    pub(super) config: Config,
    /// Next version to use; below `config.next_version`, or equal when none is reserved.
    next_version: u64,
    pub(super) writes: u64,
    /// Which elements of `destinations` are set; empty before the first is needed.
    pub(super) destinations: Vec<bool>,
    /// What `service_cidrs4/6` are to hold; unknown before somebody says so.
    pub(super) service_cidrs: Option<BTreeSet<Network>>,
    /// What was put into `interfaces`, by this process.
    pub(super) interfaces: BTreeMap<u32, Interface>,
}

impl Writer {
    /// `config` is what the map has to hold from now on; it is written if it does not.
    pub(super) fn new(maps: Maps, old: Option<Config>, config: Config) -> Result<Self, MapError> {
        let next_version = config.next_version;
        let (destinations, interfaces) = (Vec::new(), BTreeMap::new());
        let mut writer = Self { maps, config, next_version, writes: 0, destinations, service_cidrs: None, interfaces };
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

    pub(super) fn put_config(&mut self, config: Config) -> Result<(), MapError> {
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
        self.interfaces.insert(index, interface);
        Ok(())
    }

    /// Deletes an interface's element; it need not be there.
    pub(super) fn delete_interface(&mut self, index: u32) -> Result<(), MapError> {
        self.interfaces.remove(&index);
        if self.maps.interfaces.delete(&index)? {
            self.writes += 1;
        }
        Ok(())
    }

    /// Makes `service_cidrs4/6` hold exactly these networks. The programs look into a map only while `config` says that it
    /// is not empty: so filled before, and emptied after.
    pub(super) fn set_service_cidrs(&mut self, wanted: &BTreeSet<Network>) -> Result<(), MapError> {
        self.service_cidrs = Some(wanted.clone());
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
    fn write_one(&mut self, write: &Write) -> Result<(), MapError> {
        match write {
            Write::Reserve { next_backend_id, next_service_id } => {
                let (next_backend_id, next_service_id) = (*next_backend_id, *next_service_id);
                return self.set_config(Config { next_backend_id, next_service_id, ..self.config });
            }
            Write::PutName { service_id, name } => {
                // The plan refuses names that do not fit.
                if let Some(name) = elements::name_value(name) {
                    self.maps.service_names.put(service_id, &name)?;
                }
            }
            Write::PutBackend { id, backend } => {
                let version = self.version()?;
                match backend.address {
                    IpAddr::V4(address) => {
                        self.maps.v4.backends.put(id, &elements::backend_value(backend, address, version))?;
                    }
                    IpAddr::V6(address) => {
                        self.maps.v6.backends.put(id, &elements::backend_value(backend, address, version))?;
                    }
                }
            }
            Write::WriteRun { first, ids } => {
                self.maps.backend_table.put_all(&elements::run(*first, ids).collect::<Vec<_>>())?;
            }
            Write::PutSourceRange { service_id, network } => {
                networks::put_source_range(&self.maps, *service_id, network)?;
            }
            Write::DeleteSourceRange { service_id, network } => {
                networks::delete_source_range(&self.maps, *service_id, network)?;
            }
            Write::PutFrontend { address, frontend } => {
                self.announce(std::iter::once(write))?;
                let value = elements::frontend_value(frontend, self.version()?);
                match address.address {
                    IpAddr::V4(ip) => self.maps.v4.frontends.put(&elements::key(address, ip), &value)?,
                    IpAddr::V6(ip) => self.maps.v6.frontends.put(&elements::key(address, ip), &value)?,
                }
            }
            Write::DeleteFrontend { address } => match address.address {
                IpAddr::V4(ip) => drop(self.maps.v4.frontends.delete(&elements::key(address, ip))?),
                IpAddr::V6(ip) => drop(self.maps.v6.frontends.delete(&elements::key(address, ip))?),
            },
            Write::DeleteBackend { id, endpoint: SocketAddr::V4(_), .. } => drop(self.maps.v4.backends.delete(id)?),
            Write::DeleteBackend { id, endpoint: SocketAddr::V6(_), .. } => drop(self.maps.v6.backends.delete(id)?),
            Write::DeleteName { service_id } => drop(self.maps.service_names.delete(service_id)?),
        }
        self.writes += 1;
        Ok(())
    }

    /// Writes runs, and returns how many of them are complete.
    fn write_runs(&self, operations: &[Operation]) -> usize {
        let (mut elements, mut ends) = (Vec::new(), Vec::new());
        for operation in operations {
            if let Write::WriteRun { first, ids } = &operation.write {
                elements.extend(elements::run(*first, ids));
                ends.push(elements.len());
            }
        }
        let written = self.maps.backend_table.put_together(&elements);
        ends.iter().take_while(|end| **end <= written).count()
    }

    /// Versions for so many elements, or for fewer if the config can't be written.
    fn versions(&mut self, number: usize) -> Vec<u64> {
        (0..number).map_while(|_| self.version().ok()).collect()
    }

    /// Lets the programs look for packets to the frontends that are to be written.
    fn announce<'a>(&mut self, writes: impl Iterator<Item = &'a Write>) -> Result<(), MapError> {
        let element = |write: &Write| match write {
            Write::PutFrontend { address, .. } => Some(destination(address.address)),
            _ => None,
        };
        let mut missing: BTreeSet<u32> = writes.filter_map(element).collect();
        if missing.is_empty() {
            return Ok(());
        }
        self.read_destinations()?;
        missing.retain(|element| !self.destinations[*element as usize]);
        self.maps.destinations.put_all(&missing.iter().map(|element| (*element, 1)).collect::<Vec<_>>())?;
        self.writes += missing.len() as u64;
        for element in missing {
            self.destinations[element as usize] = true;
        }
        Ok(())
    }

    /// Finds out once which elements of `destinations` are set.
    pub(super) fn read_destinations(&mut self) -> Result<(), MapError> {
        if self.destinations.is_empty() {
            let elements = self.maps.destinations.dump()?;
            self.destinations = elements.into_iter().map(|(_, set)| set != 0).collect();
        }
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
        let mut frontends: Vec<_> = maps.v4.frontends.dump()?.iter().map(elements::plan_frontend).collect();
        frontends.extend(maps.v6.frontends.dump()?.iter().map(elements::plan_frontend));
        let mut backends: Vec<_> = maps.v4.backends.dump()?.iter().map(elements::plan_backend).collect();
        backends.extend(maps.v6.backends.dump()?.iter().map(elements::plan_backend));
        let names = maps.service_names.dump()?;
        // Nobody asks for what lies behind the last run.
        let sets = frontends.iter().flat_map(|(_, frontend)| [frontend.cluster, frontend.local]);
        let end = sets.map(|set| set.first.saturating_add(set.length)).max().unwrap_or(0);
        Ok(Dump {
            frontends,
            backends,
            names: names.iter().map(|(id, name)| (*id, elements::read_name(name))).collect(),
            source_ranges: networks::source_ranges(maps)?,
            table: views::table(maps, end)?,
            table_size: maps.table_size(),
            next_backend_id: self.config.next_backend_id,
            next_service_id: self.config.next_service_id,
            service_limit: maps.service_names.max_entries(),
        })
    }
}

/// The element of `destinations` that stands for a frontend's address.
pub(super) fn destination(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(ip) => filter::element(&Ipv4Address::from(ip)),
        IpAddr::V6(ip) => filter::element(&Ipv6Address::from(ip)),
    }
}

impl Sink for Writer {
    type Error = MapError;

    fn write(&mut self, write: &Write) -> Result<(), MapError> {
        self.write_one(write)
    }

    fn write_together(&mut self, operations: &[Operation]) -> usize {
        if self.announce(operations.iter().map(|operation| &operation.write)).is_err() {
            // Each then says itself what is wrong.
            return 0;
        }
        let number = operations.len();
        let written = match operations.first().map(|operation| &operation.write) {
            Some(Write::PutName { .. }) => self.maps.service_names.put_together(&elements::names(operations)),
            Some(Write::PutBackend { backend, .. }) if backend.address.is_ipv4() => {
                let elements = elements::backends(operations, self.versions(number));
                self.maps.v4.backends.put_together(&elements)
            }
            Some(Write::PutBackend { .. }) => {
                let elements = elements::backends(operations, self.versions(number));
                self.maps.v6.backends.put_together(&elements)
            }
            Some(Write::PutFrontend { address, .. }) if address.address.is_ipv4() => {
                let elements = elements::frontends(operations, self.versions(number));
                self.maps.v4.frontends.put_together(&elements)
            }
            Some(Write::PutFrontend { .. }) => {
                let elements = elements::frontends(operations, self.versions(number));
                self.maps.v6.frontends.put_together(&elements)
            }
            Some(Write::WriteRun { .. }) => self.write_runs(operations),
            _ => 0,
        };
        self.writes += written as u64;
        written
    }
}
