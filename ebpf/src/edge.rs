//! The four lines of "the one idea", for XDP and tc alike: parse, look up, decide, apply.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::TC_ACT_SHOT;
use sheave_common::config::flags as config_flags;
use sheave_common::flow::{EDGE_UPLINK, Flow, flags};
use sheave_common::frontend::{FrontendKey, flags as frontend_flags};
use sheave_common::{DropReason, Ipv4Address, PROTOCOL_TCP};

use crate::balance::Origin;
use crate::context::{Addressee, Context};
use crate::maps::{self, Family};
use crate::packet::transport::flags as tcp;
use crate::packet::{Kind, Packet, ipv4};
use crate::{conntrack, create, features, forward, icmp, observe, reject, translate};

/// What becomes of a packet.
#[derive(Clone, Copy)]
pub enum Verdict {
    /// Other programs and the stack go on with it, translated or not.
    Pass,
    /// It ends here, and is counted.
    Drop(DropReason),
    /// The action that a helper returned (redirects).
    Action(i32),
    /// XDP only: out of the interface that it came in by.
    Transmit,
}

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

/// A packet that enters from a pod, or from an uplink or tunnel.
#[inline(always)]
pub fn ingress<C: Context>(ctx: &C, network: u32, origin: Origin) -> Verdict {
    let mut packet = Packet::blank();
    let verdict = enter(ctx, network, origin, &mut packet);
    observe::decision(ctx, &packet, verdict);
    verdict
}

#[inline(always)]
fn enter<C: Context>(ctx: &C, network: u32, origin: Origin, packet: &mut Packet<Ipv4Address>) -> Verdict {
    match ctx.addressee() {
        Addressee::Us => {}
        // A pod's veth may be a bridge port, and its frames go to the bridge.
        Addressee::AnotherHost if origin == Origin::Inside => {}
        _ => return Verdict::Pass,
    }
    match ipv4::parse(ctx, network, edge(ctx, origin), packet) {
        Kind::Transport => {}
        _ if C::XDP => return Verdict::Pass,
        Kind::NotOurs => return Verdict::Pass,
        Kind::Malformed => return malformed(packet),
        Kind::IcmpError => {
            return icmp::error(ctx, packet, Direction::Ingress)
                .unwrap_or_else(|| unsupported(packet, DropReason::UnsupportedProtocol));
        }
        Kind::Fragment => return unsupported(packet, DropReason::Fragment),
        Kind::Other => return unsupported(packet, DropReason::UnsupportedProtocol),
    }
    let now = features::now();
    let flow = match conntrack::find(packet, Direction::Ingress, now) {
        Some(flow) => flow,
        None => {
            let mut flow = MaybeUninit::uninit();
            match miss(ctx, packet, origin, now, &mut flow) {
                // SAFETY: `miss` fills it whenever it says so.
                CREATED => unsafe { flow.assume_init() },
                verdict => return Verdict::from_bits(verdict),
            }
        }
    };
    apply(ctx, packet, &flow)
}

/// A packet that leaves to a pod, or by an uplink or tunnel. Frontends are never looked at, flows never made.
#[inline(always)]
pub fn egress<C: Context>(ctx: &C, network: u32, origin: Origin) -> Verdict {
    let mut packet = Packet::blank();
    let verdict = leave(ctx, network, origin, &mut packet);
    observe::decision(ctx, &packet, verdict);
    verdict
}

#[inline(always)]
fn leave<C: Context>(ctx: &C, network: u32, origin: Origin, packet: &mut Packet<Ipv4Address>) -> Verdict {
    match ipv4::parse(ctx, network, edge(ctx, origin), packet) {
        Kind::Transport => {}
        Kind::IcmpError => return icmp::error(ctx, packet, Direction::Egress).unwrap_or(Verdict::Pass),
        _ => return Verdict::Pass,
    }
    conntrack::find(packet, Direction::Egress, features::now()).map_or(Verdict::Pass, |flow| apply(ctx, packet, &flow))
}

/// Translates a packet of a known flow and sends it on its way.
#[inline(always)]
fn apply<C: Context>(ctx: &C, packet: &Packet<Ipv4Address>, flow: &Flow<Ipv4Address>) -> Verdict {
    if flow.flags & flags::REDIRECT != 0 {
        return forward::by_route(ctx, packet, flow);
    }
    if C::XDP {
        return Verdict::Pass;
    }
    if translate::rewrite(ctx, packet, &flow.rewrite, false).is_none() {
        return Verdict::Drop(DropReason::RewriteFailed);
    }
    observe::packet(flow.service_id, packet.length);
    if flow.flags & flags::HAIRPIN != 0 { forward::back(ctx, packet) } else { Verdict::Pass }
}

/// What a packet that no flow knows comes to, as a verdict's bits or [`CREATED`]: a new connection if it goes to a frontend,
/// nothing to do with us otherwise. A function of its own in the kernel too, so that its stack is not the fast path's.
#[inline(never)]
fn miss<C: Context>(
    ctx: &C,
    packet: &Packet<Ipv4Address>,
    origin: Origin,
    now: u32,
    flow: &mut MaybeUninit<Flow<Ipv4Address>>,
) -> u64 {
    let verdict = match classify(packet) {
        Unknown::Foreign => Verdict::Pass,
        _ if !packet.key.tuple.source.is_one_host() => {
            if C::XDP {
                Verdict::Pass
            } else {
                Verdict::Drop(DropReason::MartianSource)
            }
        }
        Unknown::New => match create::flow(ctx, packet, origin, now, flow) {
            Ok(()) => return CREATED,
            Err(_) if C::XDP => Verdict::Pass,
            Err(DropReason::NoEndpoint) => reject::port_unreachable(ctx, packet, DropReason::NoEndpoint),
            Err(reason) => Verdict::Drop(reason),
        },
        _ if C::XDP => Verdict::Pass,
        Unknown::Unallocated => Verdict::Drop(DropReason::Unallocated),
        Unknown::NoSuchPort => reject::port_unreachable(ctx, packet, DropReason::UnknownPort),
        Unknown::MidFlow if draining() => Verdict::Pass,
        Unknown::MidFlow => reject::reset(ctx, packet, DropReason::NoFlow),
    };
    verdict.to_bits()
}

/// What a packet is that no flow knows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unknown {
    /// The first packet of a connection to a frontend.
    New,
    /// Mid-flow TCP to a frontend.
    MidFlow,
    /// To a port that a service address does not have.
    NoSuchPort,
    /// To an address inside a ServiceCIDR that no Service has.
    Unallocated,
    /// Not ours.
    Foreign,
}

/// Whether connections of another proxy are draining.
#[inline(always)]
fn draining() -> bool {
    maps::config().is_some_and(|config| config.flags & config_flags::DRAIN_FOREIGN != 0)
}

/// Whether an address that is no frontend's lies inside a ServiceCIDR.
#[inline(always)]
fn unallocated<A: Family>(address: A) -> bool {
    maps::config().is_some_and(|config| A::in_service_cidr(config, address))
}

#[inline(always)]
fn classify(packet: &Packet<Ipv4Address>) -> Unknown {
    let key = &packet.key;
    let frontend = FrontendKey::new(key.tuple.destination, key.tuple.destination_port_be, key.protocol);
    // Only the flags are read, and the key decides those that matter here, so a torn value does no harm.
    // SAFETY: a map value stays readable while the program runs.
    let known =
        Ipv4Address::frontend(&frontend).map(|element| unsafe { (&raw const (*element).flags).read_volatile() });
    match known {
        Some(found) if found & frontend_flags::HOST_ONLY == 0 => {}
        _ if maps::mark(key.tuple.destination) & frontend_flags::WHOLE_ADDRESS != 0 => return Unknown::NoSuchPort,
        _ if unallocated(key.tuple.destination) => return Unknown::Unallocated,
        _ => return Unknown::Foreign,
    }
    if key.protocol == PROTOCOL_TCP && packet.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) != tcp::SYN {
        return Unknown::MidFlow;
    }
    Unknown::New
}

/// A packet that can't be translated: it passes unless it goes, or may go, to a Service.
#[inline(always)]
fn unsupported(packet: &Packet<Ipv4Address>, reason: DropReason) -> Verdict {
    let tuple = &packet.key.tuple;
    let marked = match maps::mark(tuple.destination) {
        0 => unallocated(tuple.destination),
        // Other protocols are not the Service's where only some ports are.
        frontend_flags::SERVICE_ADDRESS => reason == DropReason::Fragment,
        _ => true,
    };
    let port = || {
        let key = FrontendKey::new(tuple.destination, tuple.destination_port_be, packet.key.protocol);
        Ipv4Address::frontend(&key).is_some()
    };
    if marked || (tuple.destination_port_be != 0 && port()) { Verdict::Drop(reason) } else { Verdict::Pass }
}

/// Passed untouched, and counted; but dropped where it may go to a Service, because the stack would forward it.
#[inline(always)]
fn malformed(packet: &Packet<Ipv4Address>) -> Verdict {
    if maps::mark(packet.key.tuple.destination) != 0 {
        return Verdict::Drop(DropReason::Malformed);
    }
    observe::count(DropReason::Malformed);
    Verdict::Pass
}

#[inline(always)]
fn edge<C: Context>(ctx: &C, origin: Origin) -> u32 {
    match origin {
        Origin::Inside => ctx.ifindex(),
        Origin::Outside => EDGE_UPLINK,
    }
}

/// How a verdict crosses a call between programs' functions, which return one register.
const PASS: u64 = 0;
const TRANSMIT: u64 = 1 << 32;
const ACTION: u64 = 2 << 32;
const DROP: u64 = 3 << 32;
/// Not a verdict: a flow was made, and is to be applied.
const CREATED: u64 = 4 << 32;

impl Verdict {
    /// As one register.
    #[inline(always)]
    pub fn to_bits(self) -> u64 {
        match self {
            Self::Pass => PASS,
            Self::Transmit => TRANSMIT,
            Self::Action(action) => ACTION | u64::from(action as u32),
            Self::Drop(reason) => DROP | reason as u64,
        }
    }

    /// From [`Self::to_bits`].
    #[inline(always)]
    pub fn from_bits(bits: u64) -> Self {
        match bits & !0xffff_ffff {
            PASS => Self::Pass,
            TRANSMIT => Self::Transmit,
            ACTION => Self::Action(bits as i32),
            // SAFETY: `to_bits` put a reason there.
            _ => Self::Drop(unsafe { core::mem::transmute::<u32, DropReason>(bits as u32) }),
        }
    }

    /// The tc action. "Pass" means the next program, never "accept".
    #[inline(always)]
    pub fn tc_action(self) -> i32 {
        match self {
            Self::Pass | Self::Transmit => aya_ebpf::bindings::TC_ACT_UNSPEC,
            Self::Action(action) => action,
            Self::Drop(reason) => {
                observe::count(reason);
                TC_ACT_SHOT
            }
        }
    }

    /// The XDP action.
    #[inline(always)]
    pub fn xdp_action(self) -> u32 {
        use aya_ebpf::bindings::xdp_action;
        match self {
            Self::Pass => xdp_action::XDP_PASS,
            Self::Transmit => xdp_action::XDP_TX,
            Self::Action(action) => action as u32,
            Self::Drop(reason) => {
                observe::count(reason);
                xdp_action::XDP_DROP
            }
        }
    }
}
