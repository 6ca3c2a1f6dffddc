//! Making a veth pair behave like a wire between two network cards, which native XDP needs: checksums are complete on
//! it, and the other end has an XDP program, without which frames sent by XDP_TX or XDP_REDIRECT are lost.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};

use crate::netns::Namespace;
use crate::program::XDP_PASS;
use crate::raw_bpf::{EXIT, Kind, MOVE, Place, Program, check, instruction};

/// ETHTOOL_STXCSUM of linux/ethtool.h.
const ETHTOOL_STXCSUM: u32 = 0x17;

/// Turns transmit checksum offload off, so that frames leave with whole checksums as they do on a real wire.
///
/// # Errors
/// If there is no such interface.
pub fn disable_checksum_offload(namespace: &Namespace, interface: &str) -> Result<()> {
    namespace.run(|| set_checksum_offload(interface, 0)).with_context(|| format!("{}: {interface}", namespace.name()))
}

fn set_checksum_offload(interface: &str, on: u32) -> io::Result<()> {
    #[repr(C)]
    struct EthtoolValue {
        command: u32,
        data: u32,
    }
    let mut value = EthtoolValue { command: ETHTOOL_STXCSUM, data: on };
    // SAFETY: an ifreq of zeros is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes().take(15)) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: socket takes no pointers; the new descriptor is owned here and nowhere else.
    let socket =
        unsafe { OwnedFd::from_raw_fd(check(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0))?) };
    // SAFETY: `request` and the value that it points to outlive the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), 0x8946, &raw mut request) })?;
    Ok(())
}

/// An XDP program that passes every frame, attached as long as this value lives.
#[derive(Debug)]
pub struct XdpPass {
    _link: OwnedFd,
}

impl XdpPass {
    /// Attaches it to an interface in native mode.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn attach(namespace: &Namespace, interface: &str) -> Result<Self> {
        let link = namespace.run(|| attach_pass(interface));
        let link = link.with_context(|| format!("attaching XDP_PASS to {interface} in {}", namespace.name()))?;
        Ok(Self { _link: link })
    }
}

fn attach_pass(interface: &str) -> io::Result<OwnedFd> {
    attach(&Program::load(Kind::Xdp, &[instruction(MOVE, 0, 0, 0, XDP_PASS), EXIT])?, interface)
}

/// Attaches an XDP program to an interface of the calling thread's namespace in native mode, as long as what comes back lives.
///
/// # Errors
/// If the kernel refuses.
pub fn attach(program: &Program, interface: &str) -> io::Result<OwnedFd> {
    program.attach(interface, Place::XdpNative)
}
