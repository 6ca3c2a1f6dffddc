//! Applying a flow's rewrite to a packet: addresses, ports, checksums and, where the packet is redirected, TTL or hop limit.

use sheave_common::checksum::difference;
use sheave_common::flow::Tuple;
use sheave_common::{PROTOCOL_SCTP, PROTOCOL_UDP, crc32c};

use crate::context::Context;
use crate::packet::network::Network;
use crate::packet::{Packet, Part, transport};

/// What the two addresses change in a checksum.
#[inline(always)]
pub fn address_difference<A: Network>(old: &Tuple<A>, new: &Tuple<A>) -> u64 {
    one(&old.source, &new.source) + one(&old.destination, &new.destination)
}

/// The same for a packet that goes the other way: `new` is to be reversed.
#[inline(always)]
pub fn crossed_difference<A: Network>(old: &Tuple<A>, new: &Tuple<A>) -> u64 {
    one(&old.source, &new.destination) + one(&old.destination, &new.source)
}

/// What one address changes in a checksum.
#[inline(always)]
fn one<A: Network>(old: &A, new: &A) -> u64 {
    let (old, new) = (core::ptr::from_ref(old).cast::<u32>(), core::ptr::from_ref(new).cast::<u32>());
    let mut sum = 0;
    for word in 0..size_of::<A>() / 4 {
        // SAFETY: addresses are arrays of octets, aligned to words and a whole number of words long.
        sum += unsafe { difference(*old.add(word), *new.add(word)) };
    }
    sum
}

/// The two ports as the word that lies in the packet.
#[inline(always)]
pub fn ports_word<A>(tuple: &Tuple<A>) -> u32 {
    let source = tuple.source_port_be.to_ne_bytes();
    let destination = tuple.destination_port_be.to_ne_bytes();
    u32::from_ne_bytes([source[0], source[1], destination[0], destination[1]])
}

/// Rewrites a packet, or the part of it that a fragment has. With `redirected`, the TTL is decremented too. `None`: a helper
/// failed, and the packet must be dropped, since it may be half written.
#[inline(always)]
pub fn rewrite<C: Context, A: Network>(ctx: &C, packet: &Packet<A>, new: &Tuple<A>, redirected: bool) -> Option<()> {
    let old = &packet.key.tuple;
    let addresses = address_difference(old, new);
    if packet.part != Part::Later {
        let (old_ports, new_ports) = (ports_word(old), ports_word(new));
        if packet.key.protocol == PROTOCOL_SCTP {
            if old_ports != new_ports {
                rewrite_sctp(ctx, packet, old_ports, new_ports)?;
            }
        } else {
            let udp = packet.key.protocol == PROTOCOL_UDP;
            let ports = if old_ports == new_ports { 0 } else { difference(old_ports, new_ports) };
            if packet.is_plain::<C>() {
                let offset = Packet::<A>::plain_transport::<C>();
                // Offsets that the compiler knows, also of the checksum.
                if udp {
                    ctx.adjust_checksum_at(offset + transport::UDP_CHECKSUM, addresses, ports, true)?;
                } else {
                    ctx.adjust_checksum_at(offset + transport::TCP_CHECKSUM, addresses, ports, false)?;
                }
                let place = ctx.at::<u32>(offset)?;
                // SAFETY: `at` found it in the packet.
                unsafe { place.write(new_ports) };
            } else {
                let offset = packet.transport::<C>();
                let checksum = offset + transport::checksum_offset(packet.key.protocol);
                ctx.adjust_checksum(checksum, addresses, true, udp)?;
                if ports != 0 {
                    ctx.adjust_checksum(checksum, ports, false, udp)?;
                    ctx.store(offset, &new_ports)?;
                }
            }
        }
    }
    A::rewrite_header(ctx, packet, new, redirected, addresses)
}

/// Rewrites the ports of an SCTP packet; its checksum does not cover addresses. A fragmented packet's checksum would need
/// the length of the whole: it is dropped.
#[inline(always)]
fn rewrite_sctp<C: Context, A: Network>(ctx: &C, packet: &Packet<A>, old_ports: u32, new_ports: u32) -> Option<()> {
    if packet.part != Part::Whole {
        return None;
    }
    let offset = packet.transport::<C>();
    let checksum = offset + transport::SCTP_CHECKSUM;
    let old = u32::from_le_bytes(ctx.load::<[u8; 4]>(checksum)?);
    ctx.store_uncompensated(offset, &new_ports)?;
    // 0 is left to the device or the kernel, which will compute it (CHECKSUM_PARTIAL).
    if old == 0 {
        return Some(());
    }
    let length = packet.length - (offset - C::NETWORK);
    let new = old ^ sctp_checksum_difference(u32::from_le(old_ports), u32::from_le(new_ports), length);
    ctx.store_uncompensated(checksum, &new.to_le_bytes())
}

/// A global function in the kernel, which its verifier looks at once: it is a long loop.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn sctp_checksum_difference(old: u32, new: u32, length: u32) -> u32 {
    crc32c::difference(old, new, length)
}
