//! A cluster's worth of objects, and what the maps must hold for them.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};
use sheave::dataplane::PinnedMaps;
use sheave::model::Change;

use crate::path::address;

/// Port of every service.
pub(crate) const PORT: u16 = 80;
/// Port of every endpoint.
const TARGET: u16 = 8080;

/// The load of most of PERFORMANCE.md's rows.
pub(crate) const LOAD: Load = Load { services: 10_000, endpoints: 10 };

/// So many services with so many endpoints each, one EndpointSlice per service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    /// Services.
    pub(crate) services: u32,
    /// Endpoints of each.
    pub(crate) endpoints: u32,
}

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} × {}", self.services, self.endpoints)
    }
}

impl Load {
    /// Addresses of a service's endpoints.
    pub(crate) fn endpoints_of(self, service: u32) -> Vec<Ipv4Addr> {
        let base = u32::from(Ipv4Addr::new(10, 128, 0, 0)) + service * self.endpoints;
        (0..self.endpoints).map(|endpoint| (base + endpoint).into()).collect()
    }

    /// A Service.
    pub(crate) fn service(self, number: u32) -> Value {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": format!("s{number}"), "namespace": "bench"},
            "spec": {"clusterIP": address(number), "clusterIPs": [address(number)], "ipFamilies": ["IPv4"],
                "ports": [{"name": "http", "protocol": "TCP", "port": PORT, "targetPort": TARGET}]}})
    }

    /// Its EndpointSlice with these endpoints.
    pub(crate) fn slice(self, number: u32, endpoints: &[Ipv4Addr]) -> Value {
        let endpoints: Vec<Value> = endpoints
            .iter()
            .map(|endpoint| json!({"addresses": [endpoint], "nodeName": "elsewhere", "conditions": {"ready": true}}))
            .collect();
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("s{number}-1"), "namespace": "bench",
                "labels": {"kubernetes.io/service-name": format!("s{number}")}},
            "ports": [{"name": "http", "protocol": "TCP", "port": TARGET}], "endpoints": endpoints})
    }

    /// Every object, as a List's items.
    pub(crate) fn objects(self) -> Vec<Value> {
        let both = |number| [self.service(number), self.slice(number, &self.endpoints_of(number))];
        (0..self.services).flat_map(both).collect()
    }

    /// Every object in Kubernetes' own types.
    pub(crate) fn typed(self) -> Result<(Vec<Service>, Vec<EndpointSlice>)> {
        let numbers = || 0..self.services;
        let services =
            numbers().map(|number| serde_json::from_value(self.service(number))).collect::<Result<_, _>>()?;
        let slice = |number| serde_json::from_value(self.slice(number, &self.endpoints_of(number)));
        Ok((services, numbers().map(slice).collect::<Result<_, _>>()?))
    }

    /// The change that gives a service other endpoints.
    pub(crate) fn change(self, number: u32, endpoints: &[Ipv4Addr]) -> Result<Change> {
        let slice: EndpointSlice = serde_json::from_value(self.slice(number, endpoints))?;
        Ok(Change::Slice((&slice).into()))
    }

    /// Fails unless the maps hold exactly these services and endpoints.
    pub(crate) fn check(self, maps: &PinnedMaps) -> Result<()> {
        let backends: BTreeMap<u32, Ipv4Addr> =
            maps.backends4()?.into_iter().map(|(id, backend)| (id, Ipv4Addr::from(backend.address.octets))).collect();
        let table = maps.backend_table()?;
        let frontends: BTreeMap<Ipv4Addr, _> = maps
            .frontends4()?
            .into_iter()
            .filter(|(key, _)| u16::from_be(key.port_be) == PORT)
            .map(|(key, frontend)| (Ipv4Addr::from(key.address.octets), frontend.cluster))
            .collect();
        ensure!(
            frontends.len() == self.services as usize,
            "{} of {} services are there",
            frontends.len(),
            self.services
        );
        for number in 0..self.services {
            let set = frontends.get(&address(number)).with_context(|| format!("service {number} is not there"))?;
            let run =
                table.get(set.first as usize..(set.first + set.length) as usize).context("a run beyond the table")?;
            let mut endpoints: Vec<Ipv4Addr> = run.iter().filter_map(|id| backends.get(id)).copied().collect();
            endpoints.sort_unstable();
            ensure!(endpoints == self.endpoints_of(number), "service {number} has {endpoints:?}");
        }
        Ok(())
    }
}
