//! `sheave backends`: one row per backend.

use serde::Serialize;
use sheave_common::backend::flags;

use super::Row;
use super::snapshot::{Snapshot, protocol_name};

#[derive(Debug, Serialize)]
pub(super) struct BackendRow {
    id: u32,
    service: String,
    protocol: String,
    address: String,
    port: u16,
    state: &'static str,
    local: bool,
    weight: u16,
    /// Connections, if the service chooses by them.
    connections: Option<i64>,
    /// Sets that it is in.
    #[serde(skip)]
    sets: String,
}

pub(super) fn rows(snapshot: &Snapshot) -> Vec<BackendRow> {
    let mut backends: Vec<_> = snapshot.backends.iter().collect();
    backends.sort_by_cached_key(|(id, backend)| {
        (snapshot.service(backend.service_id), snapshot.protocol(backend.service_id), backend.address, **id)
    });
    backends
        .into_iter()
        .map(|(id, backend)| BackendRow {
            id: *id,
            service: snapshot.service(backend.service_id),
            protocol: snapshot.protocol(backend.service_id).map(protocol_name).unwrap_or_default(),
            address: backend.address.ip().to_string(),
            port: backend.address.port(),
            state: state(backend.flags),
            local: backend.flags & flags::LOCAL != 0,
            weight: backend.weight,
            connections: backend.connections,
            sets: sets(backend.flags),
        })
        .collect()
}

/// The sets that a backend is in.
fn sets(bits: u32) -> String {
    let sets = [(flags::IN_CLUSTER_SET, "cluster"), (flags::IN_LOCAL_SET, "local")];
    let names: Vec<&str> = sets.into_iter().filter(|(flag, _)| bits & flag != 0).map(|(_, name)| name).collect();
    if names.is_empty() { "-".to_owned() } else { names.join(",") }
}

/// A removed backend is known to the connections that it has, and to nobody else.
fn state(bits: u32) -> &'static str {
    if bits & flags::IN_USE == 0 {
        "removed"
    } else if bits & flags::TERMINATING != 0 {
        "terminating"
    } else {
        "ready"
    }
}

impl Row for BackendRow {
    fn titles(&self) -> Vec<&'static str> {
        vec!["ID", "SERVICE", "PROTOCOL", "ADDRESS", "STATE", "LOCAL", "WEIGHT", "CONNECTIONS"]
    }

    fn cells(&self) -> Vec<String> {
        let address = match self.address.contains(':') {
            true => format!("[{}]:{}", self.address, self.port),
            false => format!("{}:{}", self.address, self.port),
        };
        vec![
            self.id.to_string(),
            self.service.clone(),
            self.protocol.clone(),
            address,
            self.state.to_owned(),
            if self.local { "yes" } else { "no" }.to_owned(),
            self.weight.to_string(),
            self.connections.map_or_else(|| "-".to_owned(), |connections| connections.to_string()),
        ]
    }

    fn wide(&self) -> Vec<(&'static str, String)> {
        vec![("SETS", self.sets.clone())]
    }
}
