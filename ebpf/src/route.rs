//! Where the kernel would send a packet: `bpf_fib_lookup`, whose answer each CPU keeps for the rest of the second. A lookup costs
//! more than everything else that a packet of a known flow needs. What is kept belongs to a whole tuple, so that routes by
//! source or port and several next hops stay as the kernel has them.

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_SRC,
    bpf_fib_lookup as Parameters,
};
use aya_ebpf::helpers::generated::bpf_fib_lookup;
use sheave_common::DropReason;
use sheave_common::flow::Tuple;

use crate::context::Context;
use crate::features;
use crate::maps::{self, INTERFACES_MAP};
use crate::packet::network::Network;

/// How many routes a CPU keeps, each in the one place that its tuple may have.
pub const ROUTES: usize = 1_024;
/// Words of the maps' values.
pub const WORDS: usize = 11;
/// No second: what was found counts for its packet only.
const NEVER: u32 = u32::MAX;

/// A route that was found.
#[repr(C)]
pub struct Route<A> {
    /// Tuple of the packets that take it.
    tuple: Tuple<A>,
    /// Interface that they came in by.
    input: u32,
    /// Their protocol.
    protocol: u32,
    /// The second in which it may be used again, or [`NEVER`].
    second: u32,
    /// Bytes that a packet may have from the network header on.
    mtu: u32,
    /// Interface that the packet leaves by.
    pub ifindex: u32,
    /// Next hop's address, for resolving the neighbour.
    pub next_hop: A,
    /// MAC address of the interface.
    pub source_mac: [u8; 6],
    /// MAC address of the next hop.
    pub destination_mac: [u8; 6],
    /// The neighbour is known, and both MAC addresses are filled.
    pub resolved: bool,
}

/// No route that the packet can take.
pub enum NoRoute {
    /// The packet is larger than this MTU.
    TooBig(u32),
    /// None at all, or the input interface does not forward.
    Unreachable,
}

/// Route of a packet with this (rewritten) tuple, valid until the next one is looked for. `length` is its size from the network
/// header on, for a GSO packet that of one segment; 0 leaves the MTU unchecked.
#[inline(always)]
pub fn find<C: Context, A: Network>(
    ctx: &C,
    tuple: &Tuple<A>,
    protocol: u8,
    length: u32,
) -> Result<&'static Route<A>, NoRoute> {
    let place = A::route(place(tuple)).ok_or(NoRoute::Unreachable)?;
    const { assert!(size_of::<Route<A>>() <= WORDS * 8 && align_of::<Route<A>>() <= 8) };
    // SAFETY: the element is this CPU's own, and all-zero bytes are a valid route, of no packet.
    let route = unsafe { &mut *place.cast::<Route<A>>() };
    let known = route.second == features::now()
        && maps::same_words(&route.tuple, tuple)
        && (route.input, route.protocol) == (ctx.ifindex(), u32::from(protocol));
    if known && length != 0 && length <= route.mtu {
        return Ok(route);
    }
    match look_up(ctx, tuple, protocol, length, route) {
        FOUND => Ok(route),
        UNREACHABLE => Err(NoRoute::Unreachable),
        mtu => Err(NoRoute::TooBig(mtu as u32)),
    }
}

/// The place that a tuple's route may have.
#[inline(always)]
fn place<A: Network>(tuple: &Tuple<A>) -> u32 {
    let mut sum = 0_u64;
    for word in 0..size_of::<Tuple<A>>() / 4 {
        // SAFETY: tuples are aligned to words and a whole number of words long.
        sum = sum.rotate_left(21) ^ u64::from(unsafe { core::ptr::from_ref(tuple).cast::<u32>().add(word).read() });
    }
    // Fibonacci hashing: the upper bits of a product with 2^64 divided by the golden ratio.
    (sum.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - ROUTES.ilog2())) as u32
}

const FOUND: u64 = 0;
const UNREACHABLE: u64 = u64::MAX;

/// Asks the kernel and fills `route`: [`FOUND`], [`UNREACHABLE`], or the MTU that the packet exceeds. A function of its own in
/// the kernel too, so that its stack is not the caller's.
#[inline(never)]
fn look_up<C: Context, A: Network>(ctx: &C, tuple: &Tuple<A>, protocol: u8, length: u32, route: &mut Route<A>) -> u64 {
    let mut parameters = parameters(ctx, tuple, protocol);
    parameters.__bindgen_anon_1.tot_len = length as u16;
    route.second = NEVER;
    let resolved = match lookup(ctx, &mut parameters, 0) {
        BPF_FIB_LKUP_RET_SUCCESS => true,
        BPF_FIB_LKUP_RET_NO_NEIGH => false,
        BPF_FIB_LKUP_RET_FRAG_NEEDED if features::has(features::FIB_MTU) => {
            // SAFETY: the kernel wrote this member of the union.
            return u64::from(unsafe { parameters.__bindgen_anon_1.mtu_result }).max(1);
        }
        BPF_FIB_LKUP_RET_FRAG_NEEDED => return u64::from(next_plateau(length)),
        _ => return UNREACHABLE,
    };
    route.ifindex = parameters.ifindex;
    route.next_hop = A::route_next_hop(&parameters);
    route.resolved = resolved;
    route.source_mac = parameters.smac;
    route.destination_mac = parameters.dmac;
    // The kernel says the MTU only of a route whose neighbour it knows, and only if it was to compare it with a length.
    if resolved && length != 0 && features::has(features::FIB_MTU) {
        maps::copy_words(tuple, &raw mut route.tuple);
        route.input = ctx.ifindex();
        route.protocol = u32::from(protocol);
        // SAFETY: the kernel wrote this member of the union.
        route.mtu = u32::from(unsafe { parameters.__bindgen_anon_1.mtu_result });
        route.second = features::now();
    }
    FOUND
}

/// What an ICMP error names where the kernel does not say the MTU (before 5.12: the length is left as it was, which named as
/// the MTU would stop the connection for good): the next smaller of the usual ones, as RFC 1191, 7.1 has a host guess.
#[inline(always)]
fn next_plateau(length: u32) -> u32 {
    const PLATEAUS: [u32; 10] = [32_000, 17_914, 8_166, 4_352, 2_002, 1_492, 1_450, 1_400, 1_280, 1_006];
    const SMALLEST: u32 = 508;
    for plateau in PLATEAUS {
        if plateau < length {
            return plateau;
        }
    }
    SMALLEST
}

/// SNATs a tuple: makes its source the egress interface's address, so that the reply takes the same road back. A function of its own in the kernel too, so that its stack is not the caller's.
#[inline(never)]
pub fn source<C: Context, A: Network>(ctx: &C, tuple: &mut Tuple<A>, protocol: u8) -> Result<(), DropReason> {
    let mut parameters = parameters(ctx, tuple, protocol);
    let flags = if features::has(features::FIB_SOURCE) { BPF_FIB_LOOKUP_SRC } else { 0 };
    match lookup(ctx, &mut parameters, flags) {
        // Given no length, the kernel compares the packet's own with the MTU, after it has answered everything else. Whether
        // it is too big is said where it is sent.
        BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH | BPF_FIB_LKUP_RET_FRAG_NEEDED => {}
        _ => return Err(DropReason::NoRoute),
    }
    // With a resolved neighbour the kernel reports the source; without one it leaves the packet's own.
    let chosen = A::route_source(&parameters);
    if features::has(features::FIB_SOURCE) && chosen != tuple.source {
        tuple.source = chosen;
        return Ok(());
    }
    // SAFETY: a map value stays readable while the program runs; an interface's address hardly ever changes.
    let configured = unsafe { INTERFACES_MAP.get(parameters.ifindex) }.map(A::source);
    match configured {
        Some(address) if address != A::UNSPECIFIED => {
            tuple.source = address;
            Ok(())
        }
        _ => Err(DropReason::NoSourceAddress),
    }
}

#[inline(always)]
fn parameters<C: Context, A: Network>(ctx: &C, tuple: &Tuple<A>, protocol: u8) -> Parameters {
    // SAFETY: all-zero bytes are a valid value of this plain C struct.
    let mut parameters: Parameters = unsafe { core::mem::zeroed() };
    A::set_route(&mut parameters, tuple);
    parameters.l4_protocol = protocol;
    parameters.sport = tuple.source_port_be;
    parameters.dport = tuple.destination_port_be;
    parameters.ifindex = ctx.ifindex();
    parameters
}

#[inline(always)]
fn lookup<C: Context>(ctx: &C, parameters: &mut Parameters, flags: u32) -> u32 {
    // SAFETY: the context is the program's own, and the parameters are as long as is said.
    let result = unsafe { bpf_fib_lookup(ctx.as_ptr(), parameters, size_of::<Parameters>() as i32, flags) };
    // Errors are negative and match no answer.
    result as u32
}
