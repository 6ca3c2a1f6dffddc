//! Floods: half-open connections and datagrams of senders that don't exist.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;

use super::world::{TCP, UDP};
use crate::flood;
use crate::netns::Namespace;
use crate::packet::{Packet, SYN};

/// What pours in: a packet to one address, each time from another sender.
pub(super) struct Flood {
    pub(super) what: String,
    frame: Bytes,
}

impl Flood {
    /// SYNs to the TCP port of a service.
    pub(super) fn of_syns(to: IpAddr) -> Self {
        let frame = Packet::tcp(sender(to), &SocketAddr::new(to, TCP).to_string(), SYN).build();
        Self { what: format!("SYNs to {to}"), frame }
    }

    /// Datagrams to the UDP port of a service, which are too short to be answered.
    pub(super) fn of_datagrams(to: IpAddr) -> Self {
        let frame = Packet::udp(sender(to), &SocketAddr::new(to, UDP).to_string()).build();
        Self { what: format!("datagrams to {to}"), frame }
    }

    /// Sends from a namespace as fast as one thread can, for a time; says how many.
    pub(super) fn pour(&self, from: &Namespace, length: Duration) -> Result<u32> {
        from.run(|| flood::send_for(&self.frame, length))
    }
}

/// The first of the senders.
fn sender(to: IpAddr) -> &'static str {
    if to.is_ipv4() { "10.66.0.0:1024" } else { "[fd66::]:1024" }
}
