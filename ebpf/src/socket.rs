//! Connect-time balancing: a process's socket is pointed at a backend before a packet exists, so that the host pays
//! nothing per packet.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval};
use aya_ebpf::programs::SockAddrContext;
use sheave_common::config::{Config, flags as config_flags};
use sheave_common::frontend::FrontendKey;
use sheave_common::socket::{SocketKey, SocketPeer};
use sheave_common::{DropReason, Ipv4Address, PROTOCOL_TCP, PROTOCOL_UDP};

use crate::balance::{self, Origin};
use crate::maps::{self, Family as _};
use crate::{features, observe, versioned};

/// The program's answer: go on.
const ALLOW: i32 = 1;
/// The program's answer: the call fails.
const REFUSE: i32 = 0;
/// ECONNREFUSED
const CONNECTION_REFUSED: i32 = 111;

/// What a call is about.
struct Call<'a> {
    ctx: &'a SockAddrContext,
    config: &'static Config,
    protocol: u8,
    address: Ipv4Address,
    port_be: u16,
    cookie: u64,
    /// The process is in the host's network namespace.
    host: bool,
}

/// connect()
#[inline(always)]
pub fn connect4(ctx: &SockAddrContext) -> i32 {
    call(ctx).map_or(ALLOW, |call| balance(&call, false))
}

/// sendto() or sendmsg() with an address, on a UDP socket that is not connected.
#[inline(always)]
pub fn sendmsg4(ctx: &SockAddrContext) -> i32 {
    call(ctx).map_or(ALLOW, |call| balance(&call, true))
}

/// recvmsg() and getpeername(): shows the frontend that the process asked for, not the backend.
#[inline(always)]
pub fn show_frontend4(ctx: &SockAddrContext) -> i32 {
    let Some(call) = call(ctx) else { return ALLOW };
    let key = SocketKey::new(call.cookie, call.address, call.port_be, call.protocol);
    if let Some(peer) = Ipv4Address::socket_frontend(&key) {
        // SAFETY: a map value stays readable while the program runs.
        let peer = unsafe { maps::copy(peer) };
        set(ctx, peer.address, peer.port_be);
    }
    ALLOW
}

/// The call, if its process is one that is balanced.
#[inline(always)]
fn call(ctx: &SockAddrContext) -> Option<Call<'_>> {
    let config = maps::config()?;
    let raw: *mut bpf_sock_addr = ctx.sock_addr;
    // SAFETY: the kernel's context is valid while the program runs.
    let (protocol, address, port) = unsafe { ((*raw).protocol as u8, (*raw).user_ip4, (*raw).user_port) };
    if protocol != PROTOCOL_TCP && protocol != PROTOCOL_UDP {
        return None;
    }
    let host = in_host(ctx, config);
    let every = config.flags & config_flags::CONNECT_ALL != 0
        || (config.flags & config_flags::CONNECT_TCP != 0 && protocol == PROTOCOL_TCP);
    if !(host && config.flags & config_flags::CONNECT_HOST != 0) && !every {
        return None;
    }
    // SAFETY: the context is the program's own.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr().cast()) };
    Some(Call {
        ctx,
        config,
        protocol,
        address: Ipv4Address::from_be_word(address),
        port_be: port as u16,
        cookie,
        host,
    })
}

/// Whether the calling socket is in the host's network namespace.
#[inline(always)]
fn in_host(ctx: &SockAddrContext, config: &Config) -> bool {
    // SAFETY: the context is the program's own; without one the helper answers for the initial namespace.
    unsafe {
        let own = bpf_get_netns_cookie(ctx.as_ptr().cast());
        let host = if config.flags & config_flags::CONNECT_INIT_NETNS != 0 {
            bpf_get_netns_cookie(core::ptr::null_mut())
        } else {
            config.host_netns_cookie
        };
        own == host
    }
}

/// Points the call at a backend, if it goes to a frontend.
#[inline(always)]
fn balance(call: &Call<'_>, unconnected: bool) -> i32 {
    let key = FrontendKey::new(call.address, call.port_be, call.protocol);
    let Some(element) = Ipv4Address::frontend(&key) else {
        if maps::mark(call.address) & sheave_common::frontend::flags::WHOLE_ADDRESS != 0 {
            return refuse(DropReason::UnknownPort);
        }
        return ALLOW;
    };
    // SAFETY: a map value stays readable while the program runs; the key decides this flag.
    let flags = unsafe { (&raw const (*element).flags).read_volatile() };
    if flags & sheave_common::frontend::flags::HOST_ONLY != 0 && !call.host {
        return ALLOW;
    }
    let forward = SocketKey::new(call.cookie, call.address, call.port_be, call.protocol);
    if unconnected && let Some(known) = Ipv4Address::socket_backend(&forward) {
        // SAFETY: as above.
        let known = unsafe { maps::copy(known) };
        if Ipv4Address::backend(known.backend_id).is_some() && versioned::serves(&key, known.service_id) {
            return point(call, &known);
        }
    }
    let client = Ipv4Address::node(call.config);
    let choice = match balance::choose(&key, Origin::Inside, &client, features::now()) {
        Ok(choice) => choice,
        Err(DropReason::NoEndpoint) => return refuse(DropReason::NoEndpoint),
        Err(reason) => {
            observe::count(reason);
            return REFUSE;
        }
    };
    let backend = &choice.backend;
    if bound_to_loopback(call.ctx) && backend.address.octets[0] != 127 {
        observe::count(DropReason::LoopbackSource);
        return ALLOW;
    }
    let peer = SocketPeer {
        address: backend.address,
        port_be: backend.port_be,
        reserved: 0,
        service_id: backend.service_id,
        backend_id: choice.id,
    };
    if unconnected {
        // Without it, the socket's next datagram is a fresh choice.
        let _ = Ipv4Address::insert_socket_backend(&forward, &peer);
    }
    observe::connection(backend.service_id);
    point(call, &peer)
}

/// Points the call at a backend, and sees to it that the backend's answers come from the frontend that was called last:
/// the socket may have reached the same backend through another one, or an LRU map may have forgotten.
#[inline(always)]
fn point(call: &Call<'_>, backend: &SocketPeer<Ipv4Address>) -> i32 {
    let reverse = SocketKey::new(call.cookie, backend.address, backend.port_be, call.protocol);
    let shown = Ipv4Address::socket_frontend(&reverse).is_some_and(|peer| {
        // SAFETY: a map value stays readable while the program runs.
        let peer = unsafe { maps::copy(peer) };
        peer.address == call.address && peer.port_be == call.port_be
    });
    if !shown {
        let frontend = SocketPeer { address: call.address, port_be: call.port_be, ..*backend };
        let remembered = Ipv4Address::insert_socket_frontend(&reverse, &frontend);
        if remembered.is_err() && call.protocol == PROTOCOL_UDP {
            // Without it, the process would see answers from an address that it never asked.
            observe::count(DropReason::ConntrackFull);
            return REFUSE;
        }
    }
    set(call.ctx, backend.address, backend.port_be);
    ALLOW
}

/// The call fails as if the peer had refused.
#[inline(always)]
fn refuse(reason: DropReason) -> i32 {
    observe::count(reason);
    if features::has(features::SET_RETVAL) {
        // SAFETY: the helper takes a scalar only.
        unsafe { bpf_set_retval(-CONNECTION_REFUSED) };
    }
    REFUSE
}

/// Whether the socket was bound to a loopback address: from there no other host can be reached.
#[inline(always)]
fn bound_to_loopback(ctx: &SockAddrContext) -> bool {
    // SAFETY: the kernel's context is valid while the program runs, and its socket is there after the null check.
    unsafe {
        let socket = (*ctx.sock_addr).__bindgen_anon_1.sk;
        !socket.is_null() && Ipv4Address::from_be_word((*socket).src_ip4).octets[0] == 127
    }
}

/// Replaces the call's address.
#[inline(always)]
fn set(ctx: &SockAddrContext, address: Ipv4Address, port_be: u16) {
    // SAFETY: the kernel's context is valid while the program runs, and allows whole-word writes to these fields.
    unsafe {
        (*ctx.sock_addr).user_ip4 = address.be_word();
        (*ctx.sock_addr).user_port = u32::from(port_be);
    }
}
