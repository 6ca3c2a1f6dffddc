//! tc: packets are socket buffers. The checksum helpers know about partial and complete checksums, so they are used
//! throughout; direct stores to checksum fields would break offloads.
//!
//! Where the device summed the whole packet (CHECKSUM_COMPLETE), that sum must follow too. `bpf_l4_csum_replace` with
//! BPF_F_PSEUDO_HDR moves it as is right for IPv4, where the header's checksum makes up for the addresses; for IPv6
//! [`Context::follow`] moves it back, which works on every kernel
//! (BPF_F_IPV6 exists since 6.16 only).
//!
//! What needs no such care is read and written in place: a call of a helper costs as much as half a lookup, more where the
//! kernel guards its returns. Programs that write in place begin with the kernel's own code that makes shared data theirs.

use core::ffi::c_void;

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::generated::{bpf_csum_update, bpf_skb_load_bytes};
use aya_ebpf::programs::TcContext;
use sheave_common::checksum::{self, fold};

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

/// A socket buffer whose network header is at `NETWORK`.
pub struct Skb<const NETWORK: u32>(pub TcContext);

impl<const NETWORK: u32> Skb<NETWORK> {
    /// Where the packet's linear data has a `T`.
    #[inline(always)]
    fn linear<T>(&self, offset: u32) -> Option<*mut T> {
        let start = self.0.data() + offset as usize;
        if start + size_of::<T>() > self.0.data_end() {
            return None;
        }
        Some(start as *mut T)
    }
}

impl<const NETWORK: u32> Context for Skb<NETWORK> {
    const XDP: bool = false;
    const NETWORK: u32 = NETWORK;

    #[inline(always)]
    fn as_ptr(&self) -> *mut c_void {
        aya_ebpf::EbpfContext::as_ptr(&self.0).cast()
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the kernel's context is valid while the program runs.
        unsafe { (*self.0.skb.skb).ifindex }
    }

    #[inline(always)]
    fn addressee(&self) -> Addressee {
        // SAFETY: the kernel's context is valid while the program runs.
        match unsafe { (*self.0.skb.skb).pkt_type } {
            PACKET_HOST => Addressee::Us,
            PACKET_OTHERHOST => Addressee::AnotherHost,
            _ => Addressee::Group,
        }
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        self.0.len()
    }

    #[inline(always)]
    fn is_linear(&self) -> bool {
        // The kernel sees to it.
        true
    }

    #[inline(always)]
    fn segment_payload(&self) -> u32 {
        // SAFETY: the kernel's context is valid while the program runs.
        unsafe { (*self.0.skb.skb).gso_size }
    }

    #[inline(always)]
    fn at<T>(&self, offset: u32) -> Option<*mut T> {
        self.linear(offset).or_else(|| {
            // Headers are hardly ever outside of it.
            self.0.pull_data(offset + size_of::<T>() as u32).ok()?;
            self.linear(offset)
        })
    }

    #[inline(always)]
    fn load<T: Copy>(&self, offset: u32) -> Option<T> {
        self.0.skb.load(offset as usize).ok()
    }

    #[inline(always)]
    fn load_into<T: Copy>(&self, offset: u32, value: &mut T) -> Option<()> {
        // SAFETY: the helper writes as many bytes as the value has; callers use plain integers and arrays.
        let result = unsafe {
            bpf_skb_load_bytes(self.0.skb.skb.cast(), offset, core::ptr::from_mut(value).cast(), size_of::<T>() as u32)
        };
        (result == 0).then_some(())
    }

    #[inline(always)]
    fn store<T>(&self, offset: u32, value: &T) -> Option<()> {
        self.0.skb.store(offset as usize, value, 0).ok()
    }

    #[inline(always)]
    fn store_uncompensated<T>(&self, offset: u32, value: &T) -> Option<()> {
        self.0.skb.store(offset as usize, value, u64::from(BPF_F_RECOMPUTE_CSUM)).ok()
    }

    #[inline(always)]
    fn follow(&self, difference: u64) {
        // SAFETY: the context is the program's own. An error says that there is no such checksum.
        unsafe { bpf_csum_update(self.0.skb.skb, fold32(difference) as u32) };
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
        self.0.skb.l4_csum_replace(offset as usize, 0, fold32(difference), flags).ok()
    }

    /// The helper alone knows whether the checksum is finished, or the device's or the kernel's to finish (CHECKSUM_PARTIAL), and
    /// then covers no ports yet. What it makes of the addresses tells: so the ports need no second call.
    #[inline(always)]
    fn adjust_checksum_at(&self, offset: u32, addresses: u64, ports: u64, udp: bool) -> Option<()> {
        // SAFETY: `at` found the two bytes in the packet.
        let before = unsafe { self.at::<u16>(offset)?.read() };
        self.adjust_checksum(offset, addresses, true, udp)?;
        if ports == 0 {
            return Some(());
        }
        let field = self.at::<u16>(offset)?;
        // SAFETY: as above.
        let after = unsafe { field.read() };
        let update = |checksum, difference| match udp {
            true => checksum::update_udp(checksum, difference),
            false => checksum::update(checksum, difference),
        };
        let finished = update(before, addresses);
        let unfinished = match fold(u64::from(before) + addresses) {
            0 if udp => u16::MAX,
            sum => sum,
        };
        if finished == unfinished {
            return self.adjust_checksum(offset, ports, false, udp);
        }
        if after == finished {
            // SAFETY: as above.
            unsafe { field.write(update(after, ports)) };
        } else if after != unfinished {
            return self.adjust_checksum(offset, ports, false, udp);
        }
        Some(())
    }
}
