//! Fragments follow their first fragment: it alone has ports, and those of translated packets are remembered.

use sheave_common::fragment::{FragmentKey, FragmentPorts};

use crate::edge::Direction;
use crate::features;
use crate::maps::{self, Family};
use crate::packet::Packet;
use crate::packet::network::Network;

/// Seconds after which an identification may belong to another packet; how long the kernel waits for the rest of one
/// (net.ipv4.ipfrag_time).
const LIFETIME: u32 = 30;

#[inline(always)]
fn key<A: Family>(packet: &Packet<A>, direction: Direction) -> FragmentKey<A> {
    FragmentKey {
        source: packet.key.tuple.source,
        destination: packet.key.tuple.destination,
        identification: packet.identification,
        edge: packet.key.edge,
        protocol: packet.key.protocol,
        egress: u8::from(direction == Direction::Egress),
        reserved: [0; 2],
    }
}

/// Remembers a first fragment's ports. Where that fails, the rest of the packet is lost, and with it the packet. A function
/// of its own in the kernel too, for its stack.
#[inline(never)]
pub fn remember<A: Network>(packet: &Packet<A>, direction: Direction, now: u32) -> bool {
    let tuple = &packet.key.tuple;
    let ports = FragmentPorts {
        source_port_be: tuple.source_port_be,
        destination_port_be: tuple.destination_port_be,
        seen: now,
    };
    A::insert_fragment(&key(packet, direction), &ports).is_ok()
}

/// Gives a later fragment the ports of its packet; false if its first fragment was not seen. A function of its own in the
/// kernel too, for its stack.
#[inline(never)]
pub fn recall<A: Network>(packet: &mut Packet<A>, direction: Direction, now: u32) -> bool {
    let Some(ports) = A::fragment(&key(packet, direction)) else { return false };
    // SAFETY: a map value stays readable while the program runs.
    let ports = unsafe { maps::copy(ports) };
    if features::elapsed(ports.seen, now) > LIFETIME {
        return false;
    }
    packet.key.tuple.source_port_be = ports.source_port_be;
    packet.key.tuple.destination_port_be = ports.destination_port_be;
    true
}
