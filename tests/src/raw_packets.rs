//! Sending whole IP packets, whoever they claim to be from.

use std::io;
use std::net::SocketAddr;

use socket2::{Domain, Protocol, Socket, Type};

use crate::packet::{ETHERNET, View};

/// Raw sockets of the network namespace in which they were opened.
#[derive(Debug)]
pub struct RawSocket {
    v4: Socket,
    v6: Socket,
}

impl RawSocket {
    /// Opens them in the calling thread's namespace.
    ///
    /// # Errors
    /// The kernel's, such as without CAP_NET_RAW.
    pub fn open() -> io::Result<Self> {
        Ok(Self { v4: socket(Domain::IPV4)?, v6: socket(Domain::IPV6)? })
    }

    /// Sends the IP packet of an Ethernet frame by the route to its destination.
    ///
    /// # Errors
    /// The kernel's; ENOBUFS where a device's queue is full.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        let (_, destination) = View(frame).addresses();
        let socket = if destination.is_ipv4() { &self.v4 } else { &self.v6 };
        socket.send_to(&frame[ETHERNET..], &SocketAddr::new(destination, 0).into()).map(|_| ())
    }
}

/// A raw socket for whole IP packets of a family.
pub(crate) fn socket(domain: Domain) -> io::Result<Socket> {
    Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))
}
