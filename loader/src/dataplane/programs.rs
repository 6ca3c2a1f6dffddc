//! The BPF object: loaded once per start, on the pinned maps.

use std::borrow::Cow;
use std::error::Error;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use aya::programs::{CgroupSockAddr, ProgramError, SchedClassifier, Xdp};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfError, EbpfLoader};
use sheave_common::features;

use super::definitions::Definition;
use super::error::DataplaneError;
use super::pins::Pins;

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
            tcx: at_least(6, 6),
        }
    }

    /// The programs' read-only global `FEATURES`.
    #[must_use]
    pub fn bits(self) -> u32 {
        let bit = |set: bool, bit: u32| if set { bit } else { 0 };
        bit(self.fib_lookup_source, features::FIB_SOURCE)
            | bit(self.set_retval, features::SET_RETVAL)
            | bit(self.coarse_clock, features::COARSE_CLOCK)
            | bit(self.fib_mtu, features::FIB_MTU)
    }
}

fn at_least(major: u8, minor: u8) -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(major, minor, 0))
}

/// The loaded programs.
pub(super) struct Programs {
    ebpf: Ebpf,
}

impl Programs {
    /// Loads every program. Maps that are pinned are used as they are, the others are made and pinned.
    pub(super) fn load(pins: &Pins, definitions: &[Definition], features: Features) -> Result<Self, DataplaneError> {
        if !at_least(5, 10) {
            let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
            return Err(DataplaneError::KernelTooOld { release: release.trim().to_owned() });
        }
        raise_locked_memory();
        let mut loader = EbpfLoader::new();
        for definition in definitions {
            loader.map_max_entries(definition.name, definition.max_entries);
            loader.map_pin_path(definition.name, Cow::Owned(pins.directory().join(definition.name)));
        }
        let bits = features.bits();
        loader.override_global("FEATURES", &bits, true);
        let mut ebpf = loader.load(crate::EBPF_OBJECT).map_err(load_error)?;
        for name in CLASSIFIERS {
            load::<SchedClassifier>(&mut ebpf, name, SchedClassifier::load)?;
        }
        load::<Xdp>(&mut ebpf, XDP, Xdp::load)?;
        for name in SOCKET {
            load::<CgroupSockAddr>(&mut ebpf, name, CgroupSockAddr::load)?;
        }
        #[cfg(feature = "packet-trace")]
        super::trace::follow(&mut ebpf);
        Ok(Self { ebpf })
    }

    /// A loaded program.
    pub(super) fn fd(&self, name: &'static str) -> Result<BorrowedFd<'_>, DataplaneError> {
        let program = self.ebpf.program(name).ok_or(DataplaneError::NoProgram { program: name })?;
        let fd = program.fd().map_err(|_| DataplaneError::NoProgram { program: name })?;
        Ok(fd.as_fd())
    }

    /// A tc program for aya's netlink.
    pub(super) fn classifier(&mut self, name: &'static str) -> Result<&mut SchedClassifier, DataplaneError> {
        let program = self.ebpf.program_mut(name).and_then(|program| program.try_into().ok());
        program.ok_or(DataplaneError::NoProgram { program: name })
    }
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
    load(program).map_err(|source| DataplaneError::Program { program: name, source: Box::new(source) })
}

fn load_error(error: EbpfError) -> DataplaneError {
    let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
    while let Some(inner) = cause {
        let os_error = inner.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        if os_error == Some(libc::EPERM) {
            return DataplaneError::NotPermitted { action: "load the BPF object".to_owned() };
        }
        cause = inner.source();
    }
    DataplaneError::Load(Box::new(error))
}

/// Kernels before 5.11 account BPF memory to the locked-memory limit.
fn raise_locked_memory() {
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
