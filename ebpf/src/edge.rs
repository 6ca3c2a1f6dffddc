//! The four lines of "the one idea", for XDP and tc alike: parse, look up, decide, apply.

use aya_ebpf::bindings::TC_ACT_SHOT;
use sheave_common::config::{Config, flags as config_flags};
use sheave_common::flow::{EDGE_UPLINK, Flow, FlowKey, Tuple, flags};
use sheave_common::frontend::{FrontendKey, flags as frontend_flags};
use sheave_common::{Address as _, DropReason, Ipv4Address, PROTOCOL_TCP};

use crate::balance::Origin;
use crate::context::Context;
use crate::maps::{self, Family as _};
use crate::packet::transport::flags as tcp;
use crate::packet::{Kind, Packet, ipv4};
use crate::{conntrack, create, features, forward, icmp, observe, reject, translate};

/// What becomes of a packet.
#[derive(Clone, Copy)]
pub enum Verdict {
    /// Other programs and the stack go on with it, translated or not.
    Pass,
    /// It ends here.
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
    let mut packet = blank();
    match ipv4::parse(ctx, network, edge(ctx, origin), &mut packet) {
        Kind::Transport => {}
        _ if C::XDP => return Verdict::Pass,
        Kind::NotOurs => return Verdict::Pass,
        Kind::Malformed => return malformed(),
        Kind::IcmpError => {
            return match icmp::error(ctx, &packet, Direction::Ingress) {
                Verdict::Pass => unsupported(&packet, DropReason::UnsupportedProtocol),
                verdict => verdict,
            };
        }
        Kind::Fragment => return unsupported(&packet, DropReason::Fragment),
        Kind::Other => return unsupported(&packet, DropReason::UnsupportedProtocol),
    }
    let Some(config) = maps::config() else { return Verdict::Pass };
    let now = features::now();
    if let Some(flow) = conntrack::find(&packet, now, config) {
        return if Direction::Ingress.applies(flow.flags) { apply(ctx, &packet, &flow) } else { Verdict::Pass };
    }
    miss(ctx, &packet, origin, now, config)
}

/// A packet that leaves to a pod, or by an uplink or tunnel. Frontends are never looked at, flows never made.
#[inline(always)]
pub fn egress<C: Context>(ctx: &C, network: u32, origin: Origin) -> Verdict {
    let mut packet = blank();
    match ipv4::parse(ctx, network, edge(ctx, origin), &mut packet) {
        Kind::Transport => {}
        Kind::IcmpError => return icmp::error(ctx, &packet, Direction::Egress),
        _ => return Verdict::Pass,
    }
    let Some(config) = maps::config() else { return Verdict::Pass };
    match conntrack::find(&packet, features::now(), config) {
        Some(flow) if Direction::Egress.applies(flow.flags) => apply(ctx, &packet, &flow),
        _ => Verdict::Pass,
    }
}

/// Translates a packet of a known flow and sends it on its way.
#[inline(always)]
fn apply<C: Context>(ctx: &C, packet: &Packet<Ipv4Address>, flow: &Flow<Ipv4Address>) -> Verdict {
    if flow.flags & flags::REDIRECT != 0 {
        let verdict = forward::by_route(ctx, packet, flow);
        if matches!(verdict, Verdict::Action(_) | Verdict::Transmit) {
            observe::packet(flow.service_id, packet.length);
        }
        return verdict;
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

/// A packet that no flow knows: a new connection if it goes to a frontend, nothing to do with us otherwise.
#[inline(always)]
fn miss<C: Context>(ctx: &C, packet: &Packet<Ipv4Address>, origin: Origin, now: u32, config: &Config) -> Verdict {
    let key = &packet.key;
    let frontend = FrontendKey::new(key.tuple.destination, key.tuple.destination_port_be, key.protocol);
    // Only the flags are read, and the key decides those that matter here, so a torn value does no harm.
    // SAFETY: a map value stays readable while the program runs.
    let known =
        Ipv4Address::frontend(&frontend).map(|element| unsafe { (&raw const (*element).flags).read_volatile() });
    match known {
        Some(found) if found & frontend_flags::HOST_ONLY == 0 => {}
        _ => {
            if C::XDP || Ipv4Address::frontend(&FrontendKey::whole_address(key.tuple.destination)).is_none() {
                return Verdict::Pass;
            }
            return reject::port_unreachable(ctx, packet, DropReason::UnknownPort);
        }
    }
    if key.protocol == PROTOCOL_TCP && packet.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) != tcp::SYN {
        if C::XDP || config.flags & config_flags::DRAIN_FOREIGN != 0 {
            return Verdict::Pass;
        }
        return reject::reset(ctx, packet, DropReason::NoFlow);
    }
    match create::flow(ctx, packet, origin, now, config) {
        Ok(flow) => apply(ctx, packet, &flow),
        Err(_) if C::XDP => Verdict::Pass,
        Err(DropReason::NoEndpoint) => reject::port_unreachable(ctx, packet, DropReason::NoEndpoint),
        Err(reason) => Verdict::Drop(reason),
    }
}

/// A packet that can't be translated: it passes unless it goes to an address that is a Service's as a whole.
#[inline(always)]
fn unsupported(packet: &Packet<Ipv4Address>, reason: DropReason) -> Verdict {
    let tuple = &packet.key.tuple;
    let whole = Ipv4Address::frontend(&FrontendKey::whole_address(tuple.destination)).is_some();
    let port = || {
        let key = FrontendKey::new(tuple.destination, tuple.destination_port_be, packet.key.protocol);
        Ipv4Address::frontend(&key).is_some()
    };
    if whole || (tuple.destination_port_be != 0 && port()) { Verdict::Drop(reason) } else { Verdict::Pass }
}

/// Passed untouched, and counted.
#[inline(always)]
fn malformed() -> Verdict {
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

#[inline(always)]
fn blank() -> Packet<Ipv4Address> {
    let none = Ipv4Address::UNSPECIFIED;
    let tuple = Tuple { source: none, destination: none, source_port_be: 0, destination_port_be: 0 };
    Packet { key: FlowKey::new(tuple, 0, 0), network: 0, transport: 0, length: 0, ttl: 0, tcp_flags: 0 }
}

impl Verdict {
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
