//! Hand-made packets of both families, and reading what a program made of them.

mod fragments;
mod view;

use std::net::{IpAddr, SocketAddr};

use bytes::{BufMut as _, Bytes, BytesMut};
use sheave_common::{PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP};

pub use fragments::{join, split};
pub use view::View;

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

/// IPv6 extension header: hop-by-hop options.
pub const HOP_BY_HOP: u8 = 0;
/// IPv6 extension header: routing.
pub const ROUTING: u8 = 43;
/// IPv6 extension header: fragment.
pub const FRAGMENT: u8 = 44;
/// IPv6 extension header: authentication, whose length counts words of four bytes.
pub const AUTHENTICATION: u8 = 51;
/// IPv6 "extension header": none follows, and nothing else.
pub const NO_NEXT_HEADER: u8 = 59;
/// IPv6 extension header: destination options.
pub const DESTINATION_OPTIONS: u8 = 60;

/// SCTP's checksum (RFC 9260, appendix A); its bytes are sent in little-endian order.
const CRC32C: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);

/// Length of the Ethernet header that a [`Packet`] begins with.
pub(crate) const ETHERNET: usize = 14;
/// Length of an IPv6 header.
const IPV6: usize = 40;
/// "More fragments" in IPv4's flags-and-offset field.
const MORE_FRAGMENTS: u16 = 0x2000;
const FRAGMENT_OFFSET: u16 = 0x1fff;

/// A packet to build, of its addresses' family; [`Packet::build`] makes an Ethernet frame with all checksums right.
#[derive(Clone, Debug)]
pub struct Packet {
    source: SocketAddr,
    destination: SocketAddr,
    protocol: u8,
    flags: u8,
    sequence: u32,
    acknowledgment: u32,
    ttl: u8,
    options: Vec<u8>,
    extensions: Vec<(u8, Vec<u8>)>,
    fragment: Option<u16>,
    claimed_length: Option<u16>,
    payload: Vec<u8>,
    segment: Option<Vec<u8>>,
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
            extensions: Vec::new(),
            fragment: None,
            claimed_length: None,
            payload: Vec::new(),
            segment: None,
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

    /// An SCTP packet of one DATA chunk.
    #[must_use]
    pub fn sctp(source: &str, destination: &str) -> Self {
        let mut packet = Self::new(source, destination, PROTOCOL_SCTP);
        // Type 0, the whole message, length 20; sequence and stream numbers; then the message.
        packet.payload = [&[0, 3, 0, 20][..], &[0; 12], b"data"].concat();
        packet
    }

    /// An ICMP error from a router at `source`, about `quoted` (a frame). IPv4: its network header and eight more bytes;
    /// IPv6: as much of it as fits.
    #[must_use]
    pub fn icmp(source: &str, destination: &str, kind: u8, code: u8, quoted: &[u8]) -> Self {
        let length = match source.contains(':') {
            false => 28,
            true => 1_232,
        };
        let mut body = vec![0, 0, 0x05, 0x78];
        body.extend_from_slice(&quoted[ETHERNET..quoted.len().min(ETHERNET + length)]);
        Self::icmp_message(source, destination, kind, code, &body)
    }

    /// Any ICMP or ICMPv6 message; `body` is what follows the checksum.
    #[must_use]
    pub fn icmp_message(source: &str, destination: &str, kind: u8, code: u8, body: &[u8]) -> Self {
        let (source, destination): (IpAddr, IpAddr) =
            (source.parse().expect("source address"), destination.parse().expect("destination address"));
        let protocol = if source.is_ipv4() { PROTOCOL_ICMP } else { PROTOCOL_ICMPV6 };
        let [source, destination] = [source, destination].map(|address| SocketAddr::new(address, 0).to_string());
        let mut packet = Self::new(&source, &destination, protocol);
        packet.payload = [&[kind, code, 0, 0], body].concat();
        packet
    }

    /// With this TTL or hop limit.
    #[must_use]
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// With these IPv4 options (a multiple of four bytes).
    #[must_use]
    pub fn options(mut self, options: &[u8]) -> Self {
        self.options = options.to_vec();
        self
    }

    /// With one more IPv6 extension header, after those that it has. `body` is what follows the header's first two bytes, its
    /// length six bytes and a multiple of eight.
    ///
    /// # Panics
    /// If the body has another length.
    #[must_use]
    pub fn extension(self, kind: u8, body: &[u8]) -> Self {
        let length = body.len() + 2;
        assert_eq!(length % 8, 0, "the length of an extension header");
        let units = if kind == AUTHENTICATION { length / 4 - 2 } else { length / 8 - 1 };
        self.extension_claiming(kind, u8::try_from(units).expect("extension header length"), body)
    }

    /// The same with any value in the length field.
    #[must_use]
    pub fn extension_claiming(mut self, kind: u8, length: u8, body: &[u8]) -> Self {
        self.extensions.push((kind, [&[length], body].concat()));
        self
    }

    /// With IPv4's flags-and-offset field like this; of an IPv6 packet, with a fragment header that says the same.
    #[must_use]
    pub fn fragment(mut self, fragment: u16) -> Self {
        self.fragment = Some(fragment);
        self
    }

    /// With a length field that says this: IPv4's total length, IPv6's payload length.
    #[must_use]
    pub fn claiming_length(mut self, length: u16) -> Self {
        self.claimed_length = Some(length);
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

    /// With this transport header and payload as they are, in place of those that its addresses and payload would give it.
    #[must_use]
    pub fn segment(mut self, segment: &[u8]) -> Self {
        self.segment = Some(segment.to_vec());
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
    /// If the packet is longer than its family allows.
    #[must_use]
    pub fn build(&self) -> Bytes {
        let mut frame = BytesMut::new();
        frame.put_slice(&self.to_mac);
        frame.put_slice(&CLIENT_MAC);
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.put_u16(0x0800);
                frame.put_slice(&self.ipv4_header(&source.octets(), &destination.octets()));
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.put_u16(0x86dd);
                frame.put_slice(&self.ipv6_headers(&source.octets(), &destination.octets()));
            }
            _ => panic!("{} and {} are of two families", self.source, self.destination),
        }
        frame.put_slice(&self.transport());
        frame.freeze()
    }

    fn ipv4_header(&self, source: &[u8], destination: &[u8]) -> BytesMut {
        let header_length = 20 + self.options.len();
        let length = u16::try_from(header_length + self.transport().len()).expect("packet length");
        let mut header = BytesMut::new();
        header.put_u8(0x40 | u8::try_from(header_length / 4).expect("header length"));
        header.put_u8(0);
        header.put_u16(self.claimed_length.unwrap_or(length));
        header.put_u16(0x1234);
        header.put_u16(self.fragment.unwrap_or(0));
        header.put_u8(self.ttl);
        header.put_u8(self.protocol);
        header.put_u16(0);
        header.put_slice(source);
        header.put_slice(destination);
        header.put_slice(&self.options);
        let checksum = !sum(&header);
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
        header
    }

    fn ipv6_headers(&self, source: &[u8], destination: &[u8]) -> BytesMut {
        let mut extensions = self.extensions.clone();
        if let Some(field) = self.fragment {
            let more = u16::from(field & MORE_FRAGMENTS != 0);
            let [high, low] = ((field & FRAGMENT_OFFSET) << 3 | more).to_be_bytes();
            extensions.push((FRAGMENT, vec![0, high, low, 0, 0, 0x12, 0x34]));
        }
        let length = extensions.iter().map(|(_, rest)| 1 + rest.len()).sum::<usize>() + self.transport().len();
        let mut next = extensions.iter().map(|(kind, _)| *kind).chain([self.protocol]);
        let mut headers = BytesMut::new();
        headers.put_u32(0x6000_0000);
        headers.put_u16(self.claimed_length.unwrap_or(u16::try_from(length).expect("packet length")));
        headers.put_u8(next.next().unwrap_or(self.protocol));
        headers.put_u8(self.ttl);
        headers.put_slice(source);
        headers.put_slice(destination);
        for ((_, rest), next) in extensions.iter().zip(next) {
            headers.put_u8(next);
            headers.put_slice(rest);
        }
        headers
    }

    /// Transport header and payload.
    fn transport(&self) -> BytesMut {
        if let Some(segment) = &self.segment {
            return segment[..].into();
        }
        let mut transport = BytesMut::new();
        if matches!(self.protocol, PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_SCTP) {
            transport.put_u16(self.source.port());
            transport.put_u16(self.destination.port());
        }
        match self.protocol {
            PROTOCOL_TCP => {
                transport.put_u32(self.sequence);
                transport.put_u32(self.acknowledgment);
                transport.put_u8(5 << 4);
                transport.put_u8(self.flags);
                transport.put_u16(64_240);
                transport.put_u32(0);
            }
            PROTOCOL_UDP => {
                transport.put_u16(u16::try_from(8 + self.payload.len()).expect("datagram length"));
                transport.put_u16(0);
            }
            // Verification tag and checksum.
            PROTOCOL_SCTP => transport.put_u64(0x5afe_5afe_0000_0000),
            _ => {}
        }
        transport.put_slice(&self.payload);
        let pseudo = pseudo_sum(self.source.ip(), self.destination.ip(), self.protocol, transport.len());
        let (at, checksum) = match self.protocol {
            PROTOCOL_TCP => (16, !add(pseudo, sum(&transport))),
            PROTOCOL_UDP if self.udp_checksum => match !add(pseudo, sum(&transport)) {
                0 => (6, 0xffff),
                checksum => (6, checksum),
            },
            PROTOCOL_ICMP => (2, !sum(&transport)),
            PROTOCOL_ICMPV6 => (2, !add(pseudo, sum(&transport))),
            PROTOCOL_SCTP => {
                let checksum = CRC32C.checksum(&transport);
                transport[8..12].copy_from_slice(&checksum.to_le_bytes());
                return transport;
            }
            _ => return transport,
        };
        transport[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        transport
    }
}

/// Whether an SCTP packet's checksum is right.
#[must_use]
pub fn sctp_checksum_is_right(packet: &[u8]) -> bool {
    let mut blank = packet.to_vec();
    blank[8..12].fill(0);
    packet[8..12] == CRC32C.checksum(&blank).to_le_bytes()
}

/// One's-complement sum of big-endian words, folded.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    words.fold(0, add)
}

/// One's-complement sum of two words.
fn add(one: u16, other: u16) -> u16 {
    let (sum, carry) = one.overflowing_add(other);
    sum + u16::from(carry)
}

/// The sum of what TCP, UDP and ICMPv6 checksums cover besides the segment.
fn pseudo_sum(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> u16 {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => sum(&address.octets()),
        IpAddr::V6(address) => sum(&address.octets()),
    };
    let length = u16::try_from(length).expect("segment length");
    [octets(source), octets(destination), u16::from(protocol), length].into_iter().fold(0, add)
}
