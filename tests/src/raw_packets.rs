//! Sending whole IPv4 packets, whoever they claim to be from.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

/// Length of the Ethernet header that [`crate::packet::Packet`] begins with.
const ETHERNET: usize = 14;

/// A raw socket of the network namespace in which it was opened.
#[derive(Debug)]
pub struct RawSocket(OwnedFd);

impl RawSocket {
    /// Opens one in the calling thread's namespace.
    ///
    /// # Errors
    /// The kernel's, such as without CAP_NET_RAW.
    pub fn open() -> io::Result<Self> {
        // SAFETY: socket takes no pointers; the new descriptor is owned here and nowhere else.
        unsafe {
            match libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW) {
                -1 => Err(io::Error::last_os_error()),
                descriptor => Ok(Self(OwnedFd::from_raw_fd(descriptor))),
            }
        }
    }

    /// Sends the IPv4 packet of an Ethernet frame by the route to an address.
    ///
    /// # Errors
    /// The kernel's; ENOBUFS where a device's queue is full.
    pub fn send(&self, frame: &[u8], to: Ipv4Addr) -> io::Result<()> {
        let packet = &frame[ETHERNET..];
        // SAFETY: all-zero bytes are a valid sockaddr_in.
        let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
        address.sin_family = libc::AF_INET as libc::sa_family_t;
        address.sin_addr.s_addr = u32::from(to).to_be();
        // SAFETY: packet and address are as long as is said, and outlive the call.
        let sent = unsafe {
            libc::sendto(
                self.0.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_in>() as libc::socklen_t,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
