//! `sheave conntrack`: one row per entry; a flow has two, one for each direction.

use std::net::{IpAddr, SocketAddr};

use serde::Serialize;
use sheave_common::flow::{flags, phase};

use super::Row;
use super::snapshot::{Flow, Snapshot, protocol_name};

/// Which flows to show.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Filter<'a> {
    /// namespace/name, or with :port.
    pub(super) service: Option<&'a str>,
    /// The client's address.
    pub(super) client: Option<IpAddr>,
}

#[derive(Debug, Serialize)]
pub(super) struct FlowRow {
    service: String,
    protocol: String,
    /// Whose packets this entry translates: `client` or `backend`.
    from: &'static str,
    state: &'static str,
    expired: bool,
    age_seconds: u32,
    source: SocketAddr,
    destination: SocketAddr,
    rewritten_source: SocketAddr,
    rewritten_destination: SocketAddr,
    backend: Option<SocketAddr>,
    backend_id: u32,
    edge: String,
    redirect: bool,
    hairpin: bool,
}

pub(super) fn rows(snapshot: &Snapshot, filter: &Filter<'_>) -> Vec<FlowRow> {
    let mut flows: Vec<&Flow> = snapshot
        .flows
        .iter()
        .filter(|flow| filter.client.is_none_or(|client| client_of(flow).ip() == client))
        .filter(|flow| filter.service.is_none_or(|wanted| is_of(&snapshot.service(flow.service_id), wanted)))
        .collect();
    flows.sort_by_cached_key(|flow| {
        (snapshot.service(flow.service_id), flow.protocol, client_of(flow), flow.edge, flow.flags & flags::REPLY)
    });
    flows.into_iter().map(|flow| row(snapshot, flow)).collect()
}

fn client_of(flow: &Flow) -> SocketAddr {
    if flow.flags & flags::REPLY == 0 { flow.source } else { flow.rewritten_destination }
}

/// Whether a service port is the wanted one, or one of the wanted Service's.
pub(in crate::cli) fn is_of(service: &str, wanted: &str) -> bool {
    service == wanted || service.strip_prefix(wanted).is_some_and(|rest| rest.starts_with(':'))
}

fn row(snapshot: &Snapshot, flow: &Flow) -> FlowRow {
    let age_seconds = snapshot.now.saturating_sub(flow.last_seen);
    FlowRow {
        service: snapshot.service(flow.service_id),
        protocol: protocol_name(flow.protocol),
        from: if flow.flags & flags::REPLY == 0 { "client" } else { "backend" },
        state: phase(flow.state, flow.closing),
        expired: age_seconds > snapshot.timeouts.of(flow.protocol, flow.state, flow.closing),
        age_seconds,
        source: flow.source,
        destination: flow.destination,
        rewritten_source: flow.rewritten_source,
        rewritten_destination: flow.rewritten_destination,
        backend: snapshot.backends.get(&flow.backend_id).map(|backend| backend.address),
        backend_id: flow.backend_id,
        edge: snapshot.edge(flow.edge),
        redirect: flow.flags & flags::REDIRECT != 0,
        hairpin: flow.flags & flags::HAIRPIN != 0,
    }
}

impl Row for FlowRow {
    fn titles(&self) -> Vec<&'static str> {
        vec!["PROTOCOL", "FROM", "TUPLE", "", "REWRITTEN", "SERVICE", "BACKEND", "STATE", "AGE", "EDGE", "HOW"]
    }

    fn cells(&self) -> Vec<String> {
        let how = match (self.redirect, self.hairpin) {
            (_, true) => "hairpin",
            (true, _) => "redirect",
            _ => "stack",
        };
        vec![
            self.protocol.clone(),
            self.from.to_owned(),
            format!("{} > {}", self.source, self.destination),
            "=>".to_owned(),
            format!("{} > {}", self.rewritten_source, self.rewritten_destination),
            self.service.clone(),
            self.backend.map_or_else(|| format!("{} (gone)", self.backend_id), |address| address.to_string()),
            if self.expired { format!("{} (expired)", self.state) } else { self.state.to_owned() },
            format!("{}s", self.age_seconds),
            self.edge.clone(),
            how.to_owned(),
        ]
    }

    fn wide(&self) -> Vec<(&'static str, String)> {
        vec![("BACKEND ID", self.backend_id.to_string())]
    }
}
