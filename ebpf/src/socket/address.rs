//! Where the kernel's context of a socket call keeps addresses, by hook and by family.
//!
//! The verifier allows 32-bit accesses to these fields, and each only in the hooks of its family; so every access is a
//! volatile word, which the compiler neither merges nor moves.

use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::programs::SockAddrContext;
use sheave_common::{Address as _, Ipv4Address, Ipv6Address};

use crate::maps::Family;

/// `bpf_sock::state` of a connected UDP socket.
const ESTABLISHED: u32 = 1;
/// The third word of an IPv4-mapped address (RFC 4291, 2.5.5.2); the first two are zero.
const MAPPED: u32 = 0xffff_u32.to_be();

/// How a call names its address.
pub trait Form {
    /// The family that it is balanced in.
    type Address: SocketFamily;
    /// Replaces the call's address.
    fn set(ctx: &SockAddrContext, address: Self::Address);
}

/// An IPv4 address in an IPv4 hook.
pub struct Ipv4;
/// An IPv6 address in an IPv6 hook.
pub struct Ipv6;
/// An IPv4 address in an IPv6 hook.
pub struct Mapped;

/// What an IPv6 hook was called with.
pub enum Called6 {
    /// An IPv6 address.
    Plain(Ipv6Address),
    /// The IPv4 address in an IPv4-mapped one.
    Mapped(Ipv4Address),
}

/// The address that an IPv4 hook was called with.
#[inline(always)]
pub fn called4(ctx: &SockAddrContext) -> Ipv4Address {
    // SAFETY: the kernel's context is valid while the program runs.
    Ipv4Address::from_be_word(unsafe { (&raw const (*ctx.sock_addr).user_ip4).read_volatile() })
}

/// The address that an IPv6 hook was called with.
#[inline(always)]
pub fn called6(ctx: &SockAddrContext) -> Called6 {
    // SAFETY: the kernel's context is valid while the program runs.
    let words = unsafe { words(&raw const (*ctx.sock_addr).user_ip6) };
    if words[0] == 0 && words[1] == 0 && words[2] == MAPPED {
        Called6::Mapped(Ipv4Address::from_be_word(words[3]))
    } else {
        Called6::Plain(from_words(words))
    }
}

/// Replaces the call's port.
#[inline(always)]
pub fn set_port(ctx: &SockAddrContext, port_be: u16) {
    // SAFETY: the kernel's context is valid while the program runs, and allows whole-word writes to this field.
    unsafe { (&raw mut (*ctx.sock_addr).user_port).write_volatile(u32::from(port_be)) };
}

impl Form for Ipv4 {
    type Address = Ipv4Address;

    #[inline(always)]
    fn set(ctx: &SockAddrContext, address: Ipv4Address) {
        // SAFETY: as in `set_port`.
        unsafe { (&raw mut (*ctx.sock_addr).user_ip4).write_volatile(address.be_word()) };
    }
}

impl Form for Ipv6 {
    type Address = Ipv6Address;

    #[inline(always)]
    fn set(ctx: &SockAddrContext, address: Ipv6Address) {
        let words = address.words();
        // SAFETY: as in `set_port`.
        unsafe {
            let field = (&raw mut (*ctx.sock_addr).user_ip6).cast::<u32>();
            field.write_volatile(words[0]);
            field.add(1).write_volatile(words[1]);
            field.add(2).write_volatile(words[2]);
            field.add(3).write_volatile(words[3]);
        }
    }
}

impl Form for Mapped {
    type Address = Ipv4Address;

    /// The prefix is there already.
    #[inline(always)]
    fn set(ctx: &SockAddrContext, address: Ipv4Address) {
        // SAFETY: as in `set_port`.
        unsafe { (&raw mut (*ctx.sock_addr).user_ip6).cast::<u32>().add(3).write_volatile(address.be_word()) };
    }
}

/// A family's addresses in a socket. An AF_INET6 socket keeps the addresses of its IPv4 side in the IPv4 fields.
pub trait SocketFamily: Family {
    /// The address that the socket is bound to.
    fn own(ctx: &SockAddrContext) -> Option<Self>;
    /// The address and the port (network order) that the socket is connected to.
    fn peer(ctx: &SockAddrContext) -> Option<(Self, u16)>;
    /// An address that stands for a network namespace, and that no packet has.
    fn of_namespace(cookie: u64) -> Self;
    /// Whether it means the machine itself.
    fn is_loopback(&self) -> bool;
}

/// The call's socket. It lives as long as the program runs.
#[inline(always)]
fn socket(ctx: &SockAddrContext) -> Option<*const bpf_sock> {
    // SAFETY: the kernel's context is valid while the program runs.
    let socket = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    (!socket.is_null()).then_some(socket.cast_const())
}

/// The port that a socket is connected to.
#[inline(always)]
fn peer_port(socket: *const bpf_sock) -> Option<u16> {
    // SAFETY: `socket` gave it.
    unsafe {
        let connected = (&raw const (*socket).state).read_volatile() == ESTABLISHED;
        connected.then(|| (&raw const (*socket).dst_port).read_volatile())
    }
}

impl SocketFamily for Ipv4Address {
    #[inline(always)]
    fn own(ctx: &SockAddrContext) -> Option<Self> {
        let socket = socket(ctx)?;
        // SAFETY: `socket` gave it.
        Some(Self::from_be_word(unsafe { (&raw const (*socket).src_ip4).read_volatile() }))
    }

    #[inline(always)]
    fn peer(ctx: &SockAddrContext) -> Option<(Self, u16)> {
        let socket = socket(ctx)?;
        let port_be = peer_port(socket)?;
        // SAFETY: `socket` gave it.
        Some((Self::from_be_word(unsafe { (&raw const (*socket).dst_ip4).read_volatile() }), port_be))
    }

    /// In 0.0.0.0/8 ("this network", RFC 1122), which repeats after 2^24 namespaces.
    #[inline(always)]
    fn of_namespace(cookie: u64) -> Self {
        Self::from_be_word((cookie as u32 & 0x00ff_ffff).to_be())
    }

    #[inline(always)]
    fn is_loopback(&self) -> bool {
        self.octets[0] == 127
    }
}

impl SocketFamily for Ipv6Address {
    #[inline(always)]
    fn own(ctx: &SockAddrContext) -> Option<Self> {
        let socket = socket(ctx)?;
        // SAFETY: `socket` gave it.
        Some(from_words(unsafe { words(&raw const (*socket).src_ip6) }))
    }

    #[inline(always)]
    fn peer(ctx: &SockAddrContext) -> Option<(Self, u16)> {
        let socket = socket(ctx)?;
        let port_be = peer_port(socket)?;
        // SAFETY: `socket` gave it.
        Some((from_words(unsafe { words(&raw const (*socket).dst_ip6) }), port_be))
    }

    /// In ::/64 (::/8 is reserved, RFC 4291).
    #[inline(always)]
    fn of_namespace(cookie: u64) -> Self {
        from_words([0, 0, ((cookie >> 32) as u32).to_be(), (cookie as u32).to_be()])
    }

    #[inline(always)]
    fn is_loopback(&self) -> bool {
        self.words() == [0, 0, 0, 1_u32.to_be()]
    }
}

/// The address whose octets lie in memory as these words do.
#[inline(always)]
fn from_words(words: [u32; 4]) -> Ipv6Address {
    let mut octets = [0; 16];
    for (octets, word) in octets.chunks_exact_mut(4).zip(words) {
        octets.copy_from_slice(&word.to_ne_bytes());
    }
    Ipv6Address { octets }
}

/// Four words of the context.
///
/// # Safety
///
/// `field` is one of the kernel's fields for an IPv6 address, of a context or a socket that is valid.
#[inline(always)]
unsafe fn words(field: *const [u32; 4]) -> [u32; 4] {
    let first = field.cast::<u32>();
    // SAFETY: by the caller's promise.
    unsafe {
        [
            first.read_volatile(),
            first.add(1).read_volatile(),
            first.add(2).read_volatile(),
            first.add(3).read_volatile(),
        ]
    }
}
