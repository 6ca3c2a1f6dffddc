//! The contexts that programs get, by the names and fields of `aya_ebpf::programs`.

use std::ffi::c_void;
use std::mem::MaybeUninit;

use crate::bindings::{__sk_buff, xdp_md};
use crate::helpers::generated;
use crate::memory::Memory;

/// Whose work a packet's checksum is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// The packet's alone: what is in it is final.
    Final,
    /// The device's or the kernel's to finish, at this offset (CHECKSUM_PARTIAL): so far it covers the pseudo-header.
    Partial(u32),
    /// The device has summed everything from the network header on (CHECKSUM_COMPLETE), folded.
    Complete(u16),
}

/// A socket buffer. Its context comes first, so that a pointer to the one is a pointer to the other.
#[repr(C)]
pub struct SocketBuffer {
    context: __sk_buff,
    pub(crate) memory: Memory,
    pub(crate) checksum: Checksum,
    pub(crate) network: u32,
}

impl SocketBuffer {
    pub(crate) fn new(memory: Memory, checksum: Checksum, network: u32, fill: impl FnOnce(&mut __sk_buff)) -> Self {
        // SAFETY: a plain C struct, for which zeroes are a value.
        let mut context: __sk_buff = unsafe { MaybeUninit::zeroed().assume_init() };
        fill(&mut context);
        Self { context, memory, checksum, network }
    }
}

/// An XDP frame. Its context comes first, too.
#[repr(C)]
pub struct XdpFrame {
    context: xdp_md,
    pub(crate) memory: Memory,
}

impl XdpFrame {
    pub(crate) fn new(memory: Memory, ifindex: u32) -> Self {
        // SAFETY: a plain C struct, for which zeroes are a value.
        let mut context: xdp_md = unsafe { MaybeUninit::zeroed().assume_init() };
        context.ingress_ifindex = ifindex;
        Self { context, memory }
    }
}

pub trait EbpfContext {
    fn as_ptr(&self) -> *mut c_void;
}

pub struct SkBuff {
    pub skb: *mut __sk_buff,
}

impl SkBuff {
    pub fn load<T>(&self, offset: usize) -> Result<T, i64> {
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: the value has room for as many bytes.
        let result = unsafe {
            generated::bpf_skb_load_bytes(
                self.skb.cast(),
                offset as u32,
                value.as_mut_ptr().cast(),
                size_of::<T>() as u32,
            )
        };
        // SAFETY: the helper has filled it; programs read plain numbers.
        if result == 0 { Ok(unsafe { value.assume_init() }) } else { Err(result) }
    }

    pub fn store<T>(&self, offset: usize, value: &T, flags: u64) -> Result<(), i64> {
        // SAFETY: the value has as many bytes.
        let bytes = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) };
        // SAFETY: the pointer is a socket buffer's.
        let result = unsafe { generated::bpf_skb_store_bytes(self.skb, offset as u32, bytes, flags) };
        if result == 0 { Ok(()) } else { Err(result) }
    }

    pub fn l4_csum_replace(&self, offset: usize, from: u64, to: u64, flags: u64) -> Result<(), i64> {
        // SAFETY: as above.
        let result = unsafe { generated::bpf_l4_csum_replace(self.skb, offset as u32, from, to, flags) };
        if result == 0 { Ok(()) } else { Err(result) }
    }
}

pub struct TcContext {
    pub skb: SkBuff,
}

impl TcContext {
    pub(crate) fn new(buffer: &mut SocketBuffer) -> Self {
        Self { skb: SkBuff { skb: std::ptr::from_mut(buffer).cast() } }
    }

    #[expect(clippy::mut_from_ref, reason = "what the kernel's contexts are")]
    fn memory(&self) -> &mut Memory {
        // SAFETY: the context is a socket buffer's, of which nothing else is borrowed while a program runs.
        unsafe { &mut (*self.skb.skb.cast::<SocketBuffer>()).memory }
    }

    #[expect(clippy::len_without_is_empty, reason = "aya's shape")]
    pub fn len(&self) -> u32 {
        self.memory().length() as u32
    }

    pub fn data(&self) -> usize {
        self.memory().start()
    }

    pub fn data_end(&self) -> usize {
        self.memory().end()
    }

    pub fn pull_data(&self, length: u32) -> Result<(), i64> {
        if self.memory().pull(length as usize) { Ok(()) } else { Err(generated::NO_MEMORY) }
    }
}

impl EbpfContext for TcContext {
    fn as_ptr(&self) -> *mut c_void {
        self.skb.skb.cast()
    }
}

pub struct XdpContext {
    pub ctx: *mut xdp_md,
}

impl XdpContext {
    pub(crate) fn new(frame: &mut XdpFrame) -> Self {
        Self { ctx: std::ptr::from_mut(frame).cast() }
    }

    fn frame(&self) -> &XdpFrame {
        // SAFETY: the context is a frame's.
        unsafe { &*self.ctx.cast::<XdpFrame>() }
    }

    pub fn data(&self) -> usize {
        self.frame().memory.start()
    }

    pub fn data_end(&self) -> usize {
        self.frame().memory.end()
    }
}

impl EbpfContext for XdpContext {
    fn as_ptr(&self) -> *mut c_void {
        self.ctx.cast()
    }
}
