//! The kernel's socket diagnosis (sock_diag(7)): which sockets of a network namespace are connected, and closing one.
//!
//! Messages follow `struct inet_diag_req_v2` and `struct inet_diag_msg` of linux/inet_diag.h.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use sheave_common::PROTOCOL_UDP;

/// SOCK_DIAG_BY_FAMILY
const BY_FAMILY: u16 = 20;
/// SOCK_DESTROY
const DESTROY: u16 = 21;
/// A set of the states of sockets that are connected, or about to be, and not closed by their process: TCP_ESTABLISHED, which
/// is that of connected UDP sockets, too, TCP_SYN_SENT and TCP_CLOSE_WAIT.
const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 8;

/// Octets of `struct inet_diag_sockid`, which identifies a socket: ports, addresses, interface and cookie.
const ID: usize = 48;
/// Octets of `struct inet_diag_req_v2`.
const REQUEST: usize = 8 + ID;
/// Octets of `struct inet_diag_msg` up to the end of its identity.
const REPLY: usize = 4 + ID;

const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];

/// A connected socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::dataplane) struct Connected {
    family: u8,
    id: [u8; ID],
}

impl Connected {
    /// Its cookie (SO_COOKIE).
    pub(in crate::dataplane) fn cookie(&self) -> u64 {
        let word = |at: usize| u64::from(u32::from_ne_bytes(self.octets(at)));
        word(40) | word(44) << 32
    }

    /// Whom it is connected to; an IPv4-mapped address as IPv4.
    pub(in crate::dataplane) fn peer(&self) -> SocketAddr {
        let address = if i32::from(self.family) == libc::AF_INET {
            IpAddr::V4(Ipv4Addr::from(self.octets::<4>(20)))
        } else {
            IpAddr::V6(Ipv6Addr::from(self.octets::<16>(20))).to_canonical()
        };
        SocketAddr::new(address, u16::from_be_bytes(self.octets(2)))
    }

    fn octets<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|index| self.id[at + index])
    }
}

impl NetlinkDeserializable for Connected {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let id = payload.get(4..REPLY).and_then(|id| id.try_into().ok());
        let id = id.ok_or_else(|| DecodeError::buffer_too_small(payload.len(), REPLY))?;
        Ok(Self { family: payload[0], id })
    }
}

/// A request about sockets of one family.
struct Request {
    kind: u16,
    family: u8,
    protocol: u8,
    states: u32,
    id: [u8; ID],
}

impl NetlinkSerializable for Request {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        REQUEST
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer[..4].copy_from_slice(&[self.family, self.protocol, 0, 0]);
        buffer[4..8].copy_from_slice(&self.states.to_ne_bytes());
        buffer[8..REQUEST].copy_from_slice(&self.id);
    }
}

/// A conversation with the kernel about the sockets of one network namespace.
pub(in crate::dataplane) struct Diagnosis {
    socket: Socket,
}

impl Diagnosis {
    /// About the calling thread's network namespace.
    pub(in crate::dataplane) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        Ok(Self { socket })
    }

    /// Every connected socket of a protocol, TCP or UDP.
    pub(in crate::dataplane) fn connected(&self, protocol: u8) -> io::Result<Vec<Connected>> {
        let mut sockets = Vec::new();
        for family in FAMILIES {
            let request = Request { kind: BY_FAMILY, family, protocol, states: CONNECTED, id: [0; ID] };
            self.exchange(request, NLM_F_DUMP, |socket| sockets.push(socket))?;
        }
        Ok(sockets)
    }

    /// Closes a UDP socket, whose process is told ECONNABORTED. Returns false if it isn't there, or if the kernel finds another
    /// one first that has the same addresses and ports.
    pub(in crate::dataplane) fn close(&self, socket: &Connected) -> io::Result<bool> {
        let request =
            Request { kind: DESTROY, family: socket.family, protocol: PROTOCOL_UDP, states: 0, id: socket.id };
        match self.exchange(request, NLM_F_ACK, drop) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sends a request and takes the answers, up to the one that ends them.
    fn exchange(&self, request: Request, flags: u16, mut take: impl FnMut(Connected)) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request));
        message.finalize();
        let mut buffer = vec![0; message.buffer_len()];
        message.serialize(&mut buffer);
        self.socket.send(&buffer, 0)?;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<Connected>::deserialize(rest).map_err(io::Error::other)?;
                match message.payload {
                    NetlinkPayload::InnerMessage(socket) => take(socket),
                    NetlinkPayload::Done(done) => return outcome(done.code),
                    NetlinkPayload::Error(error) => return outcome(error.raw_code()),
                    _ => {}
                }
                // Messages in one datagram are aligned to 4 octets.
                let length = (message.header.length as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
            }
        }
    }
}

fn outcome(code: i32) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    fn find(diagnosis: &Diagnosis, own: SocketAddr) -> Option<Connected> {
        let port = own.port().to_be_bytes();
        diagnosis.connected(PROTOCOL_UDP).expect("a dump").into_iter().find(|socket| socket.octets::<2>(0) == port)
    }

    #[test]
    fn a_connected_socket_is_found_by_its_peer_and_its_cookie_in_either_family() {
        const SO_COOKIE: i32 = 57;
        let diagnosis = Diagnosis::open().expect("sock_diag");
        for (own, peer) in
            [("127.0.0.1:0", "127.0.0.1:9"), ("[::1]:0", "[::1]:9"), ("[::ffff:127.0.0.1]:0", "[::ffff:127.0.0.1]:9")]
        {
            let socket = UdpSocket::bind(own).expect("bound");
            let own = socket.local_addr().expect("an address");
            assert_eq!(find(&diagnosis, own), None, "a socket without a peer");
            socket.connect(peer).expect("connected");
            let found = find(&diagnosis, own).expect("the socket");
            let peer: SocketAddr = peer.parse().expect("an address");
            assert_eq!(found.peer(), SocketAddr::new(peer.ip().to_canonical(), peer.port()));
            let mut cookie = 0_u64;
            let mut length: libc::socklen_t = 8;
            // SAFETY: the option's value is a u64, and `length` says so; both outlive the call.
            let result = unsafe {
                let (value, length) = ((&raw mut cookie).cast(), &raw mut length);
                libc::getsockopt(std::os::fd::AsRawFd::as_raw_fd(&socket), libc::SOL_SOCKET, SO_COOKIE, value, length)
            };
            assert_eq!((result, found.cookie()), (0, cookie));
        }
    }
}
