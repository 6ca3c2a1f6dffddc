//! Answering a packet instead of forwarding it: ICMP errors (RFC 792, RFC 1191) and TCP resets (RFC 9293, 3.10.7.1).
//!
//! The answer is built on the stack, written over the packet, and sent out of the interface that the packet came in by.
//! Its source is the packet's own destination: the service's address, as the client knows it.

use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_redirect, bpf_skb_change_tail};
use sheave_common::checksum::fold;
use sheave_common::config::Config;
use sheave_common::{DropReason, Ipv4Address, PROTOCOL_ICMP, PROTOCOL_TCP};

use crate::context::Context;
use crate::edge::Verdict;
use crate::features;
use crate::maps::{self, REJECT_BUDGET};
use crate::observe;
use crate::packet::transport::{TCP_CHECKSUM, Tcp, flags as tcp};
use crate::packet::{Packet, ethernet, ipv4};

/// Bytes of the original packet that an ICMP error carries: its header without options and eight more (RFC 792).
const QUOTED: usize = 28;
const ICMP_UNREACHABLE: u8 = 3;
const ICMP_TIME_EXCEEDED: u8 = 11;
const CODE_PORT: u8 = 3;
const CODE_FRAGMENTATION_NEEDED: u8 = 4;
const TTL: u8 = 64;

/// An ICMP error as it is sent.
#[derive(Clone, Copy)]
#[repr(C, align(4))]
struct IcmpError {
    header: ipv4::Header,
    kind: u8,
    code: u8,
    checksum: u16,
    unused_be: u16,
    mtu_be: u16,
    quoted: [u8; QUOTED],
}

/// A TCP reset as it is sent.
#[derive(Clone, Copy)]
#[repr(C, align(4))]
struct Reset {
    header: ipv4::Header,
    tcp: Tcp,
}

/// What TCP sums besides its segment.
#[derive(Clone, Copy)]
#[repr(C, align(4))]
struct PseudoHeader {
    source: Ipv4Address,
    destination: Ipv4Address,
    protocol_be: u16,
    length_be: u16,
}

/// Port unreachable. A reset, which says the same, where the packet's TCP checksum is unfinished: the kernel would finish it
/// in the middle of the ICMP error. (A UDP checksum lies where the error has an unused field, and its sum stays right.)
#[inline(always)]
pub fn port_unreachable<C: Context>(ctx: &C, packet: &Packet<Ipv4Address>, reason: DropReason) -> Verdict {
    if packet.key.protocol == PROTOCOL_TCP && unfinished(ctx, packet.transport::<C>() + TCP_CHECKSUM) {
        return reset(ctx, packet, reason);
    }
    icmp(ctx, packet, ICMP_UNREACHABLE, CODE_PORT, 0, reason)
}

/// TTL exceeded in transit.
#[inline(always)]
pub fn time_exceeded<C: Context>(ctx: &C, packet: &Packet<Ipv4Address>) -> Verdict {
    icmp(ctx, packet, ICMP_TIME_EXCEEDED, 0, 0, DropReason::TtlExceeded)
}

/// Fragmentation needed, with the MTU that would pass.
#[inline(always)]
pub fn too_big<C: Context>(ctx: &C, packet: &Packet<Ipv4Address>, mtu: u32) -> Verdict {
    icmp(ctx, packet, ICMP_UNREACHABLE, CODE_FRAGMENTATION_NEEDED, mtu as u16, DropReason::TooBig)
}

#[inline(always)]
fn icmp<C: Context>(
    ctx: &C,
    packet: &Packet<Ipv4Address>,
    kind: u8,
    code: u8,
    mtu: u16,
    reason: DropReason,
) -> Verdict {
    match send_error(ctx, packet, u16::from(kind) << 8 | u16::from(code), mtu, reason) {
        Ok(()) => back_out(ctx),
        Err(reason) => Verdict::Drop(reason),
    }
}

/// Turns the packet into an ICMP error about itself, if the rate limit allows one. A function of its own in the kernel too,
/// so that its stack is not the fast path's.
#[inline(never)]
fn send_error<C: Context>(
    ctx: &C,
    packet: &Packet<Ipv4Address>,
    kind_and_code: u16,
    mtu: u16,
    reason: DropReason,
) -> Result<(), DropReason> {
    if !allowed() {
        return Err(DropReason::RejectLimited);
    }
    let [kind, code] = kind_and_code.to_be_bytes();
    let mut answer = IcmpError {
        header: header(packet, PROTOCOL_ICMP, size_of::<IcmpError>() as u16),
        kind,
        code,
        checksum: 0,
        unused_be: 0,
        mtu_be: mtu.to_be(),
        quoted: [0; QUOTED],
    };
    ctx.load_into(packet.network::<C>(), &mut answer.quoted).ok_or(reason)?;
    let message = size_of::<ipv4::Header>();
    answer.checksum = !fold(sum(&raw const answer, message, size_of::<IcmpError>() - message));
    replace(ctx, packet, &answer, reason)
}

/// Resets the packet's connection (RFC 9293: the reset takes its numbers from the segment that it answers).
#[inline(always)]
pub fn reset<C: Context>(ctx: &C, packet: &Packet<Ipv4Address>, reason: DropReason) -> Verdict {
    if packet.tcp_flags & tcp::RST != 0 {
        return Verdict::Drop(reason);
    }
    match send_reset(ctx, packet, reason) {
        Ok(()) => back_out(ctx),
        Err(reason) => Verdict::Drop(reason),
    }
}

/// Turns the packet into a reset of its connection, if the rate limit allows one.
#[inline(never)]
fn send_reset<C: Context>(ctx: &C, packet: &Packet<Ipv4Address>, reason: DropReason) -> Result<(), DropReason> {
    if !allowed() {
        return Err(DropReason::RejectLimited);
    }
    let segment = ctx.load::<Tcp>(packet.transport::<C>()).ok_or(reason)?;
    let (sequence_be, acknowledgment_be, flags) = if segment.flags & tcp::ACK != 0 {
        (segment.acknowledgment_be, 0, tcp::RST)
    } else {
        let header = packet.transport::<C>() - packet.network::<C>() + u32::from(segment.data_offset >> 4) * 4;
        let phantom = u32::from(segment.flags & tcp::SYN != 0) + u32::from(segment.flags & tcp::FIN != 0);
        let length = packet.length.wrapping_sub(header).wrapping_add(phantom);
        (0, u32::from_be(segment.sequence_be).wrapping_add(length).to_be(), tcp::RST | tcp::ACK)
    };
    let mut answer = Reset {
        header: header(packet, PROTOCOL_TCP, size_of::<Reset>() as u16),
        tcp: Tcp {
            source_be: segment.destination_be,
            destination_be: segment.source_be,
            sequence_be,
            acknowledgment_be,
            data_offset: (size_of::<Tcp>() as u8 / 4) << 4,
            flags,
            window_be: 0,
            checksum: 0,
            urgent_be: 0,
        },
    };
    let pseudo = PseudoHeader {
        source: answer.header.source,
        destination: answer.header.destination,
        protocol_be: u16::from(PROTOCOL_TCP).to_be(),
        length_be: (size_of::<Tcp>() as u16).to_be(),
    };
    let pseudo_sum = sum(&raw const pseudo, 0, size_of::<PseudoHeader>());
    answer.tcp.checksum = if unfinished(ctx, packet.transport::<C>() + TCP_CHECKSUM) {
        // The kernel adds the segment to it.
        fold(pseudo_sum)
    } else {
        !fold(pseudo_sum + sum(&raw const answer, size_of::<ipv4::Header>(), size_of::<Tcp>()))
    };
    replace(ctx, packet, &answer, reason)
}

/// Whether the sender left the checksum at this offset to the device (CHECKSUM_PARTIAL), which the kernel remembers even
/// when the packet is replaced. A change of the data moves only a finished checksum; this one is about to be overwritten.
#[inline(always)]
fn unfinished<C: Context>(ctx: &C, offset: u32) -> bool {
    let before = ctx.load::<u16>(offset);
    ctx.adjust_checksum(offset, 1, false, false).is_some() && before == ctx.load::<u16>(offset)
}

/// An IPv4 header from the packet's destination to its source.
#[inline(always)]
fn header(packet: &Packet<Ipv4Address>, protocol: u8, length: u16) -> ipv4::Header {
    let mut header = ipv4::Header {
        version_and_length: 0x45,
        tos: 0,
        total_length_be: length.to_be(),
        id_be: 0,
        fragment_be: 0,
        ttl: TTL,
        protocol,
        checksum: 0,
        source: packet.key.tuple.destination,
        destination: packet.key.tuple.source,
    };
    // Summed from its words: the header is on its way into a larger struct, and a helper would need it in memory twice.
    let words = [u16::from_ne_bytes([header.version_and_length, header.tos]), header.total_length_be];
    let last = u16::from_ne_bytes([header.ttl, header.protocol]);
    let addresses = u64::from(header.source.be_word()) + u64::from(header.destination.be_word());
    header.checksum = !fold(u64::from(words[0]) + u64::from(words[1]) + u64::from(last) + addresses);
    header
}

/// One's-complement sum of `length` bytes (a multiple of four) from `offset` on.
#[inline(always)]
fn sum<T>(value: *const T, offset: usize, length: usize) -> u64 {
    // SAFETY: callers pass ranges within the value. The helper only reads.
    let sum = unsafe {
        let start = value.cast::<u8>().add(offset).cast_mut().cast();
        bpf_csum_diff(core::ptr::null_mut(), 0, start, length as u32, 0)
    };
    u64::from(sum as u32)
}

/// Replaces the packet by the answer, addressed to where it came from.
#[inline(always)]
fn replace<C: Context, T>(
    ctx: &C,
    packet: &Packet<Ipv4Address>,
    answer: &T,
    reason: DropReason,
) -> Result<(), DropReason> {
    let length = packet.network::<C>() + size_of::<T>() as u32;
    // SAFETY: only tc packets get here (XDP passes them up), so the context is a socket buffer's.
    let resized = unsafe { bpf_skb_change_tail(ctx.as_ptr().cast(), length, 0) };
    if resized != 0 {
        return Err(reason);
    }
    ctx.store(packet.network::<C>(), answer).ok_or(reason)?;
    if packet.network::<C>() == ethernet::LENGTH {
        let frame = ctx.load::<ethernet::Header>(0).ok_or(reason)?;
        ctx.store(0, &[frame.source, frame.destination]).ok_or(reason)?;
    }
    observe::count(reason);
    Ok(())
}

/// Sends the answer out of the interface that the packet came in by.
#[inline(always)]
fn back_out<C: Context>(ctx: &C) -> Verdict {
    // SAFETY: the helper takes scalars only.
    Verdict::Action(unsafe { bpf_redirect(ctx.ifindex(), 0) } as i32)
}

/// Whether this CPU may send one more answer in this second.
#[inline(always)]
fn allowed() -> bool {
    let (Some(config), Some(budget)) = (maps::config(), REJECT_BUDGET.get_ptr_mut(0)) else { return false };
    take(config, budget)
}

#[inline(always)]
fn take(config: &Config, budget: *mut sheave_common::counter::RejectBudget) -> bool {
    let now = features::now();
    // SAFETY: the element is this CPU's own.
    unsafe {
        if (*budget).second != now {
            (*budget).second = now;
            (*budget).sent = 0;
        }
        (*budget).sent += 1;
        (*budget).sent <= config.rejects_per_second
    }
}
