//! `sheave affinity`: which backend a client of a service port comes back to, and for how long.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use super::Row;
use super::snapshot::{Snapshot, protocol_name};

#[derive(Debug, Serialize)]
pub(super) struct AffinityRow {
    service: String,
    protocol: String,
    client: IpAddr,
    /// A client of one edge is not that of another, whatever its address.
    edge: String,
    backend: Option<SocketAddr>,
    backend_id: u32,
    /// 0: the next connection chooses afresh.
    seconds_left: u32,
}

pub(super) fn rows(snapshot: &Snapshot) -> Vec<AffinityRow> {
    let mut timeouts: BTreeMap<u32, u32> = BTreeMap::new();
    for frontend in &snapshot.frontends {
        let longest = timeouts.entry(frontend.service_id).or_default();
        *longest = frontend.affinity_seconds.max(*longest);
    }
    let mut entries: Vec<_> = snapshot.affinities.iter().collect();
    entries.sort_by_cached_key(|entry| {
        (snapshot.service(entry.service_id), snapshot.protocol(entry.service_id), entry.client, entry.edge)
    });
    entries
        .into_iter()
        .map(|entry| {
            let timeout = timeouts.get(&entry.service_id).copied().unwrap_or_default();
            let backend = snapshot.backends.get(&entry.backend_id).map(|backend| backend.address);
            let left = timeout.saturating_sub(snapshot.now.saturating_sub(entry.last_new_connection));
            AffinityRow {
                service: snapshot.service(entry.service_id),
                protocol: snapshot.protocol(entry.service_id).map(protocol_name).unwrap_or_default(),
                client: entry.client,
                edge: snapshot.edge(entry.edge),
                backend,
                backend_id: entry.backend_id,
                seconds_left: if backend.is_some() { left } else { 0 },
            }
        })
        .collect()
}

impl Row for AffinityRow {
    fn titles(&self) -> Vec<&'static str> {
        vec!["SERVICE", "PROTOCOL", "CLIENT", "EDGE", "BACKEND", "SECONDS LEFT"]
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.service.clone(),
            self.protocol.clone(),
            self.client.to_string(),
            self.edge.clone(),
            self.backend.map_or_else(|| format!("{} (gone)", self.backend_id), |address| address.to_string()),
            if self.seconds_left == 0 { "expired".to_owned() } else { self.seconds_left.to_string() },
        ]
    }

    fn wide(&self) -> Vec<(&'static str, String)> {
        vec![("BACKEND ID", self.backend_id.to_string())]
    }
}
