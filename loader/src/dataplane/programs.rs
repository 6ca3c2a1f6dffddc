//! The BPF programs: loaded on the pinned maps, or taken over from an earlier start that loaded the same ones.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use aya::programs::{CgroupSockAddr, ProgramError, SchedClassifier, Xdp};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfError, EbpfLoader};
use sheave_common::features;
use tracing::debug;

use super::definitions::Definition;
use super::error::DataplaneError;
use super::pins::Pins;
use super::shelf::Shelf;

/// tc programs.
pub(super) const CLASSIFIERS: &[&str] =
    &["pod_ingress", "pod_egress", "uplink_ingress", "uplink_egress", "uplink_ingress_l3", "uplink_egress_l3"];
/// The XDP program.
pub(super) const XDP: &str = "uplink_xdp";
/// Connect-time programs.
pub(super) const SOCKET: &[&str] = &[
    "sock_connect4",
    "sock_sendmsg4",
    "sock_recvmsg4",
    "sock_getpeername4",
    "sock_connect6",
    "sock_sendmsg6",
    "sock_recvmsg6",
    "sock_getpeername6",
];

/// What this kernel has that an older supported one lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// BPF_FIB_LOOKUP_SRC (6.7).
    pub fib_lookup_source: bool,
    /// bpf_set_retval (5.18).
    pub set_retval: bool,
    /// bpf_ktime_get_coarse_ns (5.11).
    pub coarse_clock: bool,
    /// The MTU in what BPF_FIB_LOOKUP answers (5.12).
    pub fib_mtu: bool,
    /// XDP frames in several buffers (5.18).
    pub xdp_frags: bool,
    /// TCX links (6.6).
    pub tcx: bool,
}

impl Features {
    /// By the running kernel's version.
    #[must_use]
    pub fn detect() -> Self {
        Self {
            fib_lookup_source: at_least(6, 7),
            set_retval: at_least(5, 18),
            coarse_clock: at_least(5, 11),
            fib_mtu: at_least(5, 12),
            xdp_frags: at_least(5, 18),
            tcx: at_least(6, 6),
        }
    }

    /// As bits of the programs' read-only global `FEATURES`.
    #[must_use]
    pub fn bits(self) -> u32 {
        let bit = |set: bool, bit: u32| if set { bit } else { 0 };
        bit(self.fib_lookup_source, features::FIB_SOURCE)
            | bit(self.set_retval, features::SET_RETVAL)
            | bit(self.coarse_clock, features::COARSE_CLOCK)
            | bit(self.fib_mtu, features::FIB_MTU)
            | bit(self.xdp_frags, features::XDP_FRAGS)
    }
}

pub(super) fn at_least(major: u8, minor: u8) -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(major, minor, 0))
}

/// The loaded programs.
#[derive(Debug)]
pub(super) struct Programs {
    shelf: Shelf,
    fds: BTreeMap<&'static str, OwnedFd>,
}

impl Programs {
    /// Takes over the pinned programs if they are what this build would load on these maps, since the kernel takes a second
    /// or two to verify them. Otherwise loads them all, and pins them in place of those that are there. Maps that are
    /// pinned are used as they are, the others are made and pinned. `constants` is the programs' global `FEATURES`.
    pub(super) fn open(pins: &Pins, definitions: &[Definition], constants: u32) -> Result<Self, DataplaneError> {
        if !at_least(5, 10) {
            let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
            return Err(DataplaneError::KernelTooOld { release: release.trim().to_owned() });
        }
        raise_locked_memory();
        // What programs log comes to the process that has loaded them.
        if !cfg!(feature = "packet-trace")
            && let Some(maps) = pins.map_ids(definitions)?
        {
            let shelf = Shelf::new(pins, &maps, constants);
            if let Some(fds) = shelf.take() {
                debug!(shelf = %shelf, "took the loaded programs over");
                // Those that a start that was killed had not removed yet.
                shelf.remove_others()?;
                return Ok(Self { shelf, fds });
            }
        }
        let mut ebpf = load_all(pins, definitions, constants)?;
        let maps = pins.map_ids(definitions)?.unwrap_or_default();
        let shelf = Shelf::new(pins, &maps, constants);
        let mut fds = BTreeMap::new();
        for name in names() {
            let program = ebpf.program_mut(name).ok_or(DataplaneError::NoProgram { program: name })?;
            let fd = program.fd().map_err(|_| DataplaneError::NoProgram { program: name })?.as_fd();
            fds.insert(name, fd.try_clone_to_owned().map_err(DataplaneError::file("keep", name))?);
        }
        shelf.fill(&fds)?;
        shelf.remove_others()?;
        debug!(shelf = %shelf, "loaded the programs");
        #[cfg(feature = "packet-trace")]
        super::trace::follow(&mut ebpf);
        Ok(Self { shelf, fds })
    }

    /// All of them by name.
    pub(super) fn into_fds(self) -> BTreeMap<&'static str, OwnedFd> {
        self.fds
    }

    /// A loaded program.
    pub(super) fn fd(&self, name: &'static str) -> Result<BorrowedFd<'_>, DataplaneError> {
        self.fds.get(name).map(AsFd::as_fd).ok_or(DataplaneError::NoProgram { program: name })
    }

    /// All of them, with where they are pinned.
    pub(super) fn pins(&self) -> impl Iterator<Item = (PathBuf, BorrowedFd<'_>)> {
        self.fds.iter().map(|(name, program)| (self.shelf.pin(name), program.as_fd()))
    }

    /// A tc program for aya's netlink.
    pub(super) fn classifier(&self, name: &'static str) -> Result<SchedClassifier, DataplaneError> {
        SchedClassifier::from_pin(self.shelf.pin(name))
            .map_err(|source| DataplaneError::Program { program: name, source: Box::new(source) })
    }
}

/// Every program.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    CLASSIFIERS.iter().copied().chain([XDP]).chain(SOCKET.iter().copied())
}

fn load_all(pins: &Pins, definitions: &[Definition], constants: u32) -> Result<Ebpf, DataplaneError> {
    let mut loader = EbpfLoader::new();
    for definition in definitions {
        loader.map_max_entries(definition.name, definition.max_entries);
        loader.map_pin_path(definition.name, Cow::Owned(pins.map(definition)));
    }
    loader.override_global("FEATURES", &constants, true);
    let mut ebpf = loader.load(&object(constants)).map_err(load_error)?;
    for name in CLASSIFIERS {
        load::<SchedClassifier>(&mut ebpf, name, SchedClassifier::load)?;
    }
    load::<Xdp>(&mut ebpf, XDP, Xdp::load)?;
    for name in SOCKET {
        load::<CgroupSockAddr>(&mut ebpf, name, CgroupSockAddr::load)?;
    }
    Ok(ebpf)
}

/// The object of the programs for these constants. That the XDP program takes frames in several buffers is said by its
/// section's name, and refused by a kernel that has none.
#[must_use]
pub fn object(constants: u32) -> Cow<'static, [u8]> {
    const FRAGS: &[u8] = b"xdp.frags\0";
    const PLAIN: &[u8] = b"xdp\0";
    let object = crate::EBPF_OBJECT;
    if constants & features::XDP_FRAGS != 0 {
        return object.into();
    }
    let mut object = object.to_vec();
    // In the names of the sections, and in the debug information, which names them too.
    while let Some(at) = object.windows(FRAGS.len()).position(|window| window == FRAGS) {
        object[at..at + PLAIN.len()].copy_from_slice(PLAIN);
    }
    object.into()
}

fn load<'a, P: 'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
    load: impl FnOnce(&mut P) -> Result<(), ProgramError>,
) -> Result<(), DataplaneError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program>,
{
    let program = ebpf.program_mut(name).and_then(|program| <&mut P>::try_from(program).ok());
    let program = program.ok_or(DataplaneError::NoProgram { program: name })?;
    load(program).map_err(|source| match error_number(&source) {
        Some(libc::EPERM) => DataplaneError::NotPermitted { action: format!("load program {name}") },
        Some(libc::ENOMEM) => DataplaneError::NoMemory(Box::new(source.into())),
        _ => DataplaneError::Program { program: name, source: Box::new(source) },
    })
}

fn load_error(error: EbpfError) -> DataplaneError {
    match error_number(&error) {
        Some(libc::EPERM) => DataplaneError::NotPermitted { action: "load the BPF object".to_owned() },
        Some(libc::ENOMEM) => DataplaneError::NoMemory(Box::new(error)),
        _ => DataplaneError::Load(Box::new(error)),
    }
}

/// The kernel's error number that an error comes from.
fn error_number(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut cause = Some(error);
    while let Some(inner) = cause {
        if let Some(number) = inner.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(number);
        }
        cause = inner.source();
    }
    None
}

/// Kernels before 5.11 account BPF memory to the locked-memory limit.
pub(super) fn raise_locked_memory() {
    if at_least(5, 11) {
        return;
    }
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the limit outlives the call.
    if unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) } != 0 {
        let error = io::Error::last_os_error();
        tracing::warn!(%error, "cannot raise the limit on locked memory; loading may fail");
    }
}
