//! XDP: packets are frames in driver memory, checksums are final, and every access is bounds-checked.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_xdp_get_buff_len;
use aya_ebpf::programs::XdpContext;
use sheave_common::checksum;

use super::{Addressee, Context};
use crate::features;
use crate::packet::ethernet;

/// Bytes of the frame's first buffer, which is all that can be read and written directly. A jumbo frame's headers are in it.
#[inline(always)]
fn first_buffer(ctx: &XdpContext) -> u32 {
    let length = (ctx.data_end() - ctx.data()) as u32;
    // SAFETY: reads a local. Volatile, or the compiler would compare pointers by way of arithmetic that the verifier refuses
    // ("pointer arithmetic on pkt_end prohibited", kernel 6.18).
    unsafe { (&raw const length).read_volatile() }
}

impl Context for XdpContext {
    const XDP: bool = true;
    const NETWORK: u32 = ethernet::LENGTH;

    #[inline(always)]
    fn as_ptr(&self) -> *mut c_void {
        aya_ebpf::EbpfContext::as_ptr(self).cast()
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the kernel's context is valid while the program runs.
        unsafe { (*self.ctx).ingress_ifindex }
    }

    #[inline(always)]
    fn addressee(&self) -> Addressee {
        // The whole address: from `data + 1 > data_end` compilers make `data >= data_end`, which the verifier learns nothing of.
        match self.load::<[u8; 6]>(0) {
            Some([first, ..]) if first & 1 == 0 => Addressee::Us,
            _ => Addressee::Group,
        }
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        if features::has(features::XDP_FRAGS) {
            // SAFETY: the kernel's context is valid while the program runs.
            return unsafe { bpf_xdp_get_buff_len(self.ctx) as u32 };
        }
        first_buffer(self)
    }

    #[inline(always)]
    fn is_linear(&self) -> bool {
        !features::has(features::XDP_FRAGS) || self.length() == first_buffer(self)
    }

    #[inline(always)]
    fn segment_payload(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn at<T>(&self, offset: u32) -> Option<*mut T> {
        let start = self.data() + offset as usize;
        if start + size_of::<T>() > self.data_end() {
            return None;
        }
        Some(start as *mut T)
    }

    #[inline(always)]
    fn load<T: Copy>(&self, offset: u32) -> Option<T> {
        // SAFETY: `at` checked that the frame holds a whole T there; packet memory may be unaligned.
        self.at::<T>(offset).map(|pointer| unsafe { pointer.read_unaligned() })
    }

    #[inline(always)]
    fn load_into<T: Copy>(&self, offset: u32, value: &mut T) -> Option<()> {
        *value = self.load(offset)?;
        Some(())
    }

    #[inline(always)]
    fn store<T>(&self, offset: u32, value: &T) -> Option<()> {
        // SAFETY: `at` checked that the frame holds a whole T there, and the copy is by bytes.
        self.at::<T>(offset).map(|pointer| unsafe {
            core::ptr::copy_nonoverlapping(core::ptr::from_ref(value).cast::<u8>(), pointer.cast(), size_of::<T>())
        })
    }

    #[inline(always)]
    fn store_uncompensated<T>(&self, offset: u32, value: &T) -> Option<()> {
        self.store(offset, value)
    }

    #[inline(always)]
    fn follow(&self, _difference: u64) {}

    #[inline(always)]
    fn adjust_checksum(&self, offset: u32, difference: u64, _pseudo: bool, udp: bool) -> Option<()> {
        let old: u16 = self.load(offset)?;
        let new = if udp { checksum::update_udp(old, difference) } else { checksum::update(old, difference) };
        self.store(offset, &new)
    }

    #[inline(always)]
    fn adjust_checksum_at(&self, offset: u32, addresses: u64, ports: u64, udp: bool) -> Option<()> {
        self.adjust_checksum(offset, addresses + ports, true, udp)
    }
}
