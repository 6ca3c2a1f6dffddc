//! `service_names`: service id (u32) → which service port that is. The controller reads identities back from here when
//! it starts, and the command line shows names when the controller is down.

/// Longest `namespace/name:port`: 63 + 1 + 63 + 1 + 63 octets, rounded up so that a value is a multiple of 8.
pub const TEXT_LENGTH: usize = 196;

/// Value of a service name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ServiceName {
    /// IP protocol number.
    pub protocol: u8,
    /// Number of octets of `text` in use.
    pub length: u8,
    /// Zeroes.
    pub reserved: [u8; 2],
    /// `namespace/name:port name`, or `namespace/name` for a service port without a name; then zeroes.
    pub text: [u8; TEXT_LENGTH],
}

impl ServiceName {
    /// From its parts; `None` if `text` is too long.
    #[must_use]
    pub fn new(protocol: u8, text: &str) -> Option<Self> {
        let mut name =
            Self { protocol, length: u8::try_from(text.len()).ok()?, reserved: [0; 2], text: [0; TEXT_LENGTH] };
        name.text.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
        Some(name)
    }

    /// `namespace/name:port name`; `None` if the bytes are not what this crate wrote.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        core::str::from_utf8(self.text.get(..usize::from(self.length))?).ok()
    }
}

crate::layout::layout!(ServiceName, size 200, { protocol @ 0 + 1, length @ 1 + 1, reserved @ 2 + 2, text @ 4 + 196 });
