//! Hand-made IPv4 packets, and reading what a program made of them.

use std::net::{Ipv4Addr, SocketAddrV4};

use bytes::{BufMut as _, Bytes, BytesMut};
use sheave_common::{PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP};

/// TCP flag FIN.
pub const FIN: u8 = 0x01;
/// TCP flag SYN.
pub const SYN: u8 = 0x02;
/// TCP flag RST.
pub const RST: u8 = 0x04;
/// TCP flag PSH.
pub const PSH: u8 = 0x08;
/// TCP flag ACK.
pub const ACK: u8 = 0x10;

/// MAC address of the client's side.
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// MAC address of the node's side.
pub const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

const ETHERNET: usize = 14;

/// A packet to build; [`Packet::build`] makes an Ethernet frame with all checksums right.
#[derive(Clone, Debug)]
pub struct Packet {
    source: SocketAddrV4,
    destination: SocketAddrV4,
    protocol: u8,
    flags: u8,
    sequence: u32,
    acknowledgment: u32,
    ttl: u8,
    options: Vec<u8>,
    fragment: u16,
    payload: Vec<u8>,
    udp_checksum: bool,
    to_mac: [u8; 6],
}

impl Packet {
    fn new(source: &str, destination: &str, protocol: u8) -> Self {
        Self {
            source: source.parse().expect("source address:port"),
            destination: destination.parse().expect("destination address:port"),
            protocol,
            flags: 0,
            sequence: 0x1000,
            acknowledgment: 0,
            ttl: 64,
            options: Vec::new(),
            fragment: 0,
            payload: Vec::new(),
            udp_checksum: true,
            to_mac: NODE_MAC,
        }
    }

    /// A TCP segment.
    #[must_use]
    pub fn tcp(source: &str, destination: &str, flags: u8) -> Self {
        let mut packet = Self::new(source, destination, PROTOCOL_TCP);
        packet.flags = flags;
        packet
    }

    /// A UDP datagram.
    #[must_use]
    pub fn udp(source: &str, destination: &str) -> Self {
        let mut packet = Self::new(source, destination, PROTOCOL_UDP);
        packet.payload = b"question".to_vec();
        packet
    }

    /// An ICMP message from a router at `source`, about `quoted` (a frame): its network header and eight more bytes.
    #[must_use]
    pub fn icmp(source: &str, destination: &str, kind: u8, code: u8, quoted: &[u8]) -> Self {
        let mut packet = Self::new(&format!("{source}:0"), &format!("{destination}:0"), PROTOCOL_ICMP);
        let mut message = vec![kind, code, 0, 0, 0, 0, 0x05, 0x78];
        message.extend_from_slice(&quoted[ETHERNET..quoted.len().min(ETHERNET + 28)]);
        let checksum = !sum(&message);
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
        packet.payload = message;
        packet
    }

    /// With this TTL.
    #[must_use]
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// With these IP options (a multiple of four bytes).
    #[must_use]
    pub fn options(mut self, options: &[u8]) -> Self {
        self.options = options.to_vec();
        self
    }

    /// With this flags-and-offset field.
    #[must_use]
    pub fn fragment(mut self, fragment: u16) -> Self {
        self.fragment = fragment;
        self
    }

    /// In a frame to this MAC address.
    #[must_use]
    pub fn to_mac(mut self, mac: [u8; 6]) -> Self {
        self.to_mac = mac;
        self
    }

    /// With this payload.
    #[must_use]
    pub fn payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    /// With these sequence and acknowledgment numbers.
    #[must_use]
    pub fn numbers(mut self, sequence: u32, acknowledgment: u32) -> Self {
        self.sequence = sequence;
        self.acknowledgment = acknowledgment;
        self
    }

    /// Without a UDP checksum.
    #[must_use]
    pub fn without_checksum(mut self) -> Self {
        self.udp_checksum = false;
        self
    }

    /// The Ethernet frame.
    ///
    /// # Panics
    /// If the packet is longer than IPv4 allows.
    #[must_use]
    pub fn build(&self) -> Bytes {
        let mut transport = BytesMut::new();
        match self.protocol {
            PROTOCOL_TCP => {
                transport.put_u16(self.source.port());
                transport.put_u16(self.destination.port());
                transport.put_u32(self.sequence);
                transport.put_u32(self.acknowledgment);
                transport.put_u8(5 << 4);
                transport.put_u8(self.flags);
                transport.put_u16(64_240);
                transport.put_u32(0);
            }
            PROTOCOL_UDP => {
                transport.put_u16(self.source.port());
                transport.put_u16(self.destination.port());
                transport.put_u16(u16::try_from(8 + self.payload.len()).expect("datagram length"));
                transport.put_u16(0);
            }
            _ => {}
        }
        transport.put_slice(&self.payload);
        if self.protocol == PROTOCOL_TCP || (self.protocol == PROTOCOL_UDP && self.udp_checksum) {
            let checksum = !transport_sum(*self.source.ip(), *self.destination.ip(), self.protocol, &transport);
            let at = if self.protocol == PROTOCOL_TCP { 16 } else { 6 };
            let checksum = if checksum == 0 && self.protocol == PROTOCOL_UDP { 0xffff } else { checksum };
            transport[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        }
        let header_length = 20 + self.options.len();
        let mut header = BytesMut::new();
        header.put_u8(0x40 | u8::try_from(header_length / 4).expect("header length"));
        header.put_u8(0);
        header.put_u16(u16::try_from(header_length + transport.len()).expect("packet length"));
        header.put_u16(0x1234);
        header.put_u16(self.fragment);
        header.put_u8(self.ttl);
        header.put_u8(self.protocol);
        header.put_u16(0);
        header.put_slice(&self.source.ip().octets());
        header.put_slice(&self.destination.ip().octets());
        header.put_slice(&self.options);
        let checksum = !sum(&header);
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
        let mut frame = BytesMut::new();
        frame.put_slice(&self.to_mac);
        frame.put_slice(&CLIENT_MAC);
        frame.put_u16(0x0800);
        frame.put_slice(&header);
        frame.put_slice(&transport);
        frame.freeze()
    }
}

/// What a test reads of a frame. Panics where the frame is too short, which is a failed test.
pub struct View<'a>(pub &'a [u8]);

impl View<'_> {
    fn network(&self) -> &[u8] {
        &self.0[ETHERNET..]
    }

    fn transport(&self) -> &[u8] {
        let header = usize::from(self.network()[0] & 0x0f) * 4;
        &self.network()[header..usize::from(u16::from_be_bytes([self.network()[2], self.network()[3]]))]
    }

    fn address(&self, at: usize) -> Ipv4Addr {
        let octets: [u8; 4] = self.network()[at..at + 4].try_into().expect("four octets");
        Ipv4Addr::from(octets)
    }

    fn port(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.transport()[at], self.transport()[at + 1]])
    }

    /// Source address and port.
    #[must_use]
    pub fn source(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.address(12), self.port(0))
    }

    /// Destination address and port.
    #[must_use]
    pub fn destination(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.address(16), self.port(2))
    }

    /// `source → destination`, for comparing in one go.
    #[must_use]
    pub fn tuple(&self) -> String {
        format!("{} → {}", self.source(), self.destination())
    }

    /// Source and destination addresses of the network header.
    #[must_use]
    pub fn addresses(&self) -> (Ipv4Addr, Ipv4Addr) {
        (self.address(12), self.address(16))
    }

    /// TTL.
    #[must_use]
    pub fn ttl(&self) -> u8 {
        self.network()[8]
    }

    /// Protocol number.
    #[must_use]
    pub fn protocol(&self) -> u8 {
        self.network()[9]
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

    /// MTU of an ICMP "fragmentation needed".
    #[must_use]
    pub fn icmp_mtu(&self) -> u16 {
        self.port(6)
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
        let network = &quoted[ETHERNET..];
        let address = |at: usize| Ipv4Addr::from(<[u8; 4]>::try_from(&network[at..at + 4]).expect("four octets"));
        let port = |at: usize| u16::from_be_bytes([network[at], network[at + 1]]);
        format!("{}:{} → {}:{}", address(12), port(20), address(16), port(22))
    }

    /// Destination and source MAC addresses.
    #[must_use]
    pub fn macs(&self) -> ([u8; 6], [u8; 6]) {
        (self.0[..6].try_into().expect("six octets"), self.0[6..12].try_into().expect("six octets"))
    }

    /// Panics unless every checksum of the packet is right; a UDP checksum of zero counts as none.
    pub fn assert_checksums(&self) {
        let header = usize::from(self.network()[0] & 0x0f) * 4;
        assert_eq!(sum(&self.network()[..header]), 0xffff, "IPv4 header checksum");
        match self.protocol() {
            PROTOCOL_ICMP => assert_eq!(sum(self.transport()), 0xffff, "ICMP checksum"),
            PROTOCOL_UDP if self.udp_checksum() == 0 => {}
            protocol => {
                let (source, destination) = self.addresses();
                assert_eq!(
                    transport_sum(source, destination, protocol, self.transport()),
                    0xffff,
                    "transport checksum of {}",
                    self.tuple()
                );
            }
        }
    }
}

/// One's-complement sum of big-endian words, folded.
fn sum(bytes: &[u8]) -> u16 {
    let mut total: u32 = 0;
    for pair in bytes.chunks(2) {
        total += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while total > 0xffff {
        total = (total >> 16) + (total & 0xffff);
    }
    total as u16
}

/// The sum that TCP and UDP checksums cover.
fn transport_sum(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, transport: &[u8]) -> u16 {
    let mut covered = BytesMut::new();
    covered.put_slice(&source.octets());
    covered.put_slice(&destination.octets());
    covered.put_u16(u16::from(protocol));
    covered.put_u16(u16::try_from(transport.len()).expect("segment length"));
    covered.put_slice(transport);
    sum(&covered)
}
