//! Elements of maps.

use std::net::IpAddr;

use aya::Pod;
use sheave_common::{filter, names};

use super::super::elements;
use super::super::error::{DataplaneError, MapError};
use super::super::map::{Map, Walk};
use super::super::networks;
use super::super::writer::{Writer, destination};
use super::{Audit, Dataplane, Kind, Strangers};
use crate::plan::{Backend, Drift, Frontend, FrontendAddress, Mirrored};
use sheave_common::backend::IDS_PER_ELEMENT;

/// Elements of `destinations` that one step compares.
const STRIDE: u32 = 4_096;

impl Writer {
    /// What the kernel doesn't hold under a service id as it was written.
    pub(super) fn drifts_of(&self, service_id: u32, mirrored: &Mirrored<'_>) -> Result<Vec<Drift>, MapError> {
        let maps = &self.maps;
        let mut drifts = Vec::new();
        if let Some(name) = mirrored.name
            && maps.service_names.get(&service_id)? != elements::name_value(name)
        {
            drifts.push(Drift::Name { service_id });
        }
        for (id, written) in &mirrored.backends {
            let found = self.backend(*id, written.address)?;
            if found != Some(*written) {
                drifts.push(Drift::Backend { id: *id, written: *written, found });
            }
        }
        for (set, ids) in &mirrored.runs {
            let elements =
                maps.backend_table.get_range(set.first / IDS_PER_ELEMENT, set.length.div_ceil(IDS_PER_ELEMENT))?;
            let found = elements.into_iter().flatten().take(ids.len());
            if !found.clone().eq(ids.iter().copied()) {
                drifts.push(Drift::Run { service_id, set: *set, found: found.collect() });
            }
        }
        for network in &mirrored.source_ranges {
            // Found in itself, or in a wider one, which lets the same clients in.
            if !networks::has_source_range(maps, service_id, network)? {
                drifts.push(Drift::SourceRange { service_id, network: *network });
            }
        }
        Ok(drifts)
    }

    fn backend(&self, id: u32, address: IpAddr) -> Result<Option<Backend>, MapError> {
        Ok(match address {
            IpAddr::V4(_) => self.maps.v4.backends.get(&id)?.map(|value| elements::plan_backend(&(id, value)).1),
            IpAddr::V6(_) => self.maps.v6.backends.get(&id)?.map(|value| elements::plan_backend(&(id, value)).1),
        })
    }

    /// Which of these frontends the kernel doesn't hold so. Lets the programs look for packets to all of them.
    pub(super) fn drifts_among(&mut self, frontends: &[(FrontendAddress, Frontend)]) -> Result<Vec<Drift>, MapError> {
        let mut drifts = Vec::new();
        for (address, written) in frontends {
            let found = match address.address {
                IpAddr::V4(ip) => {
                    let key = elements::key(address, ip);
                    self.maps.v4.frontends.get(&key)?.map(|value| elements::plan_frontend(&(key, value)).1)
                }
                IpAddr::V6(ip) => {
                    let key = elements::key(address, ip);
                    self.maps.v6.frontends.get(&key)?.map(|value| elements::plan_frontend(&(key, value)).1)
                }
            };
            if found != Some(*written) {
                drifts.push(Drift::Frontend(*address));
            }
            self.put_destination(destination(address.address))?;
        }
        Ok(drifts)
    }

    /// Sets an element of `destinations` that is not set, as far as is known.
    fn put_destination(&mut self, element: u32) -> Result<(), MapError> {
        self.read_destinations()?;
        if !std::mem::replace(&mut self.destinations[element as usize], true) {
            self.maps.destinations.put(&element, &1)?;
            self.writes += 1;
        }
        Ok(())
    }
}

impl Dataplane {
    /// The one element of `config`, elements of interfaces, and ServiceCIDRs.
    pub(super) fn audit_settings(&mut self, audit: &mut Audit) -> Result<(), DataplaneError> {
        let writer = &mut self.writer;
        if writer.maps.config.get(&0)? != Some(writer.config) {
            audit.found(names::CONFIG, Kind::Changed, || "settings".to_owned());
            writer.put_config(writer.config)?;
        }
        for (index, written) in writer.interfaces.clone() {
            if writer.maps.interfaces.get(&index)? != Some(written) {
                audit.found(names::INTERFACES, Kind::Changed, || format!("index {index}"));
                writer.put_interface(index, written)?;
            }
        }
        for (index, _) in writer.maps.interfaces.dump()? {
            if !writer.interfaces.contains_key(&index) && !self.unswept.contains(&index) {
                audit.found(names::INTERFACES, Kind::Strange, || format!("index {index}"));
                writer.delete_interface(index)?;
            }
        }
        if let Some(networks) = writer.service_cidrs.clone() {
            let known = networks::service_cidrs(&writer.maps)?;
            for (kind, network) in (networks.difference(&known).map(|network| (Kind::Changed, network)))
                .chain(known.difference(&networks).map(|network| (Kind::Strange, network)))
            {
                let map = if network.address().is_ipv4() { names::SERVICE_CIDRS4 } else { names::SERVICE_CIDRS6 };
                audit.found(map, kind, || network.to_string());
            }
            writer.set_service_cidrs(&networks)?;
        }
        Ok(())
    }

    /// Elements of `destinations` from one on: all that were set have to be. Returns where to go on.
    pub(super) fn audit_destinations(&mut self, audit: &mut Audit, first: u32) -> Result<Option<u32>, DataplaneError> {
        let writer = &mut self.writer;
        writer.read_destinations()?;
        for (index, found) in (first..).zip(writer.maps.destinations.get_range(first, STRIDE)?) {
            if found == 0 && writer.destinations[index as usize] {
                audit.found(names::DESTINATIONS, Kind::Changed, || format!("element {index}"));
                writer.maps.destinations.put(&index, &1)?;
                writer.writes += 1;
            }
        }
        Ok(Some(first + STRIDE).filter(|next| *next < filter::ELEMENTS))
    }

    /// Deletes source ranges that are nobody's. Returns whether there are more to look at.
    pub(super) fn audit_source_ranges(
        &mut self,
        audit: &mut Audit,
        strangers: &mut Strangers,
    ) -> Result<bool, DataplaneError> {
        let (v4, v6, planner) = (&self.writer.maps.v4, &self.writer.maps.v6, &self.planner);
        let walk = &mut strangers.walk;
        let is_known = |(id, network)| planner.has_source_range(id, network);
        let stranger = |range| match range {
            Some(range) if is_known(range) => None,
            Some((id, network)) => Some(format!("{network} of service id {id}")),
            None => Some("no network".to_owned()),
        };
        let (map, deleted) = match strangers.map {
            0 => {
                let range = |(key, _): &_| stranger(networks::range_of::<_, std::net::Ipv4Addr>(key));
                (names::SOURCE_RANGES4, delete_strangers(&v4.source_ranges, walk, range)?)
            }
            1 => {
                let range = |(key, _): &_| stranger(networks::range_of::<_, std::net::Ipv6Addr>(key));
                (names::SOURCE_RANGES6, delete_strangers(&v6.source_ranges, walk, range)?)
            }
            _ => return Ok(false),
        };
        self.tell(audit, strangers, map, deleted);
        Ok(true)
    }

    /// Deletes frontends, backends and names that are nobody's. Returns whether there are more to look at.
    pub(super) fn audit_strangers(
        &mut self,
        audit: &mut Audit,
        strangers: &mut Strangers,
    ) -> Result<bool, DataplaneError> {
        let (v4, v6, planner) = (&self.writer.maps.v4, &self.writer.maps.v6, &self.planner);
        let walk = &mut strangers.walk;
        let frontend = |address: FrontendAddress| (!planner.has_frontend(&address)).then(|| address.to_string());
        let backend = |(id, backend): (u32, Backend)| {
            (!planner.has_backend(id, &backend)).then(|| format!("{id} ({})", backend.endpoint()))
        };
        let (map, deleted) = match strangers.map {
            0 => {
                let stranger = |element: &_| frontend(elements::plan_frontend(element).0);
                (names::FRONTENDS4, delete_strangers(&v4.frontends, walk, stranger)?)
            }
            1 => {
                let stranger = |element: &_| frontend(elements::plan_frontend(element).0);
                (names::FRONTENDS6, delete_strangers(&v6.frontends, walk, stranger)?)
            }
            2 => {
                let stranger = |element: &_| backend(elements::plan_backend(element));
                (names::BACKENDS4, delete_strangers(&v4.backends, walk, stranger)?)
            }
            3 => {
                let stranger = |element: &_| backend(elements::plan_backend(element));
                (names::BACKENDS6, delete_strangers(&v6.backends, walk, stranger)?)
            }
            4 => {
                let stranger = |(id, name): &(u32, _)| {
                    let text = |name: &sheave_common::service_name::ServiceName| name.as_str().map(str::to_owned);
                    (!planner.has_name(*id)).then(|| text(name).unwrap_or_else(|| format!("service id {id}")))
                };
                (names::SERVICE_NAMES, delete_strangers(&self.writer.maps.service_names, walk, stranger)?)
            }
            _ => return Ok(false),
        };
        if deleted.as_ref().is_some_and(|deleted| !deleted.is_empty()) {
            // Sockets may have been pointed at them.
            self.sockets.look();
        }
        self.tell(audit, strangers, map, deleted);
        Ok(true)
    }

    /// Takes in what a step deleted from a map, and goes on to the next map at the end of this one.
    fn tell(&mut self, audit: &mut Audit, strangers: &mut Strangers, map: &'static str, deleted: Option<Vec<String>>) {
        match deleted {
            Some(deleted) => {
                self.writer.writes += deleted.len() as u64;
                deleted.into_iter().for_each(|name| audit.found(map, Kind::Strange, || name));
            }
            None => *strangers = Strangers { map: strangers.map + 1, walk: Walk::default() },
        }
    }
}

/// Deletes those of a map's next elements that are strangers, and returns what they were; `None` at the end.
fn delete_strangers<K: Pod, V: Pod>(
    map: &Map<K, V>,
    walk: &mut Walk,
    stranger: impl Fn(&(K, V)) -> Option<String>,
) -> Result<Option<Vec<String>>, MapError> {
    let Some(elements) = map.walk(walk)? else { return Ok(None) };
    let mut deleted = Vec::new();
    for element in &elements {
        if let Some(name) = stranger(element)
            && map.delete(&element.0)?
        {
            deleted.push(name);
        }
    }
    Ok(Some(deleted))
}
