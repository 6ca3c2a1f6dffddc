//! BPF programs written by hand, instruction by instruction, and run or attached without a loader: a frame that passes, and
//! what a benchmark compares the real programs with.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::time::Duration;

use crate::program::Outcome;

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_F_TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;

/// `dst = imm`, 64 bits.
pub const MOVE: u8 = 0xb7;
/// `dst = src`, 64 bits.
pub const COPY: u8 = 0xbf;
/// `dst += imm`, 64 bits.
pub const ADD: u8 = 0x07;
/// `dst = *(u32 *)(src + offset)`
pub const LOAD_WORD: u8 = 0x61;
/// `*(u32 *)(dst + offset) = src`
pub const STORE_WORD: u8 = 0x63;
/// `dst &= imm`, the immediate sign-extended to 64 bits.
pub const AND: u8 = 0x57;
/// `*(u64 *)(dst + offset) = imm`
pub const STORE_IMMEDIATE: u8 = 0x7a;
/// `*(u64 *)(dst + offset) += src`, atomically.
pub const ATOMIC_ADD: u8 = 0xdb;
/// `if dst > src goto offset`
pub const JUMP_ABOVE: u8 = 0x2d;
/// `if dst != imm goto offset`
pub const JUMP_UNLESS: u8 = 0x55;
/// `if dst == imm goto offset`
pub const JUMP_IF: u8 = 0x15;
/// Call of the helper `imm`.
pub const CALL: u8 = 0x85;
/// The end.
pub const EXIT: u64 = instruction(0x95, 0, 0, 0, 0);

/// Which kind of program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// BPF_PROG_TYPE_SCHED_CLS
    Classifier = 3,
    /// BPF_PROG_TYPE_XDP
    Xdp = 6,
}

/// Where a program is attached on an interface, by enum bpf_attach_type and what says where among others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// XDP in native mode, which has room for one.
    XdpNative,
    /// TCX on ingress, before all that are there.
    IngressFirst,
    /// TCX on ingress, after all that are there.
    IngressLast,
    /// TCX on egress, before all that are there.
    EgressFirst,
    /// TCX on egress, after all that are there.
    EgressLast,
}

impl Place {
    const fn numbers(self) -> (u32, u32) {
        const BPF_XDP: u32 = 37;
        const BPF_TCX_INGRESS: u32 = 46;
        const BPF_TCX_EGRESS: u32 = 47;
        const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
        const BPF_F_BEFORE: u32 = 1 << 3;
        const BPF_F_AFTER: u32 = 1 << 4;
        match self {
            Self::XdpNative => (BPF_XDP, XDP_FLAGS_DRV_MODE),
            Self::IngressFirst => (BPF_TCX_INGRESS, BPF_F_BEFORE),
            Self::IngressLast => (BPF_TCX_INGRESS, BPF_F_AFTER),
            Self::EgressFirst => (BPF_TCX_EGRESS, BPF_F_BEFORE),
            Self::EgressLast => (BPF_TCX_EGRESS, BPF_F_AFTER),
        }
    }
}

/// One instruction.
#[must_use]
pub const fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = immediate.to_le_bytes();
    u64::from_le_bytes([code, destination | source << 4, low, high, a, b, c, d])
}

/// The two instructions that load a map's address into a register.
#[must_use]
pub fn map_address(register: u8, map: BorrowedFd<'_>) -> [u64; 2] {
    [instruction(0x18, register, 1, 0, map.as_raw_fd()), 0]
}

/// The two instructions that load the address of an [`Array`]'s element into a register.
#[must_use]
pub fn element_address(register: u8, array: &Array) -> [u64; 2] {
    [instruction(0x18, register, 2, 0, array.0.as_raw_fd()), 0]
}

/// A loaded program.
#[derive(Debug)]
pub struct Program(OwnedFd);

impl From<OwnedFd> for Program {
    /// One that another loader has loaded.
    fn from(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }
}

impl Program {
    /// Loads one.
    ///
    /// # Errors
    /// If the verifier refuses, with what it says.
    pub fn load(kind: Kind, instructions: &[u64]) -> io::Result<Self> {
        #[repr(C)]
        #[derive(Default)]
        struct Attributes {
            prog_type: u32,
            insn_cnt: u32,
            insns: u64,
            license: u64,
            log_level: u32,
            log_size: u32,
            log_buf: u64,
            rest: [u64; 12],
        }
        let mut log = vec![0_u8; 65_536];
        let attributes = Attributes {
            prog_type: kind as u32,
            insn_cnt: instructions.len() as u32,
            insns: instructions.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            log_level: 1,
            log_size: log.len() as u32,
            log_buf: log.as_mut_ptr() as u64,
            ..Attributes::default()
        };
        bpf(BPF_PROG_LOAD, &attributes).map(Self).map_err(|error| {
            let said = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
            io::Error::new(error.kind(), format!("{error}: {said}"))
        })
    }

    /// Its descriptor.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Attaches it to an interface of the calling thread's namespace, as long as what comes back lives.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn attach(&self, interface: &str, place: Place) -> io::Result<OwnedFd> {
        #[repr(C)]
        #[derive(Default)]
        struct LinkCreate {
            prog_fd: u32,
            target_ifindex: u32,
            attach_type: u32,
            flags: u32,
            rest: [u64; 6],
        }
        let name = std::ffi::CString::new(interface)?;
        // SAFETY: `name` is a NUL-terminated string.
        let target_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if target_ifindex == 0 {
            return Err(io::Error::last_os_error());
        }
        let (attach_type, flags) = place.numbers();
        let prog_fd = self.0.as_raw_fd().cast_unsigned();
        bpf(BPF_LINK_CREATE, &LinkCreate { prog_fd, target_ifindex, attach_type, flags, ..LinkCreate::default() })
    }

    /// Runs it again and again on a packet (BPF_PROG_TEST_RUN); the outcome is the last run's.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn run(&self, packet: &[u8], repeat: u32) -> io::Result<Outcome> {
        let mut out = vec![0_u8; packet.len() + 256];
        let ran = test_run(TestRun {
            prog_fd: self.0.as_raw_fd().cast_unsigned(),
            data_size_in: packet.len() as u32,
            data_size_out: out.len() as u32,
            data_in: packet.as_ptr() as u64,
            data_out: out.as_mut_ptr() as u64,
            repeat,
            ..TestRun::default()
        })?;
        out.truncate(ran.data_size_out as usize);
        let duration = Duration::from_nanos(ran.duration.into());
        Ok(Outcome { action: ran.retval.cast_signed(), packet: out, duration })
    }
}

/// `struct xdp_md` for a frame that comes in by an interface: data, data_end, data_meta, ingress_ifindex, rx_queue_index,
/// egress_ifindex.
///
/// # Errors
/// If no frame is so long.
pub fn xdp_context(frame: &[u8], ifindex: u32) -> io::Result<[u8; 24]> {
    let mut context = [0_u8; 24];
    let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
    context[4..8].copy_from_slice(&length.to_ne_bytes());
    context[12..16].copy_from_slice(&ifindex.to_ne_bytes());
    Ok(context)
}

/// Runs an XDP program on frames that the kernel then sends where the program says (BPF_F_TEST_XDP_LIVE_FRAMES, Linux
/// 5.18), and returns what each took. The kernel uses a frame again as soon as it is free, with the bytes that the last run left.
///
/// # Errors
/// If the kernel refuses.
pub fn live_frames(program: BorrowedFd<'_>, frame: &[u8], ifindex: u32, frames: u32) -> io::Result<Duration> {
    let context = xdp_context(frame, ifindex)?;
    let ran = test_run(TestRun {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        data_size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        repeat: frames,
        ctx_size_in: context.len() as u32,
        ctx_in: context.as_ptr() as u64,
        flags: BPF_F_TEST_XDP_LIVE_FRAMES,
        ..TestRun::default()
    })?;
    Ok(Duration::from_nanos(ran.duration.into()))
}

/// The attributes of BPF_PROG_TEST_RUN.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    padding: u32,
    rest: [u64; 6],
}

/// Runs a program, and returns the attributes as the kernel has filled them in. Their buffers must be of the sizes given, and
/// outlive the call.
fn test_run(mut attributes: TestRun) -> io::Result<TestRun> {
    // SAFETY: the attributes are a repr(C) value that the kernel reads and writes during the call only, its unused rest is
    // zero, and the callers in this file keep its buffers.
    check(unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, &raw mut attributes, size_of::<TestRun>()) as i32
    })?;
    Ok(attributes)
}

/// An array map of one element: a program's memory from one run to the next.
#[derive(Debug)]
pub struct Array(OwnedFd);

impl Array {
    /// Makes one that holds this.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(element: &[u8]) -> io::Result<Self> {
        #[repr(C)]
        #[derive(Default)]
        struct Attributes {
            map_type: u32,
            key_size: u32,
            value_size: u32,
            max_entries: u32,
            rest: [u64; 12],
        }
        let attributes = Attributes {
            map_type: BPF_MAP_TYPE_ARRAY,
            key_size: 4,
            value_size: element.len() as u32,
            max_entries: 1,
            ..Attributes::default()
        };
        let array = Self(bpf(BPF_MAP_CREATE, &attributes)?);
        array.set(element)?;
        Ok(array)
    }

    /// Replaces the element by one of the same length.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set(&self, element: &[u8]) -> io::Result<()> {
        self.element(BPF_MAP_UPDATE_ELEM, element.as_ptr() as u64)
    }

    /// Reads the element, of this length.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn get(&self, element: &mut [u8]) -> io::Result<()> {
        self.element(BPF_MAP_LOOKUP_ELEM, element.as_mut_ptr() as u64)
    }

    /// A command on the element, whose bytes are at an address.
    fn element(&self, command: libc::c_long, value: u64) -> io::Result<()> {
        #[repr(C)]
        #[derive(Default)]
        struct Attributes {
            map_fd: u32,
            padding: u32,
            key: u64,
            value: u64,
            flags: u64,
            rest: [u64; 12],
        }
        let key = 0_u32;
        let map_fd = self.0.as_raw_fd().cast_unsigned();
        let attributes = Attributes { map_fd, key: (&raw const key) as u64, value, ..Attributes::default() };
        // SAFETY: as in `test_run`; the key outlives the call, and so does the element, which the callers borrow.
        check(unsafe { libc::syscall(libc::SYS_bpf, command, &raw const attributes, size_of::<Attributes>()) as i32 })?;
        Ok(())
    }
}

/// A bpf(2) command that makes a descriptor.
pub(crate) fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the attributes are a repr(C) value that is long enough for the command, its unused rest is zero, and what it
    // points to outlives the call. The descriptor that comes back is owned here and nowhere else.
    unsafe {
        let descriptor = libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>());
        let descriptor = i32::try_from(descriptor).unwrap_or(-1);
        Ok(OwnedFd::from_raw_fd(check(descriptor)?))
    }
}

/// A system call's result, or what went wrong.
pub(crate) fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
