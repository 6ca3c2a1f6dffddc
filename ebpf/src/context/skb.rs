//! tc: packets are socket buffers. The checksum helpers know about partial and complete checksums, so they are used
//! throughout; direct stores to checksum fields would break offloads.
//!
//! Where the device summed the whole packet (CHECKSUM_COMPLETE), that sum must follow too. `bpf_l4_csum_replace` with
//! BPF_F_PSEUDO_HDR moves it as is right for IPv4, where the header's checksum makes up for the addresses; for IPv6 the
//! store of the addresses moves it back ([`Context::store_uncompensated`]), which works on every kernel
//! (BPF_F_IPV6 exists since 6.16 only).

use core::ffi::c_void;

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
use aya_ebpf::programs::TcContext;

use super::{Addressee, Context};

/// The kernel's PACKET_HOST (linux/if_packet.h)
const PACKET_HOST: u32 = 0;
/// The kernel's PACKET_OTHERHOST
const PACKET_OTHERHOST: u32 = 3;

/// A one's-complement sum folded to 32 bits, as the checksum helpers take it.
#[inline(always)]
fn fold32(sum: u64) -> u64 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    ((sum >> 32) + sum) & 0xffff_ffff
}

impl Context for TcContext {
    const XDP: bool = false;

    #[inline(always)]
    fn as_ptr(&self) -> *mut c_void {
        aya_ebpf::EbpfContext::as_ptr(self).cast()
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the kernel's context is valid while the program runs.
        unsafe { (*self.skb.skb).ifindex }
    }

    #[inline(always)]
    fn addressee(&self) -> Addressee {
        // SAFETY: the kernel's context is valid while the program runs.
        match unsafe { (*self.skb.skb).pkt_type } {
            PACKET_HOST => Addressee::Us,
            PACKET_OTHERHOST => Addressee::AnotherHost,
            _ => Addressee::Group,
        }
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        self.len()
    }

    #[inline(always)]
    fn is_linear(&self) -> bool {
        // The kernel sees to it.
        true
    }

    #[inline(always)]
    fn segment_payload(&self) -> u32 {
        // SAFETY: the kernel's context is valid while the program runs.
        unsafe { (*self.skb.skb).gso_size }
    }

    #[inline(always)]
    fn load<T: Copy>(&self, offset: u32) -> Option<T> {
        self.skb.load(offset as usize).ok()
    }

    #[inline(always)]
    fn load_into<T: Copy>(&self, offset: u32, value: &mut T) -> Option<()> {
        // SAFETY: the helper writes as many bytes as the value has; callers use plain integers and arrays.
        let result = unsafe {
            bpf_skb_load_bytes(self.skb.skb.cast(), offset, core::ptr::from_mut(value).cast(), size_of::<T>() as u32)
        };
        (result == 0).then_some(())
    }

    #[inline(always)]
    fn store<T>(&self, offset: u32, value: &T) -> Option<()> {
        self.skb.store(offset as usize, value, 0).ok()
    }

    #[inline(always)]
    fn store_uncompensated<T>(&self, offset: u32, value: &T) -> Option<()> {
        self.skb.store(offset as usize, value, u64::from(BPF_F_RECOMPUTE_CSUM)).ok()
    }

    #[inline(always)]
    fn adjust_header_checksum(&self, offset: u32, difference: u64) -> Option<()> {
        self.skb.l3_csum_replace(offset as usize, 0, fold32(difference), 0).ok()
    }

    #[inline(always)]
    fn adjust_checksum(&self, offset: u32, difference: u64, pseudo: bool, udp: bool) -> Option<()> {
        let mut flags = 0;
        if pseudo {
            flags |= u64::from(BPF_F_PSEUDO_HDR);
        }
        if udp {
            flags |= u64::from(BPF_F_MARK_MANGLED_0);
        }
        self.skb.l4_csum_replace(offset as usize, 0, fold32(difference), flags).ok()
    }
}
