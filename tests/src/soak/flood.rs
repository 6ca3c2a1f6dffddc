//! Floods: half-open connections and datagrams of senders that don't exist.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bytes::Bytes;

use super::world::{TCP, UDP};
use crate::netns::Namespace;
use crate::packet::{Packet, SYN};
use crate::raw_packets::RawSocket;

/// Senders of a flood.
const SENDERS: u16 = 8_000;

/// What pours in: packets to one address, each of another sender.
pub(super) struct Flood {
    pub(super) what: String,
    packets: Vec<Bytes>,
}

impl Flood {
    /// SYNs to the TCP port of a service.
    pub(super) fn of_syns(to: Ipv4Addr) -> Self {
        Self::new("SYNs", to, &|source| Packet::tcp(source, &format!("{to}:{TCP}"), SYN))
    }

    /// Datagrams to the UDP port of a service, which are too short to be answered.
    pub(super) fn of_datagrams(to: Ipv4Addr) -> Self {
        Self::new("datagrams", to, &|source| Packet::udp(source, &format!("{to}:{UDP}")))
    }

    fn new(what: &str, to: Ipv4Addr, packet: &dyn Fn(&str) -> Packet) -> Self {
        let source = |number: u16| {
            let [high, low] = number.to_be_bytes();
            format!("10.66.{high}.{low}:{}", 1_024 + number)
        };
        let packets = (0..SENDERS).map(|number| packet(&source(number)).build()).collect();
        Self { what: format!("{what} to {to}"), packets }
    }

    /// Sends from a namespace as fast as one thread can, for a time; says how many.
    pub(super) fn pour(&self, from: &Namespace, length: Duration) -> Result<u64> {
        from.run(|| {
            let socket = RawSocket::open().context("a raw socket")?;
            let (started, mut sent) = (Instant::now(), 0);
            for packet in self.packets.iter().cycle() {
                // A full device queue loses some of a flood; that is no failure.
                let _ = socket.send(packet);
                sent += 1;
                if started.elapsed() > length {
                    break;
                }
            }
            Ok(sent)
        })
    }
}
