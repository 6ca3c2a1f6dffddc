//! Connect-time balancing: a process's socket is pointed at a backend before a packet exists, so that the host pays
//! nothing per packet.
//!
//! The hooks of AF_INET6 sockets see IPv4 too, as IPv4-mapped addresses (::ffff:a.b.c.d): those go by IPv4's frontends and
//! maps, and are shown as mapped addresses again. Datagrams to a mapped address come to the IPv4 hook instead.

mod address;

use core::marker::PhantomData;
use core::mem::MaybeUninit;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval};
use aya_ebpf::programs::SockAddrContext;
use sheave_common::backend::flags as backend_flags;
use sheave_common::config::{Config, flags as config_flags};
use sheave_common::frontend::{FrontendKey, flags};
use sheave_common::socket::{SocketKey, SocketPeer};
use sheave_common::{DropReason, PROTOCOL_TCP, PROTOCOL_UDP};

use self::address::{Called6, Form, Ipv4, Ipv6, Mapped, SocketFamily as _};
use crate::balance::{self, Choice};
use crate::maps::{self, Family as _};
use crate::{event, features, load, observe, versioned};

/// The program's answer: go on.
const ALLOW: i32 = 1;
/// The program's answer: the call fails.
const REFUSE: i32 = 0;
/// ECONNREFUSED
const CONNECTION_REFUSED: i32 = 111;

/// What a process asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Request {
    /// connect()
    Connect,
    /// sendto() or sendmsg() with an address, on a UDP socket.
    Send,
}

/// What a call is about.
struct Call<'a, F: Form> {
    ctx: &'a SockAddrContext,
    config: &'static Config,
    address: F::Address,
    port_be: u16,
    protocol: u8,
    /// The process is in the host's network namespace.
    host: bool,
    cookie: u64,
    /// Cookie of the process's network namespace.
    namespace: u64,
    form: PhantomData<F>,
}

impl<F: Form> Call<'_, F> {
    /// The socket together with the address that the call names.
    #[inline(always)]
    fn key(&self) -> SocketKey<F::Address> {
        SocketKey::new(self.cookie, self.address, self.port_be, self.protocol)
    }
}

/// connect() of an AF_INET socket, or of an AF_INET6 socket to an AF_INET address.
#[inline(always)]
pub fn connect4(ctx: &SockAddrContext) -> i32 {
    request::<Ipv4>(ctx, address::called4(ctx), Request::Connect)
}

/// connect() of an AF_INET6 socket.
#[inline(always)]
pub fn connect6(ctx: &SockAddrContext) -> i32 {
    match address::called6(ctx) {
        Called6::Plain(address) => request::<Ipv6>(ctx, address, Request::Connect),
        Called6::Mapped(address) => request::<Mapped>(ctx, address, Request::Connect),
    }
}

/// A datagram to an IPv4 address, mapped or not, by a socket that need not be connected.
#[inline(always)]
pub fn sendmsg4(ctx: &SockAddrContext) -> i32 {
    request::<Ipv4>(ctx, address::called4(ctx), Request::Send)
}

/// A datagram to an IPv6 address.
#[inline(always)]
pub fn sendmsg6(ctx: &SockAddrContext) -> i32 {
    match address::called6(ctx) {
        Called6::Plain(address) => request::<Ipv6>(ctx, address, Request::Send),
        Called6::Mapped(_) => ALLOW,
    }
}

/// recvmsg() and getpeername() of an AF_INET socket: shows the frontend that the process asked for, not the backend.
#[inline(always)]
pub fn show_frontend4(ctx: &SockAddrContext) -> i32 {
    show::<Ipv4>(ctx, address::called4(ctx));
    ALLOW
}

/// The same of an AF_INET6 socket.
#[inline(always)]
pub fn show_frontend6(ctx: &SockAddrContext) -> i32 {
    match address::called6(ctx) {
        Called6::Plain(address) => show::<Ipv6>(ctx, address),
        Called6::Mapped(address) => show::<Mapped>(ctx, address),
    }
    ALLOW
}

#[inline(always)]
fn request<F: Form>(ctx: &SockAddrContext, address: F::Address, request: Request) -> i32 {
    let Some(call) = call::<F>(ctx, address) else { return ALLOW };
    match request {
        Request::Connect => balance(&call, request),
        Request::Send => match to_peer(&call) {
            Some(answer) => answer,
            None => balance(&call, request),
        },
    }
}

#[inline(always)]
fn show<F: Form>(ctx: &SockAddrContext, address: F::Address) {
    let Some(call) = call::<F>(ctx, address) else { return };
    if let Some(peer) = F::Address::socket_frontend(&call.key()) {
        // SAFETY: a map value stays readable while the program runs.
        let peer = unsafe { maps::copy(peer) };
        F::set(ctx, peer.address);
        address::set_port(ctx, peer.port_be);
    }
}

/// The call, if its process is one that is balanced.
#[inline(always)]
fn call<F: Form>(ctx: &SockAddrContext, address: F::Address) -> Option<Call<'_, F>> {
    let config = maps::config()?;
    // SAFETY: the kernel's context is valid while the program runs.
    let (protocol, port) = unsafe { ((*ctx.sock_addr).protocol as u8, (*ctx.sock_addr).user_port) };
    if protocol != PROTOCOL_TCP && protocol != PROTOCOL_UDP {
        return None;
    }
    // SAFETY: the context is the program's own.
    let namespace = unsafe { bpf_get_netns_cookie(ctx.as_ptr().cast()) };
    let host = namespace == host_namespace(config);
    let every = config.flags & config_flags::CONNECT_ALL != 0
        || (config.flags & config_flags::CONNECT_TCP != 0 && protocol == PROTOCOL_TCP);
    if !(host && config.flags & config_flags::CONNECT_HOST != 0) && !every {
        return None;
    }
    // SAFETY: the context is the program's own.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr().cast()) };
    Some(Call { ctx, config, address, port_be: port as u16, protocol, host, cookie, namespace, form: PhantomData })
}

/// The cookie of the host's network namespace.
#[inline(always)]
fn host_namespace(config: &Config) -> u64 {
    if config.flags & config_flags::CONNECT_INIT_NETNS != 0 {
        // SAFETY: without a context the helper answers for the initial namespace.
        unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) }
    } else {
        config.host_netns_cookie
    }
}

/// A connected socket that names an address nevertheless: its own peer, as the kernel itself does for IPv4-mapped ones, or
/// the frontend that its peer stands for. It hears nobody but that peer, so this is no new choice.
#[inline(always)]
fn to_peer<F: Form>(call: &Call<'_, F>) -> Option<i32> {
    let (address, port_be) = F::Address::peer(call.ctx)?;
    if address == call.address && port_be == call.port_be {
        return Some(ALLOW);
    }
    let key = SocketKey::new(call.cookie, address, port_be, call.protocol);
    // SAFETY: a map value stays readable while the program runs.
    let frontend = unsafe { maps::copy(F::Address::socket_frontend(&key)?) };
    if frontend.address != call.address || frontend.port_be != call.port_be {
        return None;
    }
    F::set(call.ctx, address);
    address::set_port(call.ctx, port_be);
    Some(ALLOW)
}

/// Points the call at a backend, if it goes to a frontend.
///
/// A function of its own in the kernel too, and so is what it calls: together they need more than a program's stack.
#[inline(never)]
fn balance<F: Form>(call: &Call<'_, F>, request: Request) -> i32 {
    let key = FrontendKey::new(call.address, call.port_be, call.protocol);
    if call.config.flags & config_flags::LEAVING != 0 {
        if request == Request::Connect || !keep(call, &key) {
            forget(call, request);
        }
        return ALLOW;
    }
    let Some(element) = F::Address::frontend(&key) else {
        if maps::mark(call.address) & flags::WHOLE_ADDRESS != 0 {
            return refuse(call, DropReason::UnknownPort);
        }
        if F::Address::in_service_cidr(call.config, call.address) {
            return lose(call, DropReason::Unallocated);
        }
        forget(call, request);
        return ALLOW;
    };
    // SAFETY: a map value stays readable while the program runs; the key decides this flag.
    let bits = unsafe { (&raw const (*element).flags).read_volatile() };
    if bits & flags::HOST_ONLY != 0 && !call.host {
        return ALLOW;
    }
    // Its source address decides, and that of another namespace's process is known only to its packets.
    if bits & flags::SOURCE_RANGES != 0 && !call.host {
        forget(call, request);
        return ALLOW;
    }
    if request == Request::Send && keep(call, &key) {
        return ALLOW;
    }
    // The client of SEMANTICS' affinity is an address, and a socket has none yet: this node's own for its processes, and
    // for those of another namespace (which `host` mode leaves alone) one that no packet has.
    let client = if call.host { F::Address::node(call.config) } else { F::Address::of_namespace(call.namespace) };
    let mut choice = MaybeUninit::uninit();
    // A socket has no port yet; its cookie is as good a number of its own.
    let choice = match balance::choose(&key, call.cookie as u16, &client, features::now(), &mut choice) {
        // SAFETY: `choose` fills it whenever it succeeds.
        Ok(()) => unsafe { choice.assume_init_ref() },
        Err(DropReason::NoEndpoint) => return refuse(call, DropReason::NoEndpoint),
        Err(reason) => return lose(call, reason),
    };
    let backend = &choice.backend;
    if F::Address::own(call.ctx).is_some_and(|own| own.is_loopback()) && !backend.address.is_loopback() {
        observe::count(DropReason::LoopbackSource);
        return ALLOW;
    }
    observe::connection(backend.service_id);
    if request == Request::Connect && backend.flags & backend_flags::COUNTED != 0 {
        load::open(choice.id);
    }
    settle(call, &choice, request)
}

/// Sends a datagram to where the socket's last one to the same frontend went, if that is still right.
#[inline(never)]
fn keep<F: Form>(call: &Call<'_, F>, key: &FrontendKey<F::Address>) -> bool {
    let Some(known) = F::Address::socket_backend(&call.key()) else { return false };
    // SAFETY: a map value stays readable while the program runs.
    let known = unsafe { maps::copy(known) };
    versioned::is_serving::<F::Address>(known.backend_id)
        && versioned::serves(key, known.service_id)
        && point(call, &known) == ALLOW
}

/// Points the call at a backend that was just chosen.
#[inline(never)]
fn settle<F: Form>(call: &Call<'_, F>, choice: &Choice<F::Address>, request: Request) -> i32 {
    let peer = SocketPeer {
        address: choice.backend.address,
        port_be: choice.backend.port_be,
        reserved: 0,
        service_id: choice.backend.service_id,
        backend_id: choice.id,
    };
    if request == Request::Send {
        // Without it, the socket's next datagram is a fresh choice.
        let _ = F::Address::insert_socket_backend(&call.key(), &peer);
    }
    event::connected(&call.address, call.port_be, call.protocol, &peer);
    point(call, &peer)
}

/// A socket that connects to a peer by its own address shows that, even if it reached the same peer through a Service
/// before; and the loader is told that it is not balanced any more.
#[inline(always)]
fn forget<F: Form>(call: &Call<'_, F>, request: Request) {
    let key = call.key();
    if request == Request::Connect && F::Address::socket_frontend(&key).is_some() {
        let itself =
            SocketPeer { address: call.address, port_be: call.port_be, reserved: 0, service_id: 0, backend_id: 0 };
        // There is an element to replace, and an LRU map has room.
        let _ = F::Address::insert_socket_frontend(&key, &itself);
    }
}

/// Points the call at a backend, and sees to it that the backend's answers come from the frontend that was called last:
/// the socket may have reached the same backend through another one, or an LRU map may have forgotten.
#[inline(never)]
fn point<F: Form>(call: &Call<'_, F>, backend: &SocketPeer<F::Address>) -> i32 {
    let reverse = SocketKey::new(call.cookie, backend.address, backend.port_be, call.protocol);
    let frontend = SocketPeer { address: call.address, port_be: call.port_be, ..*backend };
    let known = F::Address::socket_frontend(&reverse).is_some_and(|known| {
        // SAFETY: a map value stays readable while the program runs.
        unsafe { maps::copy(known) == frontend }
    });
    if !known {
        let remembered = F::Address::insert_socket_frontend(&reverse, &frontend);
        if remembered.is_err() && call.protocol == PROTOCOL_UDP {
            // Without it, the process would see answers from an address that it never asked.
            return lose(call, DropReason::ConntrackFull);
        }
    }
    F::set(call.ctx, backend.address);
    address::set_port(call.ctx, backend.port_be);
    ALLOW
}

/// The call fails.
#[inline(always)]
fn lose<F: Form>(call: &Call<'_, F>, reason: DropReason) -> i32 {
    observe::count(reason);
    event::refused(&call.address, call.port_be, call.protocol, reason);
    REFUSE
}

/// The call fails as if the peer had refused.
#[inline(always)]
fn refuse<F: Form>(call: &Call<'_, F>, reason: DropReason) -> i32 {
    lose(call, reason);
    if features::has(features::SET_RETVAL) {
        // SAFETY: the helper takes a scalar only.
        unsafe { bpf_set_retval(-CONNECTION_REFUSED) };
    }
    REFUSE
}
