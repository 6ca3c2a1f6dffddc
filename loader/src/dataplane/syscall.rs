//! The bpf(2) commands that aya lacks or hides, and membarrier(2). Nothing here knows what a map or a program is for.
//!
//! Structures follow `union bpf_attr` of linux/bpf.h; a kernel that knows more fields takes the rest as zeroes.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;

const MAP_LOOKUP_ELEM: i32 = 1;
const MAP_UPDATE_ELEM: i32 = 2;
const MAP_DELETE_ELEM: i32 = 3;
const MAP_GET_NEXT_KEY: i32 = 4;
const OBJ_PIN: i32 = 6;
const OBJ_GET: i32 = 7;
const OBJ_GET_INFO_BY_FD: i32 = 15;
const MAP_LOOKUP_BATCH: i32 = 24;
const MAP_UPDATE_BATCH: i32 = 26;
const LINK_CREATE: i32 = 28;
const LINK_UPDATE: i32 = 29;
const LINK_DETACH: i32 = 34;

/// BPF_F_BEFORE, BPF_F_AFTER and BPF_F_LINK for `LINK_CREATE`: before or behind the link that is named.
const BEFORE: u32 = 1 << 3;
const AFTER: u32 = 1 << 4;
const LINK: u32 = 1 << 13;

/// BPF_NOEXIST.
const ONLY_IF_ABSENT: u64 = 1;

/// BPF_F_RDONLY for `OBJ_GET`.
const READ_ONLY: u32 = 1 << 3;

const MEMBARRIER_CMD_GLOBAL: i32 = 1;

/// Where a program is attached by a link; numbers of `enum bpf_attach_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum AttachType {
    Connect4 = 10,
    Connect6 = 11,
    Sendmsg4 = 14,
    Sendmsg6 = 15,
    Recvmsg4 = 19,
    Recvmsg6 = 20,
    Getpeername4 = 29,
    Getpeername6 = 30,
    Xdp = 37,
    TcxIngress = 46,
    TcxEgress = 47,
}

/// A map's definition as the kernel has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(super) struct MapInfo {
    pub(super) map_type: u32,
    pub(super) id: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
    pub(super) flags: u32,
}

/// The head of a program's information.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(super) struct ProgramInfo {
    pub(super) program_type: u32,
    pub(super) id: u32,
    tag: u64,
    lengths: [u32; 2],
    instructions: [u64; 2],
    load_time: u64,
    created_by: u32,
    maps: u32,
    map_ids: u64,
    /// Cut off after 15 octets; then zeroes.
    pub(super) name: [u8; 16],
}

/// The head of a link's information. `target` is the interface index for XDP and TCX links (0 once the device is gone)
/// and the low half of the cgroup's id for cgroup links.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(super) struct LinkInfo {
    pub(super) link_type: u32,
    pub(super) id: u32,
    pub(super) program_id: u32,
    padding: u32,
    pub(super) target: u32,
    pub(super) target_high: u32,
}

#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    padding: u32,
    key: u64,
    /// Or the next key.
    value: u64,
    flags: u64,
}

#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    element_flags: u64,
    flags: u64,
}

#[repr(C)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    file_flags: u32,
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
struct LinkCreateAttr {
    program_fd: u32,
    /// Or the interface index.
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    /// The link that this one is placed by.
    relative_fd: u32,
    padding: u32,
    expected_revision: u64,
}

#[repr(C)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_program_fd: u32,
    flags: u32,
    old_program_fd: u32,
}

#[repr(C)]
struct LinkDetachAttr {
    link_fd: u32,
}

/// # Safety
///
/// Every address in `attr` must be valid for what `command` reads or writes through it.
unsafe fn bpf<T>(command: i32, attr: &mut T) -> io::Result<i64> {
    // SAFETY: `attr` is a live repr(C) value of the given size; the caller vouches for the addresses in it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// # Safety
///
/// As [`bpf`], and `command` must be one that returns a file descriptor.
unsafe fn bpf_fd<T>(command: i32, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: passed on to the caller.
    let fd = unsafe { bpf(command, attr) }?;
    let fd = i32::try_from(fd).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    // SAFETY: the kernel has just given this descriptor to us, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

fn address<T: ?Sized>(value: &T) -> u64 {
    std::ptr::from_ref(value).cast::<u8>() as u64
}

fn address_mut<T: ?Sized>(value: &mut T) -> u64 {
    std::ptr::from_mut(value).cast::<u8>() as u64
}

/// One element. `key` and `value` have the sizes of the map's definition. Returns false if the key is not there.
pub(super) fn map_lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr =
        ElementAttr { map_fd: number(map), padding: 0, key: address(key), value: address_mut(value), flags: 0 };
    // SAFETY: `Map` checks both sizes against the kernel's definition when it opens a map.
    found(unsafe { bpf(MAP_LOOKUP_ELEM, &mut attr) })
}

/// Writes one element, whether or not it was there.
pub(super) fn map_update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let mut attr = ElementAttr { map_fd: number(map), padding: 0, key: address(key), value: address(value), flags: 0 };
    // SAFETY: `Map` checks both sizes against the kernel's definition when it opens a map; the kernel only reads.
    unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) }.map(drop)
}

/// Writes one element unless the key is there.
pub(super) fn map_insert(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let (key, value) = (address(key), address(value));
    let mut attr = ElementAttr { map_fd: number(map), padding: 0, key, value, flags: ONLY_IF_ABSENT };
    // SAFETY: `Map` checks both sizes against the kernel's definition when it opens a map; the kernel only reads.
    match unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) } {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        result => result.map(drop),
    }
}

/// Deletes one element. Returns false if it was not there.
pub(super) fn map_delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<bool> {
    let mut attr = ElementAttr { map_fd: number(map), padding: 0, key: address(key), value: 0, flags: 0 };
    // SAFETY: `Map` checks the key's size against the kernel's definition when it opens a map; the kernel only reads.
    found(unsafe { bpf(MAP_DELETE_ELEM, &mut attr) })
}

/// The key after `key`, or the first one. Returns false at the end.
pub(super) fn map_next_key(map: BorrowedFd<'_>, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<bool> {
    let key = key.map_or(0, address);
    let mut attr = ElementAttr { map_fd: number(map), padding: 0, key, value: address_mut(next), flags: 0 };
    // SAFETY: `Map` checks the key's size against the kernel's definition when it opens a map.
    found(unsafe { bpf(MAP_GET_NEXT_KEY, &mut attr) })
}

/// How far a batch lookup has got.
#[derive(Default)]
pub(super) struct Cursor {
    /// The kernel's position: a bucket number for hashes, a key for arrays.
    position: [u64; 8],
    started: bool,
}

impl Cursor {
    /// Behind an element of an array.
    pub(super) fn behind(index: u32) -> Self {
        // A key lies at the beginning, in the machine's order.
        let mut first = [0; 8];
        first[..4].copy_from_slice(&index.to_ne_bytes());
        let mut position = [0; 8];
        position[0] = u64::from_ne_bytes(first);
        Self { position, started: true }
    }
}

/// Reads the next elements into `keys` and `values`, which have room for `count` of them. Returns how many were read and
/// whether that was the end.
pub(super) fn map_lookup_batch(
    map: BorrowedFd<'_>,
    cursor: &mut Cursor,
    keys: &mut [u8],
    values: &mut [u8],
    count: u32,
) -> io::Result<(u32, bool)> {
    let position = address_mut(&mut cursor.position);
    let mut attr = BatchAttr {
        in_batch: if cursor.started { position } else { 0 },
        out_batch: position,
        keys: address_mut(keys),
        values: address_mut(values),
        count,
        map_fd: number(map),
        element_flags: 0,
        flags: 0,
    };
    // SAFETY: `Map` sizes the buffers for `count` elements; no key of any map is longer than the position's buffer.
    let result = unsafe { bpf(MAP_LOOKUP_BATCH, &mut attr) };
    cursor.started = true;
    Ok((attr.count, !found(result)?))
}

/// Writes `count` elements in order, up to the first one that fails. Returns how many were written as well.
pub(super) fn map_update_batch(map: BorrowedFd<'_>, keys: &[u8], values: &[u8], count: u32) -> (u32, io::Result<()>) {
    let mut attr = BatchAttr {
        in_batch: 0,
        out_batch: 0,
        keys: address(keys),
        values: address(values),
        count,
        map_fd: number(map),
        element_flags: 0,
        flags: 0,
    };
    // SAFETY: `Map` gives buffers of `count` keys and values of the map's sizes; the kernel only reads them.
    let result = unsafe { bpf(MAP_UPDATE_BATCH, &mut attr) }.map(drop);
    // An error before the first element leaves the count as it was.
    let written = if result.is_err() && attr.count == count { 0 } else { attr.count };
    (written, result)
}

fn found(result: io::Result<i64>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// Pins a map, program or link.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr { path: address(path.as_bytes_with_nul()), fd: number(object), file_flags: 0 };
    // SAFETY: the path is NUL-terminated and outlives the call.
    unsafe { bpf(OBJ_PIN, &mut attr) }.map(drop)
}

/// Opens what is pinned.
pub(super) fn open_pin(path: &Path, read_only: bool) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let file_flags = if read_only { READ_ONLY } else { 0 };
    let mut attr = ObjectAttr { path: address(path.as_bytes_with_nul()), fd: 0, file_flags };
    // SAFETY: the path is NUL-terminated and outlives the call; the command returns a descriptor.
    unsafe { bpf_fd(OBJ_GET, &mut attr) }
}

/// # Safety
///
/// `T` is `repr(C)`, made of integers only, and a prefix of the kernel's structure for this kind of object.
unsafe fn info<T: Default>(object: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let length = u32::try_from(size_of::<T>()).unwrap_or(u32::MAX);
    let mut attr = InfoAttr { fd: number(object), length, info: address_mut(&mut info) };
    // SAFETY: the kernel writes no more than `length` octets, and any octets are a valid `T`.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// A map's definition.
pub(super) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    // SAFETY: `MapInfo` is the head of `struct bpf_map_info`.
    unsafe { info(map) }
}

/// What a program is.
pub(super) fn program_info(program: BorrowedFd<'_>) -> io::Result<ProgramInfo> {
    // SAFETY: `ProgramInfo` is the head of `struct bpf_prog_info`; the addresses in it are zero, so nothing is written there.
    unsafe { info(program) }
}

/// What a link attaches where.
pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    // SAFETY: `LinkInfo` is the head of `struct bpf_link_info` for XDP, TCX and cgroup links.
    unsafe { info(link) }
}

/// The kernel's number for a map, program or link; each kind has numbers of its own.
pub(super) fn object_id(object: BorrowedFd<'_>) -> io::Result<u32> {
    /// Every kind's information begins like this.
    #[derive(Default)]
    #[repr(C)]
    struct Head {
        kind: u32,
        id: u32,
    }
    // SAFETY: `Head` is the head of `struct bpf_map_info`, `struct bpf_prog_info` and `struct bpf_link_info`.
    let head: Head = unsafe { info(object) }?;
    Ok(head.id)
}

/// Attaches a program to an interface.
pub(super) fn link_interface(
    program: BorrowedFd<'_>,
    index: u32,
    attach_type: AttachType,
    flags: u32,
) -> io::Result<OwnedFd> {
    link_create(number(program), index, attach_type, flags, 0)
}

/// Attaches a program to an interface's TCX hook, right before that of another link there, or right behind it.
pub(super) fn link_beside(
    program: BorrowedFd<'_>,
    index: u32,
    attach_type: AttachType,
    link: BorrowedFd<'_>,
    before: bool,
) -> io::Result<OwnedFd> {
    let place = if before { BEFORE } else { AFTER };
    link_create(number(program), index, attach_type, place | LINK, number(link))
}

/// Attaches a program to a cgroup.
pub(super) fn link_cgroup(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: AttachType,
) -> io::Result<OwnedFd> {
    link_create(number(program), number(cgroup), attach_type, 0, 0)
}

fn link_create(
    program_fd: u32,
    target_fd: u32,
    attach_type: AttachType,
    flags: u32,
    relative_fd: u32,
) -> io::Result<OwnedFd> {
    let attach_type = attach_type as u32;
    let mut attr =
        LinkCreateAttr { program_fd, target_fd, attach_type, flags, relative_fd, padding: 0, expected_revision: 0 };
    // SAFETY: no addresses; the command returns a descriptor.
    unsafe { bpf_fd(LINK_CREATE, &mut attr) }
}

/// Replaces a link's program atomically.
pub(super) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let (link_fd, new_program_fd) = (number(link), number(program));
    let mut attr = LinkUpdateAttr { link_fd, new_program_fd, flags: 0, old_program_fd: 0 };
    // SAFETY: no addresses.
    unsafe { bpf(LINK_UPDATE, &mut attr) }.map(drop)
}

/// Detaches a link's program even while others hold the link open.
pub(super) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no addresses.
    unsafe { bpf(LINK_DETACH, &mut LinkDetachAttr { link_fd: number(link) }) }.map(drop)
}

/// Returns once every program that was running when this was called has ended. Blocks for some 10 ms.
pub fn grace_period() {
    // SAFETY: the command takes no addresses.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        // Not on kernels with nohz_full, nor below some seccomp filters: no program runs for a second.
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}

/// The cookie of this thread's network namespace; `None` on kernels that don't tell (before 5.14).
pub(super) fn netns_cookie() -> io::Result<Option<u64>> {
    const SO_NETNS_COOKIE: i32 = 71;
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: the option's value is a u64, and `length` says so; both outlive the call.
    let result = unsafe {
        let (value, length) = (std::ptr::from_mut(&mut cookie).cast(), std::ptr::from_mut(&mut length));
        libc::getsockopt(socket.as_fd().as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, value, length)
    };
    if result == 0 {
        return Ok(Some(cookie));
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENOPROTOOPT) { Ok(None) } else { Err(error) }
}

/// The clock that the programs read (bpf_ktime_get_ns), in seconds. In a time namespace this process is shown another one.
#[must_use]
pub fn monotonic_seconds() -> u32 {
    /// By how many seconds that one is ahead.
    static AHEAD: OnceLock<i64> = OnceLock::new();
    let ahead = AHEAD.get_or_init(|| {
        let offsets = std::fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default();
        let offset = |line: &str| line.strip_prefix("monotonic")?.split_whitespace().next()?.parse().ok();
        // The file isn't there before 5.6, nor without CONFIG_TIME_NS.
        offsets.lines().find_map(offset).unwrap_or(0)
    });
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec that clock_gettime may write; CLOCK_MONOTONIC always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    u32::try_from(time.tv_sec - ahead).unwrap_or(u32::MAX)
}
