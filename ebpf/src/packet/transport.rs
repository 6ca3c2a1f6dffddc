//! TCP (RFC 9293), UDP (RFC 768) and SCTP (RFC 9260) headers, as far as they are read.

use sheave_common::{PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP};

/// A TCP header without options.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Tcp {
    /// Source port.
    pub source_be: u16,
    /// Destination port.
    pub destination_be: u16,
    /// Sequence number, network order.
    pub sequence_be: u32,
    /// Acknowledgment number, network order.
    pub acknowledgment_be: u32,
    /// Header length in words, in the upper four bits.
    pub data_offset: u8,
    /// Bits of [`flags`].
    pub flags: u8,
    /// Window.
    pub window_be: u16,
    /// Checksum.
    pub checksum: u16,
    /// Urgent pointer.
    pub urgent_be: u16,
}

/// A UDP header.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Udp {
    /// Source port.
    pub source_be: u16,
    /// Destination port.
    pub destination_be: u16,
    /// Length of header and data.
    pub length_be: u16,
    /// Checksum; 0 means none.
    pub checksum: u16,
}

/// An SCTP header and the type of the first chunk.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Sctp {
    /// Source port.
    pub source_be: u16,
    /// Destination port.
    pub destination_be: u16,
    /// Verification tag.
    pub tag: u32,
    /// CRC32c of the whole packet, least significant octet first.
    pub checksum: u32,
    /// Type of the first chunk.
    pub chunk: u8,
}

/// What every transport header begins with, and the least that an ICMP error quotes of it.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Ports {
    /// Source port.
    pub source_be: u16,
    /// Destination port.
    pub destination_be: u16,
    /// Whatever follows.
    pub rest: [u8; 4],
}

/// Bytes of an ICMP or ICMPv6 error's header.
pub const ICMP_LENGTH: u32 = 8;
/// Offset of the checksum in it.
pub const ICMP_CHECKSUM: u32 = 2;
/// Bytes of a TCP header without options.
pub const TCP_LENGTH: u32 = 20;
/// Bytes of a UDP header.
pub const UDP_LENGTH: u32 = 8;
/// Bytes of an SCTP header and of the first chunk's.
pub const SCTP_LENGTH: u32 = 16;
/// Offset of the checksum in an SCTP header.
pub const SCTP_CHECKSUM: u32 = 8;
/// Offset of the checksum in a TCP header.
pub const TCP_CHECKSUM: u32 = 16;
/// Offset of the checksum in a UDP header.
pub const UDP_CHECKSUM: u32 = 6;

/// TCP flags.
pub mod flags {
    /// No more data from the sender.
    pub const FIN: u8 = 1 << 0;
    /// Synchronize sequence numbers.
    pub const SYN: u8 = 1 << 1;
    /// Reset.
    pub const RST: u8 = 1 << 2;
    /// The acknowledgment field is significant.
    pub const ACK: u8 = 1 << 4;
}

/// What an SCTP packet's first chunk means for its association, in TCP's flags, so that one state machine serves both:
/// an association opens by INIT, INIT ACK and COOKIE ECHO, and ends by SHUTDOWN from one side and SHUTDOWN ACK from
/// the other, or by ABORT. INIT, INIT ACK and SHUTDOWN COMPLETE are never bundled with other chunks (RFC 9260, 6.10).
#[inline(always)]
pub const fn sctp_flags(chunk: u8) -> u8 {
    match chunk {
        1 => flags::SYN,
        2 => flags::SYN | flags::ACK,
        6 | 14 => flags::RST,
        7 | 8 => flags::FIN | flags::ACK,
        _ => flags::ACK,
    }
}

/// Whether a protocol is translated at all.
#[inline(always)]
pub const fn translated(protocol: u8) -> bool {
    matches!(protocol, PROTOCOL_TCP | PROTOCOL_UDP | PROTOCOL_SCTP)
}

/// Offset of a protocol's checksum in its header.
#[inline(always)]
pub const fn checksum_offset(protocol: u8) -> u32 {
    match protocol {
        PROTOCOL_UDP => UDP_CHECKSUM,
        PROTOCOL_SCTP => SCTP_CHECKSUM,
        _ => TCP_CHECKSUM,
    }
}
