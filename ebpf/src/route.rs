//! Where the kernel would send a packet: `bpf_fib_lookup`.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_SRC,
    bpf_fib_lookup as Parameters,
};
use aya_ebpf::helpers::generated::bpf_fib_lookup;
use sheave_common::DropReason;
use sheave_common::flow::Tuple;

use crate::context::Context;
use crate::features;
use crate::maps::INTERFACES_MAP;
use crate::packet::network::Network;

/// A route that was found.
pub struct Route<A> {
    /// Interface that the packet leaves by.
    pub ifindex: u32,
    /// Next hop's address, for resolving the neighbour.
    pub next_hop: A,
    /// The neighbour is known, and `source_mac` and `destination_mac` are filled.
    pub resolved: bool,
    /// MAC address of the interface.
    pub source_mac: [u8; 6],
    /// MAC address of the next hop.
    pub destination_mac: [u8; 6],
}

/// No route that the packet can take.
pub enum NoRoute {
    /// The packet is larger than this MTU.
    TooBig(u32),
    /// None at all, or the input interface does not forward.
    Unreachable,
}

/// Route of a packet with this (rewritten) tuple. `length` is its size from the network header on, for a GSO packet that
/// of one segment; 0 leaves the MTU unchecked.
#[inline(always)]
pub fn find<C: Context, A: Network>(ctx: &C, tuple: &Tuple<A>, protocol: u8, length: u32) -> Result<Route<A>, NoRoute> {
    // Zeroed, because kernel 6.1 loses track of an MTU's not being 0, takes that for `FOUND`, and finds a "invalid read from
    // stack R10 off=-32 size=4" where the route would be read.
    let mut route = MaybeUninit::zeroed();
    match find_into(ctx, tuple, protocol, length, &mut route) {
        // SAFETY: `find_into` fills it whenever it says so.
        FOUND => Ok(unsafe { route.assume_init() }),
        UNREACHABLE => Err(NoRoute::Unreachable),
        mtu => Err(NoRoute::TooBig(mtu as u32)),
    }
}

const FOUND: u64 = 0;
const UNREACHABLE: u64 = u64::MAX;

/// [`FOUND`], [`UNREACHABLE`], or the MTU that the packet exceeds. A function of its own in the kernel too, so that its
/// stack is not the caller's.
#[inline(never)]
fn find_into<C: Context, A: Network>(
    ctx: &C,
    tuple: &Tuple<A>,
    protocol: u8,
    length: u32,
    result: &mut MaybeUninit<Route<A>>,
) -> u64 {
    let mut parameters = parameters(ctx, tuple, protocol);
    parameters.__bindgen_anon_1.tot_len = length as u16;
    match lookup(ctx, &mut parameters, 0) {
        BPF_FIB_LKUP_RET_SUCCESS => result.write(route(&parameters, true)),
        BPF_FIB_LKUP_RET_NO_NEIGH => result.write(route(&parameters, false)),
        BPF_FIB_LKUP_RET_FRAG_NEEDED if features::has(features::FIB_MTU) => {
            // SAFETY: the kernel wrote this member of the union.
            return u64::from(unsafe { parameters.__bindgen_anon_1.mtu_result }).max(1);
        }
        BPF_FIB_LKUP_RET_FRAG_NEEDED => return u64::from(next_plateau(length)),
        _ => return UNREACHABLE,
    };
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

#[inline(always)]
fn route<A: Network>(parameters: &Parameters, resolved: bool) -> Route<A> {
    Route {
        ifindex: parameters.ifindex,
        next_hop: A::route_next_hop(parameters),
        resolved,
        source_mac: parameters.smac,
        destination_mac: parameters.dmac,
    }
}
