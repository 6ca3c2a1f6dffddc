//! Applying a flow's rewrite to a packet: addresses, ports, checksums and, where the packet is redirected, TTL.

use sheave_common::checksum::difference;
use sheave_common::flow::Tuple;
use sheave_common::{Ipv4Address, PROTOCOL_TCP, PROTOCOL_UDP};

use crate::context::Context;
use crate::packet::{Packet, ipv4, transport};

/// What the two addresses change in a checksum.
#[inline(always)]
pub fn address_difference(old: &Tuple<Ipv4Address>, new: &Tuple<Ipv4Address>) -> u64 {
    difference(old.source.be_word(), new.source.be_word())
        + difference(old.destination.be_word(), new.destination.be_word())
}

/// The two ports as the word that lies in the packet.
#[inline(always)]
pub fn ports_word(tuple: &Tuple<Ipv4Address>) -> u32 {
    let source = tuple.source_port_be.to_ne_bytes();
    let destination = tuple.destination_port_be.to_ne_bytes();
    u32::from_ne_bytes([source[0], source[1], destination[0], destination[1]])
}

/// Rewrites a TCP or UDP packet. With `redirected`, the TTL is decremented too. `None`: a helper failed, and the packet
/// must be dropped, since it may be half written.
#[inline(always)]
pub fn rewrite<C: Context>(
    ctx: &C,
    packet: &Packet<Ipv4Address>,
    new: &Tuple<Ipv4Address>,
    redirected: bool,
) -> Option<()> {
    let old = &packet.key.tuple;
    let udp = packet.key.protocol == PROTOCOL_UDP;
    let checksum = packet.transport::<C>() + if udp { transport::UDP_CHECKSUM } else { transport::TCP_CHECKSUM };
    let addresses = address_difference(old, new);
    ctx.adjust_checksum(checksum, addresses, true, udp)?;
    let (old_ports, new_ports) = (ports_word(old), ports_word(new));
    if old_ports != new_ports {
        ctx.adjust_checksum(checksum, difference(old_ports, new_ports), false, udp)?;
        ctx.store(packet.transport::<C>(), &new_ports)?;
    }
    rewrite_addresses(ctx, packet, new, redirected, addresses)
}

/// Rewrites the network header alone.
#[inline(always)]
pub fn rewrite_addresses<C: Context>(
    ctx: &C,
    packet: &Packet<Ipv4Address>,
    new: &Tuple<Ipv4Address>,
    redirected: bool,
    mut changed: u64,
) -> Option<()> {
    if redirected {
        let old = [packet.ttl, packet.key.protocol];
        let new = [packet.ttl - 1, packet.key.protocol];
        changed += difference(u32::from(u16::from_ne_bytes(old)), u32::from(u16::from_ne_bytes(new)));
        ctx.store(packet.network::<C>() + ipv4::TTL, &new[0])?;
    }
    ctx.adjust_header_checksum(packet.network::<C>() + ipv4::CHECKSUM, changed)?;
    ctx.store(packet.network::<C>() + ipv4::ADDRESSES, &[new.source, new.destination])
}

/// Whether a protocol is translated at all.
#[inline(always)]
pub const fn translated(protocol: u8) -> bool {
    matches!(protocol, PROTOCOL_TCP | PROTOCOL_UDP)
}
