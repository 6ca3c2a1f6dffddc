//! Sheave's kernel programs: entry points only. Each hands its packet to [`edge`] or [`socket`] and returns what that
//! says. Programs never return "accept": other people's programs on the same hook still run.
#![no_std]
#![no_main]

mod maps;

use aya_ebpf::bindings::{TC_ACT_UNSPEC, xdp_action};
use aya_ebpf::macros::{cgroup_sock_addr, classifier, xdp};
use aya_ebpf::programs::{SockAddrContext, TcContext, XdpContext};

macro_rules! tc {
    ($($name:ident => $function:expr;)+) => {
        $(
            #[classifier]
            pub fn $name(ctx: TcContext) -> i32 {
                $function(&ctx)
            }
        )+
    };
}

fn pass(_ctx: &TcContext) -> i32 {
    TC_ACT_UNSPEC
}

tc! {
    pod_ingress => pass;
    pod_egress => pass;
    uplink_ingress => pass;
    uplink_egress => pass;
    uplink_ingress_l3 => pass;
    uplink_egress_l3 => pass;
}

#[xdp]
pub fn uplink_xdp(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

macro_rules! sock_addr {
    ($($name:ident $attach:ident => $function:expr;)+) => {
        $(
            #[cgroup_sock_addr($attach)]
            pub fn $name(ctx: SockAddrContext) -> i32 {
                $function(&ctx)
            }
        )+
    };
}

fn allow(_ctx: &SockAddrContext) -> i32 {
    1
}

sock_addr! {
    sock_connect4 connect4 => allow;
    sock_sendmsg4 sendmsg4 => allow;
    sock_recvmsg4 recvmsg4 => allow;
    sock_getpeername4 getpeername4 => allow;
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // SAFETY: the verifier refuses a program from which this can be reached.
    unsafe { core::hint::unreachable_unchecked() }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
