//! `sheave services`: one row per frontend. Nothing in it depends on ids, table indexes or versions, so equal sets of
//! Services give equal output.

use std::net::SocketAddr;

use serde::Serialize;
use sheave_common::frontend::flags;

use super::Row;
use crate::model::desired::Algorithm;

use super::snapshot::{Frontend, Snapshot, Traffic, protocol_name};

#[derive(Debug, Serialize)]
pub(super) struct ServiceRow {
    service: String,
    protocol: String,
    #[serde(rename = "type")]
    kind: String,
    address: String,
    port: u16,
    /// For processes on this node only.
    host_only: bool,
    internal_policy: &'static str,
    external_policy: &'static str,
    affinity_seconds: u32,
    /// How backends are chosen.
    algorithm: &'static str,
    cluster_backends: Vec<SocketAddr>,
    local_backends: Vec<SocketAddr>,
    /// Clients that are let in; absent if all are.
    #[serde(skip_serializing_if = "Option::is_none")]
    source_ranges: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    counters: Option<Traffic>,
    #[serde(skip)]
    order: (String, u8, u32, SocketAddr),
}

pub(super) fn rows(snapshot: &Snapshot) -> Vec<ServiceRow> {
    let marked = |frontend: &&Frontend| frontend.flags & (flags::WHOLE_ADDRESS | flags::SERVICE_ADDRESS) == 0;
    let mut rows: Vec<ServiceRow> =
        snapshot.frontends.iter().filter(marked).map(|found| row(snapshot, found)).collect();
    rows.sort_by(|a, b| a.order.cmp(&b.order));
    rows
}

fn algorithm_name(algorithm: u32) -> &'static str {
    Algorithm::ALL.into_iter().find(|known| *known as u32 == algorithm).map_or("unknown", Algorithm::name)
}

fn row(snapshot: &Snapshot, frontend: &Frontend) -> ServiceRow {
    let service = snapshot.service(frontend.service_id);
    let policy = |flag| if frontend.flags & flag == 0 { "Cluster" } else { "Local" };
    let addresses = |ids: &[u32]| {
        let mut addresses: Vec<SocketAddr> =
            ids.iter().filter_map(|id| snapshot.backends.get(id)).map(|backend| backend.address).collect();
        addresses.sort();
        addresses.dedup();
        addresses
    };
    let kind = frontend.flags & (flags::CLUSTER_IP | flags::NODE_PORT | flags::LOAD_BALANCER | flags::EXTERNAL_IP);
    ServiceRow {
        order: (service.clone(), frontend.protocol, kind, frontend.address),
        service,
        protocol: protocol_name(frontend.protocol),
        kind: kind_name(kind),
        address: frontend.address.ip().to_string(),
        port: frontend.address.port(),
        host_only: frontend.flags & flags::HOST_ONLY != 0,
        internal_policy: policy(flags::INTERNAL_LOCAL),
        external_policy: policy(flags::EXTERNAL_LOCAL),
        affinity_seconds: frontend.affinity_seconds,
        algorithm: algorithm_name(frontend.algorithm),
        cluster_backends: addresses(&frontend.cluster),
        local_backends: addresses(&frontend.local),
        source_ranges: source_ranges(snapshot, frontend),
        counters: snapshot
            .counters
            .as_ref()
            .map(|counters| counters.get(&frontend.service_id).copied().unwrap_or_default()),
    }
}

/// Those of the frontend's family: the others' clients can't reach it anyway.
fn source_ranges(snapshot: &Snapshot, frontend: &Frontend) -> Option<Vec<String>> {
    if frontend.flags & flags::SOURCE_RANGES == 0 {
        return None;
    }
    let networks = snapshot.source_ranges.get(&frontend.service_id).into_iter().flatten();
    let same_family = networks.filter(|network| network.address().is_ipv4() == frontend.address.is_ipv4());
    Some(same_family.map(ToString::to_string).collect())
}

fn kind_name(kind: u32) -> String {
    let kinds = [
        (flags::CLUSTER_IP, "ClusterIP"),
        (flags::NODE_PORT, "NodePort"),
        (flags::LOAD_BALANCER, "LoadBalancer"),
        (flags::EXTERNAL_IP, "ExternalIP"),
    ];
    let names: Vec<&str> = kinds.iter().filter(|(flag, _)| kind & flag != 0).map(|(_, name)| *name).collect();
    names.join("+")
}

impl Row for ServiceRow {
    fn titles(&self) -> Vec<&'static str> {
        let mut titles = vec![
            "SERVICE",
            "PROTOCOL",
            "TYPE",
            "ADDRESS",
            "POLICY",
            "AFFINITY",
            "BACKENDS",
            "LOCAL BACKENDS",
            "CLIENTS",
        ];
        if self.counters.is_some() {
            titles.extend(["CONNECTIONS", "PACKETS", "BYTES"]);
        }
        titles
    }

    fn cells(&self) -> Vec<String> {
        let address = match self.address.contains(':') {
            true => format!("[{}]:{}", self.address, self.port),
            false => format!("{}:{}", self.address, self.port),
        };
        let policy = if self.kind == "ClusterIP" { self.internal_policy } else { self.external_policy };
        let affinity = if self.affinity_seconds == 0 { "-".to_owned() } else { format!("{}s", self.affinity_seconds) };
        let clients = match self.source_ranges.as_deref() {
            None => "all".to_owned(),
            Some([]) => "none".to_owned(),
            Some(ranges) => ranges.join(","),
        };
        let mut cells = vec![
            self.service.clone(),
            self.protocol.clone(),
            if self.host_only { format!("{} (host only)", self.kind) } else { self.kind.clone() },
            address,
            policy.to_owned(),
            affinity,
            self.cluster_backends.len().to_string(),
            self.local_backends.len().to_string(),
            clients,
        ];
        if let Some(Traffic { connections, packets, bytes }) = self.counters {
            cells.extend([connections, packets, bytes].map(|number| number.to_string()));
        }
        cells
    }

    fn wide(&self) -> Vec<(&'static str, String)> {
        let endpoints: Vec<String> = self.cluster_backends.iter().map(ToString::to_string).collect();
        let endpoints = if endpoints.is_empty() { "-".to_owned() } else { endpoints.join(",") };
        vec![("ALGORITHM", self.algorithm.to_owned()), ("ENDPOINTS", endpoints)]
    }
}
