//! Flows that rewrite into each other, so that one run of a program after another finds a flow in the packet that the
//! last one left: BPF_PROG_TEST_RUN does not restore the packet between repeats.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use aya::Pod;
use sheave_common::flow::{Flow, FlowKey, Tuple, flags, state};
use sheave_common::{Address, Ipv4Address, Ipv6Address, PROTOCOL_TCP, PROTOCOL_UDP};
use sheave_tests::family::Family;
use sheave_tests::packet::{ACK, PSH, Packet};
use sheave_tests::program::Programs;

/// The two service addresses that every other tuple goes to; both are frontends of the same service port.
pub(crate) fn destinations(family: Family) -> [SocketAddr; 2] {
    let at = |last: u8, port| {
        let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, last.into());
        SocketAddr::new(family.pick(Ipv4Addr::new(10, 96, 0, last), v6), port)
    };
    [at(10, 80), at(11, 8080)]
}

/// A circle of flows: each one's packets become those of the next, and those of the last one those of the first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Circle {
    /// Family of all addresses.
    pub(crate) family: Family,
    /// TCP or UDP.
    pub(crate) protocol: u8,
    /// Edge of all flows.
    pub(crate) edge: u32,
    /// Bits of [`flags`] beside [`flags::REPLY`].
    pub(crate) flags: u8,
    /// Tells circles apart.
    pub(crate) number: u8,
    /// How many flows; even.
    pub(crate) length: u32,
    /// Their service port.
    pub(crate) service_id: u32,
    /// Their backend.
    pub(crate) backend_id: u32,
}

/// An address of a map's key.
pub(crate) trait KeyAddress: Address {
    /// From one of this family.
    fn of(address: IpAddr) -> Self;
}

impl KeyAddress for Ipv4Address {
    fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => address.into(),
            IpAddr::V6(_) => Self::UNSPECIFIED,
        }
    }
}

impl KeyAddress for Ipv6Address {
    fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V6(address) => address.into(),
            IpAddr::V4(_) => Self::UNSPECIFIED,
        }
    }
}

impl Circle {
    /// Source and destination of the flow at a place.
    fn addresses(&self, place: u32) -> (SocketAddr, SocketAddr) {
        let place = place % self.length;
        let [_, high, middle, low] = place.to_be_bytes();
        let v4 = Ipv4Addr::new(self.number, high, middle, low);
        let v6 = Ipv6Addr::new(0xfd01, self.number.into(), 0, 0, 0, 0, high.into(), u16::from_be_bytes([middle, low]));
        let client = SocketAddr::new(self.family.pick(v4, v6), 40_000 + u16::from(low));
        (client, destinations(self.family)[place as usize % 2])
    }

    /// The key of the flow at a place.
    pub(crate) fn key<A: KeyAddress>(&self, place: u32) -> FlowKey<A> {
        let (source, destination) = self.addresses(place);
        let tuple = Tuple {
            source: A::of(source.ip()),
            destination: A::of(destination.ip()),
            source_port_be: source.port().to_be(),
            destination_port_be: destination.port().to_be(),
        };
        FlowKey::new(tuple, self.protocol, self.edge)
    }

    /// Writes every flow into a map, both halves, as last seen now.
    pub(crate) fn insert<A: KeyAddress>(&self, programs: &mut Programs, map: &str) -> Result<()>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        for place in 0..self.length {
            let key = self.key::<A>(place);
            // What the programs do for the other half when they make a flow.
            if self.flags & flags::REDIRECT != 0 {
                programs.let_in(&key.tuple.source)?;
            } else {
                programs.let_out(&key.tuple.destination, second())?;
            }
            let mut map = programs.hash::<FlowKey<A>, Flow<A>>(map)?;
            let flow = Flow {
                rewrite: self.key::<A>(place + 1).tuple,
                service_id: self.service_id,
                backend_id: self.backend_id,
                last_seen: second(),
                state: state::ESTABLISHED,
                flags: self.flags & !flags::REPLY,
                closing: 0,
                tried: 0,
            };
            map.insert(key, flow, 0)?;
            map.insert(flow.sibling_key(&key), flow.sibling(&key), 0)?;
        }
        Ok(())
    }

    /// The client's packet of the flow at a place, with this TTL; or the backend's.
    pub(crate) fn packet(&self, place: u32, reply: bool, ttl: u8) -> Vec<u8> {
        let (source, destination) = self.addresses(place);
        let (source, destination) = if reply { (destination, source) } else { (source, destination) };
        let (source, destination) = (source.to_string(), destination.to_string());
        let packet = match self.protocol {
            PROTOCOL_TCP => Packet::tcp(&source, &destination, PSH | ACK),
            PROTOCOL_UDP => Packet::udp(&source, &destination),
            other => unreachable!("protocol {other} is not measured"),
        };
        packet.payload(&[0x5a; 64]).ttl(ttl).build().to_vec()
    }

    /// Where a packet that started at the first flow is after so many runs.
    pub(crate) fn place_after(&self, runs: u32, reply: bool) -> u32 {
        let steps = runs % self.length;
        if reply { (self.length - steps) % self.length } else { steps }
    }
}

/// Seconds of CLOCK_MONOTONIC, as the programs see them.
pub(crate) fn second() -> u32 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the time is written to a value that outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    u32::try_from(time.tv_sec).unwrap_or(u32::MAX)
}
