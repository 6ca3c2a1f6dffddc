//! Ethernet frames.

/// Bytes of an untagged header.
pub const LENGTH: u32 = 14;
/// EtherType of IPv4, network order.
pub const TYPE_IPV4_BE: u16 = 0x0800_u16.to_be();
/// EtherType of IPv6, network order.
pub const TYPE_IPV6_BE: u16 = 0x86dd_u16.to_be();

/// An untagged header.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Header {
    /// Destination.
    pub destination: [u8; 6],
    /// Source.
    pub source: [u8; 6],
    /// EtherType, network order.
    pub ether_type_be: u16,
}
