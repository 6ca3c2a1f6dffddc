//! A packet's bytes, in memory that ends where the packet ends.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

/// Alignment of what drivers hand over: the network header behind an Ethernet header lies on a multiple of four.
const ALIGNMENT: usize = 16;

/// Memory for exactly so many bytes, behind as many of padding as align the network header.
struct Buffer {
    start: *mut u8,
    padding: usize,
    length: usize,
}

impl Buffer {
    fn layout(&self) -> Layout {
        Layout::from_size_align(self.padding + self.length.max(1), ALIGNMENT).expect("a packet's size")
    }

    fn new(bytes: &[u8], padding: usize) -> Self {
        let mut buffer = Self { start: std::ptr::null_mut(), padding, length: bytes.len() };
        // SAFETY: the layout's size is not zero.
        buffer.start = unsafe { alloc_zeroed(buffer.layout()) };
        if buffer.start.is_null() {
            handle_alloc_error(buffer.layout());
        }
        // SAFETY: the memory is the padding and these bytes long.
        unsafe { buffer.data().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        buffer
    }

    fn data(&self) -> *mut u8 {
        // SAFETY: the memory begins with the padding.
        unsafe { self.start.add(self.padding) }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: so many bytes follow the padding.
        unsafe { std::slice::from_raw_parts(self.data(), self.length) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nothing else is borrowed of it.
        unsafe { std::slice::from_raw_parts_mut(self.data(), self.length) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout.
        unsafe { dealloc(self.start, self.layout()) };
    }
}

/// A packet, of which programs can reach the linear part directly. Every change by a helper that may move it moves it, so that a
/// pointer from before is one to freed memory.
pub struct Memory {
    linear: Buffer,
    rest: Vec<u8>,
    padding: usize,
}

impl Memory {
    /// A packet of which the first `linear` bytes are linear. `network` is the offset of its network header.
    #[must_use]
    pub fn new(packet: &[u8], linear: usize, network: u32) -> Self {
        let padding = (4 - network as usize % 4) % 4;
        let (linear, rest) = packet.split_at(linear.min(packet.len()));
        Self { linear: Buffer::new(linear, padding), rest: rest.to_vec(), padding }
    }

    /// First byte of the linear part.
    #[must_use]
    pub fn start(&self) -> usize {
        self.linear.data() as usize
    }

    /// Behind the last byte of the linear part.
    #[must_use]
    pub fn end(&self) -> usize {
        self.start() + self.linear.length
    }

    /// Bytes of the whole packet.
    #[must_use]
    pub fn length(&self) -> usize {
        self.linear.length + self.rest.len()
    }

    /// The whole packet.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        [self.linear.bytes(), &self.rest].concat()
    }

    /// A byte of the packet.
    #[must_use]
    pub fn byte(&self, offset: usize) -> u8 {
        self.linear.bytes().get(offset).copied().unwrap_or_else(|| self.rest[offset - self.linear.length])
    }

    /// Whether the packet has so many bytes from there on.
    #[must_use]
    pub fn holds(&self, offset: usize, length: usize) -> bool {
        offset.checked_add(length).is_some_and(|end| end <= self.length())
    }

    /// Makes the first `length` bytes linear; false if there are not so many. The packet moves.
    pub fn pull(&mut self, length: usize) -> bool {
        if length > self.length() {
            return false;
        }
        let bytes = self.bytes();
        let linear = length.max(self.linear.length);
        self.linear = Buffer::new(&bytes[..linear], self.padding);
        self.rest = bytes[linear..].to_vec();
        true
    }

    /// Writes where [`Self::holds`]; what is written becomes linear. The packet moves.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        self.pull(offset + bytes.len());
        self.linear.bytes_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Cuts or extends the packet; what is new is not zero. All of it becomes linear.
    pub fn resize(&mut self, length: usize) {
        let mut bytes = self.bytes();
        bytes.resize(length, 0xa5);
        self.linear = Buffer::new(&bytes, self.padding);
        self.rest.clear();
    }
}
