//! TCP (RFC 9293) and UDP (RFC 768) headers, as far as they are read.

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

/// Bytes of a TCP header without options.
pub const TCP_LENGTH: u32 = 20;
/// Bytes of a UDP header.
pub const UDP_LENGTH: u32 = 8;
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
