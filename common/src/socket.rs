//! `sock_forward4/6` and `sock_reverse4/6`: what connect-time balancing did for a socket.
//!
//! Forward: (socket, frontend) → the backend that an unconnected UDP socket keeps for it.
//! Reverse: (socket, backend) → the frontend that recvmsg() and getpeername() show. With backend id 0: the socket connected
//! to that address itself, after it had reached the same one through a frontend.

use crate::{Address, Ipv4Address, Ipv6Address};

/// Key: a socket and one remote end of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct SocketKey<A: Address> {
    /// The socket's cookie (SO_COOKIE).
    pub cookie: u64,
    /// Frontend address (forward) or backend address (reverse).
    pub address: A,
    /// Its port, network order.
    pub port_be: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
    /// Zeroes.
    pub fill: A::Fill,
}

/// Value: the other remote end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct SocketPeer<A> {
    /// Backend address (forward) or frontend address (reverse).
    pub address: A,
    /// Its port, network order.
    pub port_be: u16,
    /// Zero.
    pub reserved: u16,
    /// Service port.
    pub service_id: u32,
    /// Backend.
    pub backend_id: u32,
}

impl<A: Address> SocketKey<A> {
    /// A key.
    #[inline(always)]
    pub const fn new(cookie: u64, address: A, port_be: u16, protocol: u8) -> Self {
        Self { cookie, address, port_be, protocol, reserved: 0, fill: A::FILL }
    }
}

crate::layout::layout!(SocketKey<Ipv4Address>, size 16, {
    cookie @ 0 + 8, address @ 8 + 4, port_be @ 12 + 2, protocol @ 14 + 1, reserved @ 15 + 1, fill @ 16 + 0,
});
crate::layout::layout!(SocketKey<Ipv6Address>, size 32, {
    cookie @ 0 + 8, address @ 8 + 16, port_be @ 24 + 2, protocol @ 26 + 1, reserved @ 27 + 1, fill @ 28 + 4,
});
crate::layout::layout!(SocketPeer<Ipv4Address>, size 16, {
    address @ 0 + 4, port_be @ 4 + 2, reserved @ 6 + 2, service_id @ 8 + 4, backend_id @ 12 + 4,
});
crate::layout::layout!(SocketPeer<Ipv6Address>, size 28, {
    address @ 0 + 16, port_be @ 16 + 2, reserved @ 18 + 2, service_id @ 20 + 4, backend_id @ 24 + 4,
});
