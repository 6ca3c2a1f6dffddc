//! Sheave's kernel programs: entry points only. Each hands its packet to [`edge`] or [`socket`] and returns what that
//! says. Programs never return "accept": other people's programs on the same hook still run.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![expect(unreachable_pub, reason = "a program has no API; `pub` marks what its modules share")]
#![expect(missing_docs, reason = "the entry points are made by macros, which drop their documentation")]

mod affinity;
mod atomic;
mod balance;
mod bypass;
mod conntrack;
mod context;
mod create;
mod edge;
mod event;
mod failover;
mod features;
mod filter;
mod forward;
mod fragment;
mod icmp;
mod load;
mod maps;
mod observe;
mod own;
mod packet;
mod reject;
mod route;
mod scratch;
mod socket;
mod translate;
mod verdict;
mod versioned;

use aya_ebpf::macros::{cgroup_sock_addr, classifier, xdp};
use aya_ebpf::programs::{SockAddrContext, TcContext, XdpContext};
use sheave_common::{Ipv4Address, Ipv6Address};

use crate::balance::Origin;
use crate::context::Skb;
use crate::packet::ethernet;
use crate::verdict::Verdict;

/// EtherTypes in the width of `__sk_buff::protocol`.
const PROTOCOL_IPV4: u32 = ethernet::TYPE_IPV4_BE as u32;
const PROTOCOL_IPV6: u32 = ethernet::TYPE_IPV6_BE as u32;
/// Offset of the network header on devices without a link-layer header.
const NO_HEADER: u32 = 0;

/// tc entry points: name => function of `edge`, offset of the network header, origin.
macro_rules! tc {
    ($($name:ident => $function:ident($network:expr, $origin:expr);)+) => {
        $(
            #[classifier]
            pub fn $name(ctx: TcContext) -> i32 {
                // SAFETY: the kernel's context is valid while the program runs.
                let (protocol, tagged) = unsafe { ((*ctx.skb.skb).protocol, (*ctx.skb.skb).vlan_present) };
                let verdict = match protocol {
                    // A VLAN's packets meet the programs of the VLAN's own device.
                    _ if tagged != 0 => return aya_ebpf::bindings::TC_ACT_UNSPEC,
                    PROTOCOL_IPV4 => edge::$function::<_, Ipv4Address>(&Skb::<{ $network }>(ctx), $origin),
                    PROTOCOL_IPV6 => edge::$function::<_, Ipv6Address>(&Skb::<{ $network }>(ctx), $origin),
                    _ => return aya_ebpf::bindings::TC_ACT_UNSPEC,
                };
                Verdict::from_bits(verdict).tc_action()
            }
        )+
    };
}

tc! {
    pod_ingress => ingress(ethernet::LENGTH, Origin::Inside);
    pod_egress => egress(ethernet::LENGTH, Origin::Inside);
    uplink_ingress => ingress(ethernet::LENGTH, Origin::Outside);
    uplink_egress => egress(ethernet::LENGTH, Origin::Outside);
    uplink_ingress_l3 => ingress(NO_HEADER, Origin::Outside);
    uplink_egress_l3 => egress(NO_HEADER, Origin::Outside);
}

#[xdp(frags)]
pub fn uplink_xdp(ctx: XdpContext) -> u32 {
    let Some(header) = context::Context::load::<ethernet::Header>(&ctx, 0) else {
        return aya_ebpf::bindings::xdp_action::XDP_PASS;
    };
    let verdict = match header.ether_type_be {
        ethernet::TYPE_IPV4_BE => edge::ingress::<_, Ipv4Address>(&ctx, Origin::Outside),
        ethernet::TYPE_IPV6_BE => edge::ingress::<_, Ipv6Address>(&ctx, Origin::Outside),
        _ => return aya_ebpf::bindings::xdp_action::XDP_PASS,
    };
    Verdict::from_bits(verdict).xdp_action()
}

/// cgroup entry points: name, hook => function of `socket`.
macro_rules! sock_addr {
    ($($name:ident $hook:ident => $function:ident;)+) => {
        $(
            #[cgroup_sock_addr($hook)]
            pub fn $name(ctx: SockAddrContext) -> i32 {
                socket::$function(&ctx)
            }
        )+
    };
}

sock_addr! {
    sock_connect4 connect4 => connect4;
    sock_sendmsg4 sendmsg4 => sendmsg4;
    sock_recvmsg4 recvmsg4 => show_frontend4;
    sock_getpeername4 getpeername4 => show_frontend4;
    sock_connect6 connect6 => connect6;
    sock_sendmsg6 sendmsg6 => sendmsg6;
    sock_recvmsg6 recvmsg6 => show_frontend6;
    sock_getpeername6 getpeername6 => show_frontend6;
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // SAFETY: the verifier refuses a program from which this can be reached.
    unsafe { core::hint::unreachable_unchecked() }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
