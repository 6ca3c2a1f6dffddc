//! Answering a packet instead of forwarding it: ICMP errors (RFC 792, RFC 1191, RFC 4443), TCP resets (RFC 9293, 3.10.7.1)
//! and echo replies.
//!
//! The answer is built on the stack, written over the packet, and sent out of the interface that the packet came in by.
//! Its source is the packet's own destination: the service's address, as the client knows it.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::generated::{bpf_csum_diff, bpf_redirect, bpf_skb_change_tail};
use sheave_common::checksum::{difference, fold};
use sheave_common::config::Config;
use sheave_common::{DropReason, PROTOCOL_TCP, PROTOCOL_UDP};

use crate::balance::Origin;
use crate::context::Context;
use crate::event;
use crate::features;
use crate::maps::{self, REJECT_BUDGET};
use crate::observe;
use crate::packet::network::{Answer, Network};
use crate::packet::transport::{ICMP_CHECKSUM, TCP_CHECKSUM, Tcp, UDP_CHECKSUM, flags as tcp};
use crate::packet::{Packet, ethernet};
use crate::verdict::Verdict;

/// An ICMP error as it is sent.
#[derive(Clone, Copy)]
#[repr(C, align(4))]
struct IcmpError<A: Network> {
    header: A::Header,
    kind: [u8; 2],
    checksum: u16,
    /// The MTU, of which ICMP has the lower half only; 0 in other errors.
    mtu_be: u32,
    quoted: A::Quoted,
}

/// A TCP reset as it is sent.
#[derive(Clone, Copy)]
#[repr(C, align(4))]
struct Reset<A: Network> {
    header: A::Header,
    tcp: Tcp,
}

/// Port unreachable. A reset, which says the same, for a pod's TCP over IPv6, since an ICMPv6 error that reaches a busy
/// socket is dropped and costs a second; and where the packet's TCP checksum is unfinished: the kernel would finish it in the
/// middle of the ICMP error. (A UDP checksum lies where the error has an unused field, and its sum stays right.)
#[inline(always)]
pub fn port_unreachable<C: Context, A: Network>(
    ctx: &C,
    packet: &Packet<A>,
    origin: Origin,
    reason: DropReason,
) -> Verdict {
    if packet.key.protocol == PROTOCOL_TCP
        && ((A::ICMP_PSEUDO && origin == Origin::Inside) || unfinished(ctx, packet.transport::<C>() + TCP_CHECKSUM))
    {
        return reset(ctx, packet, reason);
    }
    error(ctx, packet, Answer::PortUnreachable, 0, reason)
}

/// An ICMP error about the packet; `mtu` is what would pass.
#[inline(always)]
pub fn error<C: Context, A: Network>(
    ctx: &C,
    packet: &Packet<A>,
    answer: Answer,
    mtu: u32,
    reason: DropReason,
) -> Verdict {
    let kind = u16::from_be_bytes(A::icmp_kind(answer));
    match send_error(ctx, packet, kind, mtu, reason) {
        Ok(()) => {
            event::dropped(&packet.key, reason);
            back_out(ctx)
        }
        Err(reason) => Verdict::Drop(reason),
    }
}

/// Turns the packet into an ICMP error about itself, if the rate limit allows one. A function of its own in the kernel too,
/// so that its stack is not the fast path's.
#[inline(never)]
fn send_error<C: Context, A: Network>(
    ctx: &C,
    packet: &Packet<A>,
    kind: u16,
    mtu: u32,
    reason: DropReason,
) -> Result<(), DropReason> {
    if !allowed() {
        return Err(DropReason::RejectLimited);
    }
    let message = (size_of::<IcmpError<A>>() - size_of::<A::Header>()) as u16;
    let mut answer = MaybeUninit::<IcmpError<A>>::uninit();
    let place = answer.as_mut_ptr();
    // Field by field: zeroes in the quote's place would be a call of memset, with a frame of its own.
    // SAFETY: the place is an error's, and its quote is overwritten as a whole before it is read.
    let answer = unsafe {
        (&raw mut (*place).header).write(A::answer_header(packet, A::ICMP, message));
        (&raw mut (*place).kind).write(kind.to_be_bytes());
        (&raw mut (*place).checksum).write(0);
        (&raw mut (*place).mtu_be).write(mtu.to_be());
        ctx.load_into(C::NETWORK, &mut (*place).quoted).ok_or(reason)?;
        answer.assume_init_mut()
    };
    let pseudo = if A::ICMP_PSEUDO { pseudo_header(packet, A::ICMP, message) } else { 0 };
    answer.checksum = !fold(pseudo + sum(&raw const *answer, size_of::<A::Header>(), usize::from(message)));
    // What the kernel finishes at a UDP checksum's place, in the unused field, is the complement of the whole message's sum. With
    // the pseudo-header's sum there before, it comes out as all ones, and the message's checksum is right again.
    if A::ICMP_PSEUDO
        && mtu == 0
        && packet.key.protocol == PROTOCOL_UDP
        && unfinished(ctx, packet.transport::<C>() + UDP_CHECKSUM)
    {
        answer.mtu_be = u32::from_ne_bytes(unused(fold(pseudo)));
    }
    replace(ctx, answer, reason)
}

/// An error's unused field with this at the place of a UDP checksum.
#[inline(always)]
fn unused(checksum: u16) -> [u8; 4] {
    let [high, low] = checksum.to_ne_bytes();
    [0, 0, high, low]
}

/// Resets the packet's connection (RFC 9293: the reset takes its numbers from the segment that it answers).
#[inline(always)]
pub fn reset<C: Context, A: Network>(ctx: &C, packet: &Packet<A>, reason: DropReason) -> Verdict {
    if packet.tcp_flags & tcp::RST != 0 || packet.key.protocol != PROTOCOL_TCP {
        return Verdict::Drop(reason);
    }
    match send_reset(ctx, packet, reason) {
        Ok(()) => {
            event::dropped(&packet.key, reason);
            back_out(ctx)
        }
        Err(reason) => Verdict::Drop(reason),
    }
}

/// Turns the packet into a reset of its connection, if the rate limit allows one.
#[inline(never)]
fn send_reset<C: Context, A: Network>(ctx: &C, packet: &Packet<A>, reason: DropReason) -> Result<(), DropReason> {
    if !allowed() {
        return Err(DropReason::RejectLimited);
    }
    let segment = ctx.load::<Tcp>(packet.transport::<C>()).ok_or(reason)?;
    let (sequence_be, acknowledgment_be, flags) = if segment.flags & tcp::ACK != 0 {
        (segment.acknowledgment_be, 0, tcp::RST)
    } else {
        let header = packet.transport::<C>() - C::NETWORK + u32::from(segment.data_offset >> 4) * 4;
        let phantom = u32::from(segment.flags & tcp::SYN != 0) + u32::from(segment.flags & tcp::FIN != 0);
        let length = packet.length.wrapping_sub(header).wrapping_add(phantom);
        (0, u32::from_be(segment.sequence_be).wrapping_add(length).to_be(), tcp::RST | tcp::ACK)
    };
    let length = size_of::<Tcp>() as u16;
    let mut answer = Reset::<A> {
        header: A::answer_header(packet, PROTOCOL_TCP, length),
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
    let pseudo = pseudo_header(packet, PROTOCOL_TCP, length);
    answer.tcp.checksum = if unfinished(ctx, packet.transport::<C>() + TCP_CHECKSUM) {
        // The kernel adds the segment to it.
        fold(pseudo)
    } else {
        !fold(pseudo + sum(&raw const answer, size_of::<A::Header>(), size_of::<Tcp>()))
    };
    replace(ctx, &answer, reason)
}

/// One's-complement sum of the pseudo-header of an answer, which has the packet's addresses, only the other way round.
#[inline(always)]
fn pseudo_header<A: Network>(packet: &Packet<A>, protocol: u8, length: u16) -> u64 {
    let mut total = u64::from(u16::from(protocol).to_be()) + u64::from(length.to_be());
    // Not one loop over both, whose shape kernel 6.1 refuses ("back-edge from insn 3333 to 3334").
    for word in packet.key.tuple.source.words() {
        total += u64::from(word);
    }
    for word in packet.key.tuple.destination.words() {
        total += u64::from(word);
    }
    total
}

/// Answers an echo request (RFC 792, RFC 4443): the request itself goes back, type and addresses changed.
#[inline(always)]
pub fn echo<C: Context, A: Network>(ctx: &C, packet: &Packet<A>) -> Verdict {
    match send_echo(ctx, packet) {
        Some(()) => back_out(ctx),
        None => Verdict::Drop(DropReason::RewriteFailed),
    }
}

/// Turns an echo request into its answer. What is swapped changes no checksum; type and code do.
#[inline(never)]
fn send_echo<C: Context, A: Network>(ctx: &C, packet: &Packet<A>) -> Option<()> {
    let message = packet.transport::<C>();
    let old = ctx.load::<[u8; 2]>(message)?;
    let new = [A::ECHO_REPLY, 0];
    let changed = difference(u32::from(u16::from_ne_bytes(old)), u32::from(u16::from_ne_bytes(new)));
    ctx.adjust_checksum(message + ICMP_CHECKSUM, changed, false, false)?;
    ctx.store(message, &new)?;
    // What is now nothing but zeroes has a checksum of all ones, and all ones is never wrong (RFC 1071 knows two zeroes).
    if ctx.load::<u16>(message + ICMP_CHECKSUM)? == 0 {
        ctx.store(message + ICMP_CHECKSUM, &u16::MAX)?;
    }
    let header = A::answer_header(packet, A::ICMP, (packet.length - (message - C::NETWORK)) as u16);
    // With options the header stays as it was, but for the addresses.
    if message - C::NETWORK == A::LENGTH {
        // IPv6's has no checksum that would make up for the hop limit.
        ctx.store_uncompensated(C::NETWORK, &header)?;
    } else {
        A::rewrite_header(ctx, packet, &packet.key.tuple.reversed(), false, 0)?;
    }
    Some(())
}

/// Whether the sender left the checksum at this offset to the device (CHECKSUM_PARTIAL), which the kernel remembers even
/// when the packet is replaced. A change of the data moves only a finished checksum; this one is about to be overwritten.
#[inline(always)]
fn unfinished<C: Context>(ctx: &C, offset: u32) -> bool {
    let before = ctx.load::<u16>(offset);
    ctx.adjust_checksum(offset, 1, false, false).is_some() && before == ctx.load::<u16>(offset)
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

/// Replaces the packet by the answer.
#[inline(always)]
fn replace<C: Context, T>(ctx: &C, answer: &T, reason: DropReason) -> Result<(), DropReason> {
    let length = C::NETWORK + size_of::<T>() as u32;
    // SAFETY: only tc packets get here (XDP passes them up), so the context is a socket buffer's.
    let resized = unsafe { bpf_skb_change_tail(ctx.as_ptr().cast(), length, 0) };
    if resized != 0 {
        return Err(reason);
    }
    ctx.store(C::NETWORK, answer).ok_or(reason)?;
    observe::count(reason);
    Ok(())
}

/// Swaps the frame's MAC addresses, if it has any. A function of its own in the kernel too, for its callers' stack.
#[inline(never)]
fn turn_frame<C: Context>(ctx: &C) -> Option<()> {
    if C::NETWORK != ethernet::LENGTH {
        return Some(());
    }
    let frame = ctx.load::<ethernet::Header>(0)?;
    ctx.store(0, &[frame.source, frame.destination])
}

/// Sends the answer to where the packet came from, out of the interface that it came in by.
#[inline(always)]
fn back_out<C: Context>(ctx: &C) -> Verdict {
    if turn_frame(ctx).is_none() {
        return Verdict::Drop(DropReason::RewriteFailed);
    }
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
