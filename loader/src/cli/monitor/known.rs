//! Names of service ports, from the pinned maps; read again when something comes up that has none.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cli::views::{ReadError, ViewError, open, socket};
use crate::dataplane::{MapError, PinnedMaps};

/// The least time between two readings: what has no name may never get one.
const PAUSE: Duration = Duration::from_secs(1);

/// What is known.
#[derive(Debug)]
pub(super) struct Known {
    pins: PathBuf,
    read: Instant,
    services: BTreeMap<u32, String>,
    frontends: BTreeMap<(SocketAddr, u8), u32>,
}

impl Known {
    pub(super) fn read(pins: &Path) -> Result<Self, ViewError> {
        let (services, frontends) = (BTreeMap::new(), BTreeMap::new());
        let mut known = Self { pins: pins.to_owned(), read: Instant::now(), services, frontends };
        known.refresh()?;
        Ok(known)
    }

    /// A service port's name.
    pub(super) fn service(&mut self, id: u32) -> Result<Option<String>, ViewError> {
        if !self.services.contains_key(&id) {
            self.refresh_if_due()?;
        }
        Ok(self.services.get(&id).cloned())
    }

    /// The name of the service port that has this frontend.
    pub(super) fn service_at(&mut self, frontend: SocketAddr, protocol: u8) -> Result<Option<String>, ViewError> {
        if !self.frontends.contains_key(&(frontend, protocol)) {
            self.refresh_if_due()?;
        }
        match self.frontends.get(&(frontend, protocol)).copied() {
            Some(id) => self.service(id),
            None => Ok(None),
        }
    }

    fn refresh_if_due(&mut self) -> Result<(), ViewError> {
        if self.read.elapsed() < PAUSE {
            return Ok(());
        }
        self.refresh()
    }

    fn refresh(&mut self) -> Result<(), ViewError> {
        self.read = Instant::now();
        self.take(&open(&self.pins)?).map_err(|error| ReadError::Map(error).into())
    }

    fn take(&mut self, maps: &PinnedMaps) -> Result<(), MapError> {
        let names = maps.service_names()?.into_iter();
        self.services = names.filter_map(|(id, name)| Some((id, name.as_str()?.to_owned()))).collect();
        let v4 = maps.frontends4()?.into_iter();
        let v6 = maps.frontends6()?.into_iter();
        self.frontends =
            v4.map(|(key, value)| ((socket(key.address, key.port_be), key.protocol), value.service_id)).collect();
        self.frontends
            .extend(v6.map(|(key, value)| ((socket(key.address, key.port_be), key.protocol), value.service_id)));
        Ok(())
    }
}

#[cfg(test)]
impl Known {
    /// These, all of TCP.
    pub(super) fn of(services: &[(u32, &str)], frontends: &[(&str, u32)]) -> Self {
        let tcp = |address: &str| (address.parse().unwrap(), sheave_common::PROTOCOL_TCP);
        Self {
            pins: PathBuf::from("/nowhere"),
            read: Instant::now(),
            services: services.iter().map(|(id, name)| (*id, (*name).to_owned())).collect(),
            frontends: frontends.iter().map(|(address, id)| (tcp(address), *id)).collect(),
        }
    }
}
