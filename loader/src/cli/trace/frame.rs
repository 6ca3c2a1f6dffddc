//! The frame that is tried, and what is read of the one that comes out.
//!
//! Nobody receives it, so it has no checksums.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use sheave_common::{PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP};

const ETHERNET: usize = 14;
const IPV4: usize = 20;
const IPV6: usize = 40;
const TTL: u8 = 64;
/// Locally administered.
const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 1];
const TCP_SYN: u8 = 2;
const TCP_RST: u8 = 4;

/// The first packet of a connection: a TCP segment with SYN, an SCTP packet with INIT, or a UDP datagram. `receiver` is the
/// link-layer address of the interface that it comes in by.
pub(super) fn build(receiver: [u8; 6], protocol: u8, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let (from_port, to_port) = (from.port().to_be_bytes(), to.port().to_be_bytes());
    let ports = [from_port, to_port].concat();
    let transport = match protocol {
        // Sequence and acknowledgment 0, header of five words, window of 64 KiB less one.
        PROTOCOL_TCP => [&ports[..], &[0; 8], &[5 << 4, TCP_SYN, 0xff, 0xff, 0, 0, 0, 0]].concat(),
        // No tag; one INIT chunk of 20 octets: tag 1, a window, one stream each way, TSN 1 (RFC 9260, 3.3.2).
        PROTOCOL_SCTP => {
            let init = [1, 0, 0, 20, 0, 0, 0, 1, 0, 0, 0xff, 0xff, 0, 1, 0, 1, 0, 0, 0, 1];
            [&ports[..], &[0; 8], &init].concat()
        }
        _ => [&ports[..], &[0, 16, 0, 0], b"sheave\0\0"].concat(),
    };
    let length = u16::try_from(transport.len()).unwrap_or(u16::MAX);
    let (ether_type, header) = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let [high, low] = (length + IPV4 as u16).to_be_bytes();
            let start = [0x45, 0, high, low, 0, 1, 0x40, 0, TTL, protocol, 0, 0];
            ([0x08, 0x00], [&start[..], &from.octets(), &to.octets()].concat())
        }
        (from, to) => {
            let octets = |ip| match ip {
                IpAddr::V4(ip) => Ipv4Addr::to_ipv6_mapped(&ip).octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            let [high, low] = length.to_be_bytes();
            let start = [0x60, 0, 0, 0, high, low, protocol, TTL];
            ([0x86, 0xdd], [&start[..], &octets(from), &octets(to)].concat())
        }
    };
    [&receiver[..], &SENDER, &ether_type, &header, &transport].concat()
}

/// What a frame is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Headers {
    /// IP protocol number.
    pub(super) protocol: u8,
    /// Source; without ports (0) if the protocol is another one than TCP, UDP and SCTP.
    pub(super) source: SocketAddr,
    /// Destination.
    pub(super) destination: SocketAddr,
    /// A TCP segment with RST.
    pub(super) reset: bool,
}

/// Reads a frame; `None` if it is cut short or of another protocol than IP.
pub(super) fn read(frame: &[u8]) -> Option<Headers> {
    let packet = frame.get(ETHERNET..)?;
    let (protocol, source, destination, transport): (u8, IpAddr, IpAddr, _) = match packet.first()? >> 4 {
        4 => {
            let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
            (*packet.get(9)?, address(12)?.into(), address(16)?.into(), packet.get(IPV4..)?)
        }
        6 => {
            let address = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
            (*packet.get(6)?, address(8)?.into(), address(24)?.into(), packet.get(IPV6..)?)
        }
        _ => return None,
    };
    let has_ports = [PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_SCTP].contains(&protocol);
    let port = |at: usize| match transport.get(at..at + 2) {
        Some(&[high, low]) if has_ports => u16::from_be_bytes([high, low]),
        _ => 0,
    };
    Some(Headers {
        protocol,
        source: SocketAddr::new(source, port(0)),
        destination: SocketAddr::new(destination, port(2)),
        reset: protocol == PROTOCOL_TCP && transport.get(13).is_some_and(|flags| flags & TCP_RST != 0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_is_read() {
        for (from, to) in [("10.0.0.1:40000", "10.96.0.1:53"), ("[fd00::1]:40000", "[fd00:96::1]:53")] {
            let (source, destination) = (from.parse().unwrap(), to.parse().unwrap());
            for protocol in [PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_SCTP] {
                let frame = build([1; 6], protocol, source, destination);
                assert_eq!(read(&frame), Some(Headers { protocol, source, destination, reset: false }));
                assert_eq!(read(&frame[..30]), None, "cut short");
            }
        }
    }
}
