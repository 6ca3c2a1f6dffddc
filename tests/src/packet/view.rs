//! Reading a frame.

use std::net::{IpAddr, SocketAddr};

use sheave_common::{PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_SCTP, PROTOCOL_UDP};

use super::{
    AUTHENTICATION, CRC32C, DESTINATION_OPTIONS, ETHERNET, FRAGMENT, HOP_BY_HOP, IPV6, ROUTING, add, pseudo_sum, sum,
};

/// What a test reads of a frame. Panics where the frame is too short, which is a failed test.
pub struct View<'a>(pub &'a [u8]);

impl View<'_> {
    fn network(&self) -> &[u8] {
        &self.0[ETHERNET..]
    }

    fn is_ipv6(&self) -> bool {
        self.network()[0] >> 4 == 6
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.network()[at], self.network()[at + 1]])
    }

    /// The protocol number, and where its header begins in the network packet: behind options and extension headers.
    fn transport_at(&self) -> (u8, usize) {
        if !self.is_ipv6() {
            return (self.network()[9], usize::from(self.network()[0] & 0x0f) * 4);
        }
        let (mut next, mut at) = (self.network()[6], IPV6);
        loop {
            let header = &self.network()[at..];
            at += match next {
                HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => (usize::from(header[1]) + 1) * 8,
                AUTHENTICATION => (usize::from(header[1]) + 2) * 4,
                FRAGMENT => 8,
                _ => return (next, at),
            };
            next = header[0];
        }
    }

    /// Transport header and payload.
    #[must_use]
    pub fn transport(&self) -> &[u8] {
        let end = if self.is_ipv6() { IPV6 + usize::from(self.word(4)) } else { usize::from(self.word(2)) };
        &self.network()[self.transport_at().1..end]
    }

    fn port(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.transport()[at], self.transport()[at + 1]])
    }

    /// Source address and port.
    #[must_use]
    pub fn source(&self) -> SocketAddr {
        SocketAddr::new(self.addresses().0, self.port(0))
    }

    /// Destination address and port.
    #[must_use]
    pub fn destination(&self) -> SocketAddr {
        SocketAddr::new(self.addresses().1, self.port(2))
    }

    /// Length of transport header and payload.
    #[must_use]
    pub fn transport_length(&self) -> usize {
        self.transport().len()
    }

    /// `source → destination`, for comparing in one go.
    #[must_use]
    pub fn tuple(&self) -> String {
        format!("{} → {}", self.source(), self.destination())
    }

    /// Source and destination addresses of the network header.
    #[must_use]
    pub fn addresses(&self) -> (IpAddr, IpAddr) {
        let v4 = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&self.network()[at..at + 4]).expect("four octets"));
        let v6 = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&self.network()[at..at + 16]).expect("sixteen octets"));
        if self.is_ipv6() { (v6(8), v6(24)) } else { (v4(12), v4(16)) }
    }

    /// TTL or hop limit.
    #[must_use]
    pub fn ttl(&self) -> u8 {
        self.network()[if self.is_ipv6() { 7 } else { 8 }]
    }

    /// Protocol number, of IPv6 that behind the extension headers.
    #[must_use]
    pub fn protocol(&self) -> u8 {
        self.transport_at().0
    }

    /// TCP flags.
    #[must_use]
    pub fn tcp_flags(&self) -> u8 {
        self.transport()[13]
    }

    /// TCP sequence and acknowledgment numbers.
    #[must_use]
    pub fn numbers(&self) -> (u32, u32) {
        let word = |at: usize| u32::from_be_bytes(self.transport()[at..at + 4].try_into().expect("four octets"));
        (word(4), word(8))
    }

    /// The UDP checksum field.
    #[must_use]
    pub fn udp_checksum(&self) -> u16 {
        self.port(6)
    }

    /// ICMP type and code.
    #[must_use]
    pub fn icmp(&self) -> (u8, u8) {
        (self.transport()[0], self.transport()[1])
    }

    /// MTU of an ICMP "fragmentation needed" or ICMPv6 "packet too big".
    #[must_use]
    pub fn icmp_mtu(&self) -> u16 {
        self.port(6)
    }

    /// What follows the ICMP checksum.
    #[must_use]
    pub fn icmp_body(&self) -> &[u8] {
        &self.transport()[4..]
    }

    /// The packet that an ICMP error quotes, as a frame that can be viewed.
    #[must_use]
    pub fn quoted(&self) -> Vec<u8> {
        let mut frame = self.0[..ETHERNET].to_vec();
        frame.extend_from_slice(&self.transport()[8..]);
        frame
    }

    /// `source → destination` of a quoted packet, of which only the ports are there.
    #[must_use]
    pub fn quoted_tuple(&self) -> String {
        let quoted = self.quoted();
        let quoted = View(&quoted);
        let (source, destination) = quoted.addresses();
        let ports = &quoted.network()[quoted.transport_at().1..];
        let port = |at: usize| u16::from_be_bytes([ports[at], ports[at + 1]]);
        format!("{} → {}", SocketAddr::new(source, port(0)), SocketAddr::new(destination, port(2)))
    }

    /// Destination and source MAC addresses.
    #[must_use]
    pub fn macs(&self) -> ([u8; 6], [u8; 6]) {
        (self.0[..6].try_into().expect("six octets"), self.0[6..12].try_into().expect("six octets"))
    }

    /// Panics unless every checksum of the packet is right; over IPv4, a UDP checksum of zero counts as none.
    pub fn assert_checksums(&self) {
        let (protocol, at) = self.transport_at();
        if !self.is_ipv6() {
            assert_eq!(sum(&self.network()[..at]), 0xffff, "IPv4 header checksum");
        }
        let (source, destination) = self.addresses();
        let pseudo = pseudo_sum(source, destination, protocol, self.transport().len());
        match protocol {
            PROTOCOL_ICMP => assert_eq!(sum(self.transport()), 0xffff, "ICMP checksum"),
            PROTOCOL_ICMPV6 => assert_eq!(add(pseudo, sum(self.transport())), 0xffff, "ICMPv6 checksum"),
            PROTOCOL_SCTP => {
                let mut packet = self.transport().to_vec();
                packet[8..12].fill(0);
                let checksum = CRC32C.checksum(&packet).to_le_bytes();
                assert_eq!(self.transport()[8..12], checksum, "SCTP checksum of {}", self.tuple());
            }
            PROTOCOL_UDP if self.udp_checksum() == 0 => assert!(!self.is_ipv6(), "no UDP checksum over IPv6"),
            _ => {
                let total = add(pseudo, sum(self.transport()));
                assert_eq!(total, 0xffff, "transport checksum of {}", self.tuple());
            }
        }
    }
}
