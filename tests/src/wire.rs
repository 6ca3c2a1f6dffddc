//! Making a veth pair behave like a wire between two network cards, which native XDP needs: checksums are complete on
//! it, and the other end has an XDP program, without which frames sent by XDP_TX or XDP_REDIRECT are lost.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};

use crate::netns::Namespace;
use crate::program::XDP_PASS;
use crate::raw_bpf::{EXIT, Kind, MOVE, Program, bpf, check, instruction};

/// ETHTOOL_STXCSUM of linux/ethtool.h.
const ETHTOOL_STXCSUM: u32 = 0x17;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_XDP: u32 = 37;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

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
    #[repr(C)]
    #[derive(Default)]
    struct LinkCreate {
        prog_fd: u32,
        target_ifindex: u32,
        attach_type: u32,
        flags: u32,
        rest: [u64; 6],
    }
    let mut name = [0u8; 16];
    name[..interface.len().min(15)].copy_from_slice(&interface.as_bytes()[..interface.len().min(15)]);
    // SAFETY: `name` is a NUL-terminated string.
    let index = unsafe { libc::if_nametoindex(name.as_ptr().cast()) };
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    bpf(
        BPF_LINK_CREATE,
        &LinkCreate {
            prog_fd: program.descriptor().as_raw_fd().cast_unsigned(),
            target_ifindex: index,
            attach_type: BPF_XDP,
            flags: XDP_FLAGS_DRV_MODE,
            ..LinkCreate::default()
        },
    )
}
