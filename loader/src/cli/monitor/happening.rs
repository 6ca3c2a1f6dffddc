//! An event in people's terms.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use jiff::Timestamp;
use serde::Serialize;
use sheave_common::event::{EDGE_SOCKET, Event, kind};
use sheave_common::flow::{EDGE_BYPASS, EDGE_UPLINK, flags};
use sheave_common::{DropReason, Ipv6Address};

use super::known::Known;
use crate::cli::output::{BAD, GOOD};
use crate::cli::views::{ViewError, interface_name, protocol_name};

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Happening {
    /// When it was read, RFC 3339.
    pub(super) time: String,
    /// `new`, `end`, `failover` or `drop`.
    pub(super) event: &'static str,
    pub(super) protocol: String,
    /// Who asked; absent for a process's connect() or sendmsg().
    pub(super) client: Option<SocketAddr>,
    /// What was asked; of a dropped packet, where it was going.
    pub(super) destination: SocketAddr,
    /// Who serves it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) backend: Option<SocketAddr>,
    /// The source that the backend sees, if it isn't the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) snat: Option<SocketAddr>,
    pub(super) service: Option<String>,
    /// Why it was dropped, rejected or reset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<&'static str>,
    /// Where the client's packets meet this node: an interface, `uplink`, `bypass` or `socket`.
    pub(super) edge: String,
}

impl Happening {
    pub(super) fn new(event: &Event, known: &mut Known) -> Result<Self, ViewError> {
        let end = |words: [u32; 4], port_be: u16| SocketAddr::new(ip(event.family, words), u16::from_be(port_be));
        let source = end(event.source, event.source_port_be);
        let destination = end(event.destination, event.destination_port_be);
        let rewritten_source = end(event.rewritten_source, event.rewritten_source_port_be);
        let rewritten_destination = end(event.rewritten_destination, event.rewritten_destination_port_be);
        let dropped = event.kind == kind::DROP;
        let reply = event.flags & flags::REPLY != 0;
        let socket = event.edge == EDGE_SOCKET;
        // The half that translates the backend's packets is the client's one turned round.
        let (client, frontend, backend, seen) = if reply {
            (rewritten_destination, rewritten_source, source, destination)
        } else {
            (source, destination, rewritten_destination, rewritten_source)
        };
        let service = match event.service_id {
            0 => known.service_at(frontend, event.protocol)?,
            id => known.service(id)?,
        };
        Ok(Self {
            time: Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string(),
            event: match event.kind {
                kind::NEW => "new",
                kind::END => "end",
                kind::FAILOVER => "failover",
                _ => "drop",
            },
            protocol: protocol_name(event.protocol),
            client: (!socket).then_some(client),
            destination: frontend,
            backend: (!dropped).then_some(backend),
            snat: (!dropped && !socket && seen != client).then_some(seen),
            service,
            reason: dropped.then(|| reason(event.reason)),
            edge: match event.edge {
                EDGE_UPLINK => "uplink".to_owned(),
                EDGE_BYPASS => "bypass".to_owned(),
                EDGE_SOCKET => "socket".to_owned(),
                index => interface_name(index).unwrap_or_else(|| format!("interface {index}")),
            },
        })
    }

    /// For people.
    pub(super) fn line(&self, wide: bool) -> String {
        let clock = self.time.get(11..).unwrap_or_default();
        let style = if self.reason.is_some() { BAD } else { GOOD };
        let client = self.client.map_or_else(|| "a process".to_owned(), |client| client.to_string());
        let mut text =
            format!("{clock} {style}{:<4}{style:#} {:<4} {client} > {}", self.event, self.protocol, self.destination);
        if let Some(backend) = self.backend {
            text += &format!(" => {backend}");
        }
        for part in [self.service.as_deref(), self.reason].into_iter().flatten() {
            text += &format!("  {part}");
        }
        if wide {
            text += &format!("  by {}", self.edge);
            if let Some(snat) = self.snat {
                text += &format!(" as {snat}");
            }
        }
        text + "\n"
    }
}

fn ip(family: u8, words: [u32; 4]) -> IpAddr {
    match family {
        4 => Ipv4Addr::from(words[0].to_ne_bytes()).into(),
        _ => Ipv6Addr::from(Ipv6Address::from_words(words)).into(),
    }
}

fn reason(number: u8) -> &'static str {
    let known = DropReason::ALL.iter().find(|reason| **reason as u32 == u32::from(number));
    known.map_or("unknown", |reason| reason.name())
}

#[cfg(test)]
pub(super) mod tests {
    use sheave_common::PROTOCOL_TCP;

    use super::*;

    /// An IPv4 event of a client 10.0.0.1:1000 that asks 10.96.0.1:80.
    pub(in super::super) fn event(kind: u8) -> Event {
        let words = |octets: [u8; 4]| [u32::from_ne_bytes(octets), 0, 0, 0];
        Event {
            source: words([10, 0, 0, 1]),
            destination: words([10, 96, 0, 1]),
            rewritten_source: words([10, 0, 0, 1]),
            rewritten_destination: words([10, 0, 0, 2]),
            source_port_be: 1_000_u16.to_be(),
            destination_port_be: 80_u16.to_be(),
            rewritten_source_port_be: 1_000_u16.to_be(),
            rewritten_destination_port_be: 8_080_u16.to_be(),
            service_id: 7,
            backend_id: 3,
            edge: EDGE_UPLINK,
            kind,
            family: 4,
            protocol: PROTOCOL_TCP,
            reason: 0,
            flags: 0,
            reserved: [0; 7],
        }
    }

    fn line(event: &Event, wide: bool) -> String {
        let happening = Happening::new(event, &mut Known::of(&[(7, "default/web:http")], &[("10.96.0.1:80", 7)]));
        let line = anstream::adapter::strip_str(&happening.unwrap().line(wide)).to_string();
        line.split_once(' ').unwrap().1.to_owned()
    }

    #[test]
    fn either_half_of_a_flow_tells_who_asked_whom() {
        let new = event(kind::NEW);
        assert_eq!(line(&new, false), "new  TCP  10.0.0.1:1000 > 10.96.0.1:80 => 10.0.0.2:8080  default/web:http\n");
        let reply = Event {
            source: new.rewritten_destination,
            destination: new.rewritten_source,
            rewritten_source: new.destination,
            rewritten_destination: new.source,
            source_port_be: new.rewritten_destination_port_be,
            destination_port_be: 61_000_u16.to_be(),
            rewritten_source_port_be: new.destination_port_be,
            rewritten_destination_port_be: new.source_port_be,
            kind: kind::END,
            flags: flags::REPLY,
            ..new
        };
        let expected =
            "end  TCP  10.0.0.1:1000 > 10.96.0.1:80 => 10.0.0.2:8080  default/web:http  by uplink as 10.0.0.1:61000\n";
        assert_eq!(line(&reply, true), expected);
    }

    #[test]
    fn a_dropped_packet_has_a_reason_and_the_service_that_it_was_for() {
        let dropped = Event { service_id: 0, reason: DropReason::NoEndpoint as u8, ..event(kind::DROP) };
        assert_eq!(line(&dropped, false), "drop TCP  10.0.0.1:1000 > 10.96.0.1:80  default/web:http  no_endpoint\n");
        let refused = Event { edge: EDGE_SOCKET, ..dropped };
        assert_eq!(line(&refused, false), "drop TCP  a process > 10.96.0.1:80  default/web:http  no_endpoint\n");
    }
}
