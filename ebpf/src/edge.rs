//! The four lines of "the one idea", for XDP and tc alike: parse, look up, decide, apply.

use core::mem::MaybeUninit;

use sheave_common::config::flags as config_flags;
use sheave_common::flow::{EDGE_UPLINK, Flow, flags};
use sheave_common::frontend::{FrontendKey, flags as frontend_flags};
use sheave_common::{DropReason, PROTOCOL_TCP, PROTOCOL_UDP};

use crate::balance::{From, Origin};
use crate::conntrack::Found;
use crate::context::{Addressee, Context};
use crate::maps::{self, Family, Table};
use crate::packet::network::Network;
use crate::packet::transport::flags as tcp;
use crate::packet::{Kind, Packet, Part};
use crate::verdict::{FLOW, Verdict};
use crate::{affinity, bypass, conntrack, create, features, filter, forward, fragment, icmp, observe, own, reject};

/// Which way packets of a hook travel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Into this node.
    Ingress,
    /// Out of this node.
    Egress,
}

impl Direction {
    /// Whether a flow half is applied at hooks of this direction: what the program redirects itself is turned at ingress
    /// both ways; all other replies are turned at egress, after netfilter has seen them.
    #[inline(always)]
    pub fn applies(self, flow_flags: u8) -> bool {
        let at_egress = flow_flags & flags::REPLY != 0 && flow_flags & (flags::REDIRECT | flags::HAIRPIN) == 0;
        at_egress == (self == Self::Egress)
    }
}

/// A packet that enters from a pod, or from an uplink or tunnel. A function of its own in the kernel too, as a verdict's bits:
/// a program has one for each family, and only one of them needs stack.
#[inline(never)]
pub fn ingress<C: Context, A: Network>(ctx: &C, origin: Origin) -> u64 {
    let verdict = A::with_room(|packet, flow| {
        let kind = A::parse(ctx, edge(ctx, origin), packet);
        if kind == Kind::NotOurs {
            return Verdict::Pass;
        }
        // SAFETY: `parse` fills it unless it says so.
        let packet = unsafe { packet.assume_init_mut() };
        let verdict = enter(ctx, kind, packet, origin, flow);
        observe::decision(ctx, packet, verdict);
        verdict
    });
    verdict.unwrap_or(Verdict::Pass).to_bits()
}

#[inline(always)]
fn enter<C: Context, A: Network>(
    ctx: &C,
    kind: Kind,
    packet: &mut Packet<A>,
    origin: Origin,
    flow: &mut MaybeUninit<Flow<A>>,
) -> Verdict {
    match ctx.addressee() {
        Addressee::Us => {}
        // A pod's veth may be a bridge port, and its frames go to the bridge.
        Addressee::AnotherHost if origin == Origin::Inside => {}
        _ => return Verdict::Pass,
    }
    if C::XDP && (kind != Kind::Transport || packet.part != Part::Whole) {
        return Verdict::Pass;
    }
    let destination = &packet.key.tuple.destination;
    if kind == Kind::Transport && !filter::may_enter(destination) && !unallocated(*destination) {
        return Verdict::Pass;
    }
    let now = features::now();
    match kind {
        Kind::Transport => {}
        Kind::Later if fragment::recall(packet, Direction::Ingress, now) => {}
        Kind::IcmpError => match icmp::error(ctx, packet, Direction::Ingress, flow) {
            Some(verdict) => return verdict,
            None => return Verdict::from_bits(aside(ctx, packet, kind)),
        },
        _ => return Verdict::from_bits(aside(ctx, packet, kind)),
    }
    let found = match bypass::find(packet, now, flow) {
        Found::Miss => conntrack::find(packet, Direction::Ingress, now, flow),
        found => found,
    };
    if found == Found::Completed {
        // SAFETY: both fill it whenever they say so.
        affinity::establish(unsafe { flow.assume_init_ref() }, &packet.key);
    } else if found != Found::Flow {
        let verdict = miss(ctx, packet, From::new(origin, found), now, flow);
        if verdict != FLOW {
            return Verdict::from_bits(verdict);
        }
    }
    // SAFETY: both fill it whenever they say so.
    apply(ctx, packet, unsafe { flow.assume_init_ref() }, Direction::Ingress, now)
}

/// A packet that leaves to a pod, or by an uplink or tunnel. Frontends are never looked at, flows never made. A function of
/// its own in the kernel too, as [`ingress`] is.
#[inline(never)]
pub fn egress<C: Context, A: Network>(ctx: &C, origin: Origin) -> u64 {
    let verdict = A::with_room(|packet, flow| {
        let kind = A::parse(ctx, edge(ctx, origin), packet);
        if kind == Kind::NotOurs {
            return Verdict::Pass;
        }
        // SAFETY: `parse` fills it unless it says so.
        let packet = unsafe { packet.assume_init_mut() };
        let verdict = leave(ctx, kind, packet, flow);
        observe::decision(ctx, packet, verdict);
        verdict
    });
    verdict.unwrap_or(Verdict::Pass).to_bits()
}

#[inline(always)]
fn leave<C: Context, A: Network>(
    ctx: &C,
    kind: Kind,
    packet: &mut Packet<A>,
    flow: &mut MaybeUninit<Flow<A>>,
) -> Verdict {
    let now = features::now();
    match kind {
        Kind::Transport if !filter::may_leave(&packet.key.tuple.source, now) => return Verdict::Pass,
        Kind::Transport => {}
        Kind::Later if fragment::recall(packet, Direction::Egress, now) => {}
        Kind::IcmpError => return icmp::error(ctx, packet, Direction::Egress, flow).unwrap_or(Verdict::Pass),
        _ => return Verdict::Pass,
    }
    let found = conntrack::find(packet, Direction::Egress, now, flow);
    if found == Found::Miss {
        return Verdict::Pass;
    }
    // SAFETY: `find` fills it whenever it says so.
    let flow = unsafe { flow.assume_init_ref() };
    if found == Found::Completed {
        affinity::establish(flow, &packet.key);
    }
    apply(ctx, packet, flow, Direction::Egress, now)
}

/// Translates a packet of a known flow and sends it on its way.
#[inline(always)]
fn apply<C: Context, A: Network>(
    ctx: &C,
    packet: &Packet<A>,
    flow: &Flow<A>,
    direction: Direction,
    now: u32,
) -> Verdict {
    if packet.part == Part::First && !fragment::remember(packet, direction, now) {
        return Verdict::Drop(DropReason::Fragment);
    }
    if flow.flags & flags::REDIRECT != 0 {
        return forward::by_route(ctx, packet, flow);
    }
    if C::XDP {
        return Verdict::Pass;
    }
    if A::rewrite(ctx, packet, &flow.rewrite, false).is_none() {
        return Verdict::Drop(DropReason::RewriteFailed);
    }
    observe::packet(flow.service_id, packet.length);
    if flow.flags & flags::HAIRPIN != 0 { forward::back(ctx) } else { Verdict::Pass }
}

/// What a packet that no flow knows comes to, or a SYN that its flow's backend has not answered ([`From::is_again`]), as a verdict's
/// bits or [`FLOW`]: a new connection if it goes to a frontend, nothing to do with us otherwise. A function of its own in the kernel too, so that its stack is not the fast path's.
#[inline(never)]
fn miss<C: Context, A: Network>(
    ctx: &C,
    packet: &Packet<A>,
    from: From,
    now: u32,
    flow: &mut MaybeUninit<Flow<A>>,
) -> u64 {
    let verdict = match classify(packet) {
        Unknown::Foreign => Verdict::Pass,
        _ if is_set(config_flags::LEAVING) => {
            // A closed flow of the same client and port must not catch what follows.
            A::remove_flow(Table::Established, &packet.key);
            A::remove_flow(Table::HalfOpen, &packet.key);
            Verdict::Pass
        }
        // Its first fragment had a flow, which is gone.
        _ if packet.part == Part::Later => Verdict::Drop(DropReason::Fragment),
        Unknown::Martian if C::XDP => Verdict::Pass,
        Unknown::Martian => Verdict::Drop(DropReason::MartianSource),
        Unknown::New => match create::flow(ctx, packet, from, now, flow) {
            Ok(()) => return FLOW,
            Err(_) if C::XDP => Verdict::Pass,
            Err(DropReason::NoEndpoint) => return refuse(ctx, packet, from.origin(), DropReason::NoEndpoint),
            Err(reason) => Verdict::Drop(reason),
        },
        _ if C::XDP => Verdict::Pass,
        Unknown::Unallocated => Verdict::Drop(DropReason::Unallocated),
        Unknown::NoSuchPort => return refuse(ctx, packet, from.origin(), DropReason::UnknownPort),
        Unknown::MidFlow if is_set(config_flags::DRAIN_FOREIGN) => Verdict::Pass,
        // A process of this node has taken a nodePort's number as its own port.
        Unknown::MidFlow if packet.key.protocol == PROTOCOL_TCP && own::connection(ctx, &packet.key.tuple) => {
            Verdict::Pass
        }
        Unknown::MidFlow => return refuse(ctx, packet, from.origin(), DropReason::NoFlow),
    };
    verdict.to_bits()
}

/// Answers a packet that can't be served, as a verdict's bits. A function of its own in the kernel too, so that its stack is
/// not that of new connections.
#[inline(never)]
fn refuse<C: Context, A: Network>(ctx: &C, packet: &Packet<A>, origin: Origin, reason: DropReason) -> u64 {
    let verdict = match reason {
        DropReason::NoFlow => reject::reset(ctx, packet, reason),
        _ => reject::port_unreachable(ctx, packet, origin, reason),
    };
    verdict.to_bits()
}

/// What a packet is that no flow knows.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Unknown {
    /// The first packet of a connection to a frontend.
    New,
    /// Mid-flow TCP or SCTP to a frontend.
    MidFlow,
    /// To a port that a service address does not have.
    NoSuchPort,
    /// To an address inside a ServiceCIDR that no Service has.
    Unallocated,
    /// To a Service, from an address that no single host can have.
    Martian,
    /// Not ours.
    Foreign,
}

/// Whether the configuration has a flag.
#[inline(always)]
fn is_set(flag: u32) -> bool {
    maps::config().is_some_and(|config| config.flags & flag != 0)
}

/// Whether an address that is no frontend's lies inside a ServiceCIDR.
#[inline(always)]
fn unallocated<A: Family>(address: A) -> bool {
    maps::config().is_some_and(|config| A::in_service_cidr(config, address))
}

/// A function of its own in the kernel too, for its stack.
#[inline(never)]
fn classify<A: Network>(packet: &Packet<A>) -> Unknown {
    match destination(packet) {
        Unknown::Foreign => Unknown::Foreign,
        _ if !packet.key.tuple.source.is_one_host() => Unknown::Martian,
        what => what,
    }
}

/// What a packet is by its destination and flags.
#[inline(always)]
fn destination<A: Network>(packet: &Packet<A>) -> Unknown {
    let key = &packet.key;
    let frontend = FrontendKey::new(key.tuple.destination, key.tuple.destination_port_be, key.protocol);
    // Only the flags are read, and the key decides those that matter here, so a torn value does no harm.
    // SAFETY: a map value stays readable while the program runs.
    let known = A::frontend(&frontend).map(|element| unsafe { (&raw const (*element).flags).read_volatile() });
    match known {
        Some(found) if found & frontend_flags::HOST_ONLY == 0 => {}
        _ if maps::mark(key.tuple.destination) & frontend_flags::WHOLE_ADDRESS != 0 => return Unknown::NoSuchPort,
        _ if unallocated(key.tuple.destination) => return Unknown::Unallocated,
        _ => return Unknown::Foreign,
    }
    if key.protocol != PROTOCOL_UDP && packet.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) != tcp::SYN {
        return Unknown::MidFlow;
    }
    Unknown::New
}

/// What a packet that can't be translated comes to, as a verdict's bits. It passes unless it goes, or may go, to a Service,
/// because the stack would forward it there; a ping of a service address with an endpoint is answered, since no one else
/// would. A function of its own in the kernel too, so that its stack is not the fast path's.
#[inline(never)]
fn aside<C: Context, A: Network>(ctx: &C, packet: &Packet<A>, kind: Kind) -> u64 {
    let tuple = &packet.key.tuple;
    let mark = maps::mark(tuple.destination);
    if kind == Kind::Echo && mark & frontend_flags::HAS_ENDPOINT != 0 && tuple.source.is_one_host() {
        return reject::echo(ctx, packet).to_bits();
    }
    let reason = match kind {
        Kind::Malformed | Kind::BadLength => DropReason::Malformed,
        Kind::Later => DropReason::Fragment,
        _ => DropReason::UnsupportedProtocol,
    };
    let service = match mark & !frontend_flags::HAS_ENDPOINT {
        0 => unallocated(tuple.destination),
        // Other protocols are not the Service's where only some ports are.
        frontend_flags::SERVICE_ADDRESS => reason != DropReason::UnsupportedProtocol,
        _ => true,
    };
    if service && kind != Kind::BadLength && !is_set(config_flags::LEAVING) {
        return Verdict::Drop(reason).to_bits();
    }
    if reason == DropReason::Malformed {
        observe::count(reason);
    }
    Verdict::Pass.to_bits()
}

#[inline(always)]
fn edge<C: Context>(ctx: &C, origin: Origin) -> u32 {
    match origin {
        Origin::Inside => ctx.ifindex(),
        Origin::Outside => EDGE_UPLINK,
    }
}
